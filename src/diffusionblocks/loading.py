"""Loading a saved model. No code from the folder is run: its class is looked up by name in the adapter registry."""

from __future__ import annotations

from pathlib import Path

import torch

from .adapters import instantiate, rebuild_config
from .config import BlocksConfig
from .convert import assemble
from .files import read_json, read_tensors
from .model import DiffusionBlocks
from .partition import Partition
from .saving import FORMAT, INDEX, block_file


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
    folder = Path(path)
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
        model = assemble(instantiate(index["model_class"], model_config), config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} does not describe a model: {type(error).__name__}: {error}") from error
    if model.partition != partition:
        raise ValueError(f"{folder / INDEX}: the partition does not follow from the blocks_config beside it")
    joint = bool(model.shared_parameters())
    common = read_tensors(folder / "shared.safetensors") if joint else {}
    for b in range(len(model.blocks)):
        own = read_tensors(folder / block_file(b))
        tensors = own | common
        dtype = next(iter(own.values())).dtype
        try:
            model.block(b).load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ValueError(f"{folder / block_file(b)} does not match the model: {error}") from None
    return model.to(device=device, dtype=dtype).eval()
