"""Digests: of files, and of JSON values, by which what was changed after it was written is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class FileDigest(BaseModel):
    """What an index says about a file beside it."""

    model_config = ConfigDict(frozen=True, strict=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def digest(path: Path) -> FileDigest:
    """Length and SHA-256 of a file.

    Raises:
        FileNotFoundError: it is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with path.open("rb") as file:
        return FileDigest(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def check_digest(file: Path, files: Mapping[str, FileDigest], index: str, advice: str) -> None:
    """Refuse a file that is not as the index beside it says.

    Args:
        file: the file.
        files: digests by the names of files, of the index.
        index: what the index is called.
        advice: what to do, for the message.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it was changed or damaged, or the index has no digest of it.
    """
    if files.get(file.name) != digest(file):
        raise ValueError(
            f"{file} does not match {index} beside it, by its SHA-256: it was changed or damaged after it was saved; "
            f"{advice}"
        )


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Add the SHA-256 of what JSON values say, as their entry `sha256`."""
    return values | {"sha256": _seal_of(values)}


def check_seal(values: dict[str, Any], where: Path) -> None:
    """Refuse values of which `seal` wrote other ones; older files have no such entry.

    Raises:
        ValueError: it names the file.
    """
    if "sha256" in values and values["sha256"] != _seal_of(values):
        raise ValueError(
            f"{where} was changed or damaged after it was saved, by its sha256; copy it again, or delete its entry "
            "sha256 if the change is meant"
        )


def _seal_of(values: dict[str, Any]) -> str:
    return json_digest({name: value for name, value in values.items() if name != "sha256"})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name, in hex: of their dtypes, shapes and bytes, wherever they lie."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def json_digest(values: Any) -> str:
    """SHA-256 of JSON values as they are read back: in hex, the same whatever the order of an object's names."""
    as_read = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
