"""diffusionblocks init."""

from __future__ import annotations

import argparse
from pathlib import Path

MODELS = ("vit", "dit", "masked", "llama")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `init`."""
    parser.set_defaults(run=run)
    parser.add_argument("name", help="of the run; the recipe is NAME.yaml in this folder")
    parser.add_argument(
        "data",
        type=Path,
        help="labelled images: a folder with train*.parquet and test*.parquet, or one with a folder of pictures for "
        "each class; or text: a .txt file (or .xz, .gz, .bz2), or a folder with train*.txt, valid*.txt and test*.txt",
    )
    parser.add_argument(
        "--model",
        choices=MODELS,
        help="vit classifies images (their default), dit generates them; masked (the default of text) fills text in, "
        "llama continues it",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        help="of a folder of pictures: height and width that they are brought to, a multiple of 4 (default 64)",
    )


def run(options: argparse.Namespace) -> None:
    """Write a commented recipe for data of one's own; pictures are packed beside it first."""
    from ..experiments.own_data import write_own_recipe

    for file in write_own_recipe(options.name, options.data, model=options.model, size=options.size):
        print(file)
    print(f"next: diffusionblocks inspect {file}; diffusionblocks train {file} --dry-run")
