"""Rows that train for the same time, and what a row of recurrent depth counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from diffusionblocks.experiments.ablation import ablate, settings
from diffusionblocks.experiments.baselines import variants
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parallel import compare
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.recipe_changes import trunk_recipe, with_train
from diffusionblocks.experiments.step_time import estimated_step, seconds_a_step
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


def test_slow_steps_are_told_by_one_unit_of_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1, 2 and 1 layers: of each size one block is stepped, on few examples where time is short."""
    slow = recipe(
        "vit/digits.yaml",
        VIT | {"model.config.num_hidden_layers": 4, "blocks.num_blocks": 3, "blocks.layers": [1, 2, 1]},
    )
    experiment = Experiment(slow, {"train": slow.data.load("train")})
    stepped: list[tuple[int, int | None]] = []
    step = Trainer.step

    def noted(self: Trainer, unit: int, following: int | None = None, *, examples: int | None = None) -> None:
        stepped.append((unit, examples))
        step(self, unit, following, examples=examples)

    monkeypatch.setattr(Trainer, "step", noted)
    assert estimated_step(experiment, 1e-9).scaled
    assert stepped == [(0, 1), (1, 1)]
    stepped.clear()
    assert not estimated_step(experiment, 100).scaled
    tried = [1, 1, 2, 4, 8, None]  # of batches of 16
    assert stepped[:12] == [(unit, examples) for unit in (0, 1) for examples in tried]
    assert stepped[12:] == [(unit, None) for _ in range(2 + 6) for unit in range(3)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_that_takes_long_is_estimated_in_bounded_time(
    accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step longer than its time, by the processor's clock, which other processes do not move."""
    for module in ("experiments.step_time.perf_counter", "training.trainer.time.perf_counter"):
        monkeypatch.setattr(f"diffusionblocks.{module}", time.process_time)
    sizes = {"model.config.hidden_size": 384, "train.batch_size": 420 // accumulation, "train.compile": True}
    slow = recipe("vit/digits.yaml", VIT | sizes | {"train.accumulation": accumulation})
    experiment = Experiment(slow, {"train": slow.data.load("train")})
    at_most = 0.15
    start = time.process_time()
    estimate = estimated_step(experiment, at_most)
    assert estimate.scaled
    assert time.process_time() - start < at_most + 1.5  # of which the trainer takes what it takes to be built
    whole = seconds_a_step(experiment.derive(with_train(slow, compile=False)), warm=0, timed=1)
    assert whole > 2 * at_most, "nothing to scale"
    assert whole / 1.5 < estimate.seconds < 1.5 * whole


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
