"""diffusionblocks completion."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `completion`."""
    parser.set_defaults(run=run)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script is printed")


def run(options: argparse.Namespace) -> None:
    """Print a script by which a shell completes commands and options, at once: it starts no Python."""
    try:
        import shtab
    except ImportError:
        raise ImportError("completion needs the extra: pip install 'diffusionblocks[completion]'") from None
    from .commands import parser

    print(shtab.complete(parser(), options.shell))
