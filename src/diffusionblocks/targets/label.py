"""The label's embedding as the target of a classifier (paper, section 4.1)."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..common.fields import FEEDBACK_NAMES, LabelFeedback
from ..common.messages import span
from ..common.precision import without_autocast
from .target import Batch, EmbeddingTarget, EmbeddingTargetConfig

#: An `ignore_index` that no label has, so that torch passes over none.
NONE_IGNORED = torch.iinfo(torch.int64).min


class LabelTargetConfig(EmbeddingTargetConfig):
    """What a classifier's blocks denoise: the L2-normalised embedding of the label (paper, section 4.1).

    Attributes:
        embedding: `frozen` (fixed random unit rows), `one-hot` (rows of the identity matrix, of a model at least as
            wide as there are labels) or `learned` (needs `shared: joint`, for z must live in the same space for every
            block). null: learned under `joint`, else frozen.
        token: Where the noised label enters: as an `extra` token (the paper), as an extra token that is a `linear` map
            of it, which starts at zero, or in place of the [CLS] token (`replace-cls`: the released code. There z
            drowns the very token that is read, for its numbers are many times those of an embedding).
        weight: Weight of the cross-entropy at each level: `none`, or `edm` = 1 / c_out^2 of the noise process.
        feedback: What a prediction feeds to the next step: `soft` (the probabilities times the embedding table) or
            `hard` (the row of the most probable label).
    """

    fixed: ClassVar[str] = "frozen"
    of_noise_input: ClassVar[dict[str, str]] = {"token": "no token of z is there"}

    kind: Literal["label"] = "label"
    embedding: Literal["frozen", "one-hot", "learned"] | None = None
    token: Literal["extra", "linear", "replace-cls"] = "extra"
    weight: Literal["none", "edm"] = "none"
    feedback: LabelFeedback = Field(default="soft", validation_alias=FEEDBACK_NAMES)


class LabelTarget(EmbeddingTarget):
    """The label's L2-normalised embedding as the target of a classifier (paper, section 4.1).

    Args:
        num_classes: number of labels, >= 2.
        dim, learned, seed: see `EmbeddingTarget`.
        one_hot: whether the rows are those of the identity matrix.

    Raises:
        ValueError: fewer than 2 labels, or more than dimensions of one-hot rows.
    """

    names = ("labels",)

    def __init__(self, num_classes: int, dim: int, *, learned: bool, seed: int, one_hot: bool = False) -> None:
        if num_classes < 2:
            raise ValueError(f"a classifier needs at least 2 labels, got {num_classes}")
        if one_hot and num_classes > dim:
            raise ValueError(
                f"target.embedding = one-hot needs a dimension for each of {num_classes} labels, the model has {dim}: "
                "use embedding: frozen"
            )
        super().__init__(num_classes, dim, learned=learned, seed=seed)
        if one_hot:
            with torch.no_grad():
                self.embedding.copy_(torch.eye(num_classes, dim))

    def encode(self, batch: Batch) -> Tensor:
        """`labels` (batch,) -> y (batch, dim)."""
        return self.rows(batch["labels"])

    def loss(self, output: Tensor, batch: Batch, z: Tensor | None = None) -> Tensor:
        """Cross-entropy of logits (batch, num_classes)."""
        return label_losses(output, batch["labels"])

    def check(self, batch: Batch, size: int) -> None:
        """Refuse labels that are not one class index for each example."""
        check_labels(batch["labels"], size, len(self.embedding))

    def denoised(self, logits: Tensor, feedback: str) -> Tensor:
        """D (batch, dim) from logits (batch, num_classes): what they feed to the next step.

        `soft`: the expected target under the predicted probabilities. `hard`: the most probable label's row.
        """
        if feedback == "soft":
            with without_autocast(logits):  # z stays float32
                return logits.float().softmax(dim=-1) @ self.table
        if feedback == "hard":
            return self.table[logits.argmax(dim=-1)]
        raise ValueError(f"unknown feedback {feedback!r}; allowed: {', '.join(get_args(LabelFeedback))}")


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies, float32 (batch,), of logits (batch, num_classes); no label is passed over, as -100 would be."""
    return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=NONE_IGNORED)


def check_labels(labels: Tensor, size: int, num_classes: int, *, null_class: bool = False) -> None:
    """Raise ValueError unless labels are int64, of shape (size,), in [0, num_classes) (or the null class)."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != (size,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape ({size},), got {labels.dtype} {tuple(labels.shape)}")
    if labels.device.type == "cpu" and size:  # on a GPU the check would stall the queue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes + null_class:
            null = f" ({num_classes}: the null class)" if null_class else ""
            raise ValueError(f"labels must be in [0, {num_classes - 1 + null_class}]{null}, got {span(low, high)}")
