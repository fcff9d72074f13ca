"""diffusionblocks average."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `average`."""
    parser.set_defaults(run=run)
    parser.add_argument("folders", type=Path, metavar="model", help="folder of the branched model")
    parser.add_argument(
        "--trunk", type=Path, required=True, help="folder of the trunk that its blocks were copied from"
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        required=True,
        metavar="SHARE",
        help="share of the trunk's weights in each block, 0 to 1, block 0 (the highest noise) first",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the averaged model")


def run(options: argparse.Namespace) -> None:
    """Average the weights of branched blocks with their trunk's."""
    from ..common.processing_files import read_files
    from ..core.loading import load
    from ..core.model_card import notes_in
    from ..core.saving import check_out, save
    from ..core.soup import average_with_trunk

    check_out(options.out, [options.folders, options.trunk], "averaged")
    model = average_with_trunk(load(options.folders), load(options.trunk), options.shares)
    save(model, options.out, processing=read_files(options.folders), notes=notes_in(options.folders))
    print(f"{model.partition.num_blocks} blocks with {options.shares} of the trunk's weights in {options.out}")
