"""What a recipe, or another config, says about its wrong fields: a line each, by their names in the YAML."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .by_kind import ByKind
from .messages import near, perhaps

#: Wrong fields that a message lists, and how long a line of them may be.
_MOST_LINES, _MOST_CHARACTERS = 5, 600

_SHOULD = "Input should be "
_SECTION = f"{_SHOULD}a section, with fields of its own"
_PATTERNS = {
    "name": "Input should be letters, digits, '.', '_' or '-', the first a letter or digit",
    "device": "Input should be auto, cpu, cuda or cuda:N",
    "teacher": "Input should be a path, or several in brackets",
}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """A line for every wrong field, of the first few: its name as in the YAML, what is wrong, and the value.

    Args:
        error: what pydantic raised.
        root: the config that was validated, or one that has it as a section.
    """
    config = next((section for section in sections_in(root) if section.__name__ == error.title), None)
    lines_of: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        location, message = _explained(item, config)
        messages = lines_of.setdefault(location, [])
        if message not in messages:
            messages.append(message)
    lines = [f"  {cut(_join(location, messages), _MOST_CHARACTERS)}" for location, messages in lines_of.items()]
    return "\n".join(lines[:_MOST_LINES] + [f"  and {len(lines) - _MOST_LINES} more"] * (len(lines) > _MOST_LINES))


def _join(location: str, messages: list[str]) -> str:
    """One line for a field: of a list the first wrong value stands for all, of a union all that is allowed is said."""
    first, *others = messages
    value_text = first.partition(" (got ")
    extra = [m.partition(" (got ")[0].removeprefix(_SHOULD) for m in others if m.startswith(_SHOULD)]
    alike = [m for m in dict.fromkeys(extra) if value_text[0].startswith(_SHOULD) and m not in value_text[0]]
    text = f"{value_text[0]}{''.join(f', or {m}' for m in alike[:2])}{value_text[1]}{value_text[2]}"
    return f"{location}: {text}" if location else text


def _explained(item: Any, config: type[BaseModel] | None) -> tuple[str, str]:
    """(the field as it is written in the YAML, what is wrong with it) of one of pydantic's errors."""
    parts = [str(part) for part in item["loc"]]
    names, inside, former = _names_of(parts, config)
    location = ".".join(names)
    kind, value, message = item["type"], item["input"], item["msg"].removeprefix("Value error, ")
    value_text = f" (got {text_of(value)})"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        if (name := former.get(parts[-1])) is not None:  # alone it would have been taken
            return location, f"{name} is given twice: {parts[-1]} is its former name; leave {parts[-1]} out"
        name, _, text = parts[-1].partition(":")
        if text and name in inside:
            return location, f"no such field; a colon of YAML has a space behind it: {name}: {text}"
        return location, f"no such field{_elsewhere(parts[-1], location, config) or near(parts[-1], inside)}"
    if kind == "union_tag_invalid":
        if not isinstance(value, dict):
            return location, f"{_SECTION}{value_text}"
        tags, own = item["ctx"]["expected_tags"], value.get("kind")
        return f"{location}.kind", f"Input should be one of {tags} (got {text_of(own)}){_perhaps(own, tags)}"
    if kind in ("model_type", "dataclass_type", "model_attributes_type", "dict_type"):
        message = _SECTION
    elif kind == "tuple_type":
        message = "Input should be a list, in brackets"
    elif kind == "path_type":
        message = "Input should be a path"
    elif kind == "string_pattern_mismatch":
        message = _PATTERNS[names[-1]]
    elif kind in ("too_long", "too_short"):
        message = message.replace("Tuple", "List").replace(" after validation", "")
    elif kind == "missing":
        message, value_text = "is missing; give it", ""
    elif kind in ("bool_type", "bool_parsing"):
        message = "Input should be true or false"
    elif kind == "value_error" and isinstance(value, (dict, BaseModel)):
        # Where fields do not go together, the message names them: the section would be printed whole.
        value_text = ""
        field = message.split(maxsplit=1)[0]
        if location and field in inside:
            location = f"{location}.{field}"
    elif kind == "literal_error":
        value_text += _perhaps(value, item["ctx"]["expected"])
    return location, f"{message}{value_text}"


def _perhaps(value: Any, choices: str) -> str:
    """Which of the names that pydantic lists, in quotes, a value may mean."""
    return perhaps(value, re.findall("'([^']*)'", choices)) if isinstance(value, str) else ""


def text_of(value: Any) -> str:
    """A value in a message: not longer than a line."""
    return cut(repr(value), 80)


def cut(text: str, most: int) -> str:
    """A text in a message: cut off, with its length, where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 30]}... ({len(text):,} characters)"


def _names_of(parts: list[str], config: type[BaseModel] | None) -> tuple[list[str], list[str], dict[str, str]]:
    """What of a location of pydantic's stands in the YAML, the names that the section there has, and the former ones.

    Of a location are also the kinds of sections, places in lists and the members of unions; readers see none of them.
    """
    if config is None:
        return parts, [], {}
    here, names = [config], list[str]()
    for place, part in enumerate(parts):
        types = {name: annotation for section in here for name, annotation in _types_of(section).items()}
        of_kind = [section for section in here if part in get_args(_types_of(section).get("kind"))]
        if len(here) > 1 and of_kind:
            here = of_kind
        elif part in types:
            names.append(part)
            here = _sections(types[part])
        elif place == len(parts) - 1 and types:
            names.append(part)  # an unknown field
        elif not here and not part.isdecimal() and names[-1] in ("config", "split_files"):
            names.append(part)  # a name of the user's own
    former = {old: name for section in here for old, name in _former_names(section).items()}
    return names, list(dict.fromkeys(name for section in here for name in _types_of(section))), former


def sections_in(section: Any) -> Iterator[type]:
    """The class of a section, and those of the sections inside."""
    yield section
    for annotation in _types_of(section).values():
        for inner in _sections(annotation):
            yield from sections_in(inner)


def _elsewhere(name: str, location: str, config: type[BaseModel] | None) -> str:
    """What to say of an unknown field that other sections have; nothing where none or many have it."""
    places = dict.fromkeys(_places(config, name)) if config is not None else {}
    if location in places or not 0 < len(places) <= 2:  # a section of another kind has it there
        return ""
    place = next(iter(places))
    if place == name and _sections(_types_of(config)[name]):
        return f"; {name} is a section of its own: write {name}, not {location}"
    return f"; write {' or '.join(places)}"


def _places(section: Any, name: str, before: str = "") -> Iterator[str]:
    """The dotted names of all fields of a name, in a section and the sections inside."""
    for field, annotation in _types_of(section).items():
        if field == name:
            yield before + field
        for inner in _sections(annotation):
            yield from _places(inner, name, f"{before}{field}.")


def _sections(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    if isinstance(annotation, ByKind):
        return list(annotation.sections)
    return [section for part in get_args(annotation) for section in _sections(part)]


def _types_of(section: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(section):
        types = get_type_hints(section)
        return {field.name: types[field.name] for field in dataclasses.fields(section)}
    return {name: type_of(field) for name, field in section.model_fields.items()}


def _former_names(section: Any) -> dict[str, str]:
    """Former names of a section's fields, each with the name of today."""
    fields = {} if dataclasses.is_dataclass(section) else section.model_fields
    aliases = {name: field.validation_alias for name, field in fields.items()}
    choices = {name: alias.choices for name, alias in aliases.items() if isinstance(alias, AliasChoices)}
    return {str(old): name for name, olds in choices.items() for old in olds if old != name}


def type_of(field: FieldInfo) -> Any:
    """The type of a field: of a section by its kind, the union of those that are registered."""
    sections = [section for part in field.metadata if isinstance(part, ByKind) for section in part.sections]
    return functools.reduce(operator.or_, sections) if sections else field.annotation
