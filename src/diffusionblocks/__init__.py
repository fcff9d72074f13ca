"""DiffusionBlocks: train a deep network one block at a time (ICLR 2026, arXiv 2506.14202)."""

from .block import Block
from .branching import branch
from .config import BlocksConfig, ImageTargetConfig, LabelTargetConfig, TokenTargetConfig
from .convert import convert
from .loading import load
from .merging import merge
from .model import BlocksOutput, DiffusionBlocks
from .noise import EDM, Masking
from .partition import Partition
from .saving import export, export_initialisation

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "Block",
    "BlocksConfig",
    "BlocksOutput",
    "DiffusionBlocks",
    "ImageTargetConfig",
    "LabelTargetConfig",
    "Masking",
    "Partition",
    "TokenTargetConfig",
    "__version__",
    "branch",
    "convert",
    "export",
    "export_initialisation",
    "load",
    "merge",
]
