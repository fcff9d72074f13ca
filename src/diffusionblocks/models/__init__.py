"""Models that no library has in the form the paper needs; each the smallest faithful module."""

from .diffusion_transformer import DiT
from .masked_transformer import MaskedTransformer
from .noprop_cnn import NoPropCNN
from .recurrent_depth import RecurrentDepth

__all__ = ["DiT", "MaskedTransformer", "NoPropCNN", "RecurrentDepth"]
