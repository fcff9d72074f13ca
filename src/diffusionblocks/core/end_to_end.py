"""An end-to-end model as a folder in the format of its own library, beside the digests of its files.

    config.json, model.safetensors, ...     as `save_pretrained` of the library writes them
    files.json                              length and SHA-256 of each weight file
    tokenizer.json, ...                     how its input is made (see `processing_files`)

Libraries fill what a folder lacks with random weights, and read over what they do not know. Here both are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ..common.digests import FileDigest, check_digest, digest
from ..common.files import recover, whole_folder
from ..common.formats import read_json, validate, write_json
from ..common.processing_files import write_files
from ..families import restored
from .loading import opened
from .saved_model import END_TO_END_FILES, MODEL_FILES
from .saving import check_plain

_WEIGHTS = r"^(model|diffusion_pytorch_model)[\w.-]*\.safetensors$"


_CONFIGS = ("config.json", "generation_config.json")


class _Files(BaseModel):
    model_config = ConfigDict(strict=True)

    files: dict[Annotated[str, Field(pattern=rf"{_WEIGHTS}|^(generation_)?config\.json$")], FileDigest]


class _Shards(BaseModel):
    """What is read of `*.safetensors.index.json`; no file named there lies outside the folder."""

    weight_map: dict[str, Annotated[str, Field(pattern=_WEIGHTS)]]


def save_end_to_end(model: nn.Module, path: Path, processing: Mapping[str, bytes] | None = None) -> None:
    """Write an unconverted model to a folder; what a run left there before is replaced once the new one is whole.

    Args:
        model: of transformers or diffusers, or one of ours.
        path: the folder.
        processing: files that say how its input is made (`processing_files`), content by name.

    Raises:
        ValueError: quantised or low-rank weights, or a place that must not be replaced.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        check_plain(tensor, f"{type(model).__name__}: {name}")
        if "lora_" in name or ".base_layer." in name:
            raise ValueError(f"{name} is of a low-rank adapter: merge it first (of PEFT: model.merge_and_unload())")
    with whole_folder(path, MODEL_FILES) as folder:
        with _written_on_any_rank(model):
            model.save_pretrained(folder)  # type: ignore[operator]
        outputs = [*sorted(folder.glob("*.safetensors")), *(folder / name for name in _CONFIGS)]
        files = {file.name: digest(file).model_dump() for file in outputs if file.is_file()}
        write_json(folder / END_TO_END_FILES, {"files": files})
        write_files(folder, processing or {})


@contextlib.contextmanager
def _written_on_any_rank(model: nn.Module) -> Iterator[None]:
    """Let transformers save where it is told to: in a process group only the first rank would write anything."""
    if hasattr(model, "should_save_on_this_rank"):
        model.should_save_on_this_rank = lambda is_main_process: is_main_process  # type: ignore[assignment]
    try:
        yield
    finally:
        model.__dict__.pop("should_save_on_this_rank", None)


def load_end_to_end(model_class: str, path: Path, *, verify: bool = True) -> nn.Module:
    """Read an unconverted model from a folder, all of it and nothing else.

    Args:
        model_class: name of a supported class.
        path: the folder.
        verify: compare the SHA-256 of weights and configs with `files.json`, where that is there.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: damaged or changed files, tensors that are missing, unexpected or of another shape, quantised
            weights, or a family beside them.
    """
    recover(path, MODEL_FILES)
    config = read_json(path / "config.json")
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{path / 'config.json'}: quantization_config: quantised weights are not read; dequantise them"
        )
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} holds a PEFT adapter (adapter_config.json): merge it into the weights first")
    weights = _weight_files(path)
    for file in weights:
        with opened(file) as tensors:
            assert tensors.keys() is not None
    listed = path / END_TO_END_FILES
    if verify and listed.is_file():
        files = validate(read_json(listed), _Files, listed).files
        for file in [*weights, *(path / name for name in _CONFIGS if name in files)]:
            check_digest(file, files, END_TO_END_FILES, f"copy it again, or delete {listed} if the change is meant")
    return restored(model_class, path)


def _weight_files(path: Path) -> list[Path]:
    """The weight files that the library will read."""
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards: Any = validate(read_json(index), _Shards, index)
            return [path / shard for shard in sorted(set(shards.weight_map.values()))]
    raise FileNotFoundError(f"{path / 'model.safetensors'} is missing: {path} holds no weights in safetensors")
