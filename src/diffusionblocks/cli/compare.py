"""diffusionblocks compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import RUNS
from .command import takes_dry_run, takes_quiet, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    takes_recipe(parser, run)
    parser.add_argument("--out", type=Path, help="folder (default runs/<name>-compare)")
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        help="only these rows, for example end-to-end-4; of classifiers also those of local learning, as greedy-3x4",
    )
    parser.add_argument(
        "--equal",
        choices=["updates", "seconds"],
        default="updates",
        help="what the rows have in common: updates of layers, or seconds of training",
    )
    parser.add_argument("--restart", action="store_true", help="train the rows anew")
    takes_dry_run(parser)
    takes_quiet(parser)


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Train the recipe and its end-to-end baselines; print their table."""
    from ..experiments.comparison import Comparison
    from ..experiments.parallel import compare
    from ..experiments.shipped_recipes import ENDINGS
    from .dry_run import dry_comparison

    options.folder = folder = options.out or RUNS / f"{experiment.recipe.name}{ENDINGS['compare']}"
    if options.dry_run:
        rows = Comparison(experiment, folder, options.equal).checked_rows(options.rows)
        dry_comparison(experiment, [(row.key, experiment.derive(row.recipe)) for row in rows])
        return
    resume, progress = not options.restart, not options.quiet
    table = compare(experiment, folder, rows=options.rows, equal=options.equal, resume=resume, progress=progress)
    if table is None:  # the first of several ranks tells
        return
    print(table)
    print(f"table: {folder / 'table.json'}")
    figures = [path for name in ("samples/grid.png", "levels.png") for path in sorted(folder.glob(f"*/{name}"))]
    for figure in [folder / "figure.png", folder / "calls.png", *figures]:
        if figure.is_file():
            print(f"figure: {figure}")
