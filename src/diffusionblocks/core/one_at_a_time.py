"""Running a model whose blocks do not fit on a device together: they take turns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.modules import places_of
from .block import Block


class OneAtATime:
    """Lets blocks take turns on a device: each comes when it is called, and the one before it makes room.

    The weights stay where they were and are copied, never moved: what leaves is forgotten. So this is for evaluation
    and sampling; training has `resident: active`. The added shared parameters, which are small, stay on the device.

    Args:
        blocks: of one model; no other code may call them meanwhile.
        device: where they run.
    """

    def __init__(self, blocks: Iterable[Block], device: torch.device) -> None:
        self.device = device
        self._present: Block | None = None
        self._originals: list[tuple[dict[str, Any], str, Tensor]] = []
        for block in blocks:
            block.shared.to(device)
            block.register_forward_pre_hook(self._before_call)

    def _before_call(self, block: nn.Module, args: Any) -> None:
        assert isinstance(block, Block)
        self.bring(block)

    def bring(self, block: Block) -> None:
        """Copy a block to the device, in place of the one before it."""
        if self._present is block:
            return
        for entries, name, tensor in self._originals:  # the copies of the block before are freed
            entries[name] = tensor
        self._present, self._originals = block, []
        copies: dict[int, Tensor] = {}  # a tensor with two places stays one
        for part in (block.network, block.adaptive):
            for entries, name in places_of(part):
                tensor = entries[name]
                if id(tensor) not in copies:
                    copies[id(tensor)] = self._copy(tensor)
                self._originals.append((entries, name, tensor))
                entries[name] = copies[id(tensor)]

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().to(self.device)
        return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
