"""Saving and loading: safetensors and JSON, one file a block, written under a temporary name and renamed.

A saved model is a folder:

    diffusionblocks.json        format, original class and config, BlocksConfig, partition
    block-00.safetensors ...    everything block b owns, original names under `network.`
    shared.safetensors          the shared parts, under the `joint` policy only

No code from the folder is run; the original class is looked up by name in the adapter registry.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import BlocksConfig
from .partition import Partition

if TYPE_CHECKING:
    from .model import DiffusionBlocks

FORMAT = 1
_INDEX = "diffusionblocks.json"
_OURS = re.compile(r"diffusionblocks\.json|shared\.safetensors|block-\d+\.safetensors")
# What a file may ask for: other values can make transformers fetch kernels.
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def save(model: DiffusionBlocks, path: Path) -> None:
    """Write `model` to the folder `path`; an older save there is replaced only once the new one is whole."""
    with replaced_folder(path, _OURS) as folder:
        shared = {id(p) for p in model.shared_parameters()}
        for index in range(len(model.blocks)):
            tensors = model.block(index).state_dict(keep_vars=True)
            write_tensors(folder / _block_file(index), {k: t for k, t in tensors.items() if id(t) not in shared})
            if shared and index == 0:
                write_tensors(folder / "shared.safetensors", {k: t for k, t in tensors.items() if id(t) in shared})
        write_json(folder / _INDEX, describe(model))


def describe(model: DiffusionBlocks) -> dict[str, Any]:
    """Everything needed to rebuild the model and route levels to blocks, as JSON values."""
    return {
        "format": FORMAT,
        "model_class": model.model_class,
        "model_config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "blocks_config": model.blocks_config.model_dump(mode="json"),
        "partition": model.partition.to_dict(),
    }


def load(path: str | Path, *, device: torch.device | str = "cpu") -> DiffusionBlocks:
    """Read a model saved by `save_pretrained`.

    Args:
        path: the folder.
        device: where to put it.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: not a saved DiffusionBlocks model, another format, or tensors that do not match.
    """
    from .convert import build_original, convert

    folder = Path(path)
    index = read_json(folder / _INDEX)
    missing = {"format", "model_class", "model_config", "attention", "blocks_config", "partition"} - set(index)
    if missing:
        raise ValueError(f"{folder / _INDEX} lacks {sorted(missing)}: not a saved DiffusionBlocks model")
    if index["format"] != FORMAT:
        raise ValueError(f"{folder}: format {index['format']!r}; this version reads format {FORMAT}")
    try:
        if index["attention"] not in _ATTENTION:
            raise ValueError(f"attention = {index['attention']!r}; allowed: {', '.join(_ATTENTION)}")
        model_config = rebuild_config(index["model_class"], index["model_config"])
        model_config._attn_implementation = index["attention"]
        config = BlocksConfig.model_validate(index["blocks_config"])
        partition = Partition.from_dict(index["partition"])
        model = convert(build_original(index["model_class"], model_config), config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / _INDEX} does not describe a model: {type(error).__name__}: {error}") from error
    if model.partition != partition:
        raise ValueError(f"{folder / _INDEX}: the partition does not follow from the blocks_config beside it")
    joint = bool(model.shared_parameters())
    common = read_tensors(folder / "shared.safetensors") if joint else {}
    for b in range(len(model.blocks)):
        tensors = read_tensors(folder / _block_file(b)) | common
        try:
            model.block(b).load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(f"{folder / _block_file(b)} does not match the model: {error}") from None
    dtype = next(iter(read_tensors(folder / _block_file(0)).values())).dtype
    return model.to(device=device, dtype=dtype).eval()


def rebuild_config(model_class: str, values: dict[str, Any]) -> Any:
    """The config object of a supported class from its JSON values."""
    from .adapters import model_class_named

    if not isinstance(model_class, str) or not isinstance(values, dict):
        raise ValueError(f"a model is described by a class name and a mapping, got {model_class!r}, {values!r}")
    original: Any = model_class_named(model_class)
    return original.config_class.from_dict(values)


def _block_file(index: int) -> str:
    return f"block-{index:02d}.safetensors"


# ---- files, whole or not at all -----------------------------------------------------------------------


@contextlib.contextmanager
def replaced_folder(path: Path, ours: re.Pattern[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the body ends without error.

    Files of an older folder whose names match `ours` are replaced; others are not ours and move to the new folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            kept = old / path.name
            path.replace(kept)
            try:
                temporary.replace(path)
            except OSError:
                kept.replace(path)  # the older folder takes its place again
                old.rmdir()
                raise
            for file in kept.iterdir():
                if not ours.fullmatch(file.name):
                    file.replace(path / file.name)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file: Path) -> None:
    if file.is_file():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file, through a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
    temporary.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not safetensors: {error}") from None


def write_json(path: Path, values: Any) -> None:
    """Write JSON through a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError, ValueError: it is missing or no JSON object; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values
