"""The tokens themselves as the target of a masked text model (MD4, arXiv 2406.04329)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from .target import BaseTargetConfig, Batch, TextTarget, attention, check_tokens, refuse_where


class TokenTargetConfig(BaseTargetConfig):
    """What a masked text model's blocks denoise: the tokens themselves, under the cross-entropy of the masked ones.

    Attributes:
        weight: Weight of the cross-entropy at each level: `elbo` (that of the evidence lower bound: MD4), or `none`.
    """

    kind: Literal["tokens"] = "tokens"
    weight: Literal["elbo", "none"] = "elbo"


class TokenTarget(TextTarget):
    """The tokens themselves as the target of masked diffusion (paper, masked text; MD4, arXiv 2406.04329).

    Args:
        vocab_size: number of tokens; the mask is the id after them.
        length: of a sequence.
    """

    names = ("input_ids",)
    optional = ("attention_mask",)

    def __init__(self, vocab_size: int, length: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.length = length

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.vocab_size

    def encode(self, batch: Batch) -> Tensor:
        """`input_ids` (batch, length), int64."""
        return batch["input_ids"]

    def target_tokens(self, batch: Batch) -> tuple[Tensor, ...]:
        """All tokens: each position predicts its own."""
        return (batch["input_ids"],)

    def resolve(self, batch: Batch) -> Batch:
        """Without `attention_mask`, which must be 1 everywhere: a text has the model's length, and no padding."""
        if (mask := batch.get("attention_mask")) is None:
            return batch
        refuse_where(
            ~attention(mask, batch["input_ids"]),
            "attention_mask has zeros: a masked text model reads texts of its own length, without padding; cut the "
            "texts to it, or join them",
        )
        return {"input_ids": batch["input_ids"]}

    def reduce(self, token_losses: Sequence[Tensor], batch: Batch, z: Tensor | None) -> Tensor:
        """The sum over the tokens that z hides, over the length.

        In nats per token of the whole sequence, so that under the ELBO's weight its mean over all levels is the bound.
        Without z every token counts.
        """
        (each,) = token_losses
        if z is not None:
            each = each * (z == self.mask_id)
        return each.sum(dim=1) / each.shape[1]

    def check(self, batch: Batch, size: int) -> None:
        """Refuse tokens of another shape or vocabulary than the model's."""
        check_tokens(batch["input_ids"], self.vocab_size, (size, self.length))
