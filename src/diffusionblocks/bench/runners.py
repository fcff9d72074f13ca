"""What a measurement steps: our trainer, behind the interface that alternatives share."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..training import Diverged, Trainer


class Runner(abc.ABC):
    """Trains, one step at a call.

    Attributes:
        turns: how many parts take turns: blocks, or layers where those train one at a time; else 1.
        switches: whether going over to another part takes time of its own.
        steps_per_switch: steps after which the method itself goes over to the next part; None leaves it to the caller.
        device: where it trains.
        host_bytes: bytes of training state in host memory.
        data_bytes: bytes of the examples, which are on the device.
    """

    turns: int = 1
    switches: bool = False
    steps_per_switch: int | None = None
    device: torch.device
    host_bytes: int = 0
    data_bytes: int = 0

    @abc.abstractmethod
    def step(self, turn: int, following: int | None = None) -> None:
        """Step a part; no wait for the device.

        Args:
            turn: which part.
            following: which part comes after it, where known.
        """

    @abc.abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The parameters on the device."""

    @abc.abstractmethod
    def persistent_bytes(self) -> dict[str, int]:
        """Bytes on the device between steps: of `parameters`, `optimizer`, `ema` and `buffers`."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise `Diverged` if a loss was not finite."""


class TrainerRunner(Runner):
    """Our trainer."""

    def __init__(self, trainer: Trainer, data_bytes: int) -> None:
        trainer.model.train()
        self.data_bytes = data_bytes
        self.trainer = trainer
        self.turns = len(trainer.units)
        self.switches = trainer.config.resident == "active" and self.turns > 1
        self.device = trainer.device
        self.host_bytes = trainer.residency.host_bytes

    def step(self, turn: int, following: int | None = None) -> None:
        """Step a unit of the trainer."""
        self.trainer.step(turn, following)

    def _modules(self) -> list[nn.Module]:
        """The modules whose tensors are on the device."""
        if self.trainer.config.resident == "all":
            return [self.trainer.model]
        return [each.module for each in self.trainer.residency.shared_modules]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the modules on the device."""
        return [p for module in self._modules() for p in module.parameters()]

    def persistent_bytes(self) -> dict[str, int]:
        """Bytes of the units that the device has room for."""
        present = self.trainer.units
        if self.switches:  # there is room for the largest
            present = [max(present, key=lambda unit: bytes_of(unit.module.parameters()))]
        sets = [self.trainer.sets[name] for name in self.trainer.sets.keys() & {"shared", *(u.name for u in present)}]
        return {
            "parameters": bytes_of(p for unit in present for p in unit.module.parameters()),
            "optimizer": bytes_of(t for owned in sets for moments in owned.moments for t in moments.values()),
            "ema": bytes_of(t for owned in sets for t in owned.ema),
            "buffers": bytes_of(t for unit in present for t in unit.module.buffers()),
        }

    def check(self) -> None:
        """Raise `Diverged` if the trainer noted a step that was not finite."""
        if self.trainer.stepper.first_bad_step() is not None:
            raise Diverged("a loss was not finite, so the figures are of no use")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once; of a tensor made of others (an 8-bit state), those."""
    return sum({id(part): part.numel() * part.element_size() for t in tensors for part in plain(t)}.values())


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a tensor subclass is made of."""
    inner: Any = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        yield tensor
        return
    for name in inner()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # a distributed tensor names its mesh, too
            yield from plain(part)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an optimizer's state, also those in objects of its own."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))
