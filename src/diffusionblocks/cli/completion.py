"""diffusionblocks completion."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

#: A function of the shell that completes recipes: names of those that ship, and files.
_RECIPES = "_diffusionblocks_recipes"


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
    from ..experiments.shipped_recipes import shipped_recipes
    from .commands import parser

    whole = parser()
    for action in _recipe_arguments(whole):
        action.complete = {"bash": _RECIPES, "zsh": _RECIPES, "tcsh": "f:*"}  # type: ignore[attr-defined]
    names = " ".join(shipped_recipes())
    preamble = {
        "bash": f'{_RECIPES}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{_RECIPES}() {{ compadd -- {names}; _files }}",
    }
    print(shtab.complete(whole, options.shell, preamble=preamble))


def _recipe_arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of all commands that are a recipe."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from (argument for argument in command._actions if "recipe" in (argument.dest, argument.metavar))
