"""What could fail only after training is refused before it: test data, lengths, places to write to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import RECIPES, VIT, sets
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from diffusionblocks.cli import main

LLAMA = str(RECIPES / "text" / "autoregressive_topics.yaml")
MASKED = str(RECIPES / "text" / "masked_topics.yaml")
TINY = sets(
    device="cpu",
    train__steps=2,
    train__batch_size=4,
    train__warmup_steps=0,
    fit="null",
    model__config__hidden_size=16,
    model__config__intermediate_size=16,
    model__config__num_attention_heads=2,
    model__config__num_key_value_heads=2,
    model__config__max_position_embeddings=64,
    data__length=64,
    evaluate__samples=2,
    evaluate__limit=4,
    evaluate__levels=2,
)


def refused(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with; nothing was trained."""
    assert main([*arguments, "--out", str(out), "--quiet"]) == 2
    assert not (out / "log.jsonl").exists()
    assert not (out / "model").exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith("error: ") for line in lines].index(True) == len(lines) - 1, (
        lines
    )  # libraries may speak first
    return lines[-1]


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_texts_that_outgrow_the_model_and_the_advice(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", LLAMA, *TINY, *sets(method=method, evaluate__prompt_length=40, evaluate__new_tokens=40)]
    message = refused(arguments, tmp_path / "run", capsys)
    assert "40 tokens and evaluate.new_tokens = 40 are 80" in message
    assert "64 (max_position_embeddings)" in message
    found = re.search(r"set (evaluate\.new_tokens) to at most (\d+)", message)
    assert found is not None
    assert main([*arguments, "--set", f"{found[1]}={found[2]}", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    prompt = ["sample", LLAMA, *TINY, *sets(method=method), "--model", str(tmp_path / "run" / "model"), "--prompt"]
    capsys.readouterr()
    assert main([*prompt, "a" * 60, "--new-tokens", "5", "--out", str(tmp_path / "s"), "--quiet"]) == 2
    assert "60 tokens and evaluate.new_tokens = 5 are 65" in capsys.readouterr().err
    assert main([*prompt, "a" * 60, "--new-tokens", "4", "--out", str(tmp_path / "s"), "--quiet"]) == 0


def test_a_length_beyond_the_models_and_the_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", LLAMA, *TINY, *sets(data__length=100, evaluate__new_tokens=4, evaluate__prompt_length=4)]
    message = refused(arguments, tmp_path / "run", capsys)
    assert message.endswith("--set data.length=64")
    assert main([*arguments, "--set", "data.length=64", "--out", str(tmp_path / "run"), "--quiet"]) == 0


def test_more_prompts_than_the_test_text_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = sets(evaluate__samples=10**6, evaluate__prompt_length=8, evaluate__new_tokens=8)
    message = refused(["train", LLAMA, *TINY, *lengths], tmp_path / "run", capsys)
    assert re.search(r"evaluate\.samples = 1000000 .* set evaluate\.samples to at most \d+", message)


SHORT = sets(evaluate__prompt_length=8, evaluate__new_tokens=8)


def test_no_row_is_trained_before_all_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The control, whose row comes first, has no levels; the blocks have none of that grid.
    message = refused(["compare", LLAMA, *TINY, *SHORT, *sets(evaluate__grid="uniform")], tmp_path / "out", capsys)
    assert "evaluate.grid" in message
    assert not list(tmp_path.glob("out/*/checkpoints"))


def of_teacher(folder: Path, damage: str) -> None:
    """A small causal language model's folder without what `damage` names."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if damage == "another kind":
        ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(folder)
        return
    LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)).save_pretrained(folder)
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    if damage == "damaged weights":
        (folder / "model.safetensors").write_bytes(b"no safetensors at all")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no weights", "its weights cannot be read"),
        ("damaged weights", "its weights cannot be read"),
        ("another kind", "is a vit, which is no causal language model"),
        ("no tokenizer", "its tokenizer cannot be read"),
    ],
)
def test_a_teacher_that_cannot_be_read(
    damage: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_teacher(tmp_path / "teacher", damage)
    teacher = [*SHORT, *sets(evaluate__teacher=tmp_path / "teacher", evaluate__teacher_tokens="false")]
    message = refused(["train", LLAMA, *TINY, *teacher], tmp_path / "run", capsys)
    assert f"evaluate.teacher = {tmp_path / 'teacher'}" in message
    assert words in message


def text_folder(tmp_path: Path, test: str | None) -> list[str]:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    if test is not None:
        (folder / "test.txt").write_text(test)
    return sets(data=f"{{kind: text, source: {folder}, length: 64}}")


@pytest.mark.parametrize(("test", "words"), [(None, "test"), ("too short", "test split"), ("a " * 40, "needs 2")])
def test_a_test_split_that_cannot_be_measured(
    test: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = text_folder(tmp_path, test)
    assert words in refused(["train", LLAMA, *TINY, *data], tmp_path / "run", capsys)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_place_that_nothing_can_be_written_to(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([command, VIT, "--out", str(tmp_path / "file" / "run"), "--quiet"]) == 2
    assert f"{tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", VIT, "--json", "{folder}"], "--json {folder} is a folder"),
        (["inspect", VIT, "--figure", "{folder}/file/x.png"], "{folder}/file is a file"),
        (["sample", LLAMA, "--count", "1000000000"], "--count 1000000000: must be at most"),
        (["sample", LLAMA, "--steps", "1000000"], "--steps 1000000: must be at most"),
        (["sample", LLAMA, "--new-tokens", "1000000000"], "--new-tokens 1000000000: must be at most"),
        (["sample", LLAMA, "--seed", "10000000000000"], "--seed 10000000000000: must be at most"),
        (["branch", "nowhere", "--blocks", "100000", "--out", "x"], "--blocks 100000: must be at most"),
    ],
)
def test_options_are_checked_before_all_else(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([part.format(folder=tmp_path) for part in arguments]) == 2
    assert words.format(folder=tmp_path) in capsys.readouterr().err
