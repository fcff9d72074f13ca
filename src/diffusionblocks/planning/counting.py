"""What stays on the device between steps: weights, optimizer state and averages, counted on a model without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..common.modules import bytes_of, tensors_of
from ..training import TrainConfig, Unit
from ..training.optim import average_dtype
from ..training.shared_module import in_several

# 8-bit AdamW (torchao): tensors of at least so many elements are kept in codes of one byte, with a float32 scale for
# every block of elements and a table of 256 float32 values for each moment.
_QUANTIZED_FROM = 4096
_QUANTIZED_BLOCK = 256
_TABLE_BYTES = 256 * 4


@dataclass(frozen=True)
class PersistentBytes:
    """Bytes that stay on the device between steps."""

    parameters: int
    buffers: int
    optimizer: int
    ema: int


def count_persistent(units: Sequence[Unit], shared: Sequence[nn.Parameter], train: TrainConfig) -> PersistentBytes:
    """Count what stays on the device between steps.

    With `resident: all` it is all units. With `active` it is the largest (see `training/residency.py`), and what
    several units hold in common; a single unit is always there.

    Args:
        units: what is trained; their modules may be on the meta device.
        shared: parameters that all units move.
        train: residency, optimizer and average.
    """
    present = list(units)
    if train.resident == "active":
        present = [max(units, key=lambda unit: bytes_of(tensors_of(unit.module)))]
    common = in_several([unit.module for unit in units])
    tensors = {id(t): t for unit in present for t in tensors_of(unit.module)}
    tensors |= {id(t): t for unit in units for t in tensors_of(unit.module) if id(t) in common}
    updates = [*(p for unit in present for p in unit.own), *shared]
    return PersistentBytes(
        parameters=bytes_of(t for t in tensors.values() if isinstance(t, nn.Parameter)),
        buffers=bytes_of(t for t in tensors.values() if not isinstance(t, nn.Parameter)),
        optimizer=sum(optimizer_bytes(p, train.optimizer, by_chance=train.weights is not None) for p in updates),
        ema=sum(p.numel() * average_dtype(p).itemsize for p in updates) if train.keeps_average else 0,
    )


def count_waiting(units: Sequence[Unit], train: TrainConfig) -> int:
    """Count the host memory of blocks that are not on the device: all of them, or the buffers of files.

    Args:
        units: what is trained; their modules may be on the meta device.
        train: residency, optimizer and average.
    """
    if train.resident != "active" or len(units) == 1:
        return 0
    moved_alone = {id(p) for unit in units for p in unit.own}
    common = in_several([unit.module for unit in units]) - moved_alone
    sizes = []
    for unit in units:
        tensors = {id(t): t for t in tensors_of(unit.module) if id(t) not in common}
        state = sum(optimizer_bytes(p, train.optimizer, by_chance=train.weights is not None) for p in unit.own)
        averages = sum(p.numel() * average_dtype(p).itemsize for p in unit.own) if train.keeps_average else 0
        sizes.append(bytes_of(tensors.values()) + state + averages)
    return 2 * max(sizes) if train.offload == "disk" else sum(sizes)


def optimizer_bytes(parameter: Tensor, optimizer: str, *, by_chance: bool = False) -> int:
    """Bytes of AdamW's state on the device for one parameter: two moments, and a float32 count of steps.

    Args:
        parameter: on any device.
        optimizer: `adamw` or `adamw-8bit`.
        by_chance: whether the weights are rounded so (`train.weights`).
    """
    elements = parameter.numel()
    if optimizer == "adamw":
        return 2 * elements * parameter.element_size() + 4
    if elements < _QUANTIZED_FROM or elements % _QUANTIZED_BLOCK:
        return 2 * elements * (4 if by_chance else parameter.element_size()) + 4
    return 2 * (elements + 4 * (elements // _QUANTIZED_BLOCK) + _TABLE_BYTES) + 4
