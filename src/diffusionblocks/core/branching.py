"""Trunk and branch: one block's worth of layers, trained on all levels, becomes B specialists.

A trunk is an ordinary `DiffusionBlocks` with one block. Branching copies its layers into B blocks, each with its own
interval of levels; nothing is shared from then on (under `replicated` or `frozen`), so the blocks train apart. A block
of fewer layers than the trunk has copies of some, evenly spaced, the first and the last among them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..common.fields import MOST_LAYERS
from ..common.finite import DIVERGED, require_finite
from ..common.modules import weights_dtype
from ..config import BlocksConfig
from ..families import instantiate, with_layers
from ..families.module_tree import layer_of
from .block import FROZEN
from .conversion import assemble, resolve
from .model import DiffusionBlocks


def branch(trunk: DiffusionBlocks, num_blocks: int, **changes: Any) -> DiffusionBlocks:
    """Copy a trunk into `num_blocks` blocks.

    Args:
        trunk: a model of one block, on all levels.
        num_blocks: B; the branched network has B times the trunk's layers, or as experts B times its weights.
        changes: fields of `BlocksConfig` that the blocks shall have and the trunk does not matter for: `partition`,
            `boundaries`, `overlap` (default 0.05), `split`: `layers`, or `experts`, which keep the trunk's depth, and
            `layers` of each block, at most the trunk's (default: all of them; see `copied_layers`). Of language models
            also `vocabulary`, and `context`: `trunk`, for blocks that attend to the trunk as it is now (see
            `NextTokenTargetConfig`).

    Returns:
        The branched model, on the trunk's device, in its mode. Every block of all the trunk's layers computes what the
        trunk does; one of fewer layers starts near it at best.

    Raises:
        ValueError: the trunk has several blocks or fewer layers than a block, its weights are not finite, or a change
            that would alter what it has learned.
    """
    if trunk.partition.num_blocks != 1:
        raise ValueError(
            f"a trunk has one block on all levels; this model has {trunk.partition.num_blocks}: train a trunk with "
            "blocks.num_blocks set to 1 and the layers of one block, or let a recipe's trunk section do both"
        )
    allowed = ("boundaries", "context", "layers", "overlap", "partition", "split", "vocabulary")
    not_allowed = sorted(set(changes) - set(allowed))
    if not_allowed:
        raise ValueError(f"branching cannot change {not_allowed}; it can change {', '.join(allowed)}")
    depth = trunk.partition.num_layers
    default = {"overlap": BlocksConfig().overlap, "layers": None}
    values = without_defaults(trunk).model_dump() | default | changes | {"num_blocks": num_blocks}
    if (context := values.pop("context", None)) is not None:
        if context == "trunk" and values["target"].get("embedding") == "learned":
            raise ValueError(
                "context = trunk: this trunk learns the rows of its target, and blocks of a frozen trunk learn none; "
                "convert the trunk with target.embedding = given"
            )
        values["target"] = {**values["target"], "context": context}
    config = BlocksConfig.model_validate(values)
    if config.ties != trunk.blocks_config.ties:
        raise ValueError(
            f"vocabulary = {config.vocabulary}: this trunk's is {trunk.blocks_config.vocabulary}, and blocks have one "
            "table for embedding and head where their trunk has; leave vocabulary out"
        )
    branches = assemble_like(trunk, config, _layers_in_trunk(config, depth))
    weights = trunk.block(0).state_dict()
    require_finite(weights.items(), "the trunk", DIVERGED)
    for b in range(num_blocks):
        block = branches.block(b)
        names = {name: _source(branches, b, name, weights, depth) for name in block.state_dict()}
        block.load_state_dict({name: weights[source] for name, source in names.items()})
    return branches.train(trunk.training)


def copied_layers(depth: int, count: int) -> list[int]:
    """Which layers of a trunk a block of `count` layers is copied from: evenly spaced, the first and last among them.

    Args:
        depth: layers of the trunk.
        count: layers of the block, 1 (the first) to depth (all).

    Raises:
        ValueError: a block of more layers than the trunk, for nothing is known of further ones.
    """
    if count > depth:
        raise ValueError(
            f"a block of {count} layers cannot be copied from a trunk of {depth}: give each block at most {depth} "
            f"layers, or a trunk of {count}"
        )
    return [place * (depth - 1) // max(count - 1, 1) for place in range(count)]


def _layers_in_trunk(config: BlocksConfig, depth: int) -> list[int]:
    """For each layer of the branched network the layer of the trunk, of `depth` layers, that it is a copy of."""
    if config.split == "experts":
        return list(range(depth))
    counts = config.layers or (depth,) * config.num_blocks
    if sum(counts) > MOST_LAYERS:
        raise ValueError(
            f"num_blocks = {config.num_blocks} of the trunk's {depth} layers each are {sum(counts):,} layers, more "
            f"than {MOST_LAYERS:,}; branch into at most {MOST_LAYERS // depth}"
        )
    return [layer for count in counts for layer in copied_layers(depth, count)]


def assemble_like(model: DiffusionBlocks, config: BlocksConfig, layers: Sequence[int]) -> DiffusionBlocks:
    """Build a model of the same class with other blocks, whose weights are to be loaded.

    Each tensor has the device, the precision and the `requires_grad` of its counterpart in the model's first block; but
    what `shared: frozen` fixes there, and is no shared parameter here, trains.

    Args:
        model: what it is to be like.
        config: how it is split.
        layers: which layer of the model each of its layers is to be like.

    Raises:
        ValueError: layers of that class keep their place.
    """
    if list(layers) != list(range(model.partition.num_layers)):  # else each layer keeps its place
        model.family.check_movable(model.model_class)
    original = instantiate(model.model_class, with_layers(model.model_class, model.config, layers))
    first = model.block(0)
    shared = model.family.shared_paths(original)
    result = assemble(original, config, take=True).to(
        device=next(first.parameters()).device, dtype=weights_dtype(first)
    )
    counterparts = model.block(0).state_dict(keep_vars=True)
    fixed = (FROZEN, *(f"network.{path}." for path in model.family.fixed_paths(original, config)))
    for b in range(config.num_blocks):
        for name, tensor in result.block(b).state_dict(keep_vars=True).items():
            own = _source(result, b, name, counterparts, len(first.layer_paths))
            tensor.data = tensor.data.to(counterparts[own].dtype)
            # What is fixed only because it is shared trains in a layer of its own, as it does after a conversion.
            if name.startswith(fixed):
                continue
            if config.shared != "frozen" or _is_below(name, shared) or not _is_below(own, shared):
                tensor.requires_grad_(counterparts[own].requires_grad)
    result.generation_config = copy.deepcopy(model.generation_config)
    return result


def _is_below(name: str, paths: Sequence[str]) -> bool:
    """Whether a block's tensor is one of the network's parts at some paths."""
    return any(f"{name}.".startswith(f"network.{path}.") for path in paths)


def _source(branches: DiffusionBlocks, block: int, name: str, trunk: Mapping[str, Tensor], depth: int) -> str:
    """`trunk_name`; of a frozen trunk's layer the name of the layer itself, in a trunk that reads no other."""
    own = trunk_name(branches, block, name, depth)
    return (
        own if own in trunk or not name.startswith(FROZEN) else f"network.{branches.block(block).original_name(name)}"
    )


def without_defaults(model: DiffusionBlocks) -> BlocksConfig:
    """A model's config, without a coverage that follows from its partition: other blocks' follows from theirs."""
    config = model.blocks_config
    if config.noise is None or not config.noise.takes_coverage():
        return config
    open_config = config.model_copy(update={"noise": config.noise.with_coverage(None)})
    return open_config if resolve(open_config, model.family, model.config) == config else config


def trunk_name(branches: DiffusionBlocks, block: int, name: str, depth: int) -> str:
    """The name in the trunk's block of what is called `name` in a block of the branched model.

    Args:
        branches: the branched model.
        block: which of its blocks.
        name: of a tensor of that block.
        depth: layers of the trunk.
    """
    paths = branches.block(block).layer_paths
    if len(paths) == depth == branches.partition.num_layers:
        return name
    place = layer_of(name.removeprefix("network."), paths) if name.startswith("network.") else None
    if place is None:
        return name
    number, rest = place
    return f"network.{paths[0].rpartition('.')[0]}.{copied_layers(depth, len(paths))[number]}.{rest}"
