"""A classifier whose modules were trained by losses of their own, as a folder.

local.json                   format, class, config and objective, number of modules, what they were trained on,
                             length and SHA-256 of every tensor file, and the SHA-256 of all that is said here
module-00.safetensors ...    what each module has of its own: layers and head, the first also the stem
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..common.digests import FileDigest, check_digest, check_seal, digest, seal
from ..common.fields import Blocks
from ..common.files import recover, whole_folder
from ..common.finite import DIVERGED, require_finite
from ..common.formats import read_json, read_tensors, validate, write_json, write_tensors
from .saved_model import LOCAL, MODEL_FILES, check_tensors
from .saving import check_plain


class _Index(BaseModel):
    """Schema of `local.json`."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    format: Literal[1]
    model_class: str
    config: dict[str, Any] = Field(alias="model_config")
    local: dict[str, Any]
    modules: Blocks
    files: dict[str, FileDigest]


@dataclass(frozen=True)
class SavedModules:
    """What the index of a folder says.

    Attributes:
        folder: where it lies.
        model_class: name of the original class.
        model_config: values of its config.
        local: values of the objective's config.
        modules: number of modules.
        files: digest of each file.
    """

    folder: Path
    model_class: str
    model_config: dict[str, Any]
    local: dict[str, Any]
    modules: int
    files: dict[str, FileDigest]

    def fill(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Give tensors the values that the files have for them.

        Args:
            states: of each module, by name.

        Raises:
            FileNotFoundError, ValueError: a file is missing, was changed, holds other tensors, or is not finite.
        """
        for index, state in enumerate(states):
            file = self.folder / _file(index)
            check_digest(file, self.files, LOCAL, "copy it again")
            tensors = read_tensors(file)
            present = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            check_tensors(present, state, f"{file} does not match the model: it", "save the model again")
            require_finite(tensors.items(), str(file), DIVERGED)
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.data = tensors[name].clone()


def _file(index: int) -> str:
    return f"module-{index:02d}.safetensors"


def save_modules(states: Sequence[Mapping[str, Tensor]], values: Mapping[str, Any], path: Path) -> None:
    """Write modules to a folder; what a run left there before is replaced once the new one is whole.

    Args:
        states: what each module has of its own, by name.
        values: of the index, as JSON values: see `SavedModules`.
        path: the folder.

    Raises:
        ValueError: tensors that safetensors would write without what makes sense of them, or that are not finite.
    """
    for index, state in enumerate(states):
        for name, tensor in state.items():
            check_plain(tensor, f"module {index}: {name}")
        require_finite(state.items(), f"module {index}", DIVERGED)
    with whole_folder(path, MODEL_FILES) as folder:
        files = {}
        for index, state in enumerate(states):
            write_tensors(folder / _file(index), dict(state))
            files[_file(index)] = digest(folder / _file(index)).model_dump()
        write_json(folder / LOCAL, seal({"format": 1, **values, "files": files}))


def read_modules(path: Path) -> SavedModules:
    """Read the index of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was changed or damaged.
    """
    recover(path, MODEL_FILES)
    file = path / LOCAL
    values = read_json(file)
    index = validate(values, _Index, file)
    check_seal(values, file)
    return SavedModules(path, index.model_class, index.config, index.local, index.modules, index.files)
