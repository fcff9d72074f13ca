"""`diffusionblocks plan` as a user meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import DIGITS, RECIPES, VIT, sets

from diffusionblocks.cli import main

CPU = sets(device="cpu")


def test_the_ledger_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", VIT, *CPU, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "vit-digits: ViTForImageClassification, diffusionblocks, batch 64, float32; predicted for block 0" in printed
    (row,) = json.loads(path.read_text())["rows"]
    assert row["peak"] == sum(value for name, value in row.items() if name not in ("unit", "peak"))
    assert re.search(rf"peak of a step +{row['peak'] / 2**20:.1f} MiB", printed)
    assert "budget" not in printed


def test_a_plan_can_be_pasted_and_then_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    small = [*CPU, *sets(model__config__hidden_size=32)]
    assert main(["plan", DIGITS, *small, "--budget", "6MiB", "--vary", "blocks", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "the recipe as it stands does not fit" in printed
    made = json.loads(path.read_text())["plan"]
    assert made["budget"] == 6 * 2**20 < made["ledger"]["peak"]
    options = made["blocks"]["options"]
    assert options in printed
    assert main(["plan", DIGITS, *small, *options.split(), "--budget", "6MiB", "--vary", "blocks"]) == 0
    assert "the recipe as it stands fits" in capsys.readouterr().out


def test_it_says_plainly_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--budget", "1MiB", "--vary", "batch", *sets(model__config__num_hidden_layers=2)]
    assert main(["plan", VIT, *CPU, *sets(blocks__num_blocks=2, model__config__hidden_size=256), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not even one example fits" in printed
    assert "nothing fits" in printed


def test_a_folder_of_images_is_counted(
    image_folder: Callable[[int, int, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DIFFUSIONBLOCKS_DATA", raising=False)
    path = tmp_path / "plan.json"
    recipe = [str(RECIPES / "vit" / "cifar100.yaml"), *sets(device="cuda", train__compile="false")]
    folder = image_folder(32, 100, "fine_label")
    assert main(["plan", *recipe, *sets(data__source=folder), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"data: 16 examples in {folder}" in printed
    assert "gaps in a captured step's private pool take" in printed
    written = json.loads(path.read_text())
    assert written["rows"][0]["data"] == 16 * (3 * 32 * 32 + 8)
    assert written["remarks"] == printed.splitlines()[-2:]

    assert main(["plan", *recipe]) == 0
    printed = capsys.readouterr().out
    assert "data: NOT COUNTED ('uoft-cs/cifar100' is no local folder, and a plan downloads nothing)" in printed
    assert "--examples N counts N examples of 3,080 bytes" in printed
    assert main(["plan", *recipe, "--examples", "50000"]) == 0
    assert re.search(r"data +146\.9 MiB", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "12"], "budget = '12' is 12 bytes: must be at least 1MiB; did you mean 12GiB?"),
        (["--budget", "lots"], "budget = 'lots': must be bytes above zero"),
        (["--vary", "batch"], "--vary batch needs a budget"),
        (["--margin", "0.1"], "--margin 0.1 needs a budget to leave free of"),
        (["--budget", "12GiB", "--margin", "2"], "margin = 2: must be a share of the predicted peak"),
        (["--examples", "-1"], "num_examples must be >= 0, got -1"),
        (["--set", "blocks.num_blocks=5"], "5"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", VIT, *CPU, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "600MiB"], "budget = 600.0 MiB: must exceed the 600.0 MiB that the context of a GPU takes"),
        (["--gpus", "2x10MiB"], "gpus: the memory of each = 10.0 MiB: must exceed the 600.0 MiB that the context"),
    ],
)
def test_memory_within_the_context_of_a_gpu_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", DIGITS, *sets(device="cuda"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--set device=cpu" in said
    assert main(["plan", DIGITS, *CPU, *arguments]) == 0
