"""The tokens themselves as the target of a masked text model (MD4, arXiv 2406.04329)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from .target import BaseTargetConfig, Batch, TextTarget, attention, check_tokens, refuse_where


class TokenTargetConfig(BaseTargetConfig):
    """What a masked text model's blocks denoise: the tokens themselves, under the cross-entropy of the masked ones.

    Attributes:
        weight: Weight of the cross-entropy at each level: `elbo` (that of the evidence lower bound: MD4), or `none`.
        noise_input: Whether blocks are told the noise level. false: they read it off the masks alone, and each is an
            ordinary masked language model of its own layers (see `export_block`).
        self_conditioning: Whether blocks are also shown what was said of the masked tokens a step before, through a
            linear map that starts at zero: for each the row of a fixed random table that is expected. In training, and
            for the bound, it is what the block itself says of the same text; in training for half of the texts nothing.
            A step costs a forward pass more, the bound another one.
    """

    kind: Literal["tokens"] = "tokens"
    weight: Literal["elbo", "none"] = "elbo"
    noise_input: bool = True
    self_conditioning: bool = False

    @property
    def sees_noise(self) -> bool:
        """`noise_input`."""
        return self.noise_input


class TokenTarget(TextTarget):
    """The tokens themselves as the target of masked diffusion (paper, masked text; MD4, arXiv 2406.04329).

    Args:
        vocab_size: number of ids that there are logits of.
        length: of a sequence; the most that it may have, with `shorter`.
        mask_id: the id that stands for a masked token; None: the id after the others.
        shorter: whether sequences may be shorter than `length`.
        hint_rows: rows of tokens for self-conditioning, float32 (vocab_size, dim); None: blocks have none.
    """

    names = ("input_ids",)
    optional = ("attention_mask",)

    def __init__(
        self,
        vocab_size: int,
        length: int,
        mask_id: int | None = None,
        *,
        shorter: bool = False,
        hint_rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.length = length
        self.mask_id = vocab_size if mask_id is None else mask_id
        self.shorter = shorter
        self.hint_rows = None if hint_rows is None else nn.Parameter(hint_rows, requires_grad=False)

    def encode(self, batch: Batch) -> Tensor:
        """`input_ids` (batch, length), int64."""
        return batch["input_ids"]

    def target_tokens(self, batch: Batch) -> tuple[Tensor, ...]:
        """All tokens: each position predicts its own."""
        return (batch["input_ids"],)

    def hint(self, logits: Tensor, z: Tensor) -> Tensor:
        """The expected rows of the tokens that z masks; zeros where z shows the token itself."""
        assert self.hint_rows is not None, "without target.self_conditioning there are none"
        rows = logits.float().softmax(dim=-1) @ self.hint_rows.float()
        return rows * (z == self.mask_id)[..., None]

    def resolve(self, batch: Batch) -> Batch:
        """Without `attention_mask`, which must be 1 everywhere: texts have no padding."""
        if (mask := batch.get("attention_mask")) is None:
            return batch
        refuse_where(
            ~attention(mask, batch["input_ids"]),
            "attention_mask has zeros: a masked text model reads texts of one length, without padding; cut the texts "
            "to it, or join them",
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
        tokens, length = batch["input_ids"], self.length
        if self.shorter and isinstance(tokens, Tensor) and tokens.dim() == 2:
            if not 0 < tokens.shape[1] <= length:
                raise ValueError(
                    f"input_ids has texts of {tokens.shape[1]} tokens, but the model takes 1 to {length}: cut the texts"
                )
            length = tokens.shape[1]
        check_tokens(tokens, self.vocab_size, (size, length))
        if self.mask_id < self.vocab_size:
            refuse_where(
                tokens == self.mask_id,
                f"input_ids has the mask, {self.mask_id}, among its tokens: blocks mask texts by themselves; give them "
                "as they are, without a collator that masks",
            )
