"""diffusionblocks recipes."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap

#: Least characters of a line about a recipe, beside its name.
_NARROWEST = 40


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `recipes`."""
    parser.set_defaults(run=run)
    parser.add_argument("name", metavar="recipe", nargs="?", help="print this one, to copy and change")


def run(options: argparse.Namespace) -> None:
    """List the recipes that ship, or print one."""
    from ..experiments.shipped_recipes import first_sentence, recipe_file, shipped_recipes

    if options.name is not None:
        print(recipe_file(options.name).read_text(encoding="utf-8"), end="")
        return
    recipes = shipped_recipes()
    width = max(map(len, recipes)) + 2
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, file in recipes.items():
        about = first_sentence(file)
        lines = [about] if columns is None else textwrap.wrap(about, max(columns - width, _NARROWEST))
        print(f"{name:{width}}" + f"\n{'':{width}}".join(lines))
