"""Models that no library has in the form the paper needs; each the smallest faithful module."""

from typing import Any

from .diffusion_transformer import DiT
from .masked_transformer import MaskedTransformer
from .noprop_cnn import NoPropCNN
from .recurrent_depth import RecurrentDepth

__all__ = ["DINOv3ViTForImageClassification", "DiT", "MaskedTransformer", "NoPropCNN", "RecurrentDepth"]


def __getattr__(name: str) -> Any:
    """Import transformers only for the one model that needs it."""
    if name != "DINOv3ViTForImageClassification":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .dinov3_classifier import DINOv3ViTForImageClassification

    return DINOv3ViTForImageClassification
