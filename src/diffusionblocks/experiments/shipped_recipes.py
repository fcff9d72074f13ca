"""The recipes that ship with the package, by name: `vit/digits`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from ..common.files import RUNS
from ..common.messages import near, perhaps

FOLDER = Path(__file__).parents[1] / "recipes"

#: What stands behind the recipe's name in the default folder, by the command that trains several runs.
ENDINGS = {"compare": "-compare", "ablate": "-ablation"}

#: A run leaves its recipe, overrides applied, under this name.
RECIPE = "recipe.json"


def shipped_recipes() -> dict[str, Path]:
    """Their files by name, as `vit/digits`."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def first_sentence(file: Path) -> str:
    """What a recipe says of itself: the first sentence of the comment that it begins with."""
    comment = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].removesuffix(".")


def recipe_file(place: str | Path) -> Path:
    """The file that a recipe is read from.

    Args:
        place: a file, with or without `.yaml`; the folder of a run, which has a `recipe.json`; or the name of a recipe
            that ships, as `vit/digits` or `recipes/vit/digits.yaml`. What is there comes before a name.

    Raises:
        FileNotFoundError: none of these.
    """
    path = Path(place)
    if path.is_dir():
        if not (path / RECIPE).is_file():
            raise FileNotFoundError(_no_run_in(path))
        return path / RECIPE
    if path.is_file():
        return path
    if path.name and path.with_name(f"{path.name}.yaml").is_file():  # as `init` is given the name
        return path.with_name(f"{path.name}.yaml")
    recipes = shipped_recipes()
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name not in recipes:
        if (untrained := _not_trained(path, recipes)) is not None:
            raise FileNotFoundError(untrained)
        raise FileNotFoundError(
            f"no recipe and no run at {path}, and no recipe of that name ships{near(name, recipes)}"
        )
    return recipes[name]


def _no_run_in(folder: Path) -> str:
    """What to say of a folder that is there and holds no recipe: that it holds others' runs, or how one gets there."""
    runs = sorted(file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{RECIPE}"))
    if runs:  # rows of a comparison or an ablation
        return f"{folder} holds no run itself, but {len(runs)} inside: name one of them, as {shlex.quote(str(runs[0]))}"
    place = shlex.quote(str(folder))
    return (
        f"{folder} holds no run: train one there first (diffusionblocks train RECIPE --out {place}), or give the "
        f"folder that holds a run's {RECIPE}; of a saved model alone, give a recipe, and --model {place}"
    )


def _not_trained(run: Path, recipes: Mapping[str, Path]) -> str | None:
    """What to say of a run's folder that is not there: which command makes it. None: it is no name of a run."""
    if len(run.parts) < 2:  # more likely a recipe's name
        return None
    verb, name = next(
        ((verb, run.name.removesuffix(ending)) for verb, ending in ENDINGS.items() if run.name.endswith(ending)),
        ("train", run.name),
    )
    lines = {recipe: file.read_text(encoding="utf-8").splitlines() for recipe, file in recipes.items()}
    recipe = next((recipe for recipe in recipes if f"name: {name}" in lines[recipe]), None)
    if recipe is None and run.parent.name != RUNS.name:
        return None
    command = f"diffusionblocks {verb} {recipe or 'RECIPE'}"
    if recipe is None or run != RUNS / run.name:
        command += f" --out {shlex.quote(str(run))}"
    suggestion = perhaps(run.name, [path.name for path in run.parent.glob("*/")]) if recipe is None else ""
    return f"no run at {run}{suggestion}: train it first: {command}"


def run_of(place: str | Path) -> Path | None:
    """The folder of a run that stands in a recipe's place; None where a recipe does."""
    path = Path(place)
    return path if path.is_dir() else None
