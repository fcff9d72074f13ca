"""The comparison every claim needs: DiffusionBlocks beside its end-to-end controls, in one table.

Rows: L layers end to end; where B > 1 L/B layers end to end, which have the memory of one block, at equal steps
and at B times the steps, which is equal compute (the control to beat); DiffusionBlocks from scratch; and, where the
recipe has a trunk, trunk and branch. Where it fits its levels, the rows of blocks do, and the last of them is there
once more without. All rows but the one of L/B layers at equal steps have the same number of layer-updates (recurrent
depth end to end runs its core many times a step, which is not counted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .data import TextChunks
from .evaluation.accuracy import AccuracyRow
from .evaluation.bits import Bits
from .evaluation.figures import draw_run
from .evaluation.level_figure import draw_levels
from .evaluation.memory import step_memory
from .evaluation.tables import format_bytes, format_table, write_results
from .language import LanguageResult, write_continuations
from .model import DiffusionBlocks
from .recipes import DEPTH_ON_HOST, BitsConfig, LanguageConfig, Recipe, SamplesConfig
from .runs import RunResult, depth_of, layers_of_a_block, make_trainer, train, trunk_recipe, with_depth
from .samples import draw_samples
from .scores import headline
from .sources import load_data
from .texts import write_texts
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

    @property
    def branched(self) -> bool:
        """Whether the blocks start from a trunk."""
        return self.recipe.trunk is not None

    @property
    def fitted(self) -> bool:
        """Whether the levels are fitted first."""
        return self.recipe.fit is not None


def variants(recipe: Recipe) -> list[Variant]:
    """The rows that a recipe of method `diffusionblocks` is compared in.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    if recipe.train.blocks is not None:
        raise ValueError(f"compare trains all blocks, not train.blocks = {list(recipe.train.blocks)}; leave it out")
    depth, many = depth_of(recipe), recipe.blocks.num_blocks
    short = layers_of_a_block(recipe)
    field = "steps" if recipe.train.steps is not None else "epochs"
    trunk, fit = (0 if part is None else getattr(part, field) for part in (recipe.trunk, recipe.fit))
    # What every block would have had, had they shared the updates of trunk and fit.
    without_fit = _longer(recipe, fit / many, field).model_copy(update={"fit": None})
    scratch = _longer(recipe, trunk / many, field).model_copy(update={"trunk": None})
    ordinary = _longer(recipe, (trunk + fit) / many, field).model_copy(update={"trunk": None, "fit": None})
    rows = [
        Variant(f"end-to-end-{depth}", _end_to_end(ordinary, depth, 1, field), depth, 1),
    ]
    if many > 1:  # else one block is the whole model
        rows.append(Variant(f"end-to-end-{short}", _end_to_end(ordinary, short, 1, field), short, 1))
        rows.append(Variant(f"end-to-end-{short}-x{many}", _end_to_end(ordinary, short, many, field), short, 1))
    rows.append(Variant("diffusionblocks", scratch, depth, many))
    if recipe.trunk is not None:
        trunk_recipe(recipe)  # refuses what cannot be a trunk before anything is trained
        rows.append(Variant("diffusionblocks-branched", recipe, depth, many))
    if recipe.fit is not None:
        rows.append(Variant(f"{rows[-1].key}-unfitted", without_fit, depth, many))
    return rows


def _longer(recipe: Recipe, more: float, field: str) -> Recipe:
    length = getattr(recipe.train, field) + more
    update = {field: round(length) if field == "steps" else length}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def _end_to_end(recipe: Recipe, layers: int, factor: int, field: str) -> Recipe:
    shallow = with_depth(recipe, layers)
    changes = {field: getattr(recipe.train, field) * factor}
    if recipe.model.type in DEPTH_ON_HOST:
        changes["cuda_graph"] = False
    train = recipe.train.model_copy(update=changes)
    return shallow.model_copy(update={"method": "end-to-end", "train": train})


def compare(recipe: Recipe, folder: Path, *, rows: Sequence[str] | None = None, progress: bool = True) -> str:
    """Train and evaluate every row; leave `folder`/table.json and figures; return the printed table.

    Args:
        recipe: of method `diffusionblocks`.
        folder: each row's run goes to a sub-folder; finished rows are not trained again.
        rows: keys of the rows to run (see `variants`); default all.
        progress: show progress bars.

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
    splits = {split: load_data(recipe, split) for split in ("train", "test")}
    table: list[dict[str, Any]] = []
    results: dict[str, RunResult] = {}
    for variant in chosen:
        probe = executed(variant.recipe, fast=False)
        memory = step_memory(make_trainer(probe, folder=None, progress=False, splits=splits))
        result = train(variant.recipe, folder / variant.key, progress=progress, splits=splits)
        results[variant.key] = result
        largest = max(memory, key=lambda unit: unit.peak)
        table.append(
            {
                "name": variant.name,
                "key": variant.key,
                "layers": variant.layers,
                "blocks": variant.blocks,
                "branched": variant.branched,
                "fitted": variant.fitted,
                "iterations": result.iterations,
                "layer_updates": result.iterations * variant.layers // variant.blocks,
                **_score(result),
                "parameters_trained": _trained(result.model),
                "peak_memory_bytes": largest.peak,
                "memory": largest.to_dict(),
                "seconds": result.seconds,
            }
        )
    write_results(folder / "table.json", table)
    _draw(recipe, table, results, folder)
    return format_table([_printed(row) for row in table])


def _score(result: RunResult) -> dict[str, Any]:
    best = headline(result.rows)
    rows = [row.to_dict() for row in result.rows]
    if isinstance(best, AccuracyRow):
        return {
            "steps": best.steps,
            "seeds": best.seeds,
            "test_accuracy": best.accuracy,
            "standard_error": best.standard_error,
            "accuracies": rows,
        }
    if isinstance(best, LanguageResult):
        return best.to_dict()
    if isinstance(best, Bits):
        return {"bits_per_character": best.bits, **best.to_dict()}
    return {**best.to_dict(), "samples_measured": rows}


def _printed(row: dict[str, Any]) -> dict[str, str]:
    name = row["name"] + ", branched" * row["branched"] + ", levels fitted" * row["fitted"]
    shown = {"name": name, "layers": row["layers"], "blocks": row["blocks"], "iterations": row["iterations"]}
    if "test_accuracy" in row:
        accuracy = f"{100 * row['test_accuracy']:.2f} +- {100 * row['standard_error']:.2f} %"
        shown |= {"denoising steps": row["steps"], "seeds": row["seeds"], "test accuracy": accuracy}
    elif "context_gap" in row:
        shown["cross-entropy"] = f"{row['cross_entropy']:.4f} +- {row['standard_error']:.4f}"
        shown["context gap"] = "-" if row["context_gap"] is None else f"{row['context_gap']:.3f}"
        shown["distinct-2"] = "-" if row["distinct_2"] is None else f"{row['distinct_2']:.3f}"
        if row["perplexity"] is not None:
            shown["perplexity under teacher"] = f"{row['perplexity']['perplexity']:.2f}"
        shown["tokens/s"] = f"{row['tokens_per_second']:.0f}"
    elif "bits_per_character" in row:
        shown["bits per character"] = f"{row['bits_per_character']:.4f} +- {row['standard_error']:.4f}"
        shown["of each block"] = " + ".join(f"{bits:.3f}" for bits in row["block_bits"])
    else:
        for split in ("train", "test"):
            distance = row[f"fd_{split}"]
            shown[f"FD {split}"] = "-" if distance is None else f"{distance:.3f}"
        shown["images/s"] = f"{row['images_per_second']:.0f}"
    return shown | {
        "trained at a time": f"{row['parameters_trained']:,}",
        "peak memory of a step": format_bytes(row["peak_memory_bytes"]),
        "seconds": f"{row['seconds']:.1f}",
    }


def _draw(recipe: Recipe, table: list[dict[str, Any]], results: dict[str, RunResult], folder: Path) -> None:
    if isinstance(recipe.evaluate, LanguageConfig):
        for key, result in results.items():
            data = load_data(recipe, "test")
            assert isinstance(data, TextChunks)
            write_continuations(recipe, result.model, folder / key / "samples", data=data)
        controls = [
            (f"{row['key']} ({row['iterations']} steps)", row["cross_entropy"])
            for row in table
            if row["name"] == "end-to-end"
        ]
        for key in ("diffusionblocks", "diffusionblocks-branched"):
            if key in results:
                model, (row, *_) = results[key].model, results[key].rows
                assert isinstance(model, DiffusionBlocks)
                assert isinstance(row, LanguageResult)
                draw_levels(row.known, model.partition, folder / key / "levels.png", controls)
        return
    if isinstance(recipe.evaluate, (SamplesConfig, BitsConfig)):
        for key, result in results.items():
            assert isinstance(result.model, DiffusionBlocks)
            draw = write_texts if isinstance(recipe.evaluate, BitsConfig) else draw_samples
            draw(recipe, result.model, folder / key / "samples")
        return
    if "diffusionblocks" not in results:
        return
    model = results["diffusionblocks"].model
    assert isinstance(model, DiffusionBlocks)
    controls = [
        (f"{row['key']} ({row['iterations']} steps)", row["test_accuracy"])
        for row in table
        if row["name"] == "end-to-end"
    ]
    rows = [row for row in results["diffusionblocks"].rows if isinstance(row, AccuracyRow)]
    draw_run(rows, controls, model.partition, model.noise, folder / "figure.png")


def executed(recipe: Recipe, *, fast: bool) -> Recipe:
    """The same steps with torch.compile and CUDA graphs, or without either."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": fast, "cuda_graph": fast})})


def _trained(model: nn.Module) -> int:
    """Most parameters that are trained at a time: those of the largest unit."""
    units, _ = units_of(model)
    return max(sum(p.numel() for p in trainable(unit.module)) for unit in units)
