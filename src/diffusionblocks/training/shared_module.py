"""Shared modules: modules without tensors of their own, in which the tensors of any unit of one shape compute."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.modules import check_recomputable, empty_tables, places_of, tensors_of
from ..core.block import Block
from .patches import multiply_patches
from .train_config import TrainConfig
from .units import Unit


class SharedModule:
    """A copy of a unit's module without tensors, to which the tensors of any unit of its shape are bound.

    Attributes:
        module: runs the network with the tensors that are bound.
        unit: whose tensors these are.
    """

    unit: Unit | None = None

    def __init__(self, unit: Unit, config: TrainConfig) -> None:
        memo: dict[int, Any] = {}
        for tensor in tensors_of(unit.module):
            empty = torch.empty_like(tensor, device="meta")
            grad = tensor.requires_grad
            memo[id(tensor)] = nn.Parameter(empty, grad) if isinstance(tensor, nn.Parameter) else empty
        self.module: nn.Module = copy.deepcopy(unit.module, memo)
        multiply_patches(self.module)
        self.module.train()
        if config.activation_checkpointing:
            check_recomputable(self.module, "train.activation_checkpointing = true")
            self.module.activation_checkpointing = True  # type: ignore[assignment]
        if config.loss_chunk is not None:
            self.module.loss_chunk = config.loss_chunk  # type: ignore[assignment]
        self._places = list(places_of(self.module))

    def take_tables(self, unit: Unit) -> None:
        """Take over tables that are neither parameters nor buffers, and were empty when the module was made."""
        for name, attribute in list(empty_tables(self.module)):
            setattr(self.module.get_submodule(name), attribute, getattr(unit.module.get_submodule(name), attribute))

    def bind(self, unit: Unit, tensors: list[Tensor]) -> None:
        """Compute with these tensors, in the order of `tensors_of`, for that unit."""
        self.unit = unit
        for (entries, name), tensor in zip(self._places, tensors, strict=True):
            entries[name] = tensor
        if isinstance(self.module, Block) and isinstance(unit.module, Block):
            # What a block of the same shape has of its own, beside tensors.
            self.module.index, self.module.interval = unit.module.index, unit.module.interval


def shape_of(unit: Unit) -> tuple[Any, ...]:
    """Return a key that is equal for units which one shared module serves.

    These have the same modules, with tensors of the same shapes, tied alike.
    """
    layers = [repr(layer) for layer in unit.module.layers()] if isinstance(unit.module, Block) else []
    return _shape_of_module(unit.module), tuple(layers)


def kinds_of(layers: Iterable[nn.Module]) -> list[tuple[Any, ...]]:
    """Return a key for each layer, equal for those of one kind: with the same modules and shapes, printed alike."""
    return [(_shape_of_module(layer), repr(layer)) for layer in layers]


def _shape_of_module(module: nn.Module) -> tuple[Any, ...]:
    tensors = tensors_of(module)
    first = {id(t): i for i, t in reversed(list(enumerate(tensors)))}
    specs = tuple((t.shape, t.dtype, t.requires_grad, first[id(t)]) for t in tensors)
    return specs, tuple(type(part) for part in module.modules())


def in_several(modules: list[nn.Module]) -> set[int]:
    """Identities of the tensors that more than one module holds."""
    every: set[int] = set()
    common: set[int] = set()
    for module in modules:
        own = {id(t) for t in tensors_of(module)}
        common |= own & every
        every |= own
    return common


def move_tensors(module: nn.Module, identities: set[int], device: torch.device) -> None:
    """Move some of a module's parameters and buffers, which other modules may share, to a device."""
    for entries, name in places_of(module):
        tensor = entries[name]
        if id(tensor) in identities and tensor.device != device:
            with torch.no_grad():
                tensor.data = tensor.data.to(device)
