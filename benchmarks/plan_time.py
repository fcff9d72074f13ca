"""Processor seconds of `diffusionblocks plan`, of every recipe: with an empty cache of followed steps, and once more.

    python benchmarks/plan_time.py --out benchmarks/results/plan_time.json
    python benchmarks/plan_time.py --out plan-time.json --recipes vit/digits          # to try it

Each command is a process of its own. Seconds are those of the processor, of user and system: a machine that others use
makes them longer by little. Both plans must say the same, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table

RECIPES = Path(__file__).parents[1] / "recipes"


def row_of(recipe: str, budget: str) -> dict[str, Any]:
    """Plan a recipe twice."""
    with tempfile.TemporaryDirectory() as caches:
        empty, first = _planned(recipe, budget, Path(caches))
        again, second = _planned(recipe, budget, Path(caches))
    if first != second:
        raise AssertionError(f"{recipe}: the second plan says another thing than the first")
    return {"recipe": recipe, "seconds": empty, "seconds_again": again}


def _planned(recipe: str, budget: str, caches: Path) -> tuple[float, bytes]:
    hub = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    environment = {"HF_HOME": str(hub), **os.environ, "XDG_CACHE_HOME": str(caches), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusionblocks", "plan", str(RECIPES / f"{recipe}.yaml"), "--budget", budget]
    before = _processor_seconds()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, check=True)
    return round(_processor_seconds() - before, 2), done.stdout


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", help="as vit/digits (default: all that need no files of yours)")
    parser.add_argument("--budget", default="12GiB")
    options = parser.parse_args()
    every = (path.relative_to(RECIPES).with_suffix("").as_posix() for path in sorted(RECIPES.rglob("*.yaml")))
    rows = []
    for recipe in options.recipes or (name for name in every if name != "text/finetune"):
        rows.append(row_of(recipe, options.budget))
        print(rows[-1], flush=True)
        write_results(options.out, rows, budget=options.budget)  # after each: a run takes a while
    print(format_table(rows))


if __name__ == "__main__":
    main()
