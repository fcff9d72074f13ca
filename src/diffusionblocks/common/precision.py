"""Precision of what must not be rounded to bfloat16."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Leave autocast for a while, on the tensor's device; on one that has none (`meta`) there is nothing to leave."""
    # Asked of the tensor: torch.amp.is_autocast_available breaks compiled graphs before torch 2.12.
    kind = like.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def as_autocast(values: Tensor) -> Tensor:
    """Return values in autocast's dtype where it is on, as torch's own operations take them; else as they are."""
    kind = values.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return values
    return values.to(torch.get_autocast_dtype(kind))


def as_float64(values: Tensor) -> Tensor:
    """Return values in float64, without gradient, on their device, or on the CPU where the device has no float64."""
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()
