"""Schedules: which unit steps at which iteration, and the learning rate over a unit's own steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch

from .keys import key

#: Iterations that a schedule may have. A random one keeps four bytes for each turn of a unit.
MOST_ITERATIONS = 10**8

_TOGETHER = 2**12  # visits whose units are computed together
_AHEAD = 2**16  # and at most so many in search of another unit


class BlockSchedule(Sequence[int]):
    """The unit of every iteration, computed when it is asked for; unit u steps exactly steps[u] times.

    A *visit* is one turn of a unit: `dwell` steps in a row, or those that are left. Visits are counted in rounds, each
    of all units that still have one; a random order draws from that count without repeats.

    Args:
        kind, steps, dwell, seed: see `block_schedule`.
    """

    def __init__(self, kind: str, steps: Sequence[int], dwell: int, seed: int) -> None:
        self._kind, self._dwell, self._length = kind, dwell, sum(steps)
        self._visits = np.array([-(-n // dwell) for n in steps], dtype=np.int64)
        self._ends = np.cumsum(self._visits)
        # Between two neighbours of these counts of rounds, the same units have a visit in every round.
        levels = np.unique(np.concatenate([[0], self._visits]))
        self._units = [np.flatnonzero(self._visits > level) for level in levels[:-1]]
        sizes = [len(units) for units in self._units]
        self._starts = np.cumsum([0, *(size * n for size, n in zip(sizes, np.diff(levels).tolist(), strict=True))])
        self._order: np.ndarray[Any, Any] | None = None
        last = [(unit, dwell - n % dwell) for unit, n in enumerate(steps) if n % dwell]
        if kind == "random":
            generator = torch.Generator().manual_seed(key(seed, 0, 0, "schedule"))
            places = torch.randperm(int(self._ends[-1]), generator=generator, dtype=torch.int32)
            self._order = places.numpy()
        # The visits that are short, in the order in which they come, and by how many steps.
        short = sorted((self._place_of_last(unit), missing) for unit, missing in last)
        self._short = np.array([place for place, _ in short], dtype=np.int64)
        self._missing = np.cumsum([0, *(missing for _, missing in short)])
        self._alone = np.count_nonzero(self._visits) == 1
        self._known: tuple[int, list[int]] = (0, [])

    def _place_of_last(self, unit: int) -> int:
        """Which visit is a unit's last one."""
        if self._kind == "sequential":
            return int(self._ends[unit]) - 1
        own = int(self._visits[unit])
        before = int(np.minimum(self._visits, own - 1).sum())
        counted = before + int((self._visits[:unit] >= own).sum())
        return counted if self._order is None else int(np.flatnonzero(self._order == counted)[0])

    def _units_of(self, visits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The units of some visits."""
        if self._kind == "sequential":
            return np.searchsorted(self._ends, visits, side="right")
        counted = visits if self._order is None else self._order[visits].astype(np.int64)
        found = np.empty(len(counted), dtype=np.int64)
        stretch = np.searchsorted(self._starts, counted, side="right") - 1
        for number in np.unique(stretch).tolist():
            here = stretch == number
            units = self._units[number]
            found[here] = units[(counted[here] - self._starts[number]) % len(units)]
        return found

    def _unit_of(self, visit: int) -> int:
        """The unit of a visit; those around it are remembered, for they come next."""
        start, units = self._known
        if not start <= visit < start + len(units):
            start = visit - visit % _TOGETHER
            units = self._units_of(np.arange(start, min(start + _TOGETHER, int(self._ends[-1])))).tolist()
            self._known = start, units
        return units[visit - start]

    def _visit_of(self, iteration: int) -> int:
        """The visit that an iteration belongs to."""
        if not len(self._short):
            return iteration // self._dwell
        ends = (self._short + 1) * self._dwell - self._missing[1:]
        return int(iteration + self._missing[np.searchsorted(ends, iteration, side="right")]) // self._dwell

    def _end_of(self, visit: int) -> int:
        """The iteration after a visit."""
        missing = int(self._missing[np.searchsorted(self._short, visit, side="right")]) if len(self._short) else 0
        return (visit + 1) * self._dwell - missing

    def turn(self, iteration: int) -> tuple[int, int]:
        """(unit, the iteration at which another unit's turn begins, or the length of the schedule)."""
        visit, total, ahead = self._visit_of(iteration), int(self._ends[-1]), _TOGETHER
        unit = self._unit_of(visit)
        if self._alone:
            return unit, len(self)
        start, known = self._known
        while visit < start + len(known):  # as it is most often, the next one stands near
            if known[visit - start] != unit:
                return unit, self._end_of(visit - 1)
            visit += 1
        while visit < total:
            others = self._units_of(np.arange(visit, min(visit + ahead, total))) != unit
            if others.any():
                return unit, self._end_of(visit + int(others.argmax()) - 1)
            visit, ahead = visit + ahead, min(2 * ahead, _AHEAD)
        return unit, len(self)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> list[int]: ...

    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"iteration {place} of {len(self)}")
        return self._unit_of(self._visit_of(place % len(self)))


def block_schedule(kind: str, steps: Sequence[int], dwell: int, seed: int) -> BlockSchedule:
    """The unit of every iteration; unit u steps exactly steps[u] times.

    Args:
        kind: `random` (paper, section 4: blocks drawn at random), `round-robin`, or `sequential` (a unit to its end,
            then the next).
        steps: of each unit.
        dwell: how many steps a unit makes in a row (the last time, those that are left).
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
    return BlockSchedule(kind, steps, dwell, seed)


def next_others(schedule: Sequence[int], start: int = 0) -> Iterator[int | None]:
    """For every iteration from `start` on the unit whose turn comes when the present one's ends; None at the last."""
    place = start
    while place < len(schedule):
        if isinstance(schedule, BlockSchedule):
            _, end = schedule.turn(place)
        else:
            end = next((i for i in range(place, len(schedule)) if schedule[i] != schedule[place]), len(schedule))
        following = schedule[end] if end < len(schedule) else None
        yield from itertools.repeat(following, end - place)
        place = end


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Factor of the base learning rate at a unit's step (0-based): linear warm-up, then constant or cosine."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
