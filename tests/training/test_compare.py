"""Rows that train for the same time, and what a row of recurrent depth counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffusionblocks.experiments.ablation import ablate, settings
from diffusionblocks.experiments.baselines import seconds_a_step, variants
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parallel import compare
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.recipe_changes import trunk_recipe
from diffusionblocks.training import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"
VIT = {
    "model.config.num_hidden_layers": 4,
    "model.config.hidden_size": 16,
    "blocks.num_blocks": 2,
    "train.batch_size": 16,
    "train.warmup_steps": 0,
    "evaluate.steps": [2],
    "evaluate.seeds": [1],
}


def recipe(name: str, changes: dict[str, Any]) -> Recipe:
    return load_recipe(RECIPES / name, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in json.loads((folder / "table.json").read_text())["rows"]}


def test_controls_train_as_long_as_the_blocks(tmp_path: Path) -> None:
    made = recipe("vit/digits.yaml", VIT | {"train.steps": 60})
    compare(Experiment(made), tmp_path, equal="seconds", progress=False)
    rows = rows_of(tmp_path)
    assert list(rows) == ["diffusionblocks", "end-to-end-4-same-time", "end-to-end-2-same-time"]
    blocks, whole, short = rows.values()
    for row in (whole, short):  # as near as a shared machine's clock allows
        assert blocks["seconds"] / 4 < row["seconds"] < 4 * blocks["seconds"]
    assert short["iterations"] > whole["iterations"]  # its steps are shorter
    assert whole["layer_updates"] == 4 * whole["iterations"]

    # Again: nothing is trained or timed anew.
    compare(Experiment(made), tmp_path, equal="seconds", progress=False)
    assert {key: row["iterations"] for key, row in rows_of(tmp_path).items()} == {
        key: row["iterations"] for key, row in rows.items()
    }


def test_rows_beside_experts_have_as_many_layer_updates(tmp_path: Path) -> None:
    """An expert's step updates all layers, so the whole model has as many steps as all experts together."""
    sizes = {"model.config.num_layers": 3, "model.config.hidden_size": 16, "model.config.num_attention_heads": 2}
    options = {"trunk": None, "blocks.split": "experts", "train.steps": 2, "train.batch_size": 4}
    made = recipe("dit/digits.yaml", sizes | options | {"evaluate.features": None, "evaluate.samples": 4})
    rows = {row.key: row.layer_updates(row.blocks * row.recipe.train.steps, 100) for row in variants(made)}
    assert rows == {"end-to-end-3": 18, "diffusionblocks": 18}
    ablate(Experiment(made), tmp_path, settings(made, {"blocks.split": ["layers", "experts"]}), progress=False)
    assert {key: row["layer_updates"] for key, row in rows_of(tmp_path).items()} == {
        "split=layers": 6,
        "split=experts": 18,
    }


def test_a_step_of_more_examples_takes_longer() -> None:
    small, large = (recipe("vit/digits.yaml", VIT | {"train.steps": 3, "train.batch_size": n}) for n in (4, 512))

    splits = {"train": small.data.load("train")}
    assert seconds_a_step(Experiment(small, splits)) < seconds_a_step(Experiment(large, splits))


def test_slow_steps_are_told_by_two_of_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1, 2 and 1 layers: six steps would take too long, so one of each size is stepped twice."""
    slow = recipe(
        "vit/digits.yaml",
        VIT | {"model.config.num_hidden_layers": 4, "blocks.num_blocks": 3, "blocks.layers": [1, 2, 1]},
    )
    experiment = Experiment(slow, {"train": slow.data.load("train")})
    stepped: list[int] = []
    step = Trainer.step

    def noted(self: Trainer, unit: int, following: int | None = None) -> None:
        stepped.append(unit)
        step(self, unit, following)

    monkeypatch.setattr(Trainer, "step", noted)
    assert 0 < seconds_a_step(experiment, warm=1, timed=1, at_most=1e-9) < 60
    assert stepped == [0, 0, 1, 1]
    stepped.clear()
    seconds_a_step(experiment, warm=1, timed=1, at_most=60)
    assert stepped == [0, 0, 1, 1, 0, 1, 2, 0, 1, 2]


def test_rows_of_recurrent_depth_count_their_layer_passes(tmp_path: Path) -> None:
    values = {
        "train.steps": 2,
        "train.batch_size": 4,
        "train.warmup_steps": 0,
        "evaluate.limit": 4,
        "evaluate.samples": 2,
        "evaluate.steps": 2,
        "evaluate.new_tokens": 2,
        "evaluate.levels": 2,
    }
    shown = compare(Experiment(recipe("text/recurrent_topics.yaml", values)), tmp_path, progress=False)
    rows = {row["name"]: row for row in rows_of(tmp_path).values()}
    # One prelude layer, two of the core, one coda layer; 8 + 1 iterations on average, or one.
    assert rows["end-to-end"]["layer_passes"] == 2 * (1 + 2 * 9 + 1)
    assert rows["diffusionblocks"]["layer_passes"] == 2 * (1 + 2 + 1)
    assert "layer passes" in shown


def test_only_rows_of_blocks_can_be_chosen_for_equal_time(tmp_path: Path) -> None:
    made = recipe("vit/digits.yaml", VIT | {"train.steps": 2})
    with pytest.raises(ValueError, match=r"unknown rows \['end-to-end-4'\]; allowed: \['diffusionblocks'\]"):
        compare(Experiment(made), tmp_path, rows=["end-to-end-4"], equal="seconds", progress=False)


def test_rows_of_blocks_of_several_sizes_have_the_same_layer_updates() -> None:
    """A trunk has the layers of the largest block, and so has a baseline."""
    unequal = {"model.config.num_layers": 6, "blocks.layers": [1, 3, 2], "trunk.steps": 8, "train.steps": 4}
    rows = {row.key: row for row in variants(recipe("dit/digits.yaml", unequal))}
    steps = {key: row.recipe.train.steps for key, row in rows.items()}
    assert steps == {
        "end-to-end-6": 8,
        "end-to-end-2": 8,
        "end-to-end-2-x3": 24,
        "end-to-end-3": 8,
        "end-to-end-3-x2": 16,
        "diffusionblocks": 8,  # 4 of its own, and 8 of 3 layers shared out over 6
        "diffusionblocks-branched": 4,
    }
    iterations = {"diffusionblocks": 3 * 8, "diffusionblocks-branched": 8 + 3 * 4}
    for key, row in rows.items():
        updates = row.layer_updates(iterations.get(key, steps[key]), 100)
        assert updates == {"end-to-end-2": 16, "end-to-end-3": 24}.get(key, 48)
    assert trunk_recipe(rows["diffusionblocks-branched"].recipe).model.config["num_layers"] == 3
    experts = {"model.config.num_layers": 2, "blocks.split": "experts", "trunk.steps": 6, "train.steps": 4}
    rows = {row.key: row for row in variants(recipe("dit/digits.yaml", experts))}
    assert rows["diffusionblocks"].recipe.train.steps == 6
    assert rows["diffusionblocks"].layer_updates(3 * 6, 100) == 2 * 18
    assert rows["diffusionblocks-branched"].layer_updates(6 + 3 * 4, 100) == 2 * 18
