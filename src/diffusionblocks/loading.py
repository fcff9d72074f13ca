"""Loading a saved model, block by block. No code from the folder is run: its class is looked up by name in the adapter
registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import outline, rebuild_config
from .building import materialise_buffers
from .config import BlocksConfig
from .convert import assemble
from .files import read_json, read_tensors, recover
from .finite import DIVERGED, require_finite
from .model import DiffusionBlocks
from .partition import Partition
from .saving import FORMAT, INDEX, SHARED, WITH_TOKENIZER, block_file


@dataclass(frozen=True)
class SavedModel:
    """What the index of a saved model says.

    Attributes:
        folder: where it lies.
        index: the JSON values as they were read.
        model_class, model_config: the original class and its config object.
        blocks_config, partition: how it was converted.
        blocks: the blocks whose files are in the folder, ascending.
    """

    folder: Path
    index: dict[str, Any]
    model_class: str
    model_config: Any
    blocks_config: BlocksConfig
    partition: Partition
    blocks: tuple[int, ...]

    @property
    def missing(self) -> list[int]:
        """The blocks whose files are not in the folder."""
        return [b for b in range(self.partition.num_blocks) if b not in self.blocks]


def read_saved(path: str | Path) -> SavedModel:
    """Read and check the index of a saved model, and nothing else of it.

    Raises:
        FileNotFoundError: no such folder, or no index in it.
        ValueError: the index is damaged, of another format, or describes no model.
    """
    folder = Path(path)
    recover(folder, WITH_TOKENIZER)
    index = read_json(folder / INDEX)
    missing = {"format", "model_class", "model_config", "blocks_config", "partition"} - set(index)
    if missing:
        raise ValueError(f"{folder / INDEX} lacks {sorted(missing)}: not a saved DiffusionBlocks model")
    if index["format"] != FORMAT:
        raise ValueError(f"{folder}: format {index['format']!r}; this version reads format {FORMAT}")
    try:
        model_config = rebuild_config(index["model_class"], index["model_config"])
        config = BlocksConfig.model_validate(index["blocks_config"])
        partition = Partition.from_dict(index["partition"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_model(folder, error) from error
    blocks = index.get("blocks", list(range(partition.num_blocks)))  # older folders hold all, and do not say so
    _check_blocks(folder, blocks, partition.num_blocks)
    return SavedModel(folder, index, index["model_class"], model_config, config, partition, tuple(blocks))


def _check_blocks(folder: Path, blocks: Any, count: int) -> None:
    indices = isinstance(blocks, list) and all(type(b) is int and 0 <= b < count for b in blocks)
    if not indices or not blocks or blocks != sorted(set(blocks)):
        raise ValueError(
            f"{folder / INDEX}: blocks = {blocks!r} must list indices from 0 to {count - 1}, ascending, without repeats"
        )


def _no_model(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder / INDEX} does not describe a model: {type(error).__name__}: {error}")


def outline_saved(saved: SavedModel) -> DiffusionBlocks:
    """The described model on the meta device: its structure, names and shapes, without memory for its weights.

    Raises:
        ValueError: the index describes no model, or its partition is not that of its config.
    """
    try:
        original = outline(saved.model_class, saved.model_config)
        model = assemble(original, saved.blocks_config, take=True)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_model(saved.folder, error) from error
    if model.partition != saved.partition:
        raise ValueError(f"{saved.folder / INDEX}: the partition does not follow from the blocks_config beside it")
    return model


def load(path: str | Path, *, device: torch.device | str = "cpu") -> DiffusionBlocks:
    """Read a model saved by `save_pretrained`, one block after another.

    Files are mapped into memory and copied tensor by tensor, so the host needs no room for weights that go to a GPU.

    Args:
        path: the folder.
        device: where to put it.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: not a saved DiffusionBlocks model, another format, some blocks only, or tensors that do not match
            or are not finite.
    """
    saved = read_saved(path)
    if saved.missing:
        raise ValueError(
            f"{saved.folder} holds blocks {list(saved.blocks)} of {saved.partition.num_blocks}; blocks {saved.missing} "
            f"are missing: merge it with the folders that hold them, diffusionblocks merge {saved.folder} OTHER ... "
            "--out MODEL, and load that"
        )
    model = outline_saved(saved)
    joint = bool(model.shared_parameters())
    common = _copied(saved.folder / SHARED, model.block(0), device) if joint else {}
    for b in saved.blocks:
        file, block = saved.folder / block_file(b), model.block(b)
        own = _copied(file, block, device)
        # Buffers that no file holds have the weights' precision.
        block.to(dtype=next((t.dtype for t in own.values() if t.is_floating_point()), None))
        try:
            block.load_state_dict(own | common, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{file} does not match the model: {error}") from None
        if joint and b == 0:
            # Now they are the parameters that all blocks hold: assigning them again must not make others.
            common = {name: parameter for name, parameter in block.named_parameters() if name in common}
        materialise_buffers(model, b)
        block.to(device)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model.eval()


def _copied(file: Path, block: nn.Module, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a file on the device, in memory of their own: what is mapped has the file's alignment."""
    expected = block.state_dict()
    copies = {}
    for name, tensor in read_tensors(file).items():
        # Weights keep the precision in which they were saved; anything else has the model's own dtype.
        wanted = expected[name].dtype if name in expected else tensor.dtype
        if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
            raise ValueError(f"{file} does not match the model: {name} is {tensor.dtype}, the model has {wanted}")
        copies[name] = tensor.to(device, copy=True)
    require_finite(copies.items(), str(file), DIVERGED)
    return copies
