"""Sections of a config whose class their `kind` names, looked up in a registry that may grow after the import."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag, TypeAdapter
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class ByKind:
    """Annotation of a field: the section is an instance of the class that its `kind` names.

    `Annotated[SerializeAsAny[Base], ByKind(registry)]`, with `Base` the base class of all sections: models of pydantic,
    or dataclasses. Errors have the location and the type that pydantic gives those of a tagged union.

    Args:
        registry: kind -> class of the section; it may grow later.
        default: the kind of a section that names none; None: it must name one.
    """

    def __init__(self, registry: Mapping[str, type], default: str | None = None) -> None:
        self._registry = registry
        self._default = default

    @property
    def sections(self) -> tuple[type, ...]:
        """The classes that are registered now."""
        return tuple(self._registry.values())

    def _union(self) -> TypeAdapter[Any]:
        return _union(tuple(self._registry.items()), self._default)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        read = lambda values: self._union().validate_python(values)  # noqa: E731 - the registry as it is then
        return core_schema.no_info_before_validator_function(read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        members = {kind: TypeAdapter(section).core_schema for kind, section in self._registry.items()}
        return handler(core_schema.tagged_union_schema(members, discriminator="kind"))


@functools.cache
def _union(sections: tuple[tuple[str, type], ...], default: str | None) -> TypeAdapter[Any]:
    def kind(values: Any) -> str:
        return str(values.get("kind", default) if isinstance(values, dict) else getattr(values, "kind", values))

    members = [Annotated[section, Tag(name)] for name, section in sections]
    return TypeAdapter(Annotated[functools.reduce(operator.or_, members), Discriminator(kind)])  # type: ignore[arg-type]


def kind_of(section: type[BaseModel]) -> str:
    """The name of a section's class: the one value of its field `kind`.

    Raises:
        ValueError: it has no such field.
    """
    field = section.model_fields.get("kind")
    names = get_args(field.annotation) if field is not None else ()
    if len(names) != 1:
        raise ValueError(f"{section.__name__}: give the section a name, as in kind: Literal['digits']")
    return str(names[0])
