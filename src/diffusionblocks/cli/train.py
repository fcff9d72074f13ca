"""diffusionblocks train."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .command import run_folder, say_when_slow, takes_dry_run, takes_quiet, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    takes_recipe(parser, run)
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/<name>); an unfinished run resumes")
    parser.add_argument(
        "--restart", action="store_true", help="start anew; deletes checkpoints and samples of the folder"
    )
    parser.add_argument(
        "--before-blocks", action="store_true", help="train only the noise fit and the trunk, which blocks start from"
    )
    parser.add_argument(
        "--log",
        action="append",
        choices=("tensorboard", "wandb", "trackio", "mlflow"),
        default=[],
        help="also log to this (extra of its name), below <out> where it keeps files; repeatable",
    )
    parser.add_argument("--tensorboard", action="append_const", dest="log", const="tensorboard", help="the same for it")
    parser.add_argument(
        "--engine", choices=("ray",), help="train each block as a task of Ray (extra: ray); <out> is on a shared disk"
    )
    parser.add_argument("--address", help="of a Ray cluster, or auto (default: Ray is started on this machine)")
    parser.add_argument(
        "--unchecked", action="store_true", help="start even where the memory that is free would not do, by prediction"
    )
    takes_dry_run(parser)
    takes_quiet(parser)


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Train, save and evaluate."""
    from ..experiments.parallel import train
    from ..experiments.parts import is_in_parts
    from ..experiments.ray_engine import train_on_ray
    from ..experiments.run import train_before_blocks
    from ..planning import check_fits
    from ..training.run_log import LOGGERS, Logger
    from .dry_run import dry_run

    recipe = experiment.recipe
    if options.address is not None and options.engine is None:
        raise ValueError(f"--address {options.address} is of a Ray cluster: give --engine ray too")
    for option, is_set in (("--dry-run", options.dry_run), ("--before-blocks", options.before_blocks)):
        if is_set and options.engine is not None:
            raise ValueError(
                f"{option} works in this process, and --engine {options.engine} in tasks of Ray: give one of them alone"
            )
    options.folder = folder = options.out or run_folder(experiment, options)
    if options.dry_run:
        dry_run(experiment, folder)
        return
    if options.before_blocks:
        train_before_blocks(experiment, folder, resume=not options.restart, progress=not options.quiet)
        return
    if not options.unchecked and options.engine is None and "WORLD_SIZE" not in os.environ:
        check_fits(experiment, say=say_when_slow("memory"))
    values = recipe.model_dump(mode="json")

    def loggers(of: Path) -> tuple[Logger, ...]:
        return tuple(LOGGERS[name](of / name, of.name, values) for name in dict.fromkeys(options.log))

    engine = functools.partial(train_on_ray, address=options.address) if options.engine else train
    result = engine(experiment, folder, loggers=loggers, resume=not options.restart, progress=not options.quiet)
    if result is None:  # the first of several ranks tells
        return
    if result.rows:
        print(experiment.task.text([row.to_dict() for row in result.rows]))
    if recipe.train.blocks is not None:
        kind = ("member" if recipe.method == "ensemble" else "block") + "s" * (len(recipe.train.blocks) > 1)
        parts = ", ".join(map(str, recipe.train.blocks))
        print(f"only {kind} {parts}; join them with the others: diffusionblocks merge")
    where = " of one device after another" if is_in_parts(folder) else ""
    print(f"{result.iterations} iterations in {result.seconds:.1f} s{where}; model in {folder / 'model'}")
