"""Ordinary models of the blocks: one block as a model of its own, or an initialisation of the original class."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..common.files import whole_folder
from ..common.finite import DIVERGED, require_finite
from ..common.formats import write_json, write_tensors
from ..common.modules import evaluating, weights_dtype
from ..common.processing_files import PROCESSING_FILES, write_files
from ..common.seeds import keyed_generator
from ..families import (
    BlockCall,
    ClassifierFamily,
    OrdinaryModel,
    config_fields,
    config_values,
    family_named,
    instantiate,
    rebuild_config,
    with_layers,
)
from ..layers.adaptive_norms import AdaptiveNorms
from ..layers.low_rank import plain_state, updates
from ..layers.quantized import quantized_layers
from ..noise import GaussianProcess
from ..targets import Batch
from .block import Block
from .model import DiffusionBlocks
from .partition import within
from .saved_model import LIBRARY_FILES
from .saving import on_meta

#: names of the files of an exported block
EXPORTED = re.compile("|".join([LIBRARY_FILES, r"block\.json", *map(re.escape, PROCESSING_FILES)]))

#: names of the files of a block's low-rank updates
_LORA_FILES = re.compile(r"adapter_config\.json|(adapter_model|pytorch_lora_weights)\.safetensors|block\.json")


#: what PEFT calls the tensors of an update
_OF_PEFT = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def export_initialisation(model: DiffusionBlocks) -> nn.Module:
    """The original class with the blocks' weights: an initialisation to train further, not the trained model.

    Of a conversion that never trained it is the original again. After training its outputs are far from the blocks':
    each block was trained on noised targets of its own, with what conversion added, and never on what the block before
    it gives. The trained model is the blocks: `predict`, `sample` or `generate`.

    Layers come from the blocks that own them; shared parameters before the layers from block 0, those after them from
    the last block (of `vocabulary: tied` the one table from block 0). What conversion added (adaptive norms, noise
    embedder, target) has no place in the original class and is left out. Weights that are kept in few bits
    (`lora.base`) are dequantised, and a warning says so.

    Returns:
        An instance of the original class, on the CPU.

    Raises:
        ValueError: a block is on the meta device.
    """
    unbuilt = [index for index in range(len(model.blocks)) if on_meta(model.block(index))]
    if unbuilt:
        raise ValueError(
            f"blocks {unbuilt} are on the meta device: they were never built, so there is no whole model to export; "
            "save the others, merge the folders of all, and export the merged model"
        )
    if model.partition.split == "experts" and len(model.blocks) > 1:
        raise ValueError(
            f"each of the {len(model.blocks)} blocks is a whole {model.model_class} (blocks.split: experts), so there "
            "is none of all of them; export_block(b) gives each"
        )
    original = instantiate(model.model_class, model.config)
    weights = _unused(model, original)
    head = tuple(f"{path}." for path in model.family.head_paths(original))
    last = len(model.blocks) - 1
    for index in range(len(model.blocks)):
        block = model.block(index)
        for name, tensor in plain_state(block.network).items():
            of_layer = any(name.startswith(f"{path}.") for path in block.layer_paths)
            of_head = f"{name}.".startswith(head)
            if of_layer or (of_head and index == last) or (not of_head and index == 0):
                weights[name] = tensor.detach().cpu().clone()
    _load(original, weights)
    _take_generation_config(model, original)
    _tell_dequantised("the whole model", model.block(0), original)
    return original.train(model.training)


def _unused(model: DiffusionBlocks, original: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that blocks have no use for, as a fresh model has them, in the precision of the blocks.

    The rest of a fresh model is not cast: buffers that no file holds, such as rotary frequencies, stay float32, as they
    do where the library loads a model.
    """
    unused = tuple(f"{path}." for path in model.family.unused)
    dtype = weights_dtype(model.block(0).network)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in original.state_dict().items()
        if f"{name}.".startswith(unused)
    }


def export_block(
    model: DiffusionBlocks,
    block: int,
    level: float | None = None,
    *,
    z: Tensor | None = None,
    approximate_on: Batch | None = None,
    merge_lora: bool = True,
) -> nn.Module:
    """One block as an ordinary model: a public class with the block's layers, for any tool that takes the class.

    Adaptive norms at a level become weights and biases of the norms, and a constant token of z one of the class's own.
    Logits are then the block's context logits for that level and z, exact to rounding:

    - Blocks of `target.noise_input: false` (label, next token) see neither: each is a model of the original class.
    - A classifier's block that is shown z as a token becomes the class of the same layers that has one token more, of
      ViT and ViTMSN a DeiT, of DINOv2 one with registers; with `token: replace-cls` it stays of its class.
    - Models that are told the level anyway (DiT, masked text) are a denoiser F of the block's interval, told c_noise:
      D = c_skip * z + c_out * F(c_in * z, c_noise). `model.noise.precondition(level)` gives the coefficients. Of a
      later block of diffusers' class a layer that does nothing comes first, for the embedder that its head reads.

    Args:
        model: the blocks.
        block: index.
        level: the noise level to fold, of the block's interval; default the noisiest of its own that is read.
        z: the noised label that the block is shown, float (dim,); default noise of that level alone, as a chain starts
            from, drawn from the seed of the blocks.
        approximate_on: a batch with `pixel_values`. Where the class has no place for a part of a classifier's block,
            the part is left out, and a warning says how much the outputs differ on these images.
        merge_lora: add the block's low-rank updates to the weights; False leaves them out, for `export_lora`. Either
            way weights that are kept in few bits (`lora.base`) are dequantised, and a warning says so.

    Returns:
        An instance of the class, on the CPU, in the model's mode. Its config has its number of layers.

    Raises:
        ValueError: no such block, one that is on the meta device or is shown what others say, a level that is not its
            own, `level` or `z` of a block that has no use for it, or a block that no class can hold: two streams, a
            recurrence, or without `approximate_on` what has no place.
    """
    part = model.block(block)
    if on_meta(part):
        raise ValueError(f"block {block} is on the meta device: it was never built and has no weights to export")
    if part.self_conditioning:
        raise ValueError(
            f"block {block} is shown what other blocks say (target.self_conditioning), for which {model.model_class} "
            "has no place: train without it to export blocks as ordinary models"
        )
    state = _State.of(model, block, level, z)
    ordinary = _folded(model, part, state, merge_lora)
    if ordinary.differences and approximate_on is None:
        raise ValueError(
            f"block {block} is more than a {ordinary.model_class} can hold: it has {' and '.join(ordinary.differences)}"
            "; to leave that out and be told how much it changes, give approximate_on a batch "
            "(--approximate); or train with target.noise_input: false"
        )
    exported = _built(model, block, ordinary)
    _tell_dequantised(f"block {block}", part, exported)
    if ordinary.differences and approximate_on is not None:
        difference = export_difference(model, block, exported, approximate_on, level, z=z)
        parts = " and ".join(ordinary.differences)
        warnings.warn(f"block {block} as a {ordinary.model_class} lacks {parts}: {difference}", stacklevel=2)
    return exported


def _tell_dequantised(what: str, block: Block, exported: nn.Module) -> None:
    """Warn where weights that a block keeps in few bits are exported as ordinary ones."""
    quantized = next((layer for _, layer in quantized_layers(block)), None)
    if quantized is not None:
        dtype = str(weights_dtype(exported)).removeprefix("torch.")
        warnings.warn(
            f"{what} is exported with its {quantized.kind} weights dequantised to {dtype}: it takes the memory of "
            "these",
            stacklevel=3,
        )


@dataclass(frozen=True)
class ExportDifference:
    """How an ordinary model differs from the block of a classifier that it was made of.

    Attributes:
        largest: difference of any two log-probabilities.
        divergence: mean KL divergence from the block's probabilities to the model's, in nats.
        same: share of the images that both give the same label.
        images: how many were compared.
    """

    largest: float
    divergence: float
    same: float
    images: int

    def __str__(self) -> str:
        return (
            f"log-probabilities differ by up to {self.largest:.3g}, KL divergence {self.divergence:.3g} nats, the same "
            f"label for {100 * self.same:.1f} % of {self.images} images"
        )


def export_difference(
    model: DiffusionBlocks,
    block: int,
    exported: nn.Module,
    batch: Batch,
    level: float | None = None,
    *,
    z: Tensor | None = None,
) -> ExportDifference:
    """Compare a classifier's block with the ordinary model that `export_block` made of it, on images.

    Args:
        model: the blocks.
        block: index.
        exported: what `export_block` returned.
        batch: with `pixel_values` (batch, channels, height, width).
        level: as it was given to `export_block`.
        z: likewise.

    Raises:
        ValueError: the model is no classifier, or the batch has no images.
    """
    part, family = model.block(block), model.family
    if not isinstance(family, ClassifierFamily):
        raise ValueError(f"export_difference compares classifiers; this {model.model_class} denoises no labels")
    model.check_batch({name: value for name, value in batch.items() if name != "labels"}, with_target=False)
    state = _State.of(model, block, level, z)
    images = batch["pixel_values"].to(state.z.device)
    with torch.no_grad(), evaluating(part), evaluating(exported):
        rows, levels = state.z.expand(len(images), -1), state.level.expand(len(images))
        ours = part({"pixel_values": images}, rows, levels, context=part.adds_likelihood).double().log_softmax(dim=-1)
        theirs = family.whole_logits(exported, images.cpu()).to(ours.device).double().log_softmax(dim=-1)
    same = (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).double().mean().item()
    divergence = (ours.exp() * (ours - theirs)).sum(dim=-1).mean().item()
    return ExportDifference((ours - theirs).abs().max().item(), divergence, same, len(images))


def export_facts(model: DiffusionBlocks, block: int, level: float | None = None) -> dict[str, Any]:
    """What `export_block` gives for a block and a level, as JSON values.

    Args:
        model: the blocks.
        block: index.
        level: as it was given to `export_block`.

    Returns:
        `block`, of how many `blocks`, the `layers` and `levels` that it owns, the `level` that is folded (null where
        none is), what the `output` is, the `noise` process, and of a diffusion model the `coefficients` of
        D = c_skip * z + c_out * F(c_in * z, c_noise) at the ends and in the middle of the levels.
    """
    inference, noise, (low, high) = model.inference, model.noise, model.partition.interval(block)
    state = None if model.block(block).shared.noise_embedding is None else _State.of(model, block, level, None)
    rows = []
    if inference.preconditioned and isinstance(noise, GaussianProcess):
        levels = noise.even_levels(max(low, noise.read_min), min(high, noise.read_max), 3).flip(0)
        columns = {"level": levels, **noise.precondition(levels)._asdict()}
        rows = [{name: column[i].item() for name, column in columns.items()} for i in range(3)]
    return {
        "block": block,
        "blocks": model.partition.num_blocks,
        "layers": list(model.partition.layer_range(block)),
        "levels": [low, high],
        "level": None if state is None else state.level.item(),
        "output": inference.exported,
        "noise": noise.to_dict(),
        "coefficients": rows,
    }


def write_export(exported: nn.Module, path: Path, facts: dict[str, Any], files: Mapping[str, bytes]) -> None:
    """Write an exported block to a folder, as its library does; an older export there is replaced.

    Args:
        exported: what `export_block` returned.
        path: the folder.
        facts: what `export_facts` returned, written to `block.json`.
        files: how its inputs are made, of `PROCESSING_FILES`: content by name.

    Raises:
        ValueError: a place that must not be replaced (`check_replaceable`), or weights that are not finite.
    """
    require_finite(exported.state_dict().items(), "the exported block", DIVERGED)
    with whole_folder(path, EXPORTED) as folder:
        exported.save_pretrained(folder)  # type: ignore[operator]
        write_files(folder, files)
        write_json(folder / "block.json", facts)


def export_lora(model: DiffusionBlocks, block: int, path: str | Path) -> None:
    """Write a block's low-rank updates to a folder, as PEFT and diffusers read them; an older export is replaced.

        adapter_config.json, adapter_model.safetensors      PEFT's: PeftModel.from_pretrained(model, path)
        pytorch_lora_weights.safetensors                    diffusers': pipeline.load_lora_weights(path)
        block.json                                          the block's layers and levels, see `export_facts`

    Names are those of the whole model: the updates are for one of all layers, which then is the block at its levels
    where it is an expert.

    Args:
        model: the blocks.
        block: index.
        path: the folder.

    Raises:
        ValueError: no such block, blocks without `lora`, updates that are not finite, or a place that must not be
            replaced.
    """
    part, options = model.block(block), model.blocks_config.lora
    if options is None:
        raise ValueError("these blocks have no low-rank updates (blocks.lora); export_block gives one as a model")
    targets = dict(updates(part.network))
    tensors = {
        f"{name}.{_OF_PEFT[side]}": tensor.detach().cpu().contiguous()
        for name, update in targets.items()
        for side, tensor in update.named_parameters()
    }
    require_finite(tensors.items(), f"the updates of block {block}", DIVERGED)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": options.scaled_by,
        "lora_dropout": options.dropout,
        "r": options.rank,
        "target_modules": sorted(targets),
        "task_type": None,
        "use_dora": options.use_dora,
    }
    facts = export_facts(model, block) | {"output": "low-rank updates of its layers"}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    with whole_folder(Path(path), _LORA_FILES) as folder:
        write_json(folder / "adapter_config.json", config)
        of_peft = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        write_tensors(folder / "adapter_model.safetensors", of_peft, {"format": "pt"})
        of_diffusers = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        write_tensors(folder / "pytorch_lora_weights.safetensors", of_diffusers, {"format": "pt", **metadata})
        write_json(folder / "block.json", facts)


class _State(NamedTuple):
    """What a block is given of noise: one level (1,), and one z (1, ...)."""

    level: Tensor
    z: Tensor

    @classmethod
    def of(cls, model: DiffusionBlocks, block: int, level: float | None, z: Tensor | None) -> Self:
        """The given ones, checked, or the defaults."""
        part = model.block(block)
        device = next(part.parameters()).device
        for name, value in (("level", level), ("z", z)):
            if value is not None and part.shared.noise_embedding is None:
                why = "is given noise level and z with each input" if part.sees_noise else "sees neither level nor z"
                raise ValueError(f"{name} = {value}: block {block} of this {model.model_class} {why}; leave it out")
        low, high = part.interval
        level = model.partition.levels(model.noise)[block] if level is None else level
        levels = torch.tensor([level], dtype=torch.float32, device=device)
        if not bool(within(levels, low, high)):
            raise ValueError(f"level = {level:g}: block {block} trains on [{low:g}, {high:g}]; give one of these")
        dim = model.family.hidden_size(model.config)
        if z is not None and (z.shape != (dim,) or not z.is_floating_point() or not bool(z.isfinite().all())):
            raise ValueError(f"z must be {dim} finite numbers, got {z.dtype} of shape {tuple(z.shape)}")
        if z is None and isinstance(model.noise, GaussianProcess):
            generator = keyed_generator(model.blocks_config.seed, block, 0, "export")
            z = model.noise.prior((dim,), generator=generator, level=level)
        return cls(levels, torch.zeros(1, dim) if z is None else z[None].to(device, torch.float32))


@torch.no_grad()
def _folded(model: DiffusionBlocks, part: Block, state: _State, merge_lora: bool) -> OrdinaryModel:
    """The block's weights, with what conversion added folded into them for a state."""
    layers = [plain_state(layer, merge=merge_lora) for layer in part.layers()]
    paths = tuple(f"{path}." for path in part.layer_paths)
    shared = {name: tensor for name, tensor in part.network.state_dict().items() if not name.startswith(paths)}
    ordinary = OrdinaryModel(model.model_class, layers, shared)
    condition, z = part.noise.condition(state.level), state.z
    if part.shared.noise_embedding is not None:
        condition = part.shared.noise_embedding(condition)
        z = part.noise.scaled(z, state.level)
    for layer, weights, norms in zip(part.layers(), layers, part.adaptive, strict=False):
        assert isinstance(norms, AdaptiveNorms)
        folded, without = norms.folded(layer, condition)
        weights |= folded
        ordinary.differences += [f"a shift of {name}" for name in without]
    if part.shared.final_norms is not None and part.final_norm_path is not None:
        norm = part.network.get_submodule(part.final_norm_path)
        folded, without = part.shared.final_norms.folded(norm, condition)
        shared |= {f"{part.final_norm_path}.{name}": tensor for name, tensor in folded.items()}
        ordinary.differences += [f"a shift of {part.final_norm_path}"] * len(without)
    if part.shared.noise_embedding is not None and not (part.adds_likelihood or part.noise.discrete):
        ordinary.differences.append("logits of D, which has a part of z (target.likelihood: learned)")
    part.family.fold(BlockCall(part.network, part.shared.extra, condition, z=z), ordinary)
    return ordinary


def _built(model: DiffusionBlocks, block: int, ordinary: OrdinaryModel) -> nn.Module:
    """An instance of the class, with its weights."""
    name = ordinary.model_class
    indices = list(model.partition.layer_range(block))
    if indices[0]:
        model.family.check_exportable(model.model_class)
    more = len(ordinary.layers) - len(indices)
    config = with_layers(model.model_class, model.config, [*indices[:1] * more, *indices])
    if name != model.model_class or ordinary.values:
        values = config_values(model.model_class, config)
        fields = config_fields(name) - {"model_type", "architectures"}
        config = rebuild_config(name, {n: v for n, v in values.items() if n in fields} | ordinary.values)
    exported = instantiate(name, config)
    weights = _unused(model, exported) | ordinary.weights(family_named(name).layer_paths(exported))
    _load(exported, {n: t.detach().cpu().clone() for n, t in weights.items()})
    _take_generation_config(model, exported)
    return exported.train(model.training)


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a model weights, each in its own precision; of parameters that its class ties, one name is enough."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    tied = [several for several in names.values() if len(several) > 1]
    for several in tied:
        stored = next(weights[name] for name in several if name in weights)
        weights |= dict.fromkeys(several, stored)
    model.load_state_dict(weights, strict=True, assign=True)
    if tied:
        model.tie_weights()  # type: ignore[operator]


def _take_generation_config(model: DiffusionBlocks, exported: nn.Module) -> None:
    if model.generation_config is not None and hasattr(exported, "generation_config"):
        exported.generation_config = copy.deepcopy(model.generation_config)  # type: ignore[assignment]


def export(model: DiffusionBlocks) -> nn.Module:
    """`export_initialisation` under its older name, which says less; warns of what it gives."""
    warnings.warn(
        "export gives an initialisation of the original class to train further, not the trained model, which is the "
        "blocks; export_initialisation does the same without this warning",
        stacklevel=2,
    )
    return export_initialisation(model)
