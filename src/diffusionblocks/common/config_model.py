"""The base class of configs: fields that are checked, frozen and refused by name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .messages import one_line
from .schema_errors import explain


class ConfigModel(BaseModel):
    """A config whose wrong fields are refused in one line that names field, value and what is allowed.

    Raises:
        ValueError: an unknown field, or a value out of range. Its cause is pydantic's `ValidationError`, which is what
            `model_validate` raises.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            name = type(self).__name__
            raise ValueError(one_line(f"{name}: {explain(error, type(self))}")) from error

    # Of a section inside another config pydantic calls no `__init__` so marked: the outer one tells, by the whole name.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
