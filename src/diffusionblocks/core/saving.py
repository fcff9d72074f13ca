"""Saving a model, one file a block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.digests import FileDigest, digest, seal
from ..common.files import check_replaceable, whole_folder
from ..common.finite import DIVERGED, require_finite
from ..common.formats import write_json, write_tensors
from ..common.modules import weights_dtype
from ..common.processing_files import write_files
from .block import Block
from .model import DiffusionBlocks
from .model_card import CardNotes, card_text, write_card
from .saved_model import (
    CONFIG,
    END_TO_END_FILES,
    ENSEMBLE,
    GENERATION_CONFIG,
    INDEX,
    LOCAL,
    MODEL_FILES,
    OURS,
    SHARED,
    STAMP,
    WITH_PROCESSING,
    block_file,
    check_tensors,
    describe,
    listed,
    outline_of_index,
    stamp,
    write_configs,
)


def check_out(out: Path, inputs: Sequence[Path], action: str, ours: re.Pattern[str] = WITH_PROCESSING) -> None:
    """Refuse a folder for a model, before any work, that must not be replaced, or that would replace what is read.

    Args:
        out: the folder.
        inputs: what is read.
        action: what is done to them, for the message.
        ours: names of files of an older model there, which may be replaced.

    Raises:
        ValueError: see `check_replaceable`; or an input lies in `out`.
    """
    for place in inputs:
        if place.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"out = {out} would replace {place}, which is {action}; choose another folder")
    check_replaceable(out, ours)


def save(
    model: DiffusionBlocks,
    path: Path,
    blocks: Sequence[int] | None = None,
    processing: Mapping[str, bytes] | None = None,
    trained: dict[str, Any] | None = None,
    notes: CardNotes | None = None,
) -> None:
    """Write `model` to the folder `path`; an older save there is replaced only once the new one is whole.

    One file is written after another, so the host holds at most one block beside the model.

    Args:
        model: what to save.
        path: the folder.
        blocks: write only these blocks; None writes all.
        processing: files that say how its input is made (`processing_files`), content by name; None or none leaves
            those that are there as they are.
        trained: what the blocks were trained on, as JSON values: blocks of different trainings are not merged.
        notes: what the model card is to say beside what the model knows of itself.

    Raises:
        ValueError: no such block, some blocks of a model with `joint` shared parameters, a block on the meta device,
            tensors that `load` would refuse or that are not finite, or a place that must not be replaced
            (`check_replaceable`).
    """
    indices = _choose(model, blocks)
    model.rest()
    index = describe(model, indices) | ({} if trained is None else {"trained": trained})
    _check_readable(model, index)
    for b in indices:
        _require_finite(model.block(b))
    with whole_folder(path, replaced_names(path, WITH_PROCESSING if processing else OURS)) as folder:
        write_files(folder, processing or {})
        files: dict[str, FileDigest] = {}
        shared = {id(p) for p in model.shared_parameters()}

        def write(name: str, tensors: dict[str, torch.Tensor], block: int | None) -> None:
            write_tensors(folder / name, tensors, {STAMP: stamp(index, block)})
            files[name] = digest(folder / name)

        for b in indices:
            tensors = model.block(b).state_dict(keep_vars=True)
            write(block_file(b), {k: t for k, t in tensors.items() if id(t) not in shared}, b)
            if shared and b == indices[0]:
                write(SHARED, {k: t for k, t in tensors.items() if id(t) in shared}, None)
        write_json(folder / INDEX, seal(index | {"files": {name: files[name].model_dump() for name in files}}))
        write_configs(folder, model, weights_dtype(model.block(indices[0])))
        write_card(folder, card_text(model, indices, notes), before=path)


def replaced_names(path: Path, ours: re.Pattern[str]) -> re.Pattern[str]:
    """The names of files that are replaced: configs too in a folder of blocks, and all of what another method left."""
    if not (path / INDEX).is_file() and any((path / name).is_file() for name in (ENSEMBLE, LOCAL, END_TO_END_FILES)):
        return MODEL_FILES
    configs = "|".join(map(re.escape, (CONFIG, GENERATION_CONFIG)))
    return re.compile(f"{ours.pattern}|{configs}") if (path / INDEX).is_file() else ours


def _check_readable(model: DiffusionBlocks, index: dict[str, Any]) -> None:
    """Refuse, before anything is written, tensors that `load` would refuse: it is the reader's own check."""
    blocks: list[int] = index["blocks"]
    for b in blocks:
        for name, tensor in model.block(b).state_dict(keep_vars=True).items():
            check_plain(tensor, f"block {b}: {name}")
    outline = outline_of_index(index)
    precisions: dict[frozenset[torch.dtype], int] = {}
    for b in blocks:
        states = model.block(b).state_dict(keep_vars=True)
        tensors = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in states.items()}
        fix = "save what `convert` made"
        if any("lora_" in name or ".base_layer." in name for name in tensors):
            fix = "merge the low-rank weights into the layers first (of PEFT: model.merge_and_unload())"
        check_tensors(tensors, outline.block(b).state_dict(), f"block {b} cannot be saved: it", fix)
        floating = frozenset(dtype for _, dtype in tensors.values() if dtype.is_floating_point)
        precisions.setdefault(floating, b)
    if len(precisions) > 1:
        (here, one), (there, other), *_ = precisions.items()
        raise ValueError(
            f"block {one} has {listed(here)} weights and block {other} {listed(there)}: a model has one precision; "
            "bring the blocks to the same, as in model.float()"
        )


def check_plain(tensor: torch.Tensor, what: str) -> None:
    """Refuse tensors that safetensors would write without what makes sense of them."""
    kind = type(tensor)
    if kind not in (torch.Tensor, nn.Parameter, nn.Buffer) or tensor.is_quantized:
        raise ValueError(
            f"{what} is a {kind.__module__}.{kind.__name__}: what makes sense of its numbers (a quantisation, other "
            "parts of the tensor) would not be saved; make an ordinary tensor of it first, dequantised or gathered"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{what} has layout {tensor.layout}; turn it into a dense tensor first")


def _choose(model: DiffusionBlocks, blocks: Sequence[int] | None) -> list[int]:
    every = list(range(model.partition.num_blocks))
    indices = every if blocks is None else sorted({model.partition.check_block(block) for block in blocks})
    if not indices or (blocks is not None and len(indices) != len(blocks)):
        raise ValueError(f"blocks = {list(blocks or ())}: name each block to save once, of {every}; None saves all")
    if indices != every and model.blocks_config.shared == "joint":
        raise ValueError(
            f"blocks = {indices}: under shared = joint all blocks have one copy of the shared parameters, so they "
            "cannot be saved apart; leave blocks out, or convert with shared: replicated or frozen"
        )
    unbuilt = [index for index in indices if on_meta(model.block(index))]
    if unbuilt:
        others = [index for index in every if not on_meta(model.block(index))]
        raise ValueError(
            f"blocks {unbuilt} are on the meta device: they were never built and have no weights to save; save the "
            f"others, with blocks={others}"
        )
    return indices


def _require_finite(block: Block) -> None:
    require_finite(block.state_dict().items(), f"block {block.index}", DIVERGED)


def on_meta(block: nn.Module) -> bool:
    """Whether a block was never built."""
    return any(tensor.is_meta for tensor in block.state_dict().values())
