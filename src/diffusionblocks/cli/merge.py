"""diffusionblocks merge."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..common.messages import one_line


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `merge`."""
    parser.set_defaults(run=run)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="saved models, or folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the merged model")
    parser.add_argument(
        "--prefer",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="take this one's copy of a block that several folders hold; repeatable, the first that holds it wins",
    )


def run(options: argparse.Namespace) -> None:
    """Make one model of folders whose blocks were trained apart."""
    from ..core.merging import merge
    from ..experiments.run import trained_differently
    from ..reports.tables import format_bytes, format_table

    origins = merge(options.folders, options.out, options.prefer)
    for line in trained_differently(options.folders):
        print(one_line(f"warning: {line}"), file=sys.stderr)
    rows = [
        {
            "block": origin.block,
            "layers": f"{origin.layers[0]}-{origin.layers[-1]}",
            "taken from": origin.folder,
            "size": format_bytes(origin.size),
            "passed over": ", ".join(map(str, origin.passed_over)) or None,
        }
        for origin in origins
    ]
    print(format_table(rows))
    print(f"{len(origins)} blocks in {options.out}")
