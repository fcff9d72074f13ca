"""What a recipe and its results say in the model card of the blocks that were trained: data, recipe, figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..common.messages import one_line, shorten
from ..core.model_card import NAME_ON_HUB, CardNotes
from ..data.dataset import Dataset
from .identity import describe_blocks
from .recipe import Recipe

#: The most names of classes that a card lists.
_MOST_CLASSES = 20


def card_notes(
    recipe: Recipe,
    data: Dataset | None,
    results: Sequence[Mapping[str, Any]] = (),
    metric: tuple[str, float] | None = None,
) -> CardNotes:
    """What a model's card says of its training. Places on this machine are named by their last part alone.

    Args:
        recipe: of the run.
        data: its training data, where they were read.
        results: printed rows of a table.
        metric: name and value of the main result.
    """
    source = getattr(recipe.data, "source", None)
    on_hub = isinstance(source, str) and NAME_ON_HUB.fullmatch(source) and not Path(source).exists()
    text = yaml.safe_dump(
        _without_places(recipe.model_dump(mode="json") | {"blocks": describe_blocks(recipe)}),
        sort_keys=False,
        allow_unicode=True,
    )
    return CardNotes(
        name=recipe.name,
        data=_about(recipe, data),
        datasets=(source,) if on_hub and source is not None else (),
        recipe=text,
        results=results,
        metric=None if metric is None else (metric[0].removeprefix("test_"), metric[1]),
        data_name=recipe.data.name,
    )


def _about(recipe: Recipe, data: Dataset | None) -> str:
    kind = recipe.data.kind
    name = recipe.data.name
    lines = [f"- {kind}" + (f": {one_line(name)}" if name != kind else "")]
    if data is not None:
        shape = "x".join(map(str, data.example_shape))
        lines.append(f"- {len(data):,} {recipe.data.examples} of {shape} to train on")
        if isinstance(data.classes, list) and data.classes:
            names = [one_line(name) for name in data.classes[:_MOST_CLASSES]]
            more = len(data.classes) - len(names)
            lines.append(f"- classes: {shorten(', '.join(names), 400)}" + f", and {more} more" * (more > 0))
    return "\n".join(lines)


def _without_places(value: Any) -> Any:
    """JSON values in which a path of this machine is its last part: where it lies is nobody's business."""
    if isinstance(value, dict):
        return {name: _without_places(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_places(part) for part in value]
    if isinstance(value, str) and (value.startswith(("~", os.sep)) or (os.sep in value and Path(value).exists())):
        return Path(value).name
    return value
