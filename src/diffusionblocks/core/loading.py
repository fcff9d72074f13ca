"""Loading a saved model, block by block. No code from the folder is run: its class is looked up by name in the family
registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.digests import digest
from ..common.finite import DIVERGED, require_finite
from ..common.formats import read_tensors
from ..layers.low_rank import is_update
from .materialise import materialise_buffers
from .model import DiffusionBlocks
from .model_card import NAME_ON_HUB
from .saved_model import (
    INDEX,
    SHARED,
    STAMP,
    SavedModel,
    block_file,
    check_tensors,
    listed,
    outline_saved,
    read_saved,
    stamp,
)

#: what safetensors calls the dtypes that models have
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load(path: str | Path, *, device: torch.device | str = "cpu", verify: bool = True) -> DiffusionBlocks:
    """Read a model saved by `save_pretrained`, one block after another.

    Files are mapped into memory and copied tensor by tensor, so the host needs no room for weights that go to a GPU.

    Args:
        path: the folder.
        device: where to put it.
        verify: compare each file's SHA-256 with the index, about a second a gigabyte; False takes what is there.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: not a saved DiffusionBlocks model, another format, some blocks only, tensors that do not match or
            are not finite, or a file that is not the one that was saved with the index.
    """
    if not Path(path).exists() and NAME_ON_HUB.fullmatch(str(path)):
        raise FileNotFoundError(
            f"{path}: there is no such folder; a model on the hub is read by "
            f"diffusionblocks.from_pretrained({str(path)!r}), and of a run give RUN/model"
        )
    source = read_saved(path)
    check_whole(source)
    model = outline_saved(source)
    headers = {file: check_header(file, tensors) for file, tensors in files_of(model, source).items()}
    check_precisions(model, headers)
    if verify:
        for name in [block_file(b) for b in source.blocks] + ([SHARED] if model.shared_parameters() else []):
            check_digest(source, name)
    joint = bool(model.shared_parameters())
    common = _copies(source.folder / SHARED, device) if joint else {}
    for b in source.blocks:
        file, block = source.folder / block_file(b), model.block(b)
        own = _copies(file, device)
        # Buffers that no file holds have the weights' precision; low-rank updates beside these are float32.
        weights = [tensor for name, tensor in (common | own).items() if not is_update(name)]
        block.to(dtype=next((t.dtype for t in weights if t.is_floating_point()), None))
        try:
            block.load_state_dict(own | common, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{file} does not match the model: {error}") from None
        if joint and b == source.blocks[0]:
            # Now they are the parameters that all blocks hold: assigning them again must not make others.
            common = {name: parameter for name, parameter in block.named_parameters() if name in common}
        materialise_buffers(model, b)
        block.to(device)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model.eval()


def check_whole(source: SavedModel) -> None:
    """Refuse a folder of some of a model's blocks. ValueError: it says which are missing, and how to join them."""
    if source.missing:
        raise ValueError(
            f"{source.folder} holds blocks {list(source.blocks)} of {source.partition.num_blocks}; blocks "
            f"{source.missing} are missing: merge it with the folders that hold them, diffusionblocks merge "
            f"{source.folder} OTHER ... --out MODEL, and load that"
        )


def _copies(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a file on the device, in memory of their own: what is mapped has the file's alignment."""
    copies = {name: tensor.to(device, copy=True) for name, tensor in read_tensors(file).items()}
    require_finite(copies.items(), str(file), DIVERGED)
    return copies


# ---- files against their index -----------------------------------------------------------------------------


def files_of(
    model: DiffusionBlocks, source: SavedModel, blocks: Sequence[int] | None = None
) -> dict[Path, dict[str, Tensor]]:
    """The tensor files of a saved model, and what the outline of its model expects in each.

    Args:
        model: the outline.
        source: where they lie.
        blocks: of these blocks only; None takes all.
    """
    common = {id(parameter) for parameter in model.shared_parameters()}
    files = {}
    for b in source.blocks if blocks is None else blocks:
        tensors = model.block(b).state_dict(keep_vars=True)
        files[source.folder / block_file(b)] = {name: t for name, t in tensors.items() if id(t) not in common}
        if common:
            files[source.folder / SHARED] = {name: t for name, t in tensors.items() if id(t) in common}
    return files


def check_header(path: Path, model_tensors: Mapping[str, Tensor]) -> frozenset[torch.dtype]:
    """Check names, shapes and dtypes in a safetensors file by its header; return the floating dtypes in it.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged, or holds something else; the message names the tensor.
    """
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        present = {
            name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype())) for name, s in slices.items()
        }
    check_tensors(present, model_tensors, f"{path} does not match the model: it", "save the model again")
    return frozenset(
        dtype for _, dtype in present.values() if isinstance(dtype, torch.dtype) and dtype.is_floating_point
    )


def check_precisions(model: DiffusionBlocks, dtypes: Mapping[Path, frozenset[torch.dtype]]) -> None:
    """Refuse files of one model whose weights have different precisions; fixed weights may have another than updates.

    Raises:
        ValueError: it names two such files.
    """
    files: dict[frozenset[torch.dtype], Path] = {}
    for path, floating in dtypes.items():
        if floating and (model.blocks_config.lora is None or path.name != SHARED):
            files.setdefault(floating, path)
    if len(files) > 1:
        (one, here), (other, there), *_ = files.items()
        raise ValueError(
            f"{here} holds {listed(one)} weights and {there} {listed(other)}: a model has one precision; save the "
            "blocks in the same"
        )


def check_digest(source: SavedModel, name: str) -> None:
    """Check that a file is the one that was saved with the index, bit by bit, where the index tells.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is another; the message says whether it is of another model or training, or was changed.
    """
    if source.files is None:
        return
    path = source.folder / name
    if name not in source.files:
        raise ValueError(f"{source.folder / INDEX}: files does not list {name}; save the model again")
    if digest(path) == source.files[name]:
        return
    block = next((b for b in source.blocks if block_file(b) == name), None)
    with opened(path) as file:
        own = (file.metadata() or {}).get(STAMP)
    origin = "it was changed or damaged after it was saved"
    if own is not None and own != stamp(source.index, block):
        origin = f"it is of another model, block or training: it says {own}, the index {stamp(source.index, block)}"
    elif own is not None:
        origin += ", or is of another run of the same recipe"
    raise ValueError(
        f"{path} does not match {INDEX} beside it, by its SHA-256: {origin}; copy the file again from where it was "
        "saved, or save the model again"
    )


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, mapped into memory.

    Raises:
        FileNotFoundError, ValueError: it is missing or damaged; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not safetensors: {error}") from None
