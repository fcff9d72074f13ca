"""Tokens that carry a noised target into a sequence: one for a label, or one for each next token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LabelToken(nn.Module):
    """A token of the noised label: z plus a position embedding of its own.

    Args:
        dim: size of an embedding.
        std: of the initial position.
    """

    def __init__(self, dim: int, std: float) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, 1, dim).normal_(std=std))

    def forward(self, z: Tensor) -> Tensor:
        """z (batch, dim) -> token (batch, 1, dim)."""
        return z[:, None, :] + self.position


class LinearLabelToken(LabelToken):
    """A token of the noised label: a linear map of z, which starts at zero, plus a position embedding of its own.

    Args:
        dim, std: see `LabelToken`.
    """

    def __init__(self, dim: int, std: float) -> None:
        super().__init__(dim, std)
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, z: Tensor) -> Tensor:
        """z (batch, dim) -> token (batch, 1, dim)."""
        return super().forward(self.linear(z.to(self.linear.weight.dtype)))


class ClsReplacement(nn.Module):
    """Puts the noised label in place of [CLS], at its position, as the released code does. It has no parameters.

    There z drowns the token that is read: its numbers are many times those of an embedding.
    """

    def forward(self, tokens: Tensor, z: Tensor, position: Tensor) -> Tensor:
        """Tokens (batch, length, dim), [CLS] first at `position` (1, 1, dim), and z (batch, dim) -> as tokens."""
        return torch.cat([(z[:, None, :] + position).to(tokens.dtype), tokens[:, 1:]], dim=1)


class Hint(nn.Module):
    """Self-conditioning of text: a linear map, which starts at zero, of what was said of each token so far.

    Args:
        dim: size of an embedding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, rows: Tensor) -> Tensor:
        """Expected rows (batch, length, dim) -> what is added to the hidden states there, of the same shape."""
        return F.linear(rows.to(self.weight.dtype), self.weight)


class NoisyToken(nn.Module):
    """Tokens of noised next-token embeddings: a linear map of z, whose bias stands for "predict the token here".

    The map starts at zero: most of z is noise, and at the scale of ordinary weights it would drown the embeddings,
    which are a tenth as large. Each block lets in as much as is of use at its levels.

    Args:
        dim: size of an embedding.
        std: of the initial bias.
        previous: whether the clean token before it is added to a noisy position, as in an ordinary language model.
    """

    def __init__(self, dim: int, std: float, *, previous: bool) -> None:
        super().__init__()
        self.previous = previous
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.linear.bias, std=std)

    def forward(self, z: Tensor) -> Tensor:
        """z (batch, length, dim) -> hidden (batch, length, dim)."""
        return self.linear(z.to(self.linear.weight.dtype))  # type: ignore[no-any-return]
