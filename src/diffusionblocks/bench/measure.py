"""Measuring a runner: peak memory by kind, time of a step, time of a switch.

Memory is the allocator's peak after every part has stepped, over steps and switches of all parts; on a CPU, what is
held plus what the profiler saw allocated. Time is that of device events.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..evaluation.memory import transient_peak
from .runners import Runner

#: The environment variable that names the lock of `alone`.
LOCK = "DIFFUSIONBLOCKS_BENCH_LOCK"
#: Steps of every part, twice over, before anything is measured: they compile, make the optimizer's state, and capture
#: every part's steps where steps are captured.
_WARM_UP = 2
#: With more parts than this, a window is long enough to stand alone.
_MANY = 12
#: Steps of every part over which the peak is taken.
_PEAK = 2
#: The allocator rounds sizes up by at most so much.
_ROUNDED = 2**21


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


# ---- memory ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step.

    Attributes:
        peak: of the allocator.
        reserved: what the allocator had taken from the device; None on a CPU.
        kinds: parts of the peak; `activations` is what is left: activations, temporaries and the batch.
        most_gradients: largest sum of gradients at any time, which need not be the time of the peak.
    """

    peak: int
    reserved: int | None
    kinds: dict[str, int]
    most_gradients: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "peak_bytes": self.peak,
            "reserved_bytes": self.reserved,
            "bytes": self.kinds,
            "most_gradients_bytes": self.most_gradients,
        }


def measure_memory(runner: Runner) -> Memory:
    """Measure the peak over steps of every part, which have all stepped before."""
    held = runner.held() | {"data": runner.data_bytes}
    with _Gradients(runner) as gradients:
        measure = _on_gpu if runner.device.type == "cuda" else _on_cpu
        peak, reserved, kinds = measure(runner, gradients, held)
    known = held | kinds
    return Memory(peak, reserved, known | {"activations": peak - sum(known.values())}, gradients.most)


def _on_cpu(runner: Runner, gradients: _Gradients, held: dict[str, int]) -> tuple[int, None, dict[str, int]]:
    """Gradients count with the most that there were: there is no telling how many at the peak."""
    peaks = [transient_peak(functools.partial(runner.step, turn), runner.device) for turn in range(runner.turns)]
    return sum(held.values()) + max(peaks), None, {"gradients": gradients.most}


def _on_gpu(runner: Runner, gradients: _Gradients, held: dict[str, int]) -> tuple[int, int, dict[str, int]]:
    peaks = []
    reserved = 0
    for turn in range(runner.turns):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(_PEAK):
            runner.step(turn)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
        reserved = max(reserved, torch.cuda.max_memory_reserved())
    worst = peaks.index(max(peaks))
    try:
        there = at_peak(_history(runner, worst), gradients.places)
    except Exception as error:  # torch calls these functions private: they may change, and the peak is known without
        warnings.warn(f"no history of the allocator ({error}): gradients are counted with their most", stacklevel=2)
        there = gradients.most
    return max(peaks), reserved, {"gradients": there, "workspace": _workspace()}


def _history(runner: Runner, turn: int) -> list[dict[str, Any]]:
    """What the allocator did while a part stepped, after another one."""
    runner.step((turn + 1) % runner.turns)
    memory: Any = torch.cuda.memory
    memory._record_memory_history(context=None, max_entries=10**6)
    try:
        for _ in range(_PEAK):
            runner.step(turn)
        torch.cuda.synchronize()
        trace: list[dict[str, Any]] = memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        memory._record_memory_history(enabled=None)
    return trace


def at_peak(trace: list[dict[str, Any]], places: dict[int, int]) -> int:
    """Bytes of gradients when most memory was allocated.

    Args:
        trace: the allocator's history, entries with `action`, `addr` and `size`.
        places: address -> bytes of each gradient.
    """
    total = most = gradients = found = 0
    counted: dict[int, int] = {}
    for entry in trace:
        address, size = entry["addr"], entry["size"]
        if entry["action"] == "alloc":
            total += size
            wanted = places.get(address, 0)
            if 0 < wanted <= size <= wanted + _ROUNDED:  # else something else was there at another time
                counted[address] = wanted
                gradients += wanted
            if total > most:
                most, found = total, gradients
        elif entry["action"] == "free_requested":
            total -= size
            gradients -= counted.pop(address, 0)
    return found


def _workspace() -> int:
    """Bytes that matrix products keep for themselves in the allocator's memory; they are made anew when needed."""
    before = torch.cuda.memory_allocated()
    clear: Any = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is None:
        return 0
    clear()
    return before - torch.cuda.memory_allocated()


class _Gradients:
    """Watches gradients come, each when it is whole.

    Attributes:
        most: most bytes of gradients at any time.
        places: address -> bytes. Those that an optimizer in the backward pass has dropped by then are not known.
    """

    def __init__(self, runner: Runner) -> None:
        self._parameters = [p for p in runner.parameters() if p.is_leaf and not p.is_meta]
        self._hooks: list[Any] = []
        self.most = 0
        self.places: dict[int, int] = {}

    def __enter__(self) -> _Gradients:
        for parameter in self._parameters:
            grad = parameter.requires_grad
            parameter.requires_grad_(True)  # an alternative may train it later
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._came))
            parameter.requires_grad_(grad)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _came(self, parameter: Tensor) -> None:
        own = parameter.numel() * parameter.element_size()
        there = sum(p.grad.numel() * p.grad.element_size() for p in self._parameters if p.grad is not None)
        if parameter.grad is None:
            there += own
        else:
            self.places[parameter.grad.data_ptr()] = own
        self.most = max(self.most, there)


# ---- time ------------------------------------------------------------------------------------------------------


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
    """A step without switches; each window has `iterations` steps of every part."""
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


def dwelling_times(runner: Runner, windows: int, dwell: int) -> Times:
    """A step where every part stays for `dwell` steps, switches included; each window goes round once or more."""
    clock = Clock(runner.device)
    rounds = max(1, 8 // (dwell * runner.turns))
    values = []
    for turn, following in _dwelling(runner.turns, dwell, 1):  # the window starts as it ends, with a switch to come
        runner.step(turn, following)
    for _ in range(_windows(runner, windows)):
        clock.wait()
        start = clock.now()
        for turn, following in _dwelling(runner.turns, dwell, rounds):
            runner.step(turn, following)
        end = clock.now()
        clock.wait()
        values.append(clock.between(start, end) / (rounds * dwell * runner.turns))
    return Times.of(values)


def _windows(runner: Runner, windows: int) -> int:
    """Fewer, where a window goes through very many parts."""
    return windows if runner.turns <= _MANY else 1


def _dwelling(turns: int, dwell: int, rounds: int) -> Iterator[tuple[int, int | None]]:
    for _ in range(rounds):
        for turn in range(turns):
            for _ in range(dwell):
                yield turn, (turn + 1) % turns if turns > 1 else None
