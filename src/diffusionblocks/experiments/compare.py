"""The comparison every claim needs: DiffusionBlocks beside its end-to-end controls, in one table.

Rows: L layers end to end; where B > 1 and the model is not pretrained, L/B layers end to end, which have the memory of
one block, at equal steps and at B times the steps, which is equal compute (the control to beat); DiffusionBlocks from
scratch; and, where the recipe has a trunk, trunk and branch. Where it fits its levels, the rows of blocks do, and the
last of them is there once more without. All rows but the one of L/B layers at equal steps have the same number of
layer-updates (recurrent depth end to end runs its core many times a step, which `layer_passes` counts). With
`equal="seconds"` the controls train as long as the blocks did instead, by the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..core.model import DiffusionBlocks
from ..data import TextChunks
from ..evaluation.accuracy import AccuracyRow
from ..evaluation.bits import Bits
from ..evaluation.memory import step_memory
from ..models.recurrent_depth import RecurrentDepth, layer_passes
from ..reports.figures import draw_levels, draw_run
from ..reports.results import write_results
from ..reports.tables import format_bytes, format_table
from ..training import EndToEnd, trainable, units_of
from .baselines import Variant, executed, of_equal_time, variants
from .language import LanguageResult, write_continuations
from .recipe import BitsConfig, LanguageConfig, Recipe, SamplesConfig
from .run import RunResult, check_machine, check_with_data, depth_of, make_trainer, train
from .samples import draw_samples
from .scores import Splits, headline
from .sources import load_data
from .texts import write_texts


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    rows: Sequence[str] | None = None,
    equal: Literal["updates", "seconds"] = "updates",
    progress: bool = True,
) -> str:
    """Train and evaluate every row; leave `folder`/table.json and figures; return the printed table.

    Args:
        recipe: of method `diffusionblocks`.
        folder: each row's run goes to a sub-folder; finished rows are not trained again.
        rows: keys of the rows to run (see `variants`); default all.
        equal: what the rows have in common, `updates` of layers or `seconds` of training. Of `seconds` the rows are
            those of blocks, and the controls for as long as the last of these took.
        progress: show progress bars.

    Raises:
        ValueError: an unknown row, or a recipe that cannot be compared.
    """
    if recipe.method != "diffusionblocks":
        raise ValueError(f"compare starts from method: diffusionblocks, got {recipe.method}")
    chosen = variants(recipe)
    if equal == "seconds":
        chosen = [variant for variant in chosen if variant.name == "diffusionblocks"]
    if rows is not None:
        unknown = sorted(set(rows) - {variant.key for variant in chosen})
        if unknown:
            raise ValueError(f"unknown rows {unknown}; allowed: {[variant.key for variant in chosen]}")
        chosen = [variant for variant in chosen if variant.key in rows]
    splits = {split: load_data(recipe, split) for split in ("train", "test")}
    # No row is trained before it is known that all can be.
    for variant in [*chosen, *(row for row in variants(recipe) if equal == "seconds" and row.name == "end-to-end")]:
        check_machine(variant.recipe, folder / variant.key)
        check_with_data(variant.recipe, folder / variant.key, splits)
    table: list[dict[str, Any]] = []
    results: dict[str, RunResult] = {}

    def add(variant: Variant) -> None:
        row, results[variant.key] = _run(variant, folder / variant.key, splits, progress)
        table.append(row)
        write_results(folder / "table.json", table)

    for variant in chosen:
        add(variant)
    if equal == "seconds":
        for variant in of_equal_time(variants(recipe), table[-1]["seconds"], folder, splits):
            add(variant)
    _draw(recipe, table, results, folder)
    return "\n".join([format_table([_printed(row) for row in table]), *remarks(recipe)])


def remarks(recipe: Recipe) -> list[str]:
    """What the table does not show, and why."""
    if recipe.model.pretrained is None or recipe.blocks.num_blocks == 1:
        return []
    return [
        f"no rows of fewer layers: {recipe.model.pretrained} has weights of all {depth_of(recipe)} layers; for "
        "baselines of one block's layers train afresh, with all sizes in model.config: --set model.pretrained=null"
    ]


def _run(variant: Variant, folder: Path, splits: Splits, progress: bool) -> tuple[dict[str, Any], RunResult]:
    """Train and evaluate a row."""
    probe = executed(variant.recipe, fast=False)
    memory = step_memory(make_trainer(probe, folder=None, progress=False, splits=splits))
    result = train(variant.recipe, folder, progress=progress, splits=splits)
    largest = max(memory, key=lambda unit: unit.peak)
    row = {
        "name": variant.name,
        "key": variant.key,
        "layers": variant.layers,
        "blocks": variant.blocks,
        "branched": variant.branched,
        "fitted": variant.fitted,
        "iterations": result.iterations,
        "layer_updates": result.iterations * variant.layers // variant.blocks,
        **_score(result),
        **_passes(result),
        "parameters_trained": _trained(result.model),
        "peak_memory_bytes": largest.peak,
        "memory": largest.to_dict(),
        "seconds": result.seconds,
    }
    return row, result


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
    if "layer_passes" in row:
        shown["layer passes"] = f"{row['layer_passes']:,}"
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


def _trained(model: nn.Module) -> int:
    """Most parameters that are trained at a time: those of the largest unit."""
    units, _ = units_of(model)
    return max(sum(p.numel() for p in trainable(unit.module)) for unit in units)
