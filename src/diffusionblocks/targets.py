"""What y is: the clean target of each task, its inner loss, and the bridge from a prediction back to z."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LabelTarget(nn.Module):
    """The label's L2-normalised embedding as the target of a classifier (paper, section 4.1).

    Normalisation keeps learned embeddings from collapsing. Initial rows are random directions drawn from `seed`,
    so every block, on whatever machine, has the same space for z.

    Args:
        num_classes: number of labels, >= 2.
        dim: size of the embedding (the model's hidden size).
        learned: whether the embedding is trained.
        seed: seed of the rows.
    """

    def __init__(self, num_classes: int, dim: int, *, learned: bool, seed: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least 2 labels, got {num_classes}")
        generator = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(num_classes, dim, generator=generator), dim=-1)
        self.embedding = nn.Parameter(rows, requires_grad=learned)

    @property
    def table(self) -> Tensor:
        """All targets: unit rows, float32, shape (num_classes, dim)."""
        return F.normalize(self.embedding.float(), dim=-1)

    def encode(self, labels: Tensor) -> Tensor:
        """Labels (batch,) -> targets y, float32, shape (batch, dim)."""
        return F.normalize(F.embedding(labels, self.embedding).float(), dim=-1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each sample, float32, shape (batch,)."""
        return F.cross_entropy(logits.float(), labels, reduction="none")

    def denoised(self, logits: Tensor, bridge: str) -> Tensor:
        """The bridge from logits (batch, num_classes) to D (batch, dim), which the solver feeds on.

        `soft`: the expected target under the predicted probabilities. `hard`: the most probable label's row.
        """
        if bridge == "soft":
            return logits.float().softmax(dim=-1) @ self.table
        if bridge == "hard":
            return self.table[logits.argmax(dim=-1)]
        raise ValueError(f"unknown bridge {bridge!r}; allowed: soft, hard")
