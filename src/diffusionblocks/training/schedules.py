"""Schedules: which unit steps at which iteration, and the learning rate over a unit's own steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..common.seeds import keyed_generator

#: Iterations that a schedule may have: a byte each, and four more while a random one is drawn.
MOST_ITERATIONS = 5 * 10**7

#: The unit of every iteration, as the smallest unsigned integers that hold its index.
Schedule = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


def block_schedule(kind: str, steps: Sequence[int], steps_per_switch: int, seed: int) -> Schedule:
    """Lay out which unit steps at every iteration; unit u steps exactly steps[u] times.

    Args:
        kind: `random` (paper, section 4: blocks drawn at random), `round-robin`, or `sequential` (a unit to its end,
            then the next).
        steps: of each unit.
        steps_per_switch: how many steps a unit makes in a row (the last time, those that are left).
        seed: of the random order.

    Returns:
        Length sum(steps).

    Raises:
        ValueError: more than `MOST_ITERATIONS`.
    """
    if sum(steps) > MOST_ITERATIONS:
        raise ValueError(
            f"{len(steps)} units of up to {max(steps):,} steps are {sum(steps):,} iterations, more than the "
            f"{MOST_ITERATIONS:,} that a run may have: set train.steps or train.epochs lower"
        )
    # A visit is one turn of a unit: `steps_per_switch` steps in a row, or those that are left.
    visits = [-(-n // steps_per_switch) for n in steps]
    units = np.repeat(np.arange(len(steps), dtype=np.min_scalar_type(len(steps))), visits)
    order: np.ndarray[Any, Any] = np.arange(len(units), dtype=np.int32)
    if kind != "sequential":  # in rounds, each of all units that still have a visit
        order = np.concatenate([np.arange(n, dtype=np.int32) for n in visits]).argsort(kind="stable")
    if kind == "random":
        generator = keyed_generator(seed, 0, 0, "schedule")
        order = order[torch.randperm(len(units), generator=generator, dtype=torch.int32).numpy()]
    turns: Schedule = units[order]
    if steps_per_switch == 1:
        return turns
    lengths = np.full(len(units), steps_per_switch)
    for last, n in zip(itertools.accumulate(visits), steps, strict=True):
        if n % steps_per_switch:
            lengths[last - 1] = n % steps_per_switch
    return np.repeat(turns, lengths[order])


def next_others(schedule: Schedule | Sequence[int], start: int = 0) -> Iterator[int | None]:
    """For every iteration from `start` on the unit whose turn comes when the present one's ends; None at the last."""
    schedule, place = np.asarray(schedule), start
    while place < len(schedule):
        end = _end_of_turn(schedule, place)
        following = int(schedule[end]) if end < len(schedule) else None
        yield from itertools.repeat(following, end - place)
        place = end


def _end_of_turn(schedule: Schedule, place: int) -> int:
    """The first iteration after `place` of another unit, or the length of the schedule."""
    ahead = 64
    while True:  # most turns are short, and one unit alone has a single turn
        others = schedule[place : place + ahead] != schedule[place]
        if others.any():
            return place + int(others.argmax())
        if place + ahead >= len(schedule):
            return len(schedule)
        ahead *= 2


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Factor of the base learning rate at a unit's step (0-based): linear warm-up, then constant or cosine."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
