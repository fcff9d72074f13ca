"""diffusionblocks sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.choices import choice_of
from ..experiments.tasks import TASKS, SampleOption, level_grids
from .command import run_folder, takes_model, takes_quiet, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sample`: those of all tasks, and each task's own."""
    takes_recipe(parser, run)
    takes_model(parser)
    parser.add_argument("--out", type=Path, help="folder of the files (default: below the run, runs/<name>/samples)")
    parser.add_argument(
        "--count", type=int, help="number of samples (default: one for each of --labels, or what evaluate says)"
    )
    parser.add_argument("--seed", type=int, help="seed of the first sample (default: evaluate.seed); the next count up")
    parser.add_argument("--steps", type=int, help="solver steps (default: the recipe's first)")
    parser.add_argument(
        "--grid",
        type=_grid,
        metavar="NAME",
        help="levels, those that suit the noise process: of EDM equal-quantile or karras (default: the recipe's)",
    )
    for option in _task_options().values():
        flags = [f"--{name.replace('_', '-')}" for name in (option.name, *option.aliases)]
        parser.add_argument(*flags, help=option.help, **option.arguments)
    takes_quiet(parser)


def _grid(text: str) -> str:
    from ..noise import grid_name

    return choice_of(level_grids)(grid_name(text))


def _task_options() -> dict[str, SampleOption]:
    """The options that not every task has, by name."""
    return {option.name: option for task in TASKS.values() for option in task.sample_options}


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Make samples of a trained model, by all ranks where torchrun started several."""
    from ..experiments.parallel import all_ranks

    with all_ranks(experiment) as of_rank:
        if of_rank.work.joins():
            _sample(of_rank, options)


def _sample(experiment: Experiment, options: argparse.Namespace) -> None:
    from ..experiments.run import check_same_files

    recipe, task = experiment.recipe, experiment.task
    if not task.makes:
        raise ValueError(f"sample is for diffusion models; {recipe.model.type} {task.does}: use evaluate")
    own = {option.name for option in task.sample_options}
    for name in _task_options().keys() - own:
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is not for {recipe.model.type}, which generates {task.makes}; leave it out")
    place = options.model or run_folder(experiment, options) / "model"
    experiment = experiment.with_processing_of(place)
    model = experiment.load(place)
    check_same_files(experiment, model, place)
    folder = options.out or run_folder(experiment, options) / "samples"
    paths = task.sample(experiment, model, folder, vars(options), progress=not options.quiet)
    for path in paths if experiment.work.leads else ():
        if path.suffix == ".txt":
            print(path.read_text(encoding="utf-8"), end="")
        print(path)
