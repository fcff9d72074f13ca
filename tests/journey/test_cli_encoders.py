"""Masked language models of transformers from the command line: train, sample, fill in, compare, plan, pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import RECIPES, sets
from helpers import fresh_encoder

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.evaluation.memory import step_memory
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.planning import predict

TOPICS = str(RECIPES / "text" / "masked_topics.yaml")
SIZES = {
    "vocab_size": 30,  # more than the 27 characters and the mask: no text has the others
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 28,
}


def model(name: str, **more: object) -> str:
    return json.dumps({"type": name, "config": SIZES | more})


TINY = {
    "device": "cpu",
    "blocks__noise": json.dumps({"kind": "masking", "vocab_size": 30, "mask_token_id": 27}),
    "data__length": 16,
    "train__steps": 4,
    "train__batch_size": 8,
    "train__warmup_steps": 0,
    "evaluate__limit": 20,
    "evaluate__steps": 8,
    "evaluate__samples": 3,
}


@pytest.mark.parametrize(
    ("name", "more"),
    [("BertForMaskedLM", {}), ("ModernBertForMaskedLM", {"local_attention": 6, "cls_token_id": 0, "sep_token_id": 0})],
)
def test_train_evaluate_sample_and_fill_in(name: str, more: dict[str, int], tmp_path: Path) -> None:
    settings = sets(**TINY, model=model(name, **more, bos_token_id=None, eos_token_id=None))
    assert main(["train", TOPICS, "--out", str(tmp_path), "--quiet", *settings]) == 0
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert 0 < row["bits"] < 8
    assert row["length"] == 16
    for arguments, length in (([], 16), (["--infill", "the _____ of"], 12)):
        command = ["sample", TOPICS, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "s"), "--quiet"]
        assert main([*command, *settings, *arguments]) == 0
        lines = (tmp_path / "s" / "samples.txt").read_text().splitlines()
        assert [len(line) for line in lines] == [length] * 3
        assert set("".join(lines)) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert all(line.startswith("the ") and line.endswith(" of") for line in lines)
    assert db.load(tmp_path / "model").model_class == name
    assert main(["plan", TOPICS, "--budget", "40MiB", *settings]) == 0


def test_compare_with_a_trunk(tmp_path: Path) -> None:
    settings = sets(**TINY | {"train__steps": 2, "trunk": "{steps: 3}", "model": model("BertForMaskedLM")})
    assert main(["compare", TOPICS, "--out", str(tmp_path), "--quiet", *settings]) == 0
    rows = {row["key"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert list(rows)[-2:] == ["diffusionblocks", "diffusionblocks-branched"]
    assert all(0 < row["bits_per_character"] < 8 for row in rows.values())
    assert rows["diffusionblocks"]["peak_memory_bytes"] < rows["end-to-end-3"]["peak_memory_bytes"]


def test_planned_bytes_are_measured_bytes() -> None:
    recipe = load_recipe(TOPICS, sets(**TINY | {"train__batch_size": 32, "model": model("BertForMaskedLM")})[1::2])
    ledger = predict(recipe)
    measured = step_memory(Experiment(recipe).trainer(progress=False))
    assert ledger.parameters + ledger.buffers == sum(unit.parameters for unit in measured)
    assert ledger.optimizer == sum(unit.optimizer for unit in measured)
    transient = max(unit.transient for unit in measured)
    assert ledger.gradients + ledger.activations == pytest.approx(transient, rel=0.02)


def test_a_pretrained_folder(tmp_path: Path) -> None:
    fresh_encoder("roberta", vocab_size=30, pad_token_id=28, max_position_embeddings=60).save_pretrained(tmp_path / "m")  # type: ignore[operator]
    pretrained = json.dumps({"type": "RobertaForMaskedLM", "pretrained": str(tmp_path / "m")})
    settings = sets(**TINY, model=pretrained)
    assert main(["train", TOPICS, "--out", str(tmp_path / "run"), "--quiet", *settings]) == 0
    assert db.load(tmp_path / "run" / "model").target.length == 31


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__length": 25}, "the model takes texts of 24, the data has 25"),
        (
            {"trunk": "{steps: 3}", "model": model("ModernBertForMaskedLM")},
            "the layers of a ModernBertForMaskedLM differ with their place",
        ),
        ({"blocks__noise__mask_token_id": 3}, "blocks.noise.mask_token_id = 3 is one of the data's 27 characters"),
        ({"blocks__noise__mask_token_id": "null"}, "BertForMaskedLM does not say which of its 30 tokens is the mask"),
    ],
)
def test_refused_before_work(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = sets(**{"model": model("BertForMaskedLM")} | TINY | changes)
    assert main(["train", TOPICS, "--out", str(tmp_path / "run"), "--quiet", *settings]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
