"""diffusionblocks jobs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import takes_recipe

if TYPE_CHECKING:
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `jobs`."""
    takes_recipe(parser, run)
    parser.add_argument("--out", type=Path, required=True, help="folder of the scripts; new, or empty")
    parser.add_argument(
        "--format",
        choices=("plain", "slurm", "skypilot"),
        default="plain",
        help="shell scripts; with a Slurm job array, or task files of SkyPilot, beside them",
    )


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Write the commands that train each block on a machine of its own."""
    from ..experiments.job_scripts import MERGE, START, SUBMIT, write_jobs

    scripts = write_jobs(experiment, options.out, options.format)
    names = [script.name for script in scripts]
    for script in scripts:
        print(script)
    if SUBMIT in names:
        print(f"submit all: sh {options.out / SUBMIT}")
        return
    if options.format == "skypilot":
        order = [f"first {START}"] * (START in names) + ["the blocks'"] + [f"then {MERGE}"] * (MERGE in names)
        print(f"each .yaml says how it is launched, from its folder: {', '.join(order).replace('.sh', '.yaml')}")
        return
    if START in names:
        print(f"first {START}, once; then copy the folder {options.out / 'start'} to where the others run")
    each = "each other script" if START in names else "each script"
    copy = f"{each} runs anywhere, from a copy of this folder"
    back = f"; bring the folders that they leave back here, then {MERGE}" if MERGE in names else ""
    print(f"{copy}{back}")
