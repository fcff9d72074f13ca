"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..common.modules import bytes_of
from ..core.block import Block
from ..core.model import DiffusionBlocks
from ..core.partition import Partition
from ..noise import NoiseProcess
from ..training import trainable


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as an aligned text table: floats to four digits, None and what a row does not have as "-"."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return " ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_bytes(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def format_duration(seconds: float) -> str:
    """Seconds as text that is read at a glance."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def block_table(model: DiffusionBlocks) -> list[dict[str, Any]]:
    """A row per block: layers, levels, probability, parameters, and predicted bytes of training with AdamW.

    Bytes are of one block with its shared parameters, in the weights' own precision, without activations.
    """
    rows = []
    for block in model.blocks:
        assert isinstance(block, Block)
        low, high = model.partition.interval(block.index)
        trains_on = model.partition.training_interval(block.index)
        probability = model.noise.cdf(torch.tensor([low, high], dtype=torch.float64)).diff().item()
        trainable_parameters = trainable(block)
        layers = model.partition.layer_range(block.index)
        rows.append(
            {
                "block": block.index,
                "layers": f"{layers[0]}-{layers[-1]}",
                "levels": f"{low:.4g} - {high:.4g}",
                "trains on": f"{trains_on[0]:.4g} - {trains_on[1]:.4g}",
                "probability": f"{probability:.4f}",
                "trainable": f"{sum(p.numel() for p in trainable_parameters):,}",
                "total": f"{sum(p.numel() for p in block.parameters()):,}",
                "parameters": format_bytes(bytes_of(block.parameters())),
                "gradients": format_bytes(bytes_of(trainable_parameters)),
                "optimizer": format_bytes(2 * bytes_of(trainable_parameters)),
            }
        )
    return rows


def partition_sketch(partition: Partition, noise: NoiseProcess, width: int = 72) -> str:
    """The training density over log sigma (or t) as a line of bars, and below it the block that owns each level."""
    levels = noise.even_levels(noise.level_min, noise.level_max, width)
    density = noise.density(levels)
    heights = (density / density.max() * 8).round().int().tolist()
    owners = partition.block_of(levels).tolist()
    ends = f"{noise.level_min:g}", f"{noise.level_max:g}"
    return "\n".join(
        [
            "density  " + "".join(" ▁▂▃▄▅▆▇█"[height] for height in heights),
            "block    " + "".join(str(owner % 10) for owner in owners),
            f"{noise.symbol:<9}" + ends[0] + ends[1].rjust(width - len(ends[0])),
        ]
    )
