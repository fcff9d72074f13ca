"""diffusionblocks branch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.choices import choice_of


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `branch`."""
    parser.set_defaults(run=run)
    parser.add_argument("model", type=Path, help="folder of the trunk")
    parser.add_argument("--blocks", type=int, required=True, metavar="B", help="number of blocks")
    parser.add_argument("--out", type=Path, required=True, help="folder of the branched model")
    parser.add_argument(
        "--overlap", type=float, help="gamma: how far the blocks' training levels overlap (default 0.05)"
    )
    parser.add_argument(
        "--partition",
        type=choice_of(_partitions),
        metavar="STRATEGY",
        help="equi-probability, log-uniform or uniform (default: the trunk's)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="layers of each block, block 0 (the highest noise) first, at most the trunk's (default: all of them); of "
        "fewer the trunk's first, last and evenly spaced ones between are copied",
    )
    parser.add_argument(
        "--split",
        choices=("layers", "experts"),
        help="layers: B times the trunk's layers (default); experts: the trunk's layers in each block",
    )


def _partitions() -> tuple[str, ...]:
    from ..noise import PARTITION_STRATEGIES

    return PARTITION_STRATEGIES


def run(options: argparse.Namespace) -> None:
    """Copy a trained trunk into several blocks."""
    from ..common.processing_files import read_files
    from ..core.branching import branch
    from ..core.loading import load
    from ..core.model_card import notes_in
    from ..core.saving import check_out, save
    from ..reports.tables import block_table, format_table

    values = {name: getattr(options, name) for name in ("layers", "overlap", "partition", "split")}
    changes = {name: value for name, value in values.items() if value is not None}
    check_out(options.out, [options.model], "branched")
    model = branch(load(options.model), options.blocks, **changes)
    save(model, options.out, processing=read_files(options.model), notes=notes_in(options.model))
    print(format_table(block_table(model)))
    print(f"{options.blocks} blocks of {_layers(model.partition.layers)} layers in {options.out}")


def _layers(counts: tuple[int, ...]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
