"""What the machine can hold: memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .modules import bytes_of


def check_memory(model: nn.Module, share: float, copies: float, device: torch.device, advice: str) -> None:
    """Refuse weights that the machine cannot hold, before it tries to.

    Args:
        model: on the meta device.
        share: how much of the model is there: less than 1 where only some blocks are.
        copies: how many times weights that train are there: themselves, gradients, optimizer state, average. Others
            are there once.
        device: where they go.
        advice: what to do about it.

    Raises:
        ValueError: more bytes than the device or the host has.
    """
    parameters = list(model.parameters())
    trainable = bytes_of(p for p in parameters if p.requires_grad)
    size = int(share * (bytes_of(parameters) + trainable * (copies - 1)))
    most = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()
    if size > most:
        raise ValueError(
            f"the model's weights with gradients and optimizer state need at least {size / 2**30:,.1f} GiB, and "
            f"{'the device' if device.type == 'cuda' else 'this machine'} has {most / 2**30:,.1f}: {advice}"
        )


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's where that is less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *(most for most, _ in group_limits())])


def free_host_memory() -> int:
    """Bytes of memory that this process could still have: of the machine, and of its control groups."""
    pages = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    return min([int(pages["MemAvailable"]) * 1024, *(max(0, most - now) for most, now in group_limits())])


def group_limits(
    groups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """The limits of this process's control group and of those around it, each with the bytes in use there.

    What a group caches of files that nobody writes is not in use: the system gives it away when memory is short.

    Args:
        groups: the folder of control groups (version 2).
        process: the file that says which one is this process's.
    """
    lines = process.read_text().splitlines() if process.is_file() else []
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = groups / own.lstrip("/")
    for place in (folder, *folder.parents):
        if not place.is_relative_to(groups):
            return
        limit, current = place / "memory.max", place / "memory.current"
        if limit.is_file() and current.is_file() and (most := limit.read_text().strip()).isdecimal():
            yield int(most), max(0, int(current.read_text()) - _cached(place / "memory.stat"))


def _cached(stat: Path) -> int:
    """Bytes of files that a control group could give away."""
    pairs = (line.split() for line in stat.read_text().splitlines()) if stat.is_file() else ()
    return sum(int(value) for name, value in pairs if name == "inactive_file")


def device_bytes(device: torch.device) -> int | None:
    """Memory of a GPU in use as its driver counts it (`nvidia-smi`): contexts, libraries and all that allocators hold.

    Of all processes on it. None of a CPU.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free
