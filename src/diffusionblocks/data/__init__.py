"""Data in memory and the batches made from it."""

from .augment import Augment, AugmentConfig
from .batches import ImageBatches, evaluation_batches
from .images import ImageData, digits, image_classification

__all__ = [
    "Augment",
    "AugmentConfig",
    "ImageBatches",
    "ImageData",
    "digits",
    "evaluation_batches",
    "image_classification",
]
