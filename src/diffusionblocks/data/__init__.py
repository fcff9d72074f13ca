"""Data in memory and the batches made from it."""

from .augment import Augment, AugmentConfig
from .images import ImageBatches, ImageData, digits, evaluation_batches, image_classification

__all__ = [
    "Augment",
    "AugmentConfig",
    "ImageBatches",
    "ImageData",
    "digits",
    "evaluation_batches",
    "image_classification",
]
