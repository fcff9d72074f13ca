"""What the machine can hold: memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from .modules import bytes_of


def check_memory(model: nn.Module, copies: float, device: torch.device, advice: str) -> None:
    """Refuse weights that the machine cannot hold, before it tries to.

    Args:
        model: on the meta device.
        copies: how many times its weights are there: themselves, gradients, optimizer state, average; a share of them
            where only some blocks are.
        device: where they go.
        advice: what to do about it.

    Raises:
        ValueError: more bytes than the device or the host has.
    """
    size = int(bytes_of(model.parameters()) * copies)
    most = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()
    if size > most:
        raise ValueError(
            f"the model's weights with gradients and optimizer state need at least {size / 2**30:,.1f} GiB, and "
            f"{'the device' if device.type == 'cuda' else 'this machine'} has {most / 2**30:,.1f}: {advice}"
        )


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdecimal() else physical
