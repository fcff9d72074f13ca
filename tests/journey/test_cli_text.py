"""A text model from the command line: train, resume, evaluate, sample, fill in, compare; and what is refused."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest
from commands import RECIPES, sets
from safetensors.torch import load_file

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.experiments.experiment import Experiment

TOPICS = str(RECIPES / "text" / "masked_topics.yaml")
TEXT8 = str(RECIPES / "text" / "masked_text8.yaml")
TINY = sets(
    device="cpu",
    model__config__hidden_size=32,
    model__config__num_layers=3,
    model__config__mlp_size=32,
    model__config__sequence_length=16,
    data__length=16,
    train__steps=4,
    train__batch_size=8,
    train__warmup_steps=0,
    evaluate__limit=20,
    evaluate__steps=8,
    evaluate__samples=3,
)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained run."""
    out = tmp_path_factory.mktemp("text")
    assert main(["train", TOPICS, "--out", str(out), "--quiet", *TINY]) == 0
    return out


def sample(run: Path, out: Path, *arguments: str) -> list[str]:
    command = ["sample", TOPICS, "--model", str(run / "model"), "--out", str(out), "--quiet", *TINY, *arguments]
    assert main(command) == 0
    return (out / "samples.txt").read_text().splitlines()


def test_train_evaluate_and_sample(text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = tmp_path / "e.json"
    arguments = ["--model", str(text_run / "model"), "--json", str(json_file), *TINY]
    assert main(["evaluate", TOPICS, *arguments]) == 0
    (row,) = json.loads(json_file.read_text())["rows"]
    assert row == json.loads((text_run / "result.json").read_text())["rows"][0]
    assert row["sequences"] == 20
    assert len(row["block_bits"]) == 3
    assert row["bits"] == pytest.approx(sum(row["block_bits"]) + row["reconstruction"])
    assert f"{row['bits']:.4g}" in capsys.readouterr().out

    lines = sample(text_run, tmp_path / "s")
    assert "\n".join(lines) in capsys.readouterr().out
    assert [len(line) for line in lines] == [16] * 3
    assert set("".join(lines)) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert sample(text_run, tmp_path / "s", "--seed", "1", "--count", "2") == lines[1:]  # text i has seed `seed` + i
    assert sample(text_run, tmp_path / "s", "--temperature", "0", "--steps", "3", "--grid", "cosine") != lines


def test_infill(text_run: Path, tmp_path: Path) -> None:
    lines = sample(text_run, tmp_path, "--infill", "the _____ of", "--count", "5")
    assert len(lines) == 5
    assert all(line.startswith("the ") and line.endswith(" of") and len(line) == 12 for line in lines)
    assert not any("_" in line for line in lines)
    assert len(set(lines)) > 1


def test_a_stopped_run_resumes_bit_for_bit(text_run: Path, tmp_path: Path) -> None:
    short = [*TINY, *sets(train__checkpoint_every=5)]
    assert main(["train", TOPICS, "--out", str(tmp_path), "--quiet", *short]) == 0
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()  # what a run that was stopped on the way leaves
    assert main(["train", TOPICS, "--out", str(tmp_path), "--quiet", *short]) == 0
    for b in range(3):
        name = f"model/block-{b:02d}.safetensors"
        ours, theirs = load_file(tmp_path / name), load_file(text_run / name)
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in ours)


def test_compare_with_a_trunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, *sets(trunk="{steps: 3}", train__steps=2)]
    assert main(["compare", TOPICS, "--out", str(tmp_path), "--quiet", *arguments]) == 0
    out = capsys.readouterr().out
    assert "bits per character" in out
    rows = {row["key"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert list(rows) == [
        "end-to-end-3",
        "end-to-end-1",
        "end-to-end-1-x3",
        "diffusionblocks",
        "diffusionblocks-branched",
    ]
    assert [row["iterations"] for row in rows.values()] == [3, 3, 9, 9, 9]
    assert [row["blocks"] for row in rows.values()] == [1, 1, 1, 3, 3]
    assert [len(row["block_bits"]) for row in rows.values()] == [1, 1, 1, 3, 3]
    assert all(0 < row["bits_per_character"] < 6 for row in rows.values())
    assert rows["diffusionblocks"]["peak_memory_bytes"] < rows["end-to-end-3"]["peak_memory_bytes"]
    for key in rows:
        assert len((tmp_path / key / "samples" / "samples.txt").read_text().splitlines()) == 3


def test_inspect_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", TOPICS, "--figure", str(tmp_path / "f.png"), *TINY]) == 0
    out = capsys.readouterr().out
    assert "0.6667 - 1" in out
    assert out.splitlines()[-3].startswith("t        0")
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert main(["plan", TOPICS, "--budget", "40MiB", *TINY]) == 0
    assert "activations" in capsys.readouterr().out


def test_planned_bytes_are_measured_bytes() -> None:
    from diffusionblocks.evaluation.memory import step_memory
    from diffusionblocks.experiments.recipe import load_recipe
    from diffusionblocks.planning import predict

    recipe = load_recipe(TOPICS, [*TINY[1::2], "train.batch_size=32"])
    ledger = predict(recipe)
    measured = step_memory(Experiment(recipe).trainer(progress=False))
    assert ledger.parameters + ledger.buffers == sum(unit.parameters for unit in measured)
    assert ledger.optimizer == sum(unit.optimizer for unit in measured)
    transient = max(unit.transient for unit in measured)
    assert ledger.gradients + ledger.activations == pytest.approx(transient, rel=0.02)


def test_a_text_file_of_ones_own(tmp_path: Path) -> None:
    source = tmp_path / "own.txt"
    source.write_text("It was the best of times, it was the worst of times; 1859. " * 200)
    tiny = [*TINY, *sets(data__source=source)]
    assert main(["train", TEXT8, "--out", str(tmp_path / "run"), "--quiet", *tiny, *OWN]) == 0
    assert db.load(tmp_path / "run" / "model").partition.num_blocks == 3


OWN = sets(
    train__epochs="null",
    train__compile="false",
    train__cuda_graph="false",
    model__config__embedding_size=16,
    model__config__num_attention_heads=2,
)


def test_the_real_corpus(tmp_path: Path) -> None:
    root = os.environ.get("DIFFUSIONBLOCKS_DATA")
    if not root or not (Path(root) / "text8like").is_dir():
        pytest.skip("DIFFUSIONBLOCKS_DATA names no folder with text8like")
    # The whole train split takes half a minute to read; the validation split shows the same.
    tiny = [*TINY, *OWN, *sets(data__train_split="valid", data__cache=tmp_path / "cache")]
    assert main(["train", TEXT8, "--out", str(tmp_path / "run"), "--quiet", *tiny]) == 0


REFUSED: list[tuple[list[str], str]] = [
    (["sample", "--labels", "3"], "--labels is not for MaskedTransformer, which generates masked text"),
    (["sample", "--solver", "heun"], "--solver is not for MaskedTransformer"),
    (["sample", "--infill", "the End_"], "must be of letters a to z, spaces and gaps (_), has ['E']"),
    (["sample", "--infill", "no gap"], "must have a gap (_)"),
    (["sample", "--infill", "_" * 17], "at most 16 characters, has 17"),
    (["sample", "--count", "0"], "count must be >= 1, got 0"),
    (["sample", "--grid", "karras"], "unknown level grid 'karras' for masking"),
    (["evaluate", "--by-level"], "--by-level is for classifiers; MaskedTransformer generates masked text"),
    (["evaluate", *sets(data__length=8)], "takes texts of 16, the data has 8"),
    (["evaluate", *sets(model__config__sequence_length=8, data__length=8)], "holds a model of texts (16,)"),
    (["evaluate", *sets(evaluate__limit=1)], "evaluate.limit"),
    (["evaluate", *sets(evaluate__kind="samples")], "evaluate.kind must be bits for MaskedTransformer, got samples"),
    (
        ["train", *sets(model__config__vocab_size=30, blocks__noise="null")],
        "vocab_size = 30, the data has 27 different",
    ),
    (["train", *sets(data="{kind: text, length: 16}")], "data.source is not set"),
    (["train", *sets(data="{kind: text, length: 16, source: nowhere}")], "nowhere is missing"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_refused(
    arguments: list[str], message: str, text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    place = ["--out", str(tmp_path / "new")] if command == "train" else ["--model", str(text_run / "model")]
    assert main([command, TOPICS, *place, *TINY, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_text_options_are_not_for_images(capsys: pytest.CaptureFixture[str]) -> None:
    digits = str(RECIPES / "dit" / "digits.yaml")
    assert main(["sample", digits, "--infill", "the _"]) == 2
    assert "--infill is not for DiT, which generates images" in capsys.readouterr().err


# ---- the recipe learns -------------------------------------------------------------------------------------------


def test_a_small_model_learns_words(tmp_path: Path) -> None:
    """Of a text whose words are drawn at random: well below the bits of its letter frequencies."""
    draw = random.Random(0)
    words = ["block", "noise", "level", "layer", "token", "train", "sample", "denoise", "model", "weight"]
    text = " ".join(draw.choice(words) for _ in range(40_000))
    (tmp_path / "words.txt").write_text(text)
    data = sets(data=f"{{kind: text, source: {tmp_path / 'words.txt'}, length: 32}}", model__config__sequence_length=32)
    small = sets(device="cpu", model__config__num_layers=3, train__batch_size=16, train__lr=5e-3)
    brief = sets(train__steps=200, train__warmup_steps=10, evaluate__times=8, evaluate__samples=2, evaluate__steps=4)
    assert main(["train", TOPICS, "--out", str(tmp_path / "run"), "--quiet", *data, *small, *brief]) == 0
    (row,) = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    shares = [text.count(letter) / len(text) for letter in set(text)]
    unigram = -sum(share * math.log2(share) for share in shares)
    assert 3.5 < unigram < math.log2(27)
    assert row["bits"] + 5 * row["standard_error"] < unigram
