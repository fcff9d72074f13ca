"""What the blocks denoise: a label, an image, masked tokens, the next token."""

from .image import Condition, ImageTarget, ImageTargetConfig
from .label import NONE_IGNORED, LabelTarget, LabelTargetConfig, check_labels, label_losses
from .label_loss import TEACHER_LOGITS, LabelLoss, check_label_loss
from .masked_tokens import TokenTarget, TokenTargetConfig
from .next_token import CONTEXT, NextTokenTarget, NextTokenTargetConfig, mean_of_counted, resolve_texts
from .target import (
    AUTO,
    HINT,
    BaseTargetConfig,
    Batch,
    EmbeddingTarget,
    LossChunk,
    Target,
    TextTarget,
    check_entries,
    check_loss_chunk,
    check_tokens,
    cross_entropies,
    followed_in_shape,
    in_chunks,
    mean_loss,
    positions_at_once,
    random_rows,
)

__all__ = [
    "AUTO",
    "CONTEXT",
    "HINT",
    "NONE_IGNORED",
    "TEACHER_LOGITS",
    "BaseTargetConfig",
    "Batch",
    "Condition",
    "EmbeddingTarget",
    "ImageTarget",
    "ImageTargetConfig",
    "LabelLoss",
    "LabelTarget",
    "LabelTargetConfig",
    "LossChunk",
    "NextTokenTarget",
    "NextTokenTargetConfig",
    "Target",
    "TextTarget",
    "TokenTarget",
    "TokenTargetConfig",
    "check_entries",
    "check_label_loss",
    "check_labels",
    "check_loss_chunk",
    "check_tokens",
    "cross_entropies",
    "followed_in_shape",
    "in_chunks",
    "label_losses",
    "mean_loss",
    "mean_of_counted",
    "positions_at_once",
    "random_rows",
    "resolve_texts",
]
