"""Layers of a frozen trunk, to whose keys and values the blocks of a language model attend."""

from __future__ import annotations

from typing import Self

from torch import nn


class FrozenTrunk(nn.ModuleList):
    """Layers that never train: without gradients, and in evaluation mode whatever the model's."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, for which dropout is off."""
        self.requires_grad_(False)
        return super().train(False)
