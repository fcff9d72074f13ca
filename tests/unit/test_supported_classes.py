"""The table of docs/models.md says what comes of each class: it works, or it is refused with that line."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_classes import CLASSES, Tried, line, outcome

from diffusionblocks.families import family_named, supported_classes

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
ALL = [tried for classes in CLASSES.values() for tried in classes]


@pytest.mark.parametrize("tried", ALL, ids=lambda tried: tried.name)
def test_what_the_page_says_is_what_happens(tried: Tried) -> None:
    result = outcome(tried)
    assert (result == "works") == (tried.name in supported_classes())
    assert f"| `{tried.name}` | {line(result)} |" in PAGE, "make the page anew: python tests/model_classes.py"


def test_every_class_of_the_libraries_that_works_is_on_the_page() -> None:
    ours = {name for name in supported_classes() if family_named(name).library.package in ("transformers", "diffusers")}
    assert ours <= {tried.name for tried in ALL}
    assert PAGE.count("| `") == len(ALL)
