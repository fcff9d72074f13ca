"""diffusionblocks export."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import run_folder, takes_model, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    takes_recipe(parser, run)
    takes_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--block", type=int, help="the block: 0 owns the highest noise")
    what.add_argument(
        "--pipeline",
        nargs="?",
        const="",
        metavar="SOURCE",
        help="both blocks of a text-to-video model as a folder of its pipeline, with the text encoder and autoencoder "
        "of the pipeline in the folder SOURCE",
    )
    parser.add_argument(
        "--level",
        type=float,
        help="of a classifier, the noise level to fold (default: the noisiest of the block's own that is read)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="of a classifier, leave out what its class has no place for, and measure the difference on test images",
    )


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Write one block as an ordinary model that its library loads, or both as a pipeline."""
    from ..core.exporting import EXPORTED, export_facts, write_export
    from ..core.saving import check_out
    from ..reports.tables import format_table

    folder = options.model or run_folder(experiment, options) / "model"
    if options.pipeline is None:  # a pipeline's folder is checked where it is written
        check_out(options.out, [folder], "exported", EXPORTED)
    network, task = experiment.load(folder), experiment.task
    if not experiment.of_blocks(network):
        raise ValueError(f"{folder} holds a model of method {experiment.recipe.method}, which has no blocks to export")
    model = experiment.blocks_of(network)
    if options.pipeline is not None:
        model.export_pipeline(options.out, source=options.pipeline or None)
        print(options.out)
        return
    batch = task.images_to_compare(experiment, model) if options.approximate else None
    exported = model.export_block(options.block, options.level, approximate_on=batch)
    facts = export_facts(model, options.block, options.level)
    write_export(exported, options.out, facts, task.files_of_export(experiment, network, folder))
    layers, levels = facts["layers"], " to ".join(f"{level:.4g}" for level in facts["levels"])
    at = "" if facts["level"] is None else f", at level {facts['level']:.4g}"
    print(
        f"block {options.block} of {facts['blocks']} (layers {layers[0]} to {layers[-1]}, levels {levels}) as a "
        f"{type(exported).__name__}{at}: {facts['output']}"
    )
    if facts["coefficients"]:
        print(format_table(facts["coefficients"]))
    print(options.out)
