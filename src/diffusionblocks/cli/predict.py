"""diffusionblocks predict."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from .command import run_folder, takes_model, takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `predict`."""
    takes_recipe(parser, run)
    parser.add_argument("files", nargs="+", type=Path, metavar="PICTURE", help="a picture, or a folder of pictures")
    takes_model(parser)
    parser.add_argument("--top", type=int, default=5, help="how many classes of each picture to print (default: 5)")
    parser.add_argument("--json", type=Path, help="also write the probabilities of all classes to this file")


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Print the likeliest classes of each picture."""
    from ..common.formats import write_json
    from ..data.image_folder import pictures_in

    if options.top < 1:
        raise ValueError(f"--top {options.top}: must be at least 1")
    files: list[Path] = []
    for path in options.files:
        if path.is_dir() and not pictures_in(path):
            raise ValueError(f"{path} has no pictures in it; give files, or a folder that they lie in")
        if not path.exists():
            raise FileNotFoundError(f"no picture {path}: give a file, or a folder of pictures")
        files += pictures_in(path) if path.is_dir() else [path]
    folder = options.model or run_folder(experiment, options) / "model"
    experiment = experiment.with_processing_of(folder)
    task, rows = experiment.task, []
    for file, classes in zip(files, task.predict(experiment, experiment.load(folder), files), strict=True):
        likeliest = itertools.islice(classes.items(), options.top)
        print(f"{file}: {', '.join(f'{name} {probability:.3f}' for name, probability in likeliest)}", flush=True)
        rows.append({"file": str(file), "probabilities": classes})
    if options.json:
        write_json(options.json, {"pictures": rows})
