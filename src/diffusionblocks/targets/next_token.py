"""The next token's embedding as the target of an autoregressive model (paper, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..common.fields import FEEDBACK_NAMES, MOST_TOKENS, Int, NonNegative, Positive, TokenFeedback
from .target import (
    Batch,
    EmbeddingTarget,
    EmbeddingTargetConfig,
    TextTarget,
    attention,
    check_like_tokens,
    check_tokens,
    refuse_where,
)

#: The label of a token that is context only: it has no loss. (transformers' number, and torch's `ignore_index`.)
CONTEXT = -100


class NextTokenTargetConfig(EmbeddingTargetConfig):
    """What an autoregressive model's blocks denoise: the next token's L2-normalised embedding (paper, section 4.3).

    Attributes:
        embedding: `given` (unit rows of the model's own input embedding at conversion, fixed), `frozen` (fixed random
            unit rows) or `learned` (needs `shared: joint`). null: learned under `joint`, else given.
        weight: Weight of the cross-entropy at each level: `none`, or `edm` = 1 / c_out^2 of the noise
            process. Under EDM it spans five orders of magnitude and collapses training to copying.
        feedback: What a prediction feeds to the next step: `soft` (the probabilities times the embedding rows), `hard`
            (the most probable token's row), `sampled` (the row of a token drawn from the probabilities) or `top-k`
            (the mixture of the `top_k` most probable rows, rescaled to unit norm).
        top_k: Rows that `top-k` mixes.
        logit_scale: Start of a learnable factor on the logits; 1 keeps the function of a pretrained head. A fresh head
            of a narrow model needs more: hidden_size * initializer_range * logit_scale should be about 16.
        previous: Add the clean token before it to a noisy position's input, as an ordinary language model has it.
        clean_weight: Weight of an extra term, the plain next-token loss of the clean stream through the same head.
        context: Whose keys and values of the clean tokens a noisy position attends to: `own`, those of a second stream
            through the block's own layers (the paper), or `trunk`, those of a frozen trunk, layer by layer: what the
            blocks branched from, or the layers of a trained model that is converted as one block or as experts. Then
            no gradient goes through the clean tokens, and the embedding is fixed with the trunk.
    """

    fixed: ClassVar[str] = "given"
    of_noise_input: ClassVar[dict[str, str]] = {
        "previous": "a block reads a text as an ordinary model does",
        "clean_weight": "there is no second stream",
        "self_conditioning": "there is no position of its own to show a token's estimate at",
        "context": "there are no noisy positions",
    }

    kind: Literal["next-token"] = "next-token"
    embedding: Literal["given", "frozen", "learned"] | None = None
    weight: Literal["none", "edm"] = "none"
    feedback: TokenFeedback = Field(default="sampled", validation_alias=FEEDBACK_NAMES)
    top_k: Int = Field(default=8, ge=1, le=MOST_TOKENS)
    logit_scale: Positive = 1.0
    previous: bool = True
    clean_weight: NonNegative = 0.0
    context: Literal["own", "trunk"] = "own"

    @property
    def reads_trunk(self) -> bool:
        """Whether `context` is `trunk`."""
        return self.context == "trunk"

    @model_validator(mode="after")
    def _a_frozen_trunk_learns_nothing(self) -> Self:
        if self.reads_trunk and self.clean_weight:
            raise ValueError(
                f"target.clean_weight = {self.clean_weight:g}: with target.context = trunk the clean tokens are a "
                "frozen trunk's, which learns nothing; leave clean_weight out"
            )
        if self.reads_trunk and self.embedding == "learned":
            raise ValueError(
                "target.embedding = learned: with target.context = trunk the embedding is fixed; leave embedding out"
            )
        return self


class NextTokenTarget(EmbeddingTarget, TextTarget):
    """The next token's L2-normalised embedding as the target of an autoregressive model (paper, section 4.3).

    Args:
        vocab_size: number of tokens.
        dim, learned, seed: see `EmbeddingTarget`.
        shift: 0 where a position of its own denoises each token, given the tokens before it (two streams); 1 where
            the position of a token denoises the one after it (one stream).
        clean_weight: weight of the clean stream's plain next-token loss; 0 leaves it out.
    """

    names = ("input_ids",)
    optional = ("labels", "attention_mask")

    def __init__(
        self, vocab_size: int, dim: int, *, learned: bool, seed: int, shift: int = 0, clean_weight: float = 0.0
    ) -> None:
        super().__init__(vocab_size, dim, learned=learned, seed=seed)
        self.vocab_size = vocab_size
        self.shift = shift
        self.clean_weight = clean_weight

    @torch.no_grad()
    def take_rows(self, embedding: Tensor) -> None:
        """Let the rows be the directions of an embedding (vocab_size, dim)."""
        self.embedding.copy_(F.normalize(embedding.float(), dim=-1))

    def posterior(self, context: Tensor, evidence: Tensor, table: Tensor | None = None) -> Tensor:
        """As of every embedding; logits of a clean stream behind those of the noisy positions stay as they are."""
        noisy = evidence.shape[1]
        if context.shape[1] == noisy:
            return super().posterior(context, evidence, table)
        at_noisy, clean = context.split([noisy, context.shape[1] - noisy], dim=1)
        return torch.cat([super().posterior(at_noisy, evidence, table), clean], dim=1)

    def encode(self, batch: Batch) -> Tensor:
        """`input_ids` (batch, length) -> y (batch, length - shift, dim)."""
        return self.rows(batch["input_ids"][:, self.shift :])

    def target_tokens(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tokens of the noisy positions, and of the clean ones, of which the last has nothing to predict."""
        tokens = batch["input_ids"]
        return tokens[:, self.shift :], tokens[:, 1:]

    def resolve(self, batch: Batch) -> Batch:
        """With `loss_mask`, bool (batch, length), where `labels` or `attention_mask` leave tokens out of the loss.

        Tokens whose label is `CONTEXT` are read and not counted. Those that `attention_mask` hides are moved behind the
        others of their text, where no position that counts sees them: a text is as if they were not there, wherever
        they stood. A text without a counted token has loss 0.

        Raises:
            ValueError: labels that are neither the token nor `CONTEXT`, or entries of another shape or dtype than
                `input_ids`; or no token counts in the whole batch. (On a GPU, which is not waited for, a value ends in
                a device-side assertion with the same message.)
        """
        return resolve_texts(batch, self.shift)

    def counted_lengths(self, batch: Batch) -> list[int] | None:
        """Of each text, the tokens up to the last that counts: no position that counts sees those behind it."""
        if "loss_mask" not in batch:
            return None
        places = torch.arange(1, batch["loss_mask"].shape[1] + 1, device=batch["loss_mask"].device)
        lengths: list[int] = (batch["loss_mask"] * places).amax(dim=1).clamp(min=self.shift + 1).tolist()
        return lengths

    def reduce(self, token_losses: Sequence[Tensor], batch: Batch, z: Tensor | None) -> Tensor:
        """The mean over the counted tokens of each sequence, in nats; and `clean_weight` times that of the clean
        stream."""
        if "loss_mask" in batch:
            starts = (self.shift, 1)  # of the noisy and the clean stream, see `target_tokens`
            pairs = zip(token_losses, starts, strict=False)
            noisy, *clean = (mean_of_counted(each, batch["loss_mask"][:, start:]) for each, start in pairs)
        else:
            noisy, *clean = (each.mean(dim=1) for each in token_losses)
        return noisy + self.clean_weight * clean[0] if clean else noisy

    def check(self, batch: Batch, size: int) -> None:
        """Refuse tokens that are too short to have a next one, or not of the vocabulary."""
        tokens = batch["input_ids"]
        least = max(self.shift, int(self.clean_weight > 0))  # the clean stream's last position has nothing to predict
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] <= least:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"input_ids must have shape (batch, length), length > {least}, got {got}")
        check_tokens(tokens, len(self.embedding), (size, tokens.shape[1]))


def resolve_texts(batch: Batch, shift: int) -> Batch:
    """What the next-token loss of a batch is made of, converted or not: see `NextTokenTarget.resolve`.

    Args:
        batch: `input_ids` (batch, length), and perhaps `labels` and `attention_mask` of the same shape.
        shift: tokens at the start that no position predicts.

    Returns:
        `input_ids`, and where one of the others was there `loss_mask`, bool (batch, length).

    Raises:
        ValueError: what `NextTokenTarget.resolve` refuses.
    """
    tokens, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if labels is None and mask is None:
        return batch
    there = loss_mask = torch.ones_like(tokens, dtype=torch.bool)
    if mask is not None:
        there = loss_mask = attention(mask, tokens)
    if labels is not None:
        check_like_tokens("labels", labels, tokens)
        loss_mask = there & (labels != CONTEXT)
        refuse_where(
            loss_mask & (labels != tokens),
            f"labels must be the tokens of input_ids themselves, or {CONTEXT} where a token is not counted: they "
            "are not to be shifted, and no others can be learned",
        )
    if mask is not None:
        order = there.logical_not().byte().argsort(dim=1, stable=True)
        tokens, loss_mask = tokens.where(there, 0).gather(1, order), loss_mask.gather(1, order)
    loss_mask = F.pad(loss_mask[:, shift:], (shift, 0))  # what no position predicts
    refuse_where(
        ~loss_mask.any(),
        "no token of the batch counts: labels and attention_mask leave nothing to learn; leave such texts out",
    )
    return {"input_ids": tokens, "loss_mask": loss_mask}


def mean_of_counted(values: Tensor, loss_mask: Tensor) -> Tensor:
    """Of each row (batch, length) the mean of the values that count; 0 where none does."""
    return torch.where(loss_mask, values, 0.0).sum(dim=1) / loss_mask.sum(dim=1).clamp(min=1)
