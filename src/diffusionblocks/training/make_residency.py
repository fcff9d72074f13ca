"""Where units compute: the residency that a configuration and a group of ranks ask for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .ranks import Group, ShardGroup
from .residency import ActiveResident, AllResident, Lengths, Residency
from .shards import ShardResident
from .train_config import TrainConfig
from .units import Unit


def make_residency(
    units: list[Unit],
    shared: list[nn.Parameter],
    lengths: Lengths,
    config: TrainConfig,
    device: torch.device,
    folder: Path | None,
    fill: Callable[[int], None] | None,
    group: Group | None = None,
) -> Residency:
    """Make the residency that a configuration asks for; one unit alone is always on the device.

    Args:
        units: what is trained.
        shared: parameters that all units move.
        lengths: steps of each unit.
        config: `resident` and `offload`.
        device: where to train.
        folder: of the run; mapped files go below it (None: to the system's temporary folder).
        fill: gives the block of an index its weights, where it is still on the meta device.
        group: ranks that train the one unit together.
    """
    if isinstance(group, ShardGroup):
        return ShardResident(units, shared, lengths, config, device, fill, group=group)
    if config.resident == "all" or len(units) == 1:
        return AllResident(units, shared, lengths, config, device, fill)
    place = folder / "resident" if folder is not None else Path(tempfile.mkdtemp(prefix="diffusionblocks-"))
    return ActiveResident(units, shared, lengths, config, device, fill, folder=place)
