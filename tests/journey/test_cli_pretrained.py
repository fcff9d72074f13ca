"""Pretrained folders from the command line: other labels, padded vocabularies, and shapes that are the folder's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import VIT, sets
from transformers import Qwen2Config, Qwen2ForCausalLM, ViTConfig, ViTForImageClassification

from diffusionblocks.cli import main
from diffusionblocks.core.loading import load
from diffusionblocks.data.token_text import train_tokenizer
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe

LABELS, LAYERS = 7, 4


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 4 layers and 7 labels for the digits' images."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=LABELS, **sizes)
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a Qwen2 whose vocabulary, 320, is padded beyond its tokenizer's 300."""
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "corpus").mkdir()
    text = "".join(f"line {i}: the quick brown fox jumps\n" for i in range(400))
    for split in ("train", "test"):
        (folder / "corpus" / f"{split}.txt").write_text(text)
    assert train_tokenizer([folder / "corpus" / "train.txt"], 300, folder / "tokenizer.json").get_vocab_size() == 300
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=320, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    data = {
        "kind": "tokens",
        "source": str(folder / "corpus"),
        "tokenizer": str(folder / "tokenizer.json"),
        "length": 32,
    }
    recipe = {
        "name": "padded",
        "device": "cpu",
        "model": {"type": "Qwen2ForCausalLM", "pretrained": str(folder / "model")},
        "blocks": {"num_blocks": 2},
        "data": {**data, "cache": str(folder / "cache")},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"kind": "language", "samples": 4, "prompt_length": 8, "new_tokens": 8, "limit": 8, "levels": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def of_digits(vit: Path, **changes: object) -> list[str]:
    """The digits' recipe on the pretrained ViT, whose shape it does not give."""
    return sets(
        device="cpu",
        model=json.dumps({"type": "ViTForImageClassification", "pretrained": str(vit)}),
        blocks__num_blocks=2,
        train__batch_size=16,
        train__warmup_steps=0,
        fit="null",
        trunk="null",
        train__epochs="null",
        train__steps=2,
        evaluate__steps="[1]",
        evaluate__seeds="[1]",
        **changes,
    )


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def advice_in(message: str) -> list[str]:
    """The `--set` arguments that a message gives."""
    return [part for found in re.findall(r"--set ([\w.]+=[^\s;,:]+)", message) for part in ("--set", found)]


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_pretrained_classifier_learns_other_labels_when_told_to(
    method: str, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["train", VIT, "--out", str(tmp_path / "run"), "--quiet", *of_digits(vit, method=method)]
    assert main(arguments) == 2
    message = last_line(capsys)
    assert "num_labels = 7, the data has 10 classes" in message
    assert advice_in(message) == sets(model__config__num_labels=10)
    assert main([*arguments, *advice_in(message)]) == 0
    assert sum("drawn afresh" in record.message for record in caplog.records) == 1
    evaluate = ["evaluate", VIT, "--model", str(tmp_path / "run" / "model"), *of_digits(vit, method=method)]
    assert main([*evaluate, *advice_in(message)]) == 0


def test_a_new_classifier_is_drawn_from_the_seed_and_all_else_is_the_folders(vit: Path) -> None:
    def recipe(**changes: object) -> Any:
        return load_recipe(VIT, of_digits(vit, model__config__num_labels=10, **changes)[1::2])

    blocks, again, other = (
        Experiment(recipe()).build(),
        Experiment(recipe()).build(),
        Experiment(recipe(train__seed=5)).build(),
    )
    whole, stored = (
        Experiment(recipe()).original.build().state_dict(),
        ViTForImageClassification.from_pretrained(vit).state_dict(),
    )
    for index in range(2):
        states = [dict(model.block(index).network.state_dict()) for model in (blocks, again, other)]
        assert states[0]["classifier.weight"].shape == (10, 16)
        assert torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
        assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])
        assert torch.equal(states[0]["classifier.weight"], whole["classifier.weight"]), "the control has the same"
        assert all(torch.equal(t, stored[n]) for n, t in states[0].items() if not n.startswith("classifier"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in stored.items() if not name.startswith("classifier"))


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_padded_vocabulary_trains_evaluates_and_samples(method: str, qwen: Path, tmp_path: Path) -> None:
    common, run = [str(qwen / "recipe.yaml")], tmp_path / "run"
    more = ["--quiet", *sets(method=method)]
    assert main(["train", *common, "--out", str(run), *more]) == 0
    assert main(["evaluate", *common, "--model", str(run / "model"), *sets(method=method)]) == 0
    # At this temperature all ids are as likely; one beyond the tokenizer's could not be decoded.
    hot = ["--temperature", "1000", "--new-tokens", "40", "--prompt", "line 3", "--count", "8"]
    assert main(["sample", *common, "--model", str(run / "model"), "--out", str(tmp_path / "s"), *hot, *more]) == 0


def test_only_ids_of_the_tokenizer_are_generated(qwen: Path) -> None:
    model = Experiment(load_recipe(qwen / "recipe.yaml")).build().eval()
    common: dict[str, Any] = {"seeds": range(20), "temperature": 1000.0}
    tokens = [row[1:] for row in model.continue_texts([[1]] * 20, 30, num_tokens=300, **common).tokens]  # type: ignore[operator]
    assert int(torch.cat(tokens).max()) < 300
    control = [row[1:] for row in model.continue_texts([[1]] * 20, 30, **common).tokens]  # type: ignore[operator]
    assert int(torch.cat(control).max()) >= 300
    with pytest.raises(ValueError, match=r"num_tokens must be from 1 to the vocabulary's 320, got 321"):
        model.continue_texts([[1]], 2, num_tokens=321)  # type: ignore[operator]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer([qwen / "corpus" / "train.txt"], 350, tmp_path / "other.json")
    size = json.loads((tmp_path / "other.json").read_text())["model"]["vocab"]
    assert len(size) > 320
    changes = sets(data__tokenizer=tmp_path / "other.json", data__cache=tmp_path / "cache")
    assert main(["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet", *changes]) == 2
    message = last_line(capsys)
    assert "vocab_size = 320" in message
    assert "give the tokenizer" in message


@pytest.mark.parametrize(
    ("field", "value", "own"),
    [("vocab_size", 300, 320), ("num_hidden_layers", 4, 2), ("hidden_size", 32, 16), ("num_key_value_heads", 2, 1)],
)
def test_a_recipe_does_not_contradict_the_folder(
    field: str, value: int, own: int, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*arguments, *sets(**{f"model__config__{field}": value})]) == 2
    message = last_line(capsys)
    assert f"model.config.{field} = {value}" in message
    assert f"has {own}" in message
    assert main(["inspect", arguments[1], *sets(**{f"model__config__{field}": own})]) == 0


def test_depth_comes_from_the_folder(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = sets(model__config__num_labels=10)
    rows = ["--rows", f"end-to-end-{LAYERS}", "diffusionblocks"]
    assert main(["compare", VIT, "--out", str(tmp_path / "c"), "--quiet", *of_digits(vit), *labels, *rows]) == 0
    assert load(tmp_path / "c" / "diffusionblocks" / "model").partition.num_layers == LAYERS
    assert f"no rows of fewer layers: {vit} has weights of all {LAYERS} layers" in capsys.readouterr().out
    short = ["--rows", f"end-to-end-{LAYERS // 2}"]
    assert main(["compare", VIT, "--out", str(tmp_path / "c"), "--quiet", *of_digits(vit), *labels, *short]) == 2
    assert f"unknown rows ['end-to-end-{LAYERS // 2}']" in last_line(capsys)
    with_trunk = [*of_digits(vit), *labels, *sets(trunk="{steps: 2}")]
    assert main(["train", VIT, "--out", str(tmp_path / "t"), "--quiet", *with_trunk]) == 2
    assert f"has {LAYERS}: leave trunk and fit out" in last_line(capsys)


@pytest.mark.parametrize("name", ["nowhere", "{folder}/corpus"])
def test_a_folder_without_a_model_is_refused(
    name: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = name.format(folder=qwen)
    changes = sets(model__pretrained=place)
    assert main(["train", str(qwen / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet", *changes]) == 2
    assert f"model.pretrained = {place}: no model is there" in last_line(capsys)
