"""The command line: `diffusionblocks COMMAND RECIPE`."""

from .commands import main

__all__ = ["main"]
