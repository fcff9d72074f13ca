"""Runs whose blocks attend to the frozen trunk they branched from: they resume, move, plan and measure as others."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import changed_recipe, same_states, seeded
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import diffusionblocks as db
from diffusionblocks.common.formats import read_json
from diffusionblocks.common.modules import bytes_of
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.ablation import ablate, settings
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe
from diffusionblocks.experiments.run import TABLE
from diffusionblocks.layers.two_streams import Streams, as_on_a_gpu, two_streams
from diffusionblocks.planning.plan_text import remarks
from diffusionblocks.planning.predictor import Predictor
from diffusionblocks.training.trainer import Trainer

VALUES: dict[str, Any] = {
    "name": "little",
    "model": {
        "type": "LlamaForCausalLM",
        "config": {
            "vocab_size": 27,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "tie_word_embeddings": False,
        },
    },
    "blocks": {"num_blocks": 2, "vocabulary": "frozen", "target": {"kind": "next-token", "context": "trunk"}},
    "data": {"kind": "topics", "length": 16},
    "trunk": {"steps": 4},
    "train": {"steps": 5, "batch_size": 4, "lr": 0.01, "ema_decay": 0.9},
    "evaluate": {"limit": 4, "levels": 2, "samples": 2, "prompt_length": 4, "new_tokens": 4},
    "device": "cpu",
}


def recipe(**changes: Any) -> Recipe:
    return changed_recipe(VALUES, changes)


def blocks_of(experiment: Experiment, folder: Path, until: int | None = None) -> Trainer:
    changed, trunk, _ = runs.train_fit_and_trunk(experiment, folder, progress=False)
    trainer = runs.blocks_trainer(changed, folder, trunk, progress=False)
    trainer.train(until=until)
    return trainer


def test_a_row_of_an_ablation_measures_the_memory_of_blocks_over_a_trunk(tmp_path: Path) -> None:
    """Before it trains; there is no trunk then, and blocks of consecutive layers have none."""
    own = {"blocks": {"target": {"context": "own"}, "vocabulary": "trained"}}
    experiment = Experiment(recipe(rows={"own": own, "over-trunk": {}}))
    ablate(experiment, tmp_path, settings(experiment.recipe), progress=False)
    rows = {row["key"]: row for row in read_json(tmp_path / TABLE)["rows"]}
    assert rows["own"]["parameters_trained"] > rows["over-trunk"]["parameters_trained"]
    # What is fixed has no gradient and no optimizer state; the trunk's copy is held.
    assert rows["own"]["memory"]["optimizer"] > rows["over-trunk"]["memory"]["optimizer"]
    assert rows["own"]["memory"]["parameters"] < rows["over-trunk"]["memory"]["parameters"]


@pytest.mark.parametrize("shared", ["replicated", "joint"])
def test_a_run_resumes_and_blocks_move_with_the_same_bits(shared: str, tmp_path: Path) -> None:
    result = runs.train(Experiment(recipe(blocks={"shared": shared})), tmp_path / "at-once", progress=False)
    assert {row.combine for row in result.rows} == {"mean", "probabilities", "chain"}
    moved = Experiment(recipe(blocks={"shared": shared}, train={"resident": "active"}))
    blocks_of(moved, tmp_path / "moved", until=5)
    again = blocks_of(moved, tmp_path / "moved")
    with again.averaged() as model:
        at_once = db.load(tmp_path / "at-once" / "model")
        assert same_states(model.state_dict(), at_once.state_dict())
    of_trunk = db.load(tmp_path / "at-once" / "trunk" / "model")
    assert of_trunk.blocks_config.vocabulary == "trained"
    fixed = [p for p in at_once.block(1).parameters() if not p.requires_grad]
    assert at_once.block(1).network.get_parameter("lm_head.weight") is at_once.block(0).network.get_parameter(
        "lm_head.weight"
    )
    assert fixed


def test_a_plan_counts_what_stands_still_once_and_has_no_state_for_it() -> None:
    planned = Predictor(recipe(train={"resident": "all", "ema_decay": None}), 0)
    ledger = planned.forecast().ledger
    model = Experiment(recipe()).outline
    every = {id(p): p for p in model.parameters()}
    moving = [p for p in every.values() if p.requires_grad]
    assert ledger.parameters == bytes_of(every.values())
    assert ledger.optimizer == 2 * bytes_of(moving) + 4 * len(moving)
    free = Predictor(recipe(blocks={"vocabulary": "trained"}, train={"ema_decay": None}), 0).forecast().ledger
    head = 2 * 4 * 27 * 16 + 4  # of each block the head, which now trains
    assert free.optimizer - ledger.optimizer == 2 * head
    (line,) = [line for line in remarks(planned) if line.startswith("trunk: ")]
    assert re.search(r"its step peaks at [\d.]+ (KiB|MiB)", line)


class Calls(TorchFunctionMode):
    """Counts the calls of attention."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_a_plan_of_a_gpu_takes_its_kernels_of_attention() -> None:
    """In float32 each masks some rows at a time: a GPU some hundred, whose calls are dear."""
    query, key, value = torch.randn(3, 1, 2, 1200, 8, generator=seeded()).unbind()
    streams = Streams(600, 600, query.device)
    outputs = []
    for context, masks in ((contextlib.nullcontext(), math.ceil(600 / 64)), (as_on_a_gpu(), math.ceil(600 / 512))):
        with context, Calls() as calls:
            outputs.append(two_streams(query, key, value, streams))
        assert calls.count == masks + 1  # and one of the clean stream
    torch.testing.assert_close(*outputs)
    counted = [trace_step_of(device) for device in ("cpu", "cuda")]
    assert counted[0] > counted[1]


def trace_step_of(device: str) -> int:
    """Calls of attention in the forward pass of a planned step of one layer a block."""
    model = VALUES["model"]
    config = model["config"] | {"max_position_embeddings": 512, "num_hidden_layers": 2}
    changed = recipe(model=model | {"config": config}, data={"length": 512}, device=device)
    with Calls() as calls:
        Predictor(changed, 0).forecast()
    return calls.count


def test_what_nothing_trains_is_refused_before_any_work() -> None:
    for blocks, name in (({}, "vocabulary = frozen"), ({"vocabulary": "trained"}, "target.context = trunk")):
        with pytest.raises(ValueError, match=rf"blocks\.{name}: in a fresh model that is random numbers; give the rec"):
            changed_recipe({**VALUES, "trunk": None}, {"blocks": blocks})
    changed_recipe({**VALUES, "trunk": None}, {"method": "end-to-end"})
