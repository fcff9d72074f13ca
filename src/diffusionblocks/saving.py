"""Saving: safetensors and JSON, one file a block; and export to the original class. `loading.py` reads it back.

A saved model is a folder:

    diffusionblocks.json        format, original class and config, BlocksConfig, partition
    block-00.safetensors ...    everything block b owns, original names under `network.`
    shared.safetensors          the shared parts, under the `joint` policy only

No code from the folder is run; the original class is looked up by name in the adapter registry.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters import config_values, instantiate
from .files import replaced_folder, write_json, write_tensors

if TYPE_CHECKING:
    from .model import DiffusionBlocks

FORMAT = 1
INDEX = "diffusionblocks.json"
_OURS = re.compile(r"diffusionblocks\.json|shared\.safetensors|block-\d+\.safetensors")


def save(model: DiffusionBlocks, path: Path) -> None:
    """Write `model` to the folder `path`; an older save there is replaced only once the new one is whole."""
    with replaced_folder(path, _OURS) as folder:
        shared = {id(p) for p in model.shared_parameters()}
        for index in range(len(model.blocks)):
            tensors = model.block(index).state_dict(keep_vars=True)
            write_tensors(folder / block_file(index), {k: t for k, t in tensors.items() if id(t) not in shared})
            if shared and index == 0:
                write_tensors(folder / "shared.safetensors", {k: t for k, t in tensors.items() if id(t) in shared})
        write_json(folder / INDEX, describe(model))


def describe(model: DiffusionBlocks) -> dict[str, Any]:
    """Everything needed to rebuild the model and route levels to blocks, as JSON values."""
    return {
        "format": FORMAT,
        "model_class": model.model_class,
        "model_config": config_values(model.model_class, model.config),
        "blocks_config": model.blocks_config.model_dump(mode="json"),
        "partition": model.partition.to_dict(),
    }


def export(model: DiffusionBlocks) -> nn.Module:
    """The original class with the trained weights, to be used or fine-tuned as an ordinary model.

    Layers come from the blocks that own them; shared parts before the layers from block 0, those after them from
    the last block. What conversion added (adaptive norms, noise embedder, target) has no place in the original
    class and is left out.

    Returns:
        An instance of the original class, on the CPU.
    """
    weights: dict[str, torch.Tensor] = {}
    original = instantiate(model.model_class, model.config)
    head = tuple(f"{path}." for path in model.adapter.head_paths(original))
    last = len(model.blocks) - 1
    for index in range(len(model.blocks)):
        block = model.block(index)
        for name, tensor in block.network.state_dict().items():
            of_layer = any(name.startswith(f"{path}.") for path in block.layer_paths)
            of_head = name.startswith(head)
            if of_layer or (of_head and index == last) or (not of_head and index == 0):
                weights[name] = tensor.detach().cpu().clone()
    nn.Module.to(original, dtype=next(iter(weights.values())).dtype)  # diffusers overrides `to`, and nags
    original.load_state_dict(weights, strict=True)
    return original.train(model.training)


def block_file(index: int) -> str:
    """Name of the file that holds block `index`."""
    return f"block-{index:02d}.safetensors"
