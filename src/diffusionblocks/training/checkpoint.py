"""Checkpoints of a training run: whole folders, renamed into place, the newest few kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import read_json, read_tensors, replaced_folder, write_json, write_tensors

_FILES = re.compile(r"state\.(safetensors|json)")
_NAME = re.compile(r"iteration-(\d{9})")


def write_checkpoint(
    folder: Path, iteration: int, tensors: dict[str, Tensor], values: dict[str, Any], keep: int
) -> Path:
    """Write `folder`/iteration-... and delete all but the newest `keep` checkpoints."""
    path = folder / f"iteration-{iteration:09d}"
    with replaced_folder(path, _FILES) as temporary:
        write_tensors(temporary / "state.safetensors", tensors)
        write_json(temporary / "state.json", {"iteration": iteration, **values})
    remove(checkpoints(folder)[:-keep])
    return path


def remove(paths: list[Path]) -> None:
    """Delete checkpoints."""
    for path in paths:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of a checkpoint; FileNotFoundError or ValueError names what is wrong with it."""
    return read_tensors(path / "state.safetensors"), read_json(path / "state.json")
