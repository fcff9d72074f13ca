"""How many examples a recipe's train split has, learned without reading the examples and without a download."""

from __future__ import annotations

from dataclasses import dataclass

from ..data.data_config import DigitsConfig, ImageFilesConfig, LatentsConfig, TopicsConfig, resolved_source
from ..data.latents import examples_of_split
from ..data.tables import rows_of_split
from ..experiments.recipe import Recipe
from ..experiments.sources import load_data


@dataclass(frozen=True)
class Examples:
    """Examples of a train split.

    Attributes:
        count: how many; None: it is not known.
        where: the folder that they lie in, or "" for data that come with a library; without a count the reason.
    """

    count: int | None
    where: str


def examples_at_hand(recipe: Recipe) -> Examples:
    """Count the train split's examples, where that is cheap.

    Of data that come with a library all are counted; of image files and latents what the files say they hold. Of text
    files they are not known: they would have to be read, or encoded.
    """
    data = recipe.data
    if isinstance(data, (DigitsConfig, TopicsConfig)):
        return Examples(len(load_data(recipe, "train")), "")
    try:
        source = resolved_source(data)
        if isinstance(data, ImageFilesConfig):
            rows = rows_of_split(source, data.split_files, data.train_split)
            return Examples(
                rows, source if rows is not None else f"{source!r} is no local folder, and a plan downloads nothing"
            )
        if isinstance(data, LatentsConfig):
            return Examples(examples_of_split(source, data.train_split), source)
    except (OSError, ValueError) as error:
        return Examples(None, str(error))
    return Examples(None, "a plan does not read text")
