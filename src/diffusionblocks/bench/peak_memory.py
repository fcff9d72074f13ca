"""The peak memory of a runner's step, by kind.

It is the allocator's peak after every part has stepped, over steps and switches of all parts. On a CPU it is what stays
between steps plus what the profiler saw allocated.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..evaluation.memory import transient_peak
from .runners import Runner

#: Steps of every part over which the peak is taken.
_STEPS = 2
#: The allocator rounds sizes up by at most so much.
_ROUNDING = 2**21


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
    persistent = runner.persistent_bytes() | {"data": runner.data_bytes}
    with _Gradients(runner) as gradients:
        measure = _on_gpu if runner.device.type == "cuda" else _on_cpu
        peak, reserved, kinds = measure(runner, gradients, persistent)
    kinds = persistent | kinds
    return Memory(peak, reserved, kinds | {"activations": peak - sum(kinds.values())}, gradients.most)


def peak_of_steps(runner: Runner) -> tuple[int, int | None]:
    """The peak of the first two steps of every part, and the device's memory that the allocator took for them; None on
    a CPU."""
    if runner.device.type != "cuda":
        for turn in range(runner.turns):
            runner.step(turn)
        return measure_memory(runner).peak, None
    for _ in range(_STEPS):
        for turn in range(runner.turns):
            runner.step(turn)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _on_cpu(runner: Runner, gradients: _Gradients, persistent: dict[str, int]) -> tuple[int, None, dict[str, int]]:
    """Gradients count with the most that there were: there is no telling how many at the peak."""
    peaks = [transient_peak(functools.partial(runner.step, turn), runner.device) for turn in range(runner.turns)]
    return sum(persistent.values()) + max(peaks), None, {"gradients": gradients.most}


def _on_gpu(runner: Runner, gradients: _Gradients, persistent: dict[str, int]) -> tuple[int, int, dict[str, int]]:
    peaks = []
    reserved = 0
    for turn in range(runner.turns):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(_STEPS):
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
        for _ in range(_STEPS):
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
    total = most = gradients = at_most = 0
    there: dict[int, int] = {}  # address -> bytes of a gradient
    for entry in trace:
        address, size = entry["addr"], entry["size"]
        if entry["action"] == "alloc":
            total += size
            own = places.get(address, 0)
            if 0 < own <= size <= own + _ROUNDING:  # else something else was there at another time
                there[address] = own
                gradients += own
            if total > most:
                most, at_most = total, gradients
        elif entry["action"] == "free_requested":
            total -= size
            gradients -= there.pop(address, 0)
    return at_most


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
