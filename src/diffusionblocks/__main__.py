"""`python -m diffusionblocks` and the console script: what stops the import of libraries is told in one line, too."""

from __future__ import annotations

import gc
import sys

from .common.messages import report_errors


def main() -> int:
    """Run the command line; returns the exit status (`messages.STATUSES`)."""
    status = 0

    def run() -> None:
        nonlocal status
        from .cli import main as command_line  # which imports torch

        status = command_line()

    status = report_errors(run) or status
    # The interpreter collects garbage as it ends: it would look at a million objects of libraries, and free nothing.
    gc.freeze()
    return status


if __name__ == "__main__":
    sys.exit(main())
