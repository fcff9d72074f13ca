"""Memory of a training step: what it must hold, counted, and what it peaks at, measured."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile

from ..common.modules import bytes_of
from ..training import Trainer
from .row import Row


@dataclass(frozen=True)
class StepMemory(Row):
    """Bytes of one unit's training step.

    Attributes:
        unit: its name.
        parameters: bytes of all weights the unit needs (frozen ones too, and those of its teachers).
        optimizer: bytes of AdamW's state for them.
        ema: bytes of the moving average.
        transient: measured peak of what the step allocates: gradients, activations, batch.
    """

    unit: str
    parameters: int
    optimizer: int
    ema: int
    transient: int

    @property
    def peak(self) -> int:
        """Bytes that the step needs at its peak, with nothing of other units resident."""
        return self.parameters + self.optimizer + self.ema + self.transient

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return super().to_dict() | {"peak": self.peak}


def step_memory(trainer: Trainer) -> list[StepMemory]:
    """Measure one step of every unit, after each has stepped twice (AdamW's state is made lazily).

    The trainer's model is trained by these steps: give a fresh one. On CPU the peak is read from the profiler's
    allocation events, on a GPU from the allocator. What other units keep is not counted: it is what a unit needs
    when it trains alone.
    """
    trainer.model.train()
    results = []
    for index, unit in enumerate(trainer.units):
        trainer.step(index)
        trainer.step(index)
        transient = transient_peak(functools.partial(trainer.step, index), trainer.device)
        names = [unit.name, *({"shared"} & trainer.sets.keys())]
        sets = [trainer.sets[name] for name in names]
        optimizer = (value for group in sets for moments in group.moments for value in moments.values())
        results.append(
            StepMemory(
                unit.name,
                sum(bytes_of([*m.parameters(), *m.buffers()]) for m in (unit.module, *trainer.teachers)),
                bytes_of(optimizer),
                bytes_of(average for group in sets for average in group.ema),
                transient,
            )
        )
    return results


def transient_peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step allocates at its peak, beyond what is there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print its own start and stop
    # Not torch.profiler's, which makes a tree of all events: that takes far longer than the step.
    with profile(use_device=None, profile_memory=True) as profiler:
        step()
    total = peak = 0
    assert profiler.kineto_results is not None
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
