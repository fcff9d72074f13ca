"""Schedules: which unit steps at which iteration, and the learning rate over a unit's own steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch

from .keys import key


def block_schedule(kind: str, steps: Sequence[int], dwell: int, seed: int) -> list[int]:
    """The unit of every iteration; unit u steps exactly steps[u] times.

    Args:
        kind: `random` (paper, section 4: blocks drawn at random), `round-robin`, or `sequential` (a unit to its end,
            then the next).
        steps: of each unit.
        dwell: how many steps a unit makes in a row (the last time, those that are left).
        seed: of the random order.

    Returns:
        Length sum(steps).
    """
    visits = [[min(dwell, n - start) for start in range(0, n, dwell)] for n in steps]
    if kind == "sequential":
        order = [(unit, length) for unit, lengths in enumerate(visits) for length in lengths]
    else:
        rounds = zip_longest(*visits)
        order = [(unit, length) for lengths in rounds for unit, length in enumerate(lengths) if length is not None]
    if kind == "random":
        generator = torch.Generator().manual_seed(key(seed, 0, 0, "schedule"))
        places: list[int] = torch.randperm(len(order), generator=generator).tolist()
        order = [order[place] for place in places]
    return [unit for unit, length in order for _ in range(length)]


def next_others(schedule: Sequence[int]) -> list[int | None]:
    """For every iteration the unit whose turn comes when that of the present one ends; None at the last turn."""
    following: list[int | None] = [None] * len(schedule)
    for i in range(len(schedule) - 2, -1, -1):
        following[i] = following[i + 1] if schedule[i + 1] == schedule[i] else schedule[i + 1]
    return following


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Factor of the base learning rate at a unit's step (0-based): linear warm-up, then constant or cosine."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
