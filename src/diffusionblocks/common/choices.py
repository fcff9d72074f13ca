"""Names of a registry in a command line or a config, which import the registry only when a name is given."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


def choice_of(names: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """Make the `type` of an option that takes one of some names.

    `choices` of argparse would be read for `--help` already.

    Args:
        names: gives the names; what it imports is not imported before.
    """

    def parse(text: str) -> str:
        choices = list(names())
        if text not in choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(map(repr, choices))})")
        return text

    return parse


class NameOf:
    """Annotation of a field of a config: `Annotated[str, NameOf(names, check)]`.

    Args:
        names: gives the names that there are, for the JSON schema.
        check: gives the name to keep; raises ValueError for one that there is not.
    """

    def __init__(self, names: Callable[[], Iterable[str]], check: Callable[[str], str]) -> None:
        self._names, self._check = names, check

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "enum": list(self._names())}
