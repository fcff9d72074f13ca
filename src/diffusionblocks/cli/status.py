"""diffusionblocks status."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

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

    from ..experiments.run_status import read_status, status_table

    status = read_status(options.folder_of_run)
    if options.as_json:
        print(json.dumps(status.to_dict(), indent=2))
        return
    print(status_table(status))
    print(_summary(status))


def _summary(status: RunStatus) -> str:
    if status.finished:
        return f"ended: model in {status.folder / 'model'}"
    missing = f"missing: {', '.join(status.missing)}"
    if status.running:
        return f"running ({status.process or 'its parts'}); {missing}"
    return f"not running; {missing}; run its command again to go on"
