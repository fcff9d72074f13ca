"""diffusionblocks push."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `push`."""
    parser.set_defaults(run=run)
    parser.add_argument("model", type=Path, metavar="RUN", help="folder of a run, or of a saved model of blocks")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="repository on the hub; made if need be")
    parser.add_argument("--private", action="store_const", const=True, help="make a new repository private")
    parser.add_argument("--message", help="of the commit")


def run(options: argparse.Namespace) -> None:
    """Upload a trained model to the hub in one commit."""
    from ..core.hub import push_to_hub

    of_run = options.model / "model"
    folder = of_run if of_run.is_dir() else options.model
    upload = push_to_hub(folder, options.repo, private=options.private, commit_message=options.message)
    if upload.keeps_card:
        print("the repository's own README.md stays: it was edited there")
    print(f"{len(upload.files)} files in {upload.address}")
