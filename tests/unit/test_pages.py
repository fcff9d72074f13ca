"""What the pages name is there: linked files, and code and test files between backticks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diffusionblocks as db

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = r"`((?:tests|src|benchmarks|recipes|findings|docs)/[\w./-]+)`"


def _missing(page: Path, text: str) -> list[str]:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    named = re.findall(FILE, text)
    return [link for link in links if not (page.parent / link).exists()] + [
        name for name in named if not (ROOT / name).exists()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert not _missing(page, page.read_text())


def test_what_is_missing_would_be_found() -> None:
    text = "[a](nothing.md), [b](concepts.md#words), `tests/unit/test_pages.py` and `tests/unit/nothing.py`"
    assert _missing(ROOT / "docs" / "index.md", text) == ["nothing.md", "tests/unit/nothing.py"]


def test_the_reference_has_all_that_is_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"^::: diffusionblocks\.(\w+)$", page, re.M)) == set(db.__all__) - {"__version__"}


def _arguments(thing: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, object, docstring) of a public object and its public methods."""
    yield thing.__name__, thing, thing.__doc__ or ""
    for name, method in vars(thing).items() if isinstance(thing, type) else ():
        if not name.startswith("_") and callable(method) and not isinstance(method, type):
            yield f"{thing.__name__}.{name}", method, method.__doc__ or ""


def _unknown_arguments(thing: Any) -> list[str]:
    unknown = []
    for where, called, doc in _arguments(thing):
        args = re.search(r"\n +Args:\n(.*?)(\n\n|\n? *$)", doc, re.S)
        indent = re.match(" *", args[1])[0] if args else ""
        names = re.findall(rf"^{indent}(\S[^:]*):", args[1], re.M) if args else []
        unknown += [f"{where}: {name}" for name in names if name not in inspect.signature(called).parameters]
    return unknown


def test_arguments_in_the_reference_are_those_of_the_signature() -> None:
    assert not [line for name in db.__all__ if name != "__version__" for line in _unknown_arguments(getattr(db, name))]


def test_an_argument_that_is_none_would_be_found() -> None:
    def function(first: int, second: int) -> None:
        """Do something.

        Args:
            first: a number.
            second, third: two in one, which the reference
                cannot match: with a signature.

        Raises:
            ValueError: never.
        """

    assert _unknown_arguments(function) == ["function: second, third"]
