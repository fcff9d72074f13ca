"""Every recipe that ships: parsed, inspected, and trained, evaluated and compared at tiny size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from diffusionblocks.cli import main
from diffusionblocks.recipes import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"digits", "cifar10", "cifar100", "tiny-imagenet"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_inspects(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(path)
    assert recipe.model.config["num_hidden_layers"] == 12
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert sum(line.split()[0] == str(b) for b in range(recipe.blocks.num_blocks) for line in out.splitlines()) == (
        recipe.blocks.num_blocks
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_recipe_trains_at_tiny_size(
    path: Path,
    method: str,
    tmp_path: Path,
    image_folder: Callable[[int, int, str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = yaml.safe_load(path.read_text())
    changes = {
        "method": method,
        "device": "cpu",
        "model.config.hidden_size": 16,
        "model.config.num_attention_heads": 2,
        "model.config.intermediate_size": 16,
        "model.config.num_hidden_layers": 2 * values["blocks"]["num_blocks"],
        "train.epochs": "null",
        "train.warmup_epochs": 0,
        "train.steps": 2,
        "train.batch_size": 4,
        "train.compile": "false",
        "evaluate.steps": "[1, 2]",
        "evaluate.seeds": "[1, 2]",
    }
    if values["data"]["kind"] == "images":
        classes = values["data"]["num_classes"]
        folder = image_folder(values["data"]["image_size"], classes, values["data"].get("label_column", "label"))
        changes["data.source"] = str(folder)
        # 32x32 keeps the patch grid of the larger images small here
    sets = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    out = tmp_path / "run"
    assert main(["train", str(path), "--out", str(out), "--quiet", *sets]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(path), "--model", str(out / "model"), "--json", str(out / "e.json"), *sets]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == (2 + 4 if method == "diffusionblocks" else 2 + 1)
    assert (out / "result.json").is_file()
    assert (out / "log.jsonl").is_file()
