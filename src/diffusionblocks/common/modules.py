"""Helpers for any module: its tensors in a fixed order, its device, and evaluation mode for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def places_of(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a parameter or buffer, in a fixed order: the dictionary that holds it, and its name there."""
    for part in module.modules():
        for entries in (part._parameters, part._buffers):
            for name, tensor in entries.items():
                if tensor is not None:
                    yield entries, name


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers in a fixed order, one that is used twice named twice."""
    return [entries[name] for entries, name in places_of(module)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def weights_dtype(module: nn.Module) -> torch.dtype:
    """The precision of a module's weights: of the first parameter that is no code of a quantisation."""
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def check_recomputable(module: nn.Module, setting: str) -> None:
    """Refuse activation checkpointing of batch norms: the second forward pass would move their statistics again.

    Args:
        module: what would be computed again.
        setting: what asks for it, for the message.

    Raises:
        ValueError: there is a batch norm in the module.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{setting}: {name} is a {type(part).__name__}, whose running statistics would move twice a step; "
                "leave it off"
            )


def computes_on(model: nn.Module) -> torch.device:
    """The device that a model takes its inputs on."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


class OneThread:
    """A context for one thread at a time, which may enter it again. A copy of it is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return OneThread, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context; afterwards every module has the mode that it had, after an error too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])  # a module may do more there than take the mode
        for module, training in modes:
            module.training = training


def empty_tables(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules, and their attributes, that are tensors on the meta device and neither parameters nor buffers.

    Some classes keep tables of rotary frequencies so, where no state dict names them.
    """
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            tensors = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors):
                yield name, attribute
