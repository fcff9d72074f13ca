"""Images in memory or their latents on disk, and the batches made from them."""

from .augment import Augment, AugmentConfig
from .batches import ImageBatches, evaluation_batches
from .images import ImageData, digits, image_classification
from .latents import LatentBatches, LatentData, latent_folder

__all__ = [
    "Augment",
    "AugmentConfig",
    "ImageBatches",
    "ImageData",
    "LatentBatches",
    "LatentData",
    "digits",
    "evaluation_batches",
    "image_classification",
    "latent_folder",
]
