"""Buffers that keep float32's digits when a model is cast: noise frequencies, sin-cos positions, rotary frequencies."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose own buffers keep at least float32's digits when it is cast to another dtype.

    For the frequencies that encode a noise level: rounded to bfloat16 they encode other levels, by tenths of a radian.
    """

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> ExactBuffers:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, exact[name].to(buffer.device))
        return self


def with_exact_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> nn.Module:
    """A module of the same class, parts and parameters, whose own buffers keep float32's digits when it is cast.

    Args:
        module: the module; it is not changed.
        buffers: its buffers, computed anew: those of a model that was cast are rounded already.
    """
    module_class: Any = type(module)
    kind = _with_exact_buffers(module_class)
    exact: Any = kind.__new__(kind)
    vars(exact).update(vars(copy.copy(module)))
    devices = {name: buffer.device for name, buffer in module.named_buffers(recurse=False)}
    exact._buffers = {name: buffer.float().to(devices[name]) for name, buffer in buffers.items()}
    return exact  # type: ignore[no-any-return]


@functools.cache
def _with_exact_buffers(module_class: Any) -> Any:
    return type(f"Exact{module_class.__name__}", (ExactBuffers, module_class), {"__module__": __name__})


class ExactRotation(nn.Module):
    """A library's rotary positions; their frequencies stay float32 when a block is cast to another dtype.

    The library loads a bfloat16 model with float32 frequencies, too: rounded ones are off by whole turns at some
    hundred tokens.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        # Computed anew: those of a model that was cast are rounded already, and no file holds them.
        exact = dict(type(rotary)(self.config).named_buffers())
        for name, buffer in rotary.named_buffers():
            setattr(rotary, name, exact[name].float().to(buffer.device))

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.rotary.config

    def forward(self, states: Tensor, *where: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines (..., length, dim of a head), of the dtype of `states` or float32.

        Args:
            states: of text, or the images themselves.
            where: of text the positions (1 or batch, length), and the kind of layer where each kind has its own.
        """
        return self.rotary(states, *where)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> ExactRotation:
        exact = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.rotary.named_buffers():
            if buffer.dtype != torch.float32:
                setattr(self.rotary, name, exact[name].to(buffer.device))
        return self
