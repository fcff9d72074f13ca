"""diffusionblocks evaluate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import run_folder, takes_model, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    takes_recipe(parser, run)
    takes_model(parser)
    parser.add_argument(
        "--json", type=Path, help="also write the rows to this file; `report` shows levels that lie in the run's folder"
    )
    parser.add_argument(
        "--by-level",
        action="store_true",
        help="of a classifier, also each block's accuracy and cross-entropy by level",
    )
    parser.add_argument("--every-block", action="store_true", help="with --by-level: ask every block at every level")
    parser.add_argument("--figure", type=Path, help="with --by-level: also draw the cross-entropies to this PNG")


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Measure a trained model, by all ranks where torchrun started several."""
    from ..experiments.parallel import all_ranks

    for name, value in (("--every-block", options.every_block), ("--figure", options.figure)):
        if value and not options.by_level:
            raise ValueError(f"{name} needs --by-level: give both")
    with all_ranks(experiment) as of_rank:
        if of_rank.work.joins():
            _measure(of_rank, options)


def _measure(experiment: Experiment, options: argparse.Namespace) -> None:
    from ..core.saved_model import read_saved
    from ..experiments.run import check_same_files
    from ..reports.results import write_results
    from ..reports.tables import format_table

    folder = options.model or run_folder(experiment, options) / "model"
    experiment = experiment.with_processing_of(folder)
    model, task = experiment.load(folder), experiment.task
    if options.by_level and not experiment.of_blocks(model):
        raise ValueError("--by-level is for method: diffusionblocks; an end-to-end model has no noise levels")
    if options.by_level and not task.by_level:
        task.measure_by_level(experiment, experiment.blocks_of(model))  # says why not
    if options.by_level or "test" in task.splits(experiment.recipe.evaluate):
        experiment.data("test")
    task.check(experiment, model)
    check_same_files(experiment, model, folder, task.splits(experiment.recipe.evaluate))
    rows = [row.to_dict() for row in task.measure(experiment, model)]
    more: dict[str, Any] = {}
    if experiment.work.leads:
        print(task.text(rows))
        for row in rows:
            if row.get("by_level"):
                print(format_table(row["by_level"]))
    if options.by_level:
        blocks = experiment.blocks_of(model)
        more_levels = {"every_block": True} if options.every_block else {}  # tasks of other packages may not take it
        levels = task.measure_by_level(experiment, blocks, **more_levels)
        if experiment.work.leads:
            more["model"] = read_saved(folder).index.get("sha256")  # by which `report` knows whose levels they are
            more["by_level"] = [row.to_dict() for row in levels]
            print(format_table(more["by_level"]))
            if options.figure:
                task.draw_by_level(blocks, levels, options.figure)
                print(options.figure)
    if options.json and experiment.work.leads:
        write_results(options.json, rows, **more)
