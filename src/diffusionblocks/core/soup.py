"""Soups: means of weights, of blocks that were branched from one trunk, or of each with the trunk."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.finite import DIVERGED, require_finite
from .block import FROZEN
from .branching import assemble_like, trunk_name, without_defaults
from .model import DiffusionBlocks


def soup(model: DiffusionBlocks, weights: Sequence[float] | None = None) -> DiffusionBlocks:
    """Mix blocks into a model of one block on all levels, by the weighted mean of their parameters.

    Blocks that were branched from one trunk may lie close enough together for it (Wortsman et al., arXiv 2203.05482);
    a mean of blocks from scratch is of no use. The result is an ordinary model: it predicts, saves and loads.

    Args:
        model: blocks of one shape.
        weights: of each block, >= 0, the larger the more it counts; default all alike.

    Returns:
        The model of one block, on the same device, in the same mode.

    Raises:
        ValueError: blocks of several shapes, weights that are not one finite number >= 0 a block or are all 0, or
            parameters that are not finite.
    """
    partition = model.partition
    if len(set(partition.layers)) > 1:
        raise ValueError(f"soup needs blocks of one shape, and these have layers = {list(partition.layers)}")
    if model.blocks_config.lora is not None:
        raise ValueError(
            "soup mixes weights, and a mix of low-rank factors is no mix of their products: export each block "
            "(export_block merges its update), and mix these"
        )
    weights = [1.0] * partition.num_blocks if weights is None else list(weights)
    if (
        len(weights) != partition.num_blocks
        or not all(math.isfinite(w) and w >= 0 for w in weights)
        or not any(weights)
    ):
        raise ValueError(
            f"weights must be {partition.num_blocks} finite numbers >= 0, one a block, not all 0; got {weights}"
        )
    result = assemble_like(model, without_defaults(model).as_one_block(), range(partition.layers[0]))
    total = sum(weights)
    state: dict[str, Tensor] = {}
    for b, weight in enumerate(weights):
        tensors = model.block(b).state_dict()
        require_finite(tensors.items(), f"block {b}", DIVERGED)
        for name, tensor in tensors.items():
            share = tensor.double() * (weight / total)
            name = trunk_name(model, b, name, partition.layers[0])
            state[name] = state[name] + share if name in state else share
    block = result.block(0)
    block.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in block.state_dict().items()})
    return result.train(model.training)


@torch.no_grad()
def average_with_trunk(model: DiffusionBlocks, trunk: DiffusionBlocks, shares: Sequence[float]) -> DiffusionBlocks:
    """Average the weights of branched blocks with those of the trunk that they were copied from.

    A block that trained on for a while may lie near enough to its trunk for a mean of the two, as in `soup`.

    Args:
        model: branched blocks.
        trunk: a model of one block on all levels, of the same class, with the layers of the largest block or more.
        shares: of the trunk's weights in each block, 0 (the block as it is) to 1 (the trunk), block 0 first.

    Returns:
        A model of the same blocks, on the device of `model`, in its mode.

    Raises:
        ValueError: shares that are not one number from 0 to 1 a block, a trunk of several blocks or other shapes, or
            weights that are not finite.
    """
    blocks = model.partition.num_blocks
    if len(shares) != blocks or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares must be {blocks} numbers from 0 to 1, one a block; got {list(shares)}")
    if model.blocks_config.shared == "joint":
        raise ValueError(
            "shared = joint: blocks have one copy of the shared parameters, so none has a share of its own"
        )
    if model.blocks_config.lora is not None or trunk.blocks_config.lora is not None:
        raise ValueError("the mean of low-rank updates is none of their weights: average models that train all weights")
    if trunk.partition.num_blocks != 1:
        raise ValueError(f"a trunk has one block on all levels, this model has {trunk.partition.num_blocks}")
    depth = trunk.partition.num_layers
    if model.partition.split == "experts" and depth != model.partition.num_layers:
        raise ValueError(
            f"experts have all layers of their trunk, {model.partition.num_layers}, and this trunk has {depth}: give "
            "the trunk that they were copied from"
        )
    weights = trunk.block(0).state_dict()
    require_finite(weights.items(), "the trunk", DIVERGED)
    result = copy.deepcopy(model)
    for b, share in enumerate(shares):
        state = model.block(b).state_dict()
        require_finite(state.items(), f"block {b}", DIVERGED)
        mixed = {}
        for name, tensor in state.items():
            if name.startswith(FROZEN):
                mixed[name] = tensor  # which is the trunk's already
                continue
            other = weights.get(trunk_name(model, b, name, depth))
            if other is None or other.shape != tensor.shape:
                raise ValueError(
                    f"block {b} has {name} {tuple(tensor.shape)}, the trunk "
                    f"{'has none' if other is None else tuple(other.shape)}: give the trunk that it was copied from"
                )
            mean = tensor.double() * (1 - share) + other.to(tensor.device).double() * share
            mixed[name] = mean.to(tensor.dtype) if share and tensor.is_floating_point() else tensor
        result.block(b).load_state_dict(mixed)
    return result


@torch.no_grad()
def greedy_soup(model: DiffusionBlocks, score: Callable[[DiffusionBlocks], float]) -> tuple[DiffusionBlocks, list[int]]:
    """Mix blocks one after another, the best first, and leave out each that would lower the score of the mix.

    Args:
        model: blocks of one shape, branched from one trunk.
        score: of a model of one block, the higher the better: for example its accuracy on training images that were
            held out. Never on test images, for the soup is selected by it.

    Returns:
        The model of one block, never of a lower score than the best single block, and the blocks that are in it.

    Raises:
        ValueError: what `soup` refuses.
    """
    count = model.partition.num_blocks

    def mix(blocks: Sequence[int]) -> DiffusionBlocks:
        return soup(model, [float(b in blocks) for b in range(count)])

    alone = [score(mix([b])) for b in range(count)]
    order = sorted(range(count), key=lambda b: -alone[b])
    chosen, best = order[:1], alone[order[0]]
    for b in order[1:]:
        value = score(mix([*chosen, b]))
        if value >= best:
            chosen, best = [*chosen, b], value
    return mix(chosen), chosen
