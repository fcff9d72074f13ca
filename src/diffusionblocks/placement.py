"""Where a module's tensors are, and running a model whose blocks do not fit on a device together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .block import Block


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


def computes_on(model: nn.Module) -> torch.device:
    """The device that a model takes its inputs on."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


class OneAtATime:
    """Lets blocks take turns on a device: each comes when it is called, and the one before it makes room.

    The weights stay where they were and are copied, never moved: what leaves is forgotten. So this is for evaluation
    and sampling; training has `resident: active`. The added shared parts, which are small, stay on the device.

    Args:
        blocks: of one model; no other code may call them meanwhile.
        device: where they run.
    """

    def __init__(self, blocks: Iterable[Block], device: torch.device) -> None:
        self.device = device
        self._present: Block | None = None
        self._kept: list[tuple[dict[str, Any], str, Tensor]] = []
        for block in blocks:
            block.shared.to(device)
            block.register_forward_pre_hook(self._bring)

    def _bring(self, block: nn.Module, args: Any) -> None:
        assert isinstance(block, Block)
        if self._present is block:
            return
        for entries, name, tensor in self._kept:  # the copies of the block before are freed
            entries[name] = tensor
        self._present, self._kept = block, []
        copies: dict[int, Tensor] = {}  # a tensor with two places stays one
        for part in (block.network, block.adaptive):
            for entries, name in places_of(part):
                tensor = entries[name]
                if id(tensor) not in copies:
                    copies[id(tensor)] = self._copied(tensor)
                self._kept.append((entries, name, tensor))
                entries[name] = copies[id(tensor)]

    def _copied(self, tensor: Tensor) -> Tensor:
        copied = tensor.detach().to(self.device)
        return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
