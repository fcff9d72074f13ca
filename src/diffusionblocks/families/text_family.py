"""What all families of text have in common: tokens in, and logits at every position out."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adaptive_norms import AdaptiveNorms
from .family import Family


class TextFamily(Family):
    """A model of text. Its read-out comes in two halves: the states of all positions, and the logits of any of them.

    Only the second is as large as the vocabulary, and there each position is on its own: so a loss can be made of some
    positions at a time (`Block.loss_chunk`).
    """

    class_count_field = "vocab_size"

    def hidden_size(self, model: nn.Module) -> int:
        """See `Family`."""
        return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def num_classes(self, config: Any) -> int:
        """See `Family`."""
        return int(config.vocab_size)

    def empty_batch(self, config: Any, size: int) -> dict[str, Tensor]:
        """See `Family`."""
        return {"input_ids": torch.empty(size, *self.example_shape(config), dtype=torch.int64)}

    def states(
        self,
        network: nn.Module,
        final: AdaptiveNorms | None,
        hidden: Any,
        denoised: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The first half of `readout`, whose arguments see.

        Returns:
            (states (batch, length, dim), what `logits` needs to know of each sample (batch, dim)).
        """
        return denoised, condition

    @abc.abstractmethod
    def logits(
        self, network: nn.Module, final: AdaptiveNorms | None, added: nn.ModuleDict, states: Tensor, told: Tensor
    ) -> Tensor:
        """The second half, of any of the positions: (batch, some, dim) -> (batch, some, vocab_size)."""

    def readout(
        self,
        network: nn.Module,
        final: AdaptiveNorms | None,
        added: nn.ModuleDict,
        hidden: Any,
        denoised: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """See `Family`."""
        return self.logits(network, final, added, *self.states(network, final, hidden, denoised, condition))
