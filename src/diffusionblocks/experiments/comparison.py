"""The comparison every claim needs: DiffusionBlocks beside its baselines, in one table.

Rows: L layers end to end; where B > 1 and the model is not pretrained, L/B layers end to end, which have the memory of
one block, at equal steps and at B times the steps, which is equal compute (of blocks of several sizes the layers of the
largest as well), and where blocks can vote an ensemble of B such networks with the steps of a block each (the baseline
to beat); DiffusionBlocks from scratch; and, where the recipe has a trunk, trunk and branch. Where it fits its levels,
the rows of blocks do, and the last of them is there once more without. All rows but those of fewer layers at equal
steps have the same number of layer-updates (recurrent depth end to end runs its core many times a step, which
`layer_passes` counts). With `equal="seconds"` the end-to-end rows train as long as the blocks did instead, by the
clock. Rows of local learning (`greedy-BxL/B`, ...) are trained where they are named: their modules run those before
them forward as well, which no count of updates shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..common.messages import announce, perhaps
from ..core.model import DiffusionBlocks
from ..evaluation.memory import step_memory
from ..models.recurrent_depth import RecurrentDepth, layer_passes
from ..reports.results import write_results
from ..reports.tables import format_bytes, format_table
from ..training import EndToEnd, units_of
from .baselines import Variant, executed, local_variants, of_equal_time, variants
from .experiment import Experiment
from .preflight import check_machine, check_with_data
from .recipe import Recipe
from .recipe_changes import depth_of
from .run import TABLE, forget, untrained
from .run import train as train_run
from .tasks.task import RunResult, Task


class TrainRow(Protocol):
    """Trains and evaluates the experiment of a row in a folder, as `run.train` does."""

    def __call__(self, experiment: Experiment, folder: Path, /, *, progress: bool) -> RunResult | None:
        """Return what it left; None where another process makes the table."""


@dataclass(frozen=True)
class Comparison:
    """The rows of one table: what they have in common, where their runs go, and what trains them.

    Attributes:
        experiment: of method `diffusionblocks`.
        folder: each row's run goes to a sub-folder; finished rows are not trained again.
        equal: what the rows have in common, `updates` of layers or `seconds` of training. Of `seconds` the rows are
            those of blocks, and the baselines for as long as the last of these took.
        resume: False trains the selected rows anew.
        progress: show progress bars.
        train: trains and evaluates a row.
    """

    experiment: Experiment
    folder: Path
    equal: Literal["updates", "seconds"] = "updates"
    resume: bool = True
    progress: bool = True
    train: TrainRow = train_run

    def checked_rows(self, keys: Sequence[str] | None = None) -> list[Variant]:
        """The rows, once it is known that all can be trained.

        Of equal seconds only those of blocks: how long the others train is known when these have ended.

        Args:
            keys: of the rows to run (see `variants` and, of local learning, `local_variants`); None: all of the former.

        Raises:
            ValueError: an unknown row, or a recipe that cannot be compared.
        """
        recipe = self.experiment.recipe
        if not self.experiment.of_method_blocks:
            raise ValueError(f"compare starts from method: diffusionblocks, got {recipe.method}")
        selection, baselines = variants(recipe), []
        if self.equal == "seconds":
            baselines = [variant for variant in selection if variant.name == "end-to-end"]
            selection = [variant for variant in selection if variant.name == "diffusionblocks"]
        elif keys is not None:
            selection += local_variants(recipe)
        if keys is not None:
            possible = [variant.key for variant in selection]
            unknown = sorted(set(keys) - set(possible))
            if unknown:
                raise ValueError(f"unknown rows {unknown}{perhaps(unknown, possible)}; allowed: {possible}")
            selection = [variant for variant in selection if variant.key in keys]
        for split in ("train", "test"):
            self.experiment.data(split)
        for variant in [*selection, *baselines]:  # no row is trained before it is known that all can be
            row, folder = self.experiment.derive(variant.recipe), self.folder / variant.key
            check_machine(row, folder)
            check_with_data(row, folder)
        return selection

    def begin(self, rows: Sequence[Variant]) -> None:
        """Delete what rows would resume from, where they are trained anew."""
        for variant in () if self.resume else rows:
            forget(self.folder / variant.key)

    def run(self, rows: Sequence[Variant]) -> str:
        """Train and evaluate rows; leave `folder`/table.json and figures; return the printed table.

        Args:
            rows: those that `checked_rows` gave.
        """
        experiment, folder = self.experiment, self.folder
        table: list[dict[str, Any]] = []
        results: dict[str, RunResult] = {}

        def add(variant: Variant) -> None:
            place = folder / variant.key
            row, results[variant.key] = run_row(experiment, variant, place, progress=self.progress, train=self.train)
            table.append(row)
            write_results(folder / TABLE, table, None, finished=False)

        for variant in rows:
            add(variant)
        if self.equal == "seconds":
            for variant in of_equal_time(experiment, table[-1]["seconds"], folder):
                self.begin([variant])
                add(variant)
        experiment.task.draw(experiment, table, results, folder)
        write_results(folder / TABLE, table, None, finished=True)
        lines = [columns(experiment.task, row) for row in table]
        for number, variant in enumerate(rows):  # of equal time more rows follow, which have no blocks
            rows_of_card = [lines[number], *lines[:number], *lines[number + 1 :]]
            score = table[number].get(experiment.task.score)
            experiment.derive(variant.recipe).note_results(folder / variant.key / "model", rows_of_card, score)
        return "\n".join([format_table(lines), *experiment.task.details(table), *remarks(experiment.recipe)])


def remarks(recipe: Recipe) -> list[str]:
    """What the table does not show, and why."""
    if recipe.model.pretrained is None or recipe.blocks.num_blocks == 1:
        return []
    return [
        f"no rows of fewer layers: {recipe.model.pretrained} has weights of all {depth_of(recipe)} layers; for "
        "baselines of one block's layers train afresh, with all sizes in model.config: --set model.pretrained=null"
    ]


def run_row(
    experiment: Experiment, variant: Variant, folder: Path, *, progress: bool, train: TrainRow = train_run
) -> tuple[dict[str, Any], RunResult]:
    """Train and evaluate a row of a table; one whose training has ended is only evaluated.

    Args:
        experiment: that is compared.
        variant: the row.
        folder: of its run.
        progress: show progress bars.
        train: trains and evaluates it.

    Returns:
        (the row as JSON values, what the run left).
    """
    if progress:
        announce(f"row: {variant.key}")
    forget_graphs(variant)
    probe = experiment.derive(executed(variant.recipe, fast=False))
    memory = step_memory(untrained(probe))
    result = train(experiment.derive(variant.recipe), folder, progress=progress)
    assert result is not None, "whoever makes the table has the results"
    largest = max(memory, key=lambda unit: unit.peak)
    row = {
        "name": variant.name,
        "key": variant.key,
        "layers": variant.layers,
        "blocks": variant.blocks,
        "branched": variant.has_trunk,
        "fitted": variant.has_fit,
        "iterations": result.iterations,
        "layer_updates": variant.layer_updates(result.iterations, len(experiment.data("train"))),
        **experiment.task.summary(result.rows),
        **_passes(result),
        "parameters_trained": _parameters_at_a_time(result.model),
        "peak_memory_bytes": largest.peak,
        "memory": largest.to_dict(),
        "seconds": result.seconds if result.device_seconds is None else result.device_seconds,
    }
    return row, result


def forget_graphs(variant: Variant) -> None:
    """Let compiled graphs go before a row: those of many rows count together, and past a limit torch runs eagerly."""
    if variant.recipe.train.compile:
        torch.compiler.reset()


def _passes(result: RunResult) -> dict[str, float]:
    """Of recurrent depth: layers that the whole training ran forward, by their mean number where it is drawn."""
    model = result.model.model if isinstance(result.model, EndToEnd) else None
    if isinstance(model, RecurrentDepth):
        iterations, config = model.mean_recurrence + 1, model.config
    elif isinstance(result.model, DiffusionBlocks) and result.model.model_class == RecurrentDepth.__name__:
        iterations, config = 1, result.model.config
    else:
        return {}
    sizes = config.num_prelude_layers, config.num_core_layers, config.num_coda_layers
    forward, _ = layer_passes(*sizes, iterations, iterations)
    return {"layer_passes": forward * result.iterations}


def columns(task: Task[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What is printed of a row of a table, of what `run_row` returned."""
    name = row["name"] + ", branched" * row["branched"] + ", levels fitted" * row["fitted"]
    result = {"name": name, "layers": row["layers"], "blocks": row["blocks"], "iterations": row["iterations"]}
    result |= task.columns(row)
    if "layer_passes" in row:
        result["layer passes"] = f"{row['layer_passes']:,}"
    return result | {
        "trained at a time": f"{row['parameters_trained']:,}",
        "peak memory of a step": format_bytes(row["peak_memory_bytes"]),
        "seconds": f"{row['seconds']:.1f}",
    }


def _parameters_at_a_time(model: nn.Module) -> int:
    """Most parameters that are trained at a time: those of the largest unit, and what all units move."""
    units, shared = units_of(model)
    return max(sum(p.numel() for p in [*unit.own, *shared]) for unit in units)
