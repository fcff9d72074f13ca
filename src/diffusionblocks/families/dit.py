"""Diffusion transformers: our DiT and diffusers' `DiTTransformer2DModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..config import BlocksConfig
from ..noise import DDPM
from .family import BlockCall, register_family
from .kinds import ImageFamily
from .libraries import DIFFUSERS, OURS
from .ordinary import OrdinaryModel
from .positions import exact_patch_embedding


@register_family
class DiTFamily(ImageFamily):
    """Converts `diffusionblocks.models.DiT`."""

    calls_layers = True
    classes = ("DiT",)
    library = OURS
    class_count_field = "num_classes"
    layers = "layers"
    head = ("final_layer",)
    last_linear = "final_layer.linear"

    @override
    def stem_paths(self, model: nn.Module) -> tuple[str, ...]:
        labels = ("label_embedder",) if self.num_classes(model.config) else ()
        return ("patch_embedder", "timestep_embedder", *labels)

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        from ..models.diffusion_transformer import condition_of, unpatchify  # bring diffusers: classifiers need none

        stem, labels = call.module("patch_embedder"), call.inputs.get("labels")
        embedder = None if labels is None else call.module("label_embedder")
        c = condition_of(call.module("timestep_embedder"), embedder, call.condition, labels)
        tokens = stem(call.z)
        for layer in call.layers:
            tokens = layer(tokens, c)
        return tokens, unpatchify(call.module("final_layer")(tokens, c), stem.patch, call.z.shape[1])


@register_family
class DiffusersDiTFamily(ImageFamily):
    """Converts diffusers' `DiTTransformer2DModel`.

    Every layer has a time and label embedder of its own; that of layer 0 also conditions the head, so it is shared.
    Its layers drop labels by themselves, each on its own, so that a dropped label is hardly ever dropped in
    all layers; in the blocks that is switched off and `label_dropout` drops it for the whole block.

    Published weights predict noise and its variance, in twice the channels: they need the noise process `ddpm`, and the
    second half is not read.
    """

    calls_layers = True
    classes = ("DiTTransformer2DModel",)
    older_names = ("Transformer2DModel",)  # of which it was one kind; the class itself refuses the others' `norm_type`
    library = DIFFUSERS
    class_count_field = "num_embeds_ada_norm"
    layers = "transformer_blocks"
    stem = ("pos_embed", "transformer_blocks.0.norm1.emb")
    head = ("norm_out", "proj_out_1", "proj_out_2")
    last_linear = "proj_out_2"

    @override
    def hidden_size(self, config: Any) -> int:
        return int(config.num_attention_heads * config.attention_head_dim)

    @override
    def check(self, model: nn.Module) -> None:
        config: Any = model.config
        if not config.num_embeds_ada_norm:
            raise ValueError(
                f"{type(model).__name__} has num_embeds_ada_norm = {config.num_embeds_ada_norm}: it always has class "
                "labels, so it needs at least 1; an unconditional model is diffusionblocks.models.DiT, num_classes=0"
            )
        channels = config.in_channels
        if config.out_channels not in (None, channels, 2 * channels):
            raise ValueError(
                f"{type(model).__name__} has out_channels = {config.out_channels} for in_channels = {channels}: set "
                f"out_channels to {channels}, or to {2 * channels} where it predicts noise and its variance"
            )

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        super().check_config(model, config)
        options: Any = model.config
        if options.out_channels == 2 * options.in_channels and not isinstance(config.noise, DDPM):
            raise ValueError(
                f"{type(model).__name__} has out_channels = {options.out_channels} for in_channels = "
                f"{options.in_channels}: it predicts noise and its variance at the timesteps of a schedule, which "
                "blocks.noise must say: kind: ddpm (DDPM.from_scheduler reads the scheduler_config.json beside the "
                f"weights); a fresh model has out_channels: {options.in_channels}"
            )

    @override
    def adjust(self, network: nn.Module) -> None:
        """Replace the positions by exact ones, and switch off what drops labels layer by layer."""
        network.add_module("pos_embed", exact_patch_embedding(network.get_submodule("pos_embed")))
        for module in network.modules():
            if type(module).__name__ == "LabelEmbedding":
                setattr(module, "dropout_prob", 0.0)  # noqa: B010 - the attribute is a foreign class's

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        stem, labels = call.module("pos_embed"), call.inputs["labels"]
        tokens = stem(call.z.to(next(stem.parameters()).dtype))
        for layer in call.layers:
            tokens = layer(tokens, timestep=call.condition, class_labels=labels)
        c = call.module(self.stem[1])(call.condition, labels, hidden_dtype=tokens.dtype)
        shift, scale = call.module("proj_out_1")(F.silu(c)).chunk(2, dim=1)
        out = call.module("norm_out")(tokens) * (1 + scale[:, None]) + shift[:, None]
        patches = call.module("proj_out_2")(out)
        n, count, _ = patches.shape
        side, channels = round(count**0.5), call.z.shape[1]
        patch = call.z.shape[-1] // side
        # As many channels as z has: the others, where there are any, predict a variance.
        patches = patches.reshape(n, side, side, patch, patch, -1)[..., :channels]
        images = torch.einsum("nhwpqc->nchpwq", patches)
        return tokens, images.reshape(call.z.shape)

    @override
    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        """The class conditions its head by layer 0's embedder: of a later block a layer that does nothing has it."""
        prefix = f"{self.stem[1]}."
        embedder = {name: ordinary.shared.pop(name) for name in list(ordinary.shared) if name.startswith(prefix)}
        if not embedder:
            return  # the layers begin with layer 0
        path = f"{self.layers}.0."
        idle = {name: torch.zeros_like(tensor) for name, tensor in ordinary.layers[0].items()}  # its gates are zero
        ordinary.layers.insert(0, idle | {name.removeprefix(path): tensor for name, tensor in embedder.items()})
