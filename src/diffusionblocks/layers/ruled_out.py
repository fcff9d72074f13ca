"""Logits by which a token is never drawn."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RuledOut(nn.Module):
    """Rule out one token: its logit becomes the lowest number, in place. (Infinite ones are taken for damage.)

    Args:
        token: its id.
    """

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (..., vocab_size), the same tensor."""
        logits[..., self.token] = torch.finfo(logits.dtype).min
        return logits
