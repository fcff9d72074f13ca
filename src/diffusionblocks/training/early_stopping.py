"""Early stopping: held-out losses of each unit as it trains, its best weights, and when it has stopped.

Each unit is measured after so many steps of its own, on the same examples with the same noise every time, and with its
moving average where one is kept. So what a unit becomes depends on its own steps alone, whatever the others do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.seeds import keyed_generator
from .ranks import Group
from .residency import Residency
from .step import arithmetic
from .train_config import EarlyStoppingConfig, TrainConfig
from .units import Unit

#: Makes the held-out batches anew, on the device.
HeldOut = Callable[[], Iterable[Mapping[str, Tensor]]]


@dataclass
class Progress:
    """What the measurements of one unit say.

    Attributes:
        measurements: how many there were.
        best_loss: the lowest, in the units of the training loss.
        best_step: steps of the unit when it was measured.
        last_loss: the newest.
        since_best: measurements since the best one.
        weights: the unit's tensors at the best one, on the CPU.
    """

    measurements: int = 0
    best_loss: float = 0.0
    best_step: int = 0
    last_loss: float = 0.0
    since_best: int = 0
    weights: list[Tensor] = field(default_factory=list)

    _NUMBERS = ("measurements", "best_loss", "best_step", "last_loss", "since_best")

    def state(self) -> dict[str, Tensor]:
        """As flat named tensors, which `load` takes; best weights are among them from the start."""
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in self._NUMBERS}
        return numbers | {f"weights.{i}": tensor for i, tensor in enumerate(self.weights)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name in self._NUMBERS:
            value = float(tensors[name])
            setattr(self, name, value if name.endswith("loss") else int(value))
        for i, tensor in enumerate(self.weights):
            tensor.copy_(tensors[f"weights.{i}"])


class EarlyStopping:
    """Measures units on held-out data while they train, and keeps the weights of their lowest loss.

    Args:
        config: of the trainer, with a section `early_stopping`.
        units: what is trained; no two of them move the same parameter.
        residency: brings them to where they compute.
        held_out: makes the batches that are measured on.
        device: where.
        group: ranks that train the unit together: all go by what the first of them measures.

    Raises:
        ValueError: units that move parameters in common, or read what others move.
    """

    def __init__(
        self,
        config: TrainConfig,
        units: list[Unit],
        residency: Residency,
        held_out: HeldOut,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        assert config.early_stopping is not None
        for unit in units:
            if unit.shared or unit.reads:
                raise ValueError(
                    f"train.early_stopping stops each unit by itself, and {unit.name} moves or reads what others move: "
                    "set train.early_stopping to null" + (", or blocks.shared to replicated" if unit.shared else "")
                )
        self.options: EarlyStoppingConfig = config.early_stopping
        self._config, self._units, self._residency = config, units, residency
        self._held_out, self._device, self._group = held_out, device, group
        self._steps = residency.lengths.steps
        self.progress = [
            Progress(weights=[tensor.detach().to("cpu", copy=True) for tensor in self._tensors(unit)]) for unit in units
        ]

    def is_due(self, unit: int) -> bool:
        """Whether a unit, which has just stepped, is to be measured."""
        steps = self._residency.sets[self._units[unit].name].steps
        return steps % self.options.every == 0 or steps == self._steps

    def has_stopped(self, unit: int) -> bool:
        """Whether a unit trains no more, before its last step."""
        return self.options.patience is not None and self.progress[unit].since_best >= self.options.patience

    @property
    def all_have_stopped(self) -> bool:
        """Whether nothing is left to train."""
        return all(map(self.has_stopped, range(len(self._units))))

    def measure(self, unit: int) -> float:
        """Measure a unit, which waits for the device, and keep its weights where they are the best so far."""
        progress, steps = self.progress[unit], self._residency.sets[self._units[unit].name].steps
        with self._averaged(unit):
            loss = self._loss(unit)
            if self._group is not None:
                (loss,) = self._group.of_first([loss])
            progress.measurements += 1
            progress.last_loss = loss
            progress.since_best += 1
            if progress.measurements == 1 or loss < progress.best_loss:  # NaN is never lower
                progress.best_loss, progress.best_step, progress.since_best = loss, steps, 0
                for best, tensor in zip(progress.weights, self._tensors(self._units[unit]), strict=True):
                    best.copy_(tensor.detach())
        return loss

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[None]:
        """Let all units have the weights of their lowest loss; one that was not measured yet, its averages."""
        with contextlib.ExitStack() as stack:
            for unit in range(len(self._units)):
                stack.enter_context(self._exchanged(unit) if self.progress[unit].measurements else self._averaged(unit))
            yield

    @contextlib.contextmanager
    def _averaged(self, unit: int) -> Iterator[None]:
        """Let a unit have its averages as weights (as it is, where none are kept)."""
        self._residency.flush()
        owner = self._residency.sets[self._units[unit].name]
        owner.swap_ema()
        self._residency.refresh()
        try:
            yield
        finally:
            self._residency.refresh()  # what is on the device is a copy of averages
            owner.swap_ema()

    @contextlib.contextmanager
    def _exchanged(self, unit: int) -> Iterator[None]:
        self._residency.flush()
        tensors, best = self._tensors(self._units[unit]), self.progress[unit].weights
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            _copy(tensors, best)
            self._residency.refresh()
            yield
        finally:
            _copy(tensors, before)
            self._residency.refresh()

    def _loss(self, unit: int) -> float:
        """The mean held-out loss of a unit with the weights that it has, in evaluation mode."""
        module: Any = self._residency.activate(unit, None).module
        self._residency.wait_for_state()
        generator = keyed_generator(self._config.seed, self._units[unit].index, 0, "held-out noise", self._device)
        total, count = torch.zeros((), dtype=torch.float64, device=self._device), 0
        module.eval()
        try:
            with torch.no_grad(), arithmetic(self._device, self._config.precision):
                for batch in self._held_out():
                    losses = module.loss(batch, generator)
                    total += losses.double().sum()
                    count += len(losses)
        finally:
            module.train()
        return float(total) / max(count, 1)

    @staticmethod
    def _tensors(unit: Unit) -> list[Tensor]:
        """What of a unit a step changes: its trainable parameters, and the statistics of batch norms."""
        parts: nn.Module = unit.module
        return [*unit.own, *(tensor for tensor in parts.buffers() if not tensor.is_meta)]


def _copy(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
