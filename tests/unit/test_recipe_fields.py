"""docs/recipes.md is what the schema of recipes says today."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import AliasChoices, BaseModel, Field

from diffusionblocks.common.fields import Samples
from diffusionblocks.experiments import recipe_fields

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
WRITE = "run: python -m diffusionblocks.experiments.recipe_fields > docs/recipes.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == recipe_fields.markdown(), WRITE


def test_every_field_is_described() -> None:
    rows = [line for line in recipe_fields.markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.endswith("|  |")]


class _Base(BaseModel):
    """A base.

    Attributes:
        inherited: Said by the base.
    """

    inherited: bool = False


class _Inner(_Base):
    """A section.

    Attributes:
        count: Said here,
            on two lines, with a | in it.
    """

    count: Samples = Field(default=3, validation_alias=AliasChoices("count", "number"))
    mode: Literal["a", "b"] | None = Field(default=None, description="Said by the field.")


class _Outer(BaseModel):
    """The whole."""

    inner: _Inner | None = None


def test_a_table_has_default_range_words_and_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_fields, "Recipe", _Outer)
    page = recipe_fields.markdown()
    assert "| `inherited` | `false` | true or false | Said by the base. |" in page
    assert (
        "| `count` | `3` | whole number, 1 to 10,000,000 | Said here, on two lines, with a \\| in it. "
        "Older spelling: `number`. |" in page
    )
    assert "| `mode` | `null` | `a`, `b`, or null | Said by the field. |" in page
