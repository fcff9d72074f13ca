"""Images in memory, their latents on disk, and text; and the batches made from them."""

from .augment import Augment, AugmentConfig
from .image_batches import ImageBatches, evaluation_batches
from .image_data import ImageData, digits, image_classification
from .latents import LatentBatches, LatentData, latent_folder
from .text_batches import TextBatches, TextChunks, evaluation_chunks
from .text_data import TextData, characters, normalise, python_topics
from .tokenized import CharacterCodec, TextCodec, TokenCodec

__all__ = [
    "Augment",
    "AugmentConfig",
    "CharacterCodec",
    "ImageBatches",
    "ImageData",
    "LatentBatches",
    "LatentData",
    "TextBatches",
    "TextChunks",
    "TextCodec",
    "TextData",
    "TokenCodec",
    "characters",
    "digits",
    "evaluation_batches",
    "evaluation_chunks",
    "image_classification",
    "latent_folder",
    "normalise",
    "python_topics",
]
