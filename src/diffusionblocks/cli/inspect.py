"""diffusionblocks inspect."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .command import run_folder, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    takes_recipe(parser, run)
    parser.add_argument(
        "--figure", type=Path, help="draw the noise partition to this PNG, of a measured one with what was measured"
    )


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Show the blocks of a recipe, or what a baseline trains in their place, before any training."""
    from ..core.materialise import empty
    from ..experiments.boundaries import draw_boundaries, read_boundaries
    from ..experiments.recipe_changes import stages, with_boundaries
    from ..reports.figures import draw_partition
    from ..reports.tables import block_table, format_table, partition_sketch
    from ..training import units_of

    record = read_boundaries(experiment, run_folder(experiment, options))
    if record is not None:  # of a run whose trunk has ended
        experiment = experiment.derive(with_boundaries(experiment.recipe, record.between), same_run=True)

    recipe, source = experiment.recipe, experiment.original.weights()
    if recipe.data.mapped and recipe.data.count_examples().count is not None:  # data that are opened at once, and here
        experiment.task.check_examples(experiment, experiment.outline, experiment.data("train"))
    if experiment.baseline is not None:
        units, _ = units_of(experiment.outline)
        print(f"{recipe.name}: {recipe.model.type}, method: {recipe.method}")
        print("training:", ", then ".join(f"{name} {length}" for _, name, length in stages(recipe)))
        sizes = {each.name: sum(p.numel() for p in each.own) for each in units}
        print(format_table([{"unit": name, "trainable": f"{size:,}"} for name, size in sizes.items()]))
        if options.figure:
            raise ValueError(f"--figure draws the levels of blocks, and method: {recipe.method} has none; leave it out")
        return
    model = empty(source, experiment.blocks)
    total = sum(p.numel() for p in source.outline().parameters())
    print(f"{recipe.name}: {recipe.model.type}, {model.partition.num_layers} layers, {total:,} parameters")
    print("training:", ", then ".join(f"{name} {length}" for _, name, length in stages(recipe)))
    print(f"blocks: {json.dumps(model.blocks_config.model_dump(mode='json', exclude={'noise'}))}")
    print(format_table(block_table(model)))
    print("bytes: AdamW in the weights' precision, of one block and its shared parameters, without activations")
    print(partition_sketch(model.partition, model.noise))
    symbol, highest, lowest = model.noise.symbol, model.noise.read_max, model.noise.read_min
    print(f"sampling and evaluation go from {symbol} = {highest:.4g} to {lowest:.4g}")
    if experiment.recipe.blocks.measured_later:
        print(f"levels are of equal probability here: those by {recipe.blocks.partition} are measured on the trunk")
    if options.figure and record is not None:
        draw_boundaries(record, model.noise, options.figure)
        print(f"what was measured on the trunk, and the blocks that share it, drawn to {options.figure}")
    elif options.figure:
        draw_partition(model.partition, model.noise, options.figure)
        print(f"partition drawn to {options.figure}")
