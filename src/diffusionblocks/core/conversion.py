"""Conversion of an ordinary model into DiffusionBlocks."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn

from ..common.finite import DIVERGED, require_finite
from ..common.seeds import seed_global
from ..config import BlocksConfig
from ..families import TRUNK, Family, check_convertible, class_name_of, family_for
from ..families.module_tree import attach, extract, part_at
from ..layers.adaptive_norms import AdaptiveNorms, NoiseEmbedding
from ..layers.frozen_trunk import FrozenTrunk
from ..layers.low_rank import Dora, LowRank, add_low_rank, fresh_updates, starting_magnitudes
from ..layers.quantized import check_quantizer, quantize_linear_layers
from ..noise import NOISE_PROCESSES, NoiseProcess
from .block import Block, SharedModules
from .model import DiffusionBlocks, UnlabelledBlocks
from .partition import Partition


def convert(model: nn.Module, config: BlocksConfig | None = None) -> DiffusionBlocks:
    """Split a model of a supported class into B independent denoisers (paper, section 3.3).

    The given model is copied, not changed. Its weights survive: each converted layer starts as exactly the
    function of the original layer. A model on the meta device is converted there (`core.materialise` fills the
    blocks).

    Args:
        model: an instance of a supported class, freshly initialised or pretrained.
        config: how to split it; default three blocks.

    Returns:
        The converted model, in training mode, on the original's device.

    Raises:
        ValueError: a class no family knows, layers that do not divide, a value out of range, or weights that are not
            finite.
        ImportError: `lora.base` without torchao.
        TypeError: `model` is no module.
    """
    family = family_for(model)
    if config is not None and not isinstance(config, BlocksConfig):
        raise TypeError(f"config must be a BlocksConfig, got {type(config).__name__}; use BlocksConfig(num_blocks=...)")
    config = resolve(config or BlocksConfig(), family, model.config)
    check_convertible(model)
    if config.lora is not None:
        check_quantizer(config.lora.base)
    if not _on_meta(model):
        require_finite(model.state_dict().items(), type(model).__name__, DIVERGED)
        family.check_weights(model, config)
    return assemble(model, config)


def assemble(model: nn.Module, config: BlocksConfig, *, take: bool = False) -> DiffusionBlocks:
    """As `convert`, for weights that are loaded afterwards: those that `model` holds may be a fresh model's.

    Args:
        model: an instance of a supported class.
        config: how to split it.
        take: let the blocks have the model's own layers instead of copies, so that host memory holds them once. The
            model is of no use afterwards.
    """
    family = family_for(model)
    config = resolve(config, family, model.config)
    assert config.noise is not None
    _check_vocabulary(model, family, config)
    family.check_config(model, config)
    layer_paths = family.layer_paths(model)
    partition = Partition.build(
        config.noise,
        num_layers=len(layer_paths),
        num_blocks=config.num_blocks,
        strategy=config.partition,
        layers=config.layers,
        overlap=config.overlap,
        split=config.split,
        boundaries=config.boundaries,
    )
    model_config = model.config if take else copy.deepcopy(model.config)
    if not config.ties:
        family.adjust_config(model_config)
    # What is added to a model without memory has none either.
    place = torch.device("meta") if _on_meta(model) else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), place:
        # What conversion adds depends on config.seed alone, not on what ran before.
        seed_global(config.seed)
        blocks = _build_blocks(model, family, config, partition, layer_paths, model_config, take)
    if config.lora is not None:
        _add_updates(blocks, family, config)
    labelled = "labels" in (*blocks[0].input_names, *blocks[0].target.names)
    converted = (DiffusionBlocks if labelled else UnlabelledBlocks)(
        blocks,
        partition=partition,
        config=config,
        family=family,
        model_class=class_name_of(model),
        model_config=model_config,
        generation_config=copy.deepcopy(getattr(model, "generation_config", None)),
    )
    parameter = next(model.parameters())
    for b in range(partition.num_blocks):
        # What the original had keeps its precision, parameter by parameter.
        for extra in (converted.block(b).adaptive, converted.block(b).shared):
            extra.to(dtype=parameter.dtype)
    return converted.to(device=parameter.device).train()


def _check_vocabulary(model: Any, family: Family, config: BlocksConfig) -> None:
    if config.vocabulary != "trained" and not family.vocabulary:
        raise ValueError(
            f"blocks.vocabulary = {config.vocabulary} is for language models with a token embedding and a head of "
            f"their own, and {'/'.join(family.classes)} has not both; leave vocabulary out"
        )
    if config.ties and not model.config.tie_word_embeddings:
        raise ValueError(
            f"blocks.vocabulary = tied: this {type(model).__name__} has tie_word_embeddings = False, and a head that "
            "is another table than the embedding; set model.config.tie_word_embeddings to true, or leave vocabulary out"
        )


def resolve(config: BlocksConfig, family: Family, model_config: Any) -> BlocksConfig:
    """Fill in the defaults that depend on other fields, or on the family.

    Raises:
        ValueError: a target or noise process of another family.
    """
    default = family.default_noise(model_config)
    noise = config.noise or default
    if noise.discrete != default.discrete:
        kinds = " or ".join(name for name, process in NOISE_PROCESSES.items() if process.discrete == default.discrete)
        raise ValueError(
            f"blocks.noise.kind = {noise.kind}, but {'/'.join(family.classes)} needs {kinds}; leave noise out, or set "
            "its kind"
        )
    target = config.target or family.default_target()
    if target.kind != family.target:
        what = f"{family.target.removesuffix('s').replace('-', ' ')}s"
        raise ValueError(
            f"blocks.target.kind = {target.kind}, but {'/'.join(family.classes)} denoises {what}; "
            "leave target out, or set its kind"
        )
    target = target.resolve(config.shared)
    if noise.takes_coverage() and noise.coverage is None:
        noise = noise.with_coverage(_coverage(noise, config, target.unread))
    return config.model_copy(update={"target": target, "noise": noise})


def _coverage(noise: NoiseProcess, config: BlocksConfig, unread: float) -> tuple[float, float]:
    """Between the quantiles `unread` and 1 - `unread` of the levels that all blocks together train on.

    Each block draws as many as the others. Where their intervals are equally likely, these are the process's own
    quantiles. Else the ends of the range belong to blocks of smaller shares, which draw there the more often.
    """
    if (config.partition == "equi-probability" and config.boundaries is None) or unread == 0:
        return unread, 1 - unread
    if config.boundaries is None:
        levels = noise.boundaries(config.num_blocks, config.partition)
    else:
        levels = [noise.level_min, *config.boundaries, noise.level_max]
    boundaries = torch.tensor(levels, dtype=torch.float64)
    shares = noise.cdf(boundaries).diff()
    at_end = min(0.5, unread * config.num_blocks)  # of what the block at that end draws
    return at_end * shares[0].item(), 1 - at_end * shares[-1].item()


def _build_blocks(
    model: nn.Module,
    family: Family,
    config: BlocksConfig,
    partition: Partition,
    layer_paths: list[str],
    model_config: Any,
    take: bool,
) -> list[Block]:
    assert config.target is not None
    is_told_level = config.target.sees_noise and not family.knows_noise_level
    hidden = family.hidden_size(model.config)
    condition_dim = config.conditioning_dim or max(32, -(-hidden // 6 // 8) * 8)
    shared_paths, final_norm_path = family.shared_paths(model), family.final_norm_path(model)

    def adaptive_norms(module: nn.Module, norms: list[nn.Module]) -> AdaptiveNorms:
        return AdaptiveNorms(module, norms, [hidden] * len(norms), condition_dim)

    def final_norms(foreign: nn.Module) -> AdaptiveNorms | None:
        if not is_told_level or final_norm_path is None:
            return None
        norm = foreign.get_submodule(final_norm_path)
        return adaptive_norms(norm, [norm])

    def memo() -> dict[int, Any]:
        return {id(model.config): model_config}

    def shared_modules() -> tuple[nn.Module, SharedModules]:
        foreign = extract(model, shared_paths, memo=memo())
        extra = SharedModules(
            NoiseEmbedding(condition_dim) if is_told_level else None,
            final_norms(foreign),
            family.make_target(model, config),
            family.add_parts(model, config),
        )
        if config.shared == "frozen":
            foreign.requires_grad_(False)
            extra.requires_grad_(False)
        return foreign, extra

    foreign, extra = shared_modules()
    # What no block moves is the first one's, which all hold.
    common, fixed, reads_trunk = foreign, family.fixed_paths(model, config), config.target.reads_trunk
    trunk: FrozenTrunk | None = None
    checkpointing = _is_checkpointing(model)
    # Copies start equal: under `replicated` the blocks are told apart by their layers and levels alone.
    first = extra.state_dict()
    blocks = []
    for index in range(partition.num_blocks):
        if index and config.shared != "joint":
            foreign, extra = shared_modules()
            extra.load_state_dict(first)
        own_paths = [layer_paths[i] for i in partition.layer_range(index)]
        # Of experts the last takes what the others have copied.
        takes = take and (partition.split == "layers" or index == partition.num_blocks - 1)
        network = extract(model, own_paths, memo=memo(), take=takes, root=family.root(model, memo()))
        _stop_checkpointing_inside(network)
        for path in shared_paths:
            attach(network, path, part_at(common if path in fixed else foreign, path))
        if config.ties:  # the family reads out by the embedding's table
            part_at(network, family.vocabulary[1]).register_parameter("weight", None)
        family.adjust(network)
        for path in fixed:
            part_at(network, path).requires_grad_(False)
        adaptive = nn.ModuleList()
        if is_told_level:
            for path in own_paths:
                layer = network.get_submodule(path)
                adaptive.append(adaptive_norms(layer, family.layer_norms(layer)))
        if reads_trunk:
            if trunk is None:  # the layers of a block, before any of them is trained
                trunk = FrozenTrunk(copy.deepcopy(network.get_submodule(path), memo()) for path in own_paths).train()
            extra.extra[TRUNK] = trunk
        block = Block(
            index,
            family=family,
            config=config,
            network=network,
            layer_paths=own_paths,
            adaptive=adaptive,
            final_norm_path=final_norm_path,
            shared=extra,
            interval=partition.training_interval(index),
            input_names=family.input_names(model.config),
            optional_inputs=family.optional_inputs(model.config),
        )
        block.activation_checkpointing = checkpointing
        blocks.append(block)
    return blocks


def _add_updates(blocks: list[Block], family: Family, config: BlocksConfig) -> None:
    """Fix all weights, let blocks hold those that are equal in common, and give each block low-rank updates."""
    options = config.lora
    assert options is not None
    if not family.knows_noise_level:
        raise ValueError(
            f"blocks.lora: {'/'.join(family.classes)} is told the noise level by what conversion adds, which would "
            "stay untrained; leave lora out (it is for diffusion transformers)"
        )
    first: dict[str, nn.Parameter] = {}
    for block in blocks:
        block.requires_grad_(False)
        if options.base is not None:
            quantize_linear_layers(block.network, block.layer_paths, options.base)
        for path, part in block.named_modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = first.setdefault(f"{path}.{name}", parameter)
        add_low_rank(
            block.network,
            block.layer_paths,
            rank=options.rank,
            alpha=options.scaled_by,
            dropout=options.dropout,
            targets=options.targets,
            kind=Dora if options.use_dora else LowRank,
        )
        if any(parameter.is_meta for parameter in block.parameters()):
            continue  # `materialise` fills them
        with torch.no_grad():
            for tensor, value in fresh_updates(block.network, config.seed, block.index):
                tensor.copy_(value)
            for tensor, value in starting_magnitudes(block.network):
                tensor.copy_(value)


def _is_checkpointing(model: nn.Module) -> bool:
    """Whether the model's library computes layers again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _stop_checkpointing_inside(network: nn.Module) -> None:
    """Layers that re-ran themselves in the backward pass would miss their noise level: the block re-runs them."""
    for module in network.modules():
        if getattr(module, "gradient_checkpointing", False):
            setattr(module, "gradient_checkpointing", False)  # noqa: B010 - the attribute is a foreign class's


def _on_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta
