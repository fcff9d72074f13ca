"""diffusionblocks boundaries."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import run_folder, takes_model, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `boundaries`."""
    takes_recipe(parser, run)
    takes_model(parser)
    parser.add_argument(
        "--out", type=Path, help="folder of boundaries.png and boundaries.json (default: below the run, boundaries)"
    )
    parser.add_argument("--count", type=int, default=8, help="samples for each place of a boundary (default: 8)")
    parser.add_argument(
        "--examples", type=int, default=256, help="of the training data, where neighbours are compared (default: 256)"
    )
    parser.add_argument(
        "--moved",
        type=float,
        nargs="+",
        metavar="PERCENT",
        help="by what each boundary's level is moved (default: -10 -5 0 5 10)",
    )


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Compare neighbouring blocks of a trained model, and sample with moved boundaries."""
    from ..reports.results import write_results
    from ..reports.tables import format_table

    for percent in options.moved or ():
        if not -100 < percent < float("inf"):
            raise ValueError(f"--moved {percent:g}: must be a percentage above -100")
    path = options.model or run_folder(experiment, options) / "model"
    experiment = experiment.with_processing_of(path)
    model = experiment.load(path)
    if not experiment.of_blocks(model):
        raise ValueError("boundaries is for method: diffusionblocks; an end-to-end model has none")
    folder = options.out or run_folder(experiment, options) / "boundaries"
    shares = None if options.moved is None else [percent / 100 for percent in options.moved]
    neighbours, views = experiment.task.compare_neighbours(
        experiment, model, folder, count=options.count, examples=options.examples, shares=shares
    )
    rows, of_views = ([row.to_dict() for row in part] for part in (neighbours, views))
    print(f"at the boundaries, root mean squares of differences over those of what differs:\n{format_table(rows)}")
    table = [
        {"boundary": row["boundary"], "moved by": f"{100 * row['share']:+g} %"}
        | {name: value for name, value in row.items() if name not in ("boundary", "share")}
        for row in of_views
    ]
    print(f"samples of the same seeds with the boundary moved:\n{format_table(table)}")
    if any(row["share"] for row in of_views) and not any(row["calls"] for row in of_views):
        print(
            "no step of the sampler falls between a boundary and the moved one, so nothing changes: move further with "
            "--moved, as --moved -50 50, or take more steps, as --set evaluate.steps=[100]"
        )
    write_results(folder / "boundaries.json", rows, moved=of_views)
    print(folder / "boundaries.png", folder / "boundaries.json", sep="\n")
