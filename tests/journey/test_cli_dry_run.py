"""`--dry-run` says what a run would take and leaves nothing; `doctor` says what of the machine can be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import pytest
from commands import TINY, TINY_VIT

from diffusionblocks.cli import main
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.planning import predict
from diffusionblocks.reports.tables import format_bytes


def columns(text: str) -> list[list[str]]:
    """The cells of the table that a text begins with, without its head."""
    lines = text.partition("---\n")[2].partition("time:")[0].splitlines()
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_a_dry_run_says_what_train_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "dit/digits", "--dry-run", *TINY]) == 0
    printed = capsys.readouterr().out
    assert "1,438 training examples, on cpu" in printed
    trunk, train = columns(printed)
    assert trunk[:2] == ["trunk", "6"]
    assert train[:2] == ["train", "12"]
    recipe = load_recipe("dit/digits", TINY[1::2])
    assert train[2] == format_bytes(predict(recipe, num_examples=1438).peak)
    assert train[3].endswith(" s")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_compare_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["--rows", "end-to-end-3", "ensemble-3x1", "diffusionblocks"]
    assert main(["compare", "vit/digits", "--dry-run", "--set", "train.steps=5", *TINY_VIT, *rows]) == 0
    printed = capsys.readouterr().out
    assert [row[:2] for row in columns(printed)] == [
        ["end-to-end-3", "5"],
        ["ensemble-3x1", "15"],
        ["diffusionblocks", "15"],
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_training_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vit/digits", "--dry-run", "--set", "model.config.num_labels=7"]) == 2
    assert "num_labels = 7, the data has 10 classes" in capsys.readouterr().err


def test_doctor_says_what_is_there_and_the_fix(
    tmp_path: Path,
    image_folder: Callable[[int, int, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DIFFUSIONBLOCKS_DATA", str(tmp_path))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = {line[9:26].strip(): line for line in lines if not line.startswith(" ")}
    assert {"Python", "torch", "GPU", "Triton kernels", "flash attention", "disk", "data"} <= checks.keys()
    assert checks["torch"].startswith("OK")
    assert checks["data"].startswith("missing")  # an empty folder
    for state, way in (("missing", "fix: "), ("option", "for it: ")):
        count = sum(line.startswith(state) for line in lines)
        assert sum(line.strip().startswith(way) for line in lines) == count
    assert not any(checks[name].startswith("missing") for name in ("GPU", "Triton kernels", "flash attention"))
    missing = sum(line.startswith("missing") for line in lines)
    assert lines[-1] == f"{missing} missing, see the fixes"
    folder = tmp_path / "cifar10"
    folder.mkdir()
    image_folder(4, 10, "label").joinpath("train.parquet").rename(folder / "train.parquet")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"of the recipes' none; not cifar10: split 'test': no file in {folder} matches 'test*.parquet'" in printed
    assert f"fix: complete cifar10, or move what recipes cannot read out of {tmp_path}" in printed
    copyfile(folder / "train.parquet", folder / "test.parquet")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "OK       data" in printed
    assert ("all that is needed is there" in printed) == (missing == 1)
