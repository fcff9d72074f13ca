"""Checkpoints of a training run: whole folders, renamed into place, the newest few kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..common.digests import FileDigest, check_seal, digest, seal
from ..common.files import delete_folder, recover_in, whole_folder
from ..common.finite import require_finite
from ..common.formats import read_json, read_tensors, same_shape, validate, write_json, write_tensors

_FILES = re.compile(r"[a-z0-9-]+\.safetensors|state\.json")
_NAME = re.compile(r"iteration-(\d{9})")


@dataclass(frozen=True)
class RunDescription:
    """What a run trains, noted in each of its checkpoints.

    Attributes:
        values: the description, as JSON values.
        check: called with a checkpoint's values, these values and its path before the run goes on from it; raises
            ValueError where they do not go together.
    """

    values: dict[str, Any]
    check: Callable[[dict[str, Any], dict[str, Any], Path], None]


class _State(BaseModel):
    """Schema of `state.json`; version 0.1.0 wrote neither `run` nor `files`."""

    model_config = ConfigDict(strict=True)

    iteration: int = Field(ge=0)
    config: dict[str, Any]
    units: list[str] = Field(min_length=1)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    run: dict[str, Any] | None = None
    files: dict[str, FileDigest] | None = None


def write_checkpoint(
    folder: Path, iteration: int, owners: Iterable[tuple[str, dict[str, Tensor]]], values: dict[str, Any], keep: int
) -> Path:
    """Write `folder`/iteration-..., one file an owner, and delete all but the newest `keep` checkpoints."""
    path = checkpoint_path(folder, iteration)
    with whole_folder(path, _FILES) as temporary:
        files = {}
        for name, tensors in owners:
            write_tensors(temporary / _file(name), tensors)
            files[_file(name)] = digest(temporary / _file(name)).model_dump()
        write_json(temporary / "state.json", seal({"iteration": iteration, **values, "files": files}))
    remove(checkpoints(folder)[:-keep])
    return path


def checkpoint_path(folder: Path, iteration: int) -> Path:
    """Where a folder has the checkpoint of an iteration."""
    return folder / f"iteration-{iteration:09d}"


def iteration_of(path: Path) -> int:
    """The iteration that a checkpoint's name says."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _file(owner: str) -> str:
    return f"{owner.replace(' ', '-')}.safetensors"


def remove(paths: list[Path]) -> None:
    """Delete checkpoints."""
    for path in paths:
        delete_folder(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    recover_in(folder, _FILES)
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def read_values(path: Path) -> dict[str, Any]:
    """Read the values of a checkpoint; FileNotFoundError or ValueError names what is wrong with it."""
    file = path / "state.json"
    values = read_json(file)
    validate(values, _State, file)
    check_seal(values, file)
    return values


def read_owner(path: Path, owner: str, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of one owner in a checkpoint.

    Raises:
        FileNotFoundError: its file is missing.
        ValueError: its file is damaged, or not the one that was saved, or holds tensors of other names or shapes than
            `like`, or values that are not finite.
    """
    file = path / _file(owner)
    files = read_values(path).get("files")  # older checkpoints have none
    if files is not None and file.is_file() and files.get(file.name) != digest(file).model_dump():
        raise ValueError(
            f"{file} was changed or damaged after it was saved, by its SHA-256 in state.json; remove {path}, and the "
            "run goes on from the checkpoint before it"
        )
    tensors = read_tensors(file)
    if different := sorted(tensors.keys() ^ like.keys()):
        raise ValueError(f"{file} does not match the model: it lacks or has too much {', '.join(different[:5])}")
    for name, tensor in like.items():
        if not same_shape(tensors[name].shape, tensor.shape):
            raise ValueError(
                f"{file} does not match the model: {name} has shape {tuple(tensors[name].shape)}, the model "
                f"{tuple(tensor.shape)}"
            )
    require_finite(tensors.items(), str(file), f"remove {path}, and the run goes on from the checkpoint before it")
    return tensors
