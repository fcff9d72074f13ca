"""Building a model block by block, so that neither host nor device ever holds the whole of it.

    source = Fresh("DiT", model_config, seed=0)     # or Pretrained(...): see weights.py
    model = empty(source, blocks_config)            # on the meta device: names and shapes, no memory
    for index in range(len(model.blocks)):
        materialise(model, index, source)           # one block's weights, on the CPU
        ...                                         # move them elsewhere, before the next

`build` does the whole.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..common.modules import empty_tables
from ..config import BlocksConfig
from ..families import instantiate, outline, with_depth, with_fewest_layers
from ..families.module_tree import layer_of
from ..layers.low_rank import fresh_updates, is_update, starting_magnitudes
from ..layers.quantized import check_quantizer, quantized_layers
from .block import FROZEN, Block
from .conversion import assemble
from .model import DiffusionBlocks
from .weights import WeightSource

_LAYER_NORMS = re.compile(r"adaptive\.\d+\.")
_TRUNK_LAYERS = re.compile(rf"{re.escape(FROZEN)}\d+\.")


def build(
    source: WeightSource,
    config: BlocksConfig,
    *,
    blocks: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> DiffusionBlocks:
    """The model of a source as blocks, built one after another.

    Host memory beside the finished blocks is at most about that of one block.

    Args:
        source: where the original model's weights come from.
        config: how to split it.
        blocks: build only these; the others stay on the meta device. None builds all.
        device: each block moves there as soon as it is built.

    Returns:
        The model, in training mode. A block's weights depend neither on which others are built nor on their order.

    Raises:
        ValueError: no such block, or what `convert` refuses.
    """
    model = empty(source, config)
    indices = range(len(model.blocks)) if blocks is None else [model.partition.check_block(b) for b in blocks]
    for index in indices:
        materialise(model, index, source)
        model.block(index).to(device)
    return model


def empty(source: WeightSource, config: BlocksConfig) -> DiffusionBlocks:
    """The model of a source as blocks on the meta device, in the source's dtype; `materialise` fills them.

    Raises:
        ValueError: what `convert` refuses, weights that cannot be trained with this config included.
    """
    if config.lora is not None:
        check_quantizer(config.lora.base)
    model = assemble(source.outline(), config, take=True)
    _check_weights(source, model)
    return model


def _check_weights(source: WeightSource, model: DiffusionBlocks) -> None:
    """Let the family see the very weights of the head, which is all that it judges."""
    original = outline(source.model_class, with_depth(source.model_class, source.model_config, 1))
    head = tuple(f"{path}." for path in model.family.head_paths(original))
    names = [name for name in original.state_dict() if name.startswith(head)]
    original.load_state_dict(dict(source.tensors(0, range(1), names)), strict=False, assign=True)
    model.family.check_weights(original, model.blocks_config)


def materialise(model: DiffusionBlocks, index: int, source: WeightSource) -> None:
    """Give memory and initial weights, on the CPU, to all that is still on the meta device in one block.

    Parameters stay the same objects. Under `joint`, the shared parameters are filled with the first block.

    Args:
        model: made by `empty` from the same source.
        index: of the block.
        source: where the original model's weights come from.

    Raises:
        ValueError: no such block.
    """
    block = model.block(index)
    empty_target = any(parameter.is_meta for parameter in block.target.parameters())
    materialise_added(model, index)
    waiting: dict[str, list[Tensor]] = {}  # experts and their trunk have layers of one name
    for name, tensor in block.state_dict(keep_vars=True).items():
        if tensor.is_meta and (original := block.original_name(name)) is not None and not is_update(name):
            waiting.setdefault(original, []).append(tensor)
    quantized = {}
    for name, linear in quantized_layers(block.network):
        if linear.parts[0].is_meta:  # several tensors here, one of the source
            quantized[f"{name}.weight"] = linear
            for part in linear.names:
                del waiting[f"{name}.{part}"]
    layers = model.partition.layer_range(index)
    # Experts start as one model: fresh ones are all drawn as the first.
    drawn_as = 0 if model.partition.split == "experts" else index
    for name, value in source.tensors(drawn_as, layers, [*waiting, *quantized]):
        if name in quantized:
            linear = quantized.pop(name)
            for part, part_value in linear.quantized(value):
                _fill(getattr(linear, part), part_value)
        else:
            first, *copies = waiting.pop(name)
            for tensor in copies:
                _fill(tensor, value.clone())
            _fill(first, value)
    assert not {**waiting, **quantized}, f"the source has no {sorted([*waiting, *quantized])}"
    for tensor, value in list(starting_magnitudes(block.network)):
        if tensor.is_meta:
            _fill(tensor, value)
    if empty_target:
        model.family.fill_target(block.network, block.target, model.blocks_config)


def materialise_added(model: DiffusionBlocks, index: int) -> None:
    """Fill what conversion added to one block (adaptive norms, noise embedder, target, an extra token's position).

    Its initial values depend on `blocks_config.seed` alone; they are those that `convert` gives. Its buffers are filled
    as by `materialise_buffers`.

    Raises:
        ValueError: no such block.
    """
    block = model.block(index)
    for tensor, value in list(fresh_updates(block.network, model.blocks_config.seed, index)):
        if tensor.is_meta:
            _fill(tensor, value)
    originals = {name for name in block.state_dict() if block.original_name(name) is not None}
    _fill_from_reference(model, block, ((n, t) for n, t in _tensors(block) if n not in originals))


def materialise_buffers(model: DiffusionBlocks, index: int) -> None:
    """Fill the buffers of one block that no file holds (frequencies, sin-cos positions); they follow from the config.

    For loading: on a block whose parameters and persistent buffers are on the meta device, or were assigned already.
    Buffers are made on the CPU, in the dtype that they have on the meta device.

    Raises:
        ValueError: no such block.
    """
    block = model.block(index)
    in_files = block.state_dict().keys()
    _fill_from_reference(model, block, ((n, t) for n, t in block.named_buffers() if n not in in_files))


def _tensors(block: Block) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _fill_from_reference(model: DiffusionBlocks, block: Block, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill tensors that do not depend on the original's weights from a real model of few layers in one block."""
    waiting = {name: tensor for name, tensor in tensors if tensor.is_meta}
    tables = list(empty_tables(block))
    if not waiting and not tables:
        return
    original = instantiate(model.model_class, with_fewest_layers(model.model_class, model.config))
    reference = assemble(original, model.blocks_config.as_one_block(), take=True).block(0)
    values = dict(_tensors(reference))
    for name, tensor in waiting.items():
        # A copy: one layer's norms stand for all layers'.
        _fill(tensor, values[_name_in_reference(block, reference, name)].clone())
    for name, attribute in tables:
        part, whole = (tree.get_submodule(name) for tree in (block, reference))
        setattr(part, attribute, copy.deepcopy(getattr(whole, attribute)))


def _name_in_reference(block: Block, reference: Block, name: str) -> str:
    """What a tensor of a block is called in a block of one layer, the model's first."""
    place = layer_of(name.removeprefix("network."), block.layer_paths) if name.startswith("network.") else None
    if place is not None:
        return f"network.{reference.layer_paths[0]}.{place[1]}"
    return _LAYER_NORMS.sub("adaptive.0.", _TRUNK_LAYERS.sub(f"{FROZEN}0.", name, count=1), count=1)


def _fill(tensor: Tensor, value: Tensor) -> None:
    """Let a tensor on the meta device have a value. The object stays the same, wherever it is referred to."""
    assert tensor.is_meta
    assert tensor.shape == value.shape, (tensor.shape, value.shape)
    filled: Tensor = value.detach().to(tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        filled = nn.Parameter(filled, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, filled)
