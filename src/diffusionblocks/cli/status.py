"""diffusionblocks status."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..experiments.run_status import RunStatus


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `status`."""
    parser.set_defaults(run=run)
    parser.add_argument("folder_of_run", type=Path, metavar="RUN", help="folder of a run, which goes on or has ended")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON values instead")


def run(options: argparse.Namespace) -> None:
    """Tell how far a run is: each of its blocks, whether a process trains it, and what is missing."""
    import json

    from ..experiments.run_status import read_status
    from ..reports.tables import format_table

    status = read_status(options.folder_of_run)
    if options.as_json:
        print(json.dumps(status.to_dict(), indent=2))
        return
    print(format_table(status_rows(status)))
    print(_summary(status))


def status_rows(status: RunStatus) -> list[dict[str, Any]]:
    """A row for each unit, as it is printed."""
    from ..reports.tables import format_bytes, format_duration

    def duration(seconds: float | None) -> str | None:
        return None if seconds is None else format_duration(seconds)

    return [
        {
            "unit": unit.unit,
            "state": unit.state,
            "steps": f"{unit.step:,} / {'?' if unit.steps is None else f'{unit.steps:,}'}",
            "loss": None if unit.loss is None else f"{unit.loss:.4g}",
            "left": duration(unit.seconds_left),
            "last sign": None if unit.seconds_since is None else f"{duration(unit.seconds_since)} ago",
            "peak": None if unit.peak_bytes is None else format_bytes(unit.peak_bytes),
            "host": unit.host,
        }
        for unit in status.units
    ]


def _summary(status: RunStatus) -> str:
    if status.finished:
        return f"ended: model in {status.folder / 'model'}"
    missing = f"missing: {', '.join(status.missing)}"
    if status.running:
        return f"running ({status.process or 'its parts'}); {missing}"
    return f"not running; {missing}; run its command again to go on"
