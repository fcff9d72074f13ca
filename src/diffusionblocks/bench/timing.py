"""The time of a runner's step and of its switches, by device events, or by the host's clock for a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .runners import Runner

#: The environment variable that names the lock of `alone`.
LOCK = "DIFFUSIONBLOCKS_BENCH_LOCK"
#: Steps of every part, twice over, before anything is measured: they compile, make the optimizer's state, and capture
#: every part's steps where steps are captured.
_WARM_UP = 2
#: With more parts than this, a window is long enough to stand alone.
_MANY = 12


class Clock:
    """Reads the time of a device: its events, or the host's clock for a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Any:
        """A mark in time; no wait."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has done all."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, after `wait`."""
        return float(start.elapsed_time(end)) if self._on_gpu else 1000.0 * (end - start)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other bench with the same lock computes; none waits without a lock."""
    path = os.environ.get(LOCK)
    if path is None:
        yield
        return
    import fcntl  # not on every system, and only this needs it

    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # not by closing: a forked helper may have the file open, too


def warm_up(runner: Runner) -> None:
    """Step every part a few times."""
    for _ in range(2):
        for turn in range(runner.turns):
            for _ in range(_WARM_UP):
                runner.step(turn)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step, over several windows."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Times:
        """Median and range."""
        return cls(statistics.median(values), min(values), max(values))

    def to_dict(self) -> dict[str, float]:
        """As JSON values."""
        return dataclasses.asdict(self)


def steady_times(runner: Runner, windows: int, iterations: int) -> Times:
    """Time a step without switches; each window has `iterations` steps of every part."""
    clock = Clock(runner.device)
    values = []
    for _ in range(_windows(runner, windows)):
        marks = []
        if runner.switches:
            for turn in range(runner.turns):
                runner.step(turn)  # brings it in, untimed
                start = clock.now()
                for _ in range(iterations):
                    runner.step(turn)
                marks.append((start, clock.now()))
        else:
            start = clock.now()
            for _ in range(iterations):
                for turn in range(runner.turns):
                    runner.step(turn)
            marks.append((start, clock.now()))
        clock.wait()
        values.append(sum(clock.between(*pair) for pair in marks) / (runner.turns * iterations))
    return Times.of(values)


def switching_times(runner: Runner, windows: int, steps_per_switch: int) -> Times:
    """Time a step, switches included; each window goes round all parts once or more."""
    clock = Clock(runner.device)
    rounds = max(1, 8 // (steps_per_switch * runner.turns))
    values = []
    for turn, following in _turns(
        runner.turns, steps_per_switch, 1
    ):  # the window starts as it ends, with a switch to come
        runner.step(turn, following)
    for _ in range(_windows(runner, windows)):
        clock.wait()
        start = clock.now()
        for turn, following in _turns(runner.turns, steps_per_switch, rounds):
            runner.step(turn, following)
        end = clock.now()
        clock.wait()
        values.append(clock.between(start, end) / (rounds * steps_per_switch * runner.turns))
    return Times.of(values)


@dataclass(frozen=True)
class Switching:
    """Milliseconds of a step with switches, and of one without in windows of as many steps, by turns.

    A GPU's clocks follow its load: steps of short windows are faster than those of long ones, with or without switches.

    Attributes:
        step: with switches.
        steady: without.
        ratio: median of the windows' ratios.
    """

    step: Times
    steady: Times
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"step_ms": self.step.to_dict(), "steady_ms": self.steady.to_dict(), "ratio": self.ratio}


def paired_switching(runner: Runner, windows: int, steps_per_switch: int) -> Switching:
    """Time steps with switches beside steps without; see `Switching`."""
    step, steady = [], []
    rounds = max(1, 8 // (steps_per_switch * runner.turns))
    for _ in range(_windows(runner, windows)):
        step.append(switching_times(runner, 1, steps_per_switch).median)
        steady.append(steady_times(runner, 1, rounds * steps_per_switch).median)
    ratios = [a / b for a, b in zip(step, steady, strict=True)]
    return Switching(Times.of(step), Times.of(steady), statistics.median(ratios))


def _windows(runner: Runner, windows: int) -> int:
    """Fewer, where a window goes through very many parts."""
    return windows if runner.turns <= _MANY else 1


def _turns(turns: int, steps_per_switch: int, rounds: int) -> Iterator[tuple[int, int | None]]:
    for _ in range(rounds):
        for turn in range(turns):
            for _ in range(steps_per_switch):
                yield turn, (turn + 1) % turns if turns > 1 else None
