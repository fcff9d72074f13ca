"""diffusionblocks recipes."""

from __future__ import annotations

import argparse

from ..common.messages import shorten

#: Characters of a recipe's line, beside its name.
_LONGEST = 90


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
    width = max(map(len, recipes))
    for name, file in recipes.items():
        print(f"{name:{width}}  {shorten(first_sentence(file), _LONGEST)}")
