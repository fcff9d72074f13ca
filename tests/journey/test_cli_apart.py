"""Jobs that never talk: blocks trained by separate commands and merged are the blocks of one run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusionblocks.cli import main

ROOT = Path(__file__).parents[2]
SHORT = ["--quiet", "--set", "train.steps=6", "--set", "train.lr=1e-3", "--set", "device=cpu"]


def train(recipe: str, out: Path, *changes: str) -> int:
    options = [part for change in changes for part in ("--set", change)]
    return main(["train", str(ROOT / recipe), "--out", str(out), *SHORT, *options])


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{n}": t for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("shared", ["replicated", "frozen"])
def test_merged_jobs_are_one_run(shared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, policy = "recipes/vit/digits.yaml", f"blocks.shared={shared}"
    quick = ["evaluate.limit=20", policy]
    assert train(recipe, tmp_path / "whole", *quick) == 0
    active = ["train.resident=active", "train.schedule=sequential"]
    assert train(recipe, tmp_path / "a", *quick, "train.blocks=[1]") == 0
    assert "only blocks 1; join them with the others: diffusionblocks merge" in capsys.readouterr().out
    assert train(recipe, tmp_path / "b", *quick, "train.blocks=[0, 2]", *active) == 0
    assert not (tmp_path / "b" / "resident").exists()
    parts = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["merge", *parts, "--out", str(tmp_path / "merged")]) == 0
    merged = weights(tmp_path / "merged")
    whole = weights(tmp_path / "whole" / "model")
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    assert (
        main(["evaluate", str(ROOT / recipe), "--model", str(tmp_path / "merged"), "--set", "evaluate.limit=20"]) == 0
    )


def test_compare_and_evaluate_want_all_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes/vit/digits.yaml")
    assert main(["compare", recipe, "--out", str(tmp_path), "--set", "train.blocks=[0]"]) == 2
    assert "compare trains all blocks" in capsys.readouterr().err
    assert train("recipes/vit/digits.yaml", tmp_path / "part", "train.blocks=[0]") == 0
    assert main(["evaluate", recipe, "--model", str(tmp_path / "part" / "model")]) == 2
    assert "merge" in capsys.readouterr().err
    assert train("recipes/vit/digits.yaml", tmp_path / "none", "train.blocks=[7]") == 2
    assert "the model has blocks 0 to" in capsys.readouterr().err
