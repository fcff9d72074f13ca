"""diffusionblocks inspect."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .command import takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment
    from ..experiments.recipe import Recipe


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`."""
    takes_recipe(parser, run)
    parser.add_argument("--figure", type=Path, help="draw the noise partition to this PNG")


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Show the blocks of a recipe before any training."""
    from ..core.materialise import empty
    from ..reports.figures import draw_partition
    from ..reports.tables import block_table, format_table, partition_sketch

    recipe, source = experiment.recipe, experiment.original.weights()
    model = empty(source, recipe.blocks)
    total = sum(p.numel() for p in source.outline().parameters())
    print(f"{recipe.name}: {recipe.model.type}, {model.partition.num_layers} layers, {total:,} parameters")
    print(f"training: {_stages(recipe)}")
    print(f"blocks: {json.dumps(model.blocks_config.model_dump(mode='json', exclude={'noise'}))}")
    print(format_table(block_table(model)))
    print("bytes: AdamW in the weights' precision, of one block and its shared parameters, without activations")
    print(partition_sketch(model.partition, model.noise))
    print(f"{model.noise.symbol} is read from {model.noise.read_min:.4g} to {model.noise.read_max:.4g}")
    if options.figure:
        draw_partition(model.partition, model.noise, options.figure)
        print(f"partition drawn to {options.figure}")


#: What is trained on its own, by method.
_UNITS = {
    "diffusionblocks": "each block",
    "end-to-end": "the whole model",
    "ensemble": "each member",
    "local": "each module",
}


def _stages(recipe: Recipe) -> str:
    """How long each stage of the training is."""
    blocks = recipe.method == "diffusionblocks"
    before = [("fit of the noise levels", recipe.fit), ("trunk", recipe.trunk)] if blocks else []
    units = {
        "diffusionblocks": "each block",
        "ensemble": "each member",
        "local": "each module",
        "noprop": "each network",
    }
    unit = units.get(recipe.method, "the whole model")
    stages = [*before, (unit, recipe.train)]
    return ", then ".join(
        f"{name} {stage.steps:,} steps" if stage.steps is not None else f"{name} {stage.epochs:g} epochs"
        for name, stage in stages
        if stage is not None
    )
