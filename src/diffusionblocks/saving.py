"""Saving: safetensors and JSON, one file a block; and export to the original class. `loading.py` reads it back.

A saved model is a folder:

    diffusionblocks.json        format, original class and config, BlocksConfig, partition, the blocks in the folder
    block-00.safetensors ...    everything block b owns, original names under `network.`
    shared.safetensors          the shared parts, under the `joint` policy only
    tokenizer.json              of a language model that a recipe trained on tokens (see `tokenizer_file`)

A folder may hold some of the blocks only, for machines that share the training; `merging.py` makes one model of them.
No code from the folder is run; the original class is looked up by name in the adapter registry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters import config_values, instantiate
from .files import check_replaceable, replaced_folder, write_json, write_tensors
from .finite import DIVERGED, require_finite
from .tokenizer_file import TOKENIZER, write_tokenizer

if TYPE_CHECKING:
    from .block import Block
    from .model import DiffusionBlocks

FORMAT = 1
INDEX = "diffusionblocks.json"
SHARED = "shared.safetensors"
#: names of the files of a saved model
OURS = re.compile(r"diffusionblocks\.json|shared\.safetensors|block-\d+\.safetensors")
#: and with the tokenizer beside them, where that is replaced as well
WITH_TOKENIZER = re.compile(rf"{OURS.pattern}|{re.escape(TOKENIZER)}")
#: names of the files of an end-to-end model, which its own library writes
_LIBRARY = r"config\.json|generation_config\.json|(model|diffusion_pytorch_model)[\w.-]*\.safetensors(\.index\.json)?"
#: what a run may have left as its model, of either method: all of it is replaced
MODEL_FILES = re.compile(rf"{WITH_TOKENIZER.pattern}|{_LIBRARY}")


def check_out(out: Path, inputs: Sequence[Path], done: str) -> None:
    """Refuse a folder for a model, before any work, that must not be replaced, or that would replace what is read.

    Args:
        out: the folder.
        inputs: what is read.
        done: what is done to them, for the message.

    Raises:
        ValueError: see `check_replaceable`; or an input lies in `out`.
    """
    for place in inputs:
        if place.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"out = {out} would replace {place}, which is {done}; choose another folder")
    check_replaceable(out, WITH_TOKENIZER)


def save(
    model: DiffusionBlocks, path: Path, blocks: Sequence[int] | None = None, tokenizer: bytes | None = None
) -> None:
    """Write `model` to the folder `path`; an older save there is replaced only once the new one is whole.

    One file is written after another, so the host holds at most one block beside the model.

    Args:
        model: what to save.
        path: the folder.
        blocks: write only these blocks; None writes all.
        tokenizer: the bytes of a language model's `tokenizer.json`; None leaves one that is there as it is.

    Raises:
        ValueError: no such block, some blocks of a model with `joint` shared parts, a block on the meta device, weights
            that are not finite, or a place that must not be replaced (`check_replaceable`).
    """
    chosen = _chosen(model, blocks)
    for index in chosen:
        _require_finite(model.block(index))
    with replaced_folder(path, OURS if tokenizer is None else WITH_TOKENIZER) as folder:
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer)
        shared = {id(p) for p in model.shared_parameters()}
        for index in chosen:
            tensors = model.block(index).state_dict(keep_vars=True)
            write_tensors(folder / block_file(index), {k: t for k, t in tensors.items() if id(t) not in shared})
            if shared and index == 0:
                write_tensors(folder / SHARED, {k: t for k, t in tensors.items() if id(t) in shared})
        write_json(folder / INDEX, describe(model, chosen))


def _chosen(model: DiffusionBlocks, blocks: Sequence[int] | None) -> list[int]:
    every = list(range(model.partition.num_blocks))
    chosen = every if blocks is None else sorted({model.partition.check_block(block) for block in blocks})
    if not chosen or (blocks is not None and len(chosen) != len(blocks)):
        raise ValueError(f"blocks = {list(blocks or ())}: name each block to save once, of {every}; None saves all")
    if chosen != every and model.blocks_config.shared == "joint":
        raise ValueError(
            f"blocks = {chosen}: under shared = joint all blocks have one copy of the shared parts, so they cannot be "
            "saved apart; leave blocks out, or convert with shared: replicated or frozen"
        )
    unbuilt = [index for index in chosen if _on_meta(model.block(index))]
    if unbuilt:
        built = [index for index in every if not _on_meta(model.block(index))]
        raise ValueError(
            f"blocks {unbuilt} are on the meta device: they were never built and have no weights to save; save the "
            f"others, with blocks={built}"
        )
    return chosen


def _require_finite(block: Block) -> None:
    require_finite(block.state_dict().items(), f"block {block.index}", DIVERGED)


def _on_meta(block: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in block.state_dict().values())


def describe(model: DiffusionBlocks, blocks: Sequence[int] | None = None) -> dict[str, Any]:
    """Everything needed to rebuild the model and route levels to blocks, and which blocks are there (None: all), as
    JSON values."""
    return {
        "format": FORMAT,
        "model_class": model.model_class,
        "model_config": config_values(model.model_class, model.config),
        "blocks_config": model.blocks_config.model_dump(mode="json"),
        "partition": model.partition.to_dict(),
        "blocks": list(range(model.partition.num_blocks) if blocks is None else blocks),
    }


def export(model: DiffusionBlocks) -> nn.Module:
    """The original class with the trained weights, to be used or fine-tuned as an ordinary model.

    Layers come from the blocks that own them; shared parts before the layers from block 0, those after them from
    the last block. What conversion added (adaptive norms, noise embedder, target) has no place in the original
    class and is left out.

    Returns:
        An instance of the original class, on the CPU.

    Raises:
        ValueError: a block is on the meta device.
    """
    unbuilt = [index for index in range(len(model.blocks)) if _on_meta(model.block(index))]
    if unbuilt:
        raise ValueError(
            f"blocks {unbuilt} are on the meta device: they were never built, so there is no whole model to export; "
            "save the others, merge the folders of all, and export the merged model"
        )
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
