"""The comparison every claim needs: DiffusionBlocks beside its end-to-end controls, in one table.

Rows: end to end with L layers; end to end with L/B layers, which has the memory of one block, at equal steps and at
B times the steps, which is equal compute (the control to beat); DiffusionBlocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .evaluation.accuracy import AccuracyRow
from .evaluation.figures import draw_run
from .evaluation.memory import step_memory
from .evaluation.tables import format_bytes, format_table, write_results
from .model import DiffusionBlocks
from .recipes import Recipe
from .runs import load_data, make_trainer, train
from .training import trainable, units_of


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: a recipe and what is particular about it."""

    key: str
    recipe: Recipe
    layers: int
    blocks: int

    @property
    def name(self) -> str:
        """The method: `end-to-end` or `diffusionblocks`."""
        return self.recipe.method


def variants(recipe: Recipe) -> list[Variant]:
    """The rows that a recipe of method `diffusionblocks` is compared in.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    try:
        depth = int(recipe.model.config["num_hidden_layers"])
    except KeyError:
        raise ValueError("compare needs model.config.num_hidden_layers, to make the end-to-end controls") from None
    many = recipe.blocks.num_blocks
    if depth % many:
        raise ValueError(f"compare needs layers that divide: {depth} layers, {many} blocks")
    short = depth // many
    rows = [
        Variant(f"end-to-end-{depth}", _end_to_end(recipe, depth, 1), depth, 1),
        Variant(f"end-to-end-{short}", _end_to_end(recipe, short, 1), short, 1),
    ]
    if many > 1:
        rows.append(Variant(f"end-to-end-{short}-x{many}", _end_to_end(recipe, short, many), short, 1))
    rows.append(Variant("diffusionblocks", recipe, depth, many))
    return rows


def _end_to_end(recipe: Recipe, layers: int, factor: int) -> Recipe:
    config = recipe.model.config | {"num_hidden_layers": layers}
    train = recipe.train
    length: dict[str, Any] = {
        name: value * factor for name in ("steps", "epochs") if (value := getattr(train, name)) is not None
    }
    return recipe.model_copy(
        update={
            "method": "end-to-end",
            "model": recipe.model.model_copy(update={"config": config}),
            "train": train.model_copy(update=length),
        }
    )


def compare(recipe: Recipe, folder: Path, *, rows: Sequence[str] | None = None, progress: bool = True) -> str:
    """Train and evaluate every row; leave `folder`/table.json and figure.png; return the printed table.

    Args:
        recipe: of method `diffusionblocks`.
        folder: each row's run goes to a sub-folder; finished rows are not trained again.
        rows: keys of the rows to run (see `variants`); default all.

    Raises:
        ValueError: an unknown row, or a recipe that cannot be compared.
    """
    if recipe.method != "diffusionblocks":
        raise ValueError(f"compare starts from method: diffusionblocks, got {recipe.method}")
    chosen = variants(recipe)
    if rows is not None:
        unknown = sorted(set(rows) - {variant.key for variant in chosen})
        if unknown:
            raise ValueError(f"unknown rows {unknown}; allowed: {[variant.key for variant in chosen]}")
        chosen = [variant for variant in chosen if variant.key in rows]
    data, test_data = load_data(recipe, "train"), load_data(recipe, "test")
    table: list[dict[str, Any]] = []
    accuracies: dict[str, list[AccuracyRow]] = {}
    partition = None
    for variant in chosen:
        memory = step_memory(make_trainer(executed(variant.recipe, fast=False), folder=None, progress=False, data=data))
        largest = max(memory, key=lambda unit: unit.peak)
        result = train(variant.recipe, folder / variant.key, progress=progress, data=data, test_data=test_data)
        accuracies[variant.key] = result.accuracies
        best = max(result.accuracies, key=lambda row: (row.seeds or 1, -(row.steps or 1)))
        if isinstance(result.model, DiffusionBlocks):
            partition = result.model.partition
        table.append(
            {
                "name": variant.name,
                "key": variant.key,
                "layers": variant.layers,
                "blocks": variant.blocks,
                "iterations": result.iterations,
                "steps": best.steps,
                "seeds": best.seeds,
                "test_accuracy": best.accuracy,
                "standard_error": best.standard_error,
                "parameters_trained": _trained(result.model),
                "peak_memory_bytes": largest.peak,
                "memory": largest.to_dict(),
                "seconds": result.seconds,
                "accuracies": [row.to_dict() for row in result.accuracies],
            }
        )
    write_results(folder / "table.json", table)
    if partition is not None:
        controls = [
            (f"{row['key']} ({row['iterations']} steps)", row["test_accuracy"])
            for row in table
            if row["name"] == "end-to-end"
        ]
        draw_run(accuracies["diffusionblocks"], controls, partition, recipe.blocks.noise, folder / "figure.png")
    return format_table(
        [
            {
                "name": row["name"],
                "layers": row["layers"],
                "blocks": row["blocks"],
                "iterations": row["iterations"],
                "denoising steps": row["steps"],
                "seeds": row["seeds"],
                "test accuracy": f"{100 * row['test_accuracy']:.2f} +- {100 * row['standard_error']:.2f} %",
                "trained at a time": f"{row['parameters_trained']:,}",
                "peak memory of a step": format_bytes(row["peak_memory_bytes"]),
                "seconds": f"{row['seconds']:.1f}",
            }
            for row in table
        ]
    )


def executed(recipe: Recipe, *, fast: bool) -> Recipe:
    """The same steps with torch.compile and CUDA graphs, or without either."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": fast, "cuda_graph": fast})})


def _trained(model: nn.Module) -> int:
    """Most parameters that are trained at a time: those of the largest unit."""
    units, _ = units_of(model)
    return max(sum(p.numel() for p in trainable(unit.module)) for unit in units)
