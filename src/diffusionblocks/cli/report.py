"""diffusionblocks report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..reports.page import RunReport

_SECONDS, _MOST_SECONDS = 5, 3600


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    parser.set_defaults(run=run)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of train, compare or ablate")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default report.html)")
    parser.add_argument(
        "--watch",
        type=int,
        nargs="?",
        const=_SECONDS,
        metavar="SECONDS",
        help=f"write the page again every so many seconds (default {_SECONDS}) until all runs have ended",
    )


def run(options: argparse.Namespace) -> None:
    """Write one page about runs: once, or until they have ended."""
    from ..common.fields import check_count
    from ..experiments.run_folder import read_runs
    from ..reports.page import all_ended, write_page

    watch = options.watch
    if watch is not None:
        check_count("--watch", watch, _MOST_SECONDS)
    while True:
        runs, tables = read_runs(options.runs, wait=watch is not None)
        if watch is None or all_ended(runs, tables):
            write_page(options.out, [_with_memory(run) for run in runs], tables)
            break
        try:
            write_page(options.out, runs, tables, refresh=watch)
            time.sleep(watch)
        except KeyboardInterrupt:
            write_page(options.out, runs, tables)  # one that no browser reads again
            raise
    print(f"page: {options.out}")


def _with_memory(run: RunReport) -> RunReport:
    """A run with the memory that the planner predicts, where none was measured and its recipe can be planned."""
    from ..experiments.run_folder import recipe_of
    from ..planning import predict

    if run.memory is not None or not run.recipe:
        return run
    on_cpu = str((run.result or {}).get("device", "")).startswith("CPU")
    with contextlib.suppress(ValueError, OSError, ImportError):
        recipe = recipe_of(run).model_copy(update={"device": "cpu"} if on_cpu else {})
        return dataclasses.replace(run, memory=predict(recipe).kinds, memory_source="predicted")
    return run
