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
    """Make one model of folders whose blocks, or members of an ensemble, were trained apart."""
    from ..core.ensembles import ensemble_folder, merge_ensembles
    from ..core.merging import merge
    from ..experiments.run import trained_differently
    from ..reports.tables import format_bytes, format_table

    of_ensemble = any(ensemble_folder(folder) is not None for folder in options.folders)
    part = "member" if of_ensemble else "block"
    origins = (merge_ensembles if of_ensemble else merge)(options.folders, options.out, options.prefer)
    for line in trained_differently(options.folders):
        print(one_line(f"warning: {line}"), file=sys.stderr)
    rows = [
        {
            part: origin.block,
            "layers": f"{origin.layers[0]}-{origin.layers[-1]}",
            "taken from": origin.folder,
            "size": format_bytes(origin.size),
            "passed over": ", ".join(map(str, origin.passed_over)) or None,
        }
        for origin in origins
    ]
    print(format_table(rows))
    print(f"{len(origins)} {part}s in {options.out}")
