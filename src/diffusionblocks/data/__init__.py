"""Data sets and the batches made from them: images, their latents, text as characters and as tokens.

`data_config.py` has the `data` section of a recipe: its classes load, batch and count what they name, and register
themselves in `image_config.py` and `text_config.py`.
"""

from . import image_config as image_config
from . import text_config as text_config
from .augment import Augment, AugmentConfig
from .character_text import characters, normalise, python_topics
from .image_batches import ImageBatches, evaluation_batches
from .image_data import ImageData, digits, image_classification
from .latent_batches import LatentBatches
from .latent_data import LatentData
from .latent_shards import latent_folder
from .text_batches import TextBatches, evaluation_chunks
from .text_codec import CharacterCodec, TextCodec, TokenCodec
from .text_data import TextChunks, TextData

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
