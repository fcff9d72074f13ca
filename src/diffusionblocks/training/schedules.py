"""Schedules: which unit steps at which iteration, and the learning rate over a unit's own steps."""

from __future__ import annotations

import math

import torch

from .keys import key


def random_schedule(steps: list[int], seed: int) -> list[int]:
    """Units in uniformly random order, unit u exactly steps[u] times (paper, section 4: blocks drawn at random).

    Returns:
        The unit of every iteration, length sum(steps).
    """
    units = torch.cat([torch.full((n,), unit) for unit, n in enumerate(steps)])
    generator = torch.Generator().manual_seed(key(seed, 0, 0, "schedule"))
    order: list[int] = units[torch.randperm(len(units), generator=generator)].tolist()
    return order


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Factor of the base learning rate at a unit's step (0-based): linear warm-up, then constant or cosine."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
