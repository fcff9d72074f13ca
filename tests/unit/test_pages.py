"""What the pages name is there: linked files, and code and test files between backticks."""

from __future__ import annotations

import re
from pathlib import Path

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
