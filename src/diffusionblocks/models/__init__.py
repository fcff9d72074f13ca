"""Models that no library has in the form the paper needs; each the smallest faithful module."""

from .dit import DiT
from .masked import MaskedTransformer
from .recurrent import RecurrentDepth

__all__ = ["DiT", "MaskedTransformer", "RecurrentDepth"]
