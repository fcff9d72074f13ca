"""What the commands have in common: how one is described, and the options of those that read a recipe."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import RUNS

if TYPE_CHECKING:
    from ..common.messages import Say
    from ..experiments.experiment import Experiment


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        help: one line.
        module: what adds its options (`add_options`), below this package; imported when the command is given.
        shared: whether the ranks that torchrun started share its work; else it is that of one process.
        uses_models: whether it imports torch and the libraries of models, which takes seconds.
    """

    help: str
    module: str
    shared: bool = False
    uses_models: bool = True


def takes_recipe(parser: argparse.ArgumentParser, run: Callable[..., None]) -> None:
    """Let a command read a recipe, with overrides; `run` gets the experiment and the options."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "recipe",
        help="a YAML file, the folder of a run (its recipe, and its model), or a recipe that ships: `diffusionblocks "
        "recipes` lists them",
    )
    parser.add_argument(
        "--set", action="append", metavar="a.b=v", help="override a field of the recipe; the value is YAML; repeatable"
    )


def takes_model(parser: argparse.ArgumentParser) -> None:
    """Let a command read a trained model."""
    parser.add_argument("--model", type=Path, help="folder of the model (default: of the run, runs/<name>/model)")


def run_folder(experiment: Experiment, options: argparse.Namespace) -> Path:
    """The folder of the run: the one that stands in the recipe's place, or runs/<name>."""
    from ..experiments.shipped_recipes import run_of

    return run_of(options.recipe) or RUNS / experiment.recipe.name


def takes_dry_run(parser: argparse.ArgumentParser) -> None:
    """Let a command only say what it would do."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check and read all that a run does, predict its memory and time a few steps; write nothing of the run",
    )


def takes_quiet(parser: argparse.ArgumentParser) -> None:
    """Let a command be quiet."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def say_when_slow(what: str, seconds: float = 5.0) -> Say:
    """What tells on stderr of work that begins so many seconds after the last line: what is quicker needs no word.

    Args:
        what: is being done; begins each line.
        seconds: from now on, and from one line to the next.
    """
    start = last = time.monotonic()

    def say(line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > seconds:
            print(f"{what}: {line} ({now - start:.0f} s so far)", file=sys.stderr)
            last = now

    return say
