"""Tensors and JSON in files, written whole or not at all: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import mode_of_new_files, whole_file
from .finite import not_finite_entry
from .messages import shorten


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, and text beside them, to a safetensors file, through a temporary name.

    Raises:
        OSError: it cannot be written, as on a full disk; it names the file.
    """
    with whole_file(path) as temporary:
        mode = mode_of_new_files(temporary.parent)
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise ValueError(f"{path} cannot be written: {error}") from None
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        except RuntimeError as error:  # tensors that lie in the same memory
            raise ValueError(f"{path} cannot be written: {' '.join(str(error).split())}") from None
        temporary.chmod(mode)


def same_shape(stored: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a stored tensor is of the shape that a model expects. Older files have no dimension for single values."""
    return tuple(stored) == tuple(shape) or (not stored and tuple(shape) == (1,))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:  # the last three: an unknown dtype, no bytes
        raise ValueError(f"{path} is damaged or not safetensors: {error}") from None


def write_json(path: Path, values: Any) -> None:
    """Write JSON through a temporary name. ValueError: a number is not finite (see `json_text`)."""
    text = json_text(values, str(path), indent=2)
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n")


def json_text(values: Any, what: str, indent: int | None = None) -> str:
    """JSON values as text.

    Args:
        values: to write.
        what: they are for: the message starts with it.
        indent: of nested values; None writes one line.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know; the message names its entry.
    """
    if (entry := not_finite_entry(values)) is not None:
        name, value = entry
        raise ValueError(f"{what} is not written: {name} is {value}, and JSON has finite numbers only")
    return json.dumps(values, indent=indent, allow_nan=False)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError, ValueError: it is missing or no JSON object; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        values = json.loads(path.read_bytes(), parse_constant=_refused_constant)
    except (ValueError, RecursionError) as error:  # not JSON, not text, a number too long, nested too deep
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def _refused_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


_Values = TypeVar("_Values", bound=BaseModel)


def validate(values: Any, schema: type[_Values], where: Path | str) -> _Values:
    """Validate values that were read from a file.

    Raises:
        ValueError: one line that names the file, the field, what is wrong with it, and its value.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first, *more = error.errors()
        field = ".".join(str(part) for part in first["loc"])
        got = "" if first["type"] == "missing" else f" (got {shorten(repr(first['input']), 80)})"
        others = f"; {len(more)} more fields are wrong" if more else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {field}{': ' if field else ''}{message}{got}{others}") from None


def leaves(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of nested JSON objects by their dotted names, and their values; an empty object is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
