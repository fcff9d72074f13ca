"""Diffusion transformers: our DiT and diffusers' `DiTTransformer2DModel`. They know the noise level by themselves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import BlocksConfig, ImageTargetConfig
from ..layers.adaptive_norms import AdaptiveNorms, ExactBuffers
from ..targets import ImageTarget
from .family import Family
from .libraries import DIFFUSERS, OURS, Library


class DenoisingTransformer(Family):
    """A transformer that knows the noise level by itself and is one block's whole network: F is what it returns."""

    knows_noise_level = True
    depth_field = "num_layers"
    #: path of the last linear layer
    _read_out: ClassVar[str]

    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        """See `Family`."""
        if config.conditioning_dim is not None:
            raise ValueError(
                f"conditioning_dim = {config.conditioning_dim}: {type(model).__name__} knows the noise level by "
                "itself, so none is added; leave it out"
            )

    def check_weights(self, model: nn.Module, config: BlocksConfig) -> None:
        """See `Family`."""
        head = model.get_submodule(self._read_out)
        if config.shared == "frozen" and not any(bool(p.any()) for p in head.parameters()):
            raise ValueError(
                f"shared = frozen would freeze {self._read_out}, which is zero in a fresh {type(model).__name__}: it "
                "could never learn; use shared: replicated, or start from trained weights"
            )

    def readout(
        self,
        network: nn.Module,
        final: AdaptiveNorms | None,
        added: nn.ModuleDict,
        hidden: Tensor,
        denoised: Tensor,
        condition: Tensor,
    ) -> Tensor:
        """See `Family`."""
        return denoised


class _ImageTransformer(DenoisingTransformer):
    """What the two classes have in common: F is of the noised image, given c_noise and the label."""

    target = "image"

    def example_shape(self, config: Any) -> tuple[int, int, int]:
        """See `Family`."""
        return config.in_channels, config.sample_size, config.sample_size

    def input_names(self, config: Any) -> tuple[str, ...]:
        """See `Family`."""
        return ("labels",) if self.num_classes(config) else ()

    def default_target(self) -> ImageTargetConfig:
        """See `Family`."""
        return ImageTargetConfig()

    def make_target(self, model: nn.Module, config: BlocksConfig) -> ImageTarget:
        """See `Family`."""
        assert isinstance(config.target, ImageTargetConfig)
        shape, count = self.example_shape(model.config), self.num_classes(model.config)
        return ImageTarget(shape, num_classes=count, label_dropout=config.target.label_dropout)


class DiTFamily(_ImageTransformer):
    """Converts `diffusionblocks.models.DiT`."""

    classes: ClassVar[dict[str, Library]] = {"DiT": OURS}
    class_count_field = "num_classes"
    _read_out = "final_layer.linear"

    def layers_path(self, model: nn.Module) -> str:
        """See `Family`."""
        return "layers"

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        labels = ("label_embedder",) if self.num_classes(model.config) else ()
        return ("patch_embedder", "timestep_embedder", *labels, *self.head_paths(model))

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("final_layer",)

    def hidden_size(self, model: nn.Module) -> int:
        """See `Family`."""
        return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def num_classes(self, config: Any) -> int:
        """See `Family`."""
        return int(config.num_classes)

    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms | None]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Tensor],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Family`."""
        from ..models.diffusion_transformer import (  # brings diffusers, which a classifier does not need
            condition_of,
            unpatchify,
        )

        stem = network.get_submodule("patch_embedder")
        embedder = network.get_submodule("label_embedder") if "labels" in inputs else None
        c = condition_of(network.get_submodule("timestep_embedder"), embedder, condition, inputs.get("labels"))
        tokens = stem(z)
        for layer, _ in layers:
            tokens = layer(tokens, c)
        raw = unpatchify(network.get_submodule("final_layer")(tokens, c), stem.patch, z.shape[1])  # type: ignore[arg-type]
        return tokens, raw


class DiffusersDiTFamily(_ImageTransformer):
    """Converts diffusers' `DiTTransformer2DModel`.

    Every layer has a time and label embedder of its own; that of layer 0 also conditions the head, so it is a shared
    part. Its layers drop labels by themselves, each on its own, so that a dropped label is hardly ever dropped in
    all layers; in the blocks that is switched off and `label_dropout` drops it for the whole block.
    """

    classes: ClassVar[dict[str, Library]] = {"DiTTransformer2DModel": DIFFUSERS}
    class_count_field = "num_embeds_ada_norm"
    _read_out = "proj_out_2"
    _head_embedder = "transformer_blocks.0.norm1.emb"

    def layers_path(self, model: nn.Module) -> str:
        """See `Family`."""
        return "transformer_blocks"

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("pos_embed", self._head_embedder, *self.head_paths(model))

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("norm_out", "proj_out_1", "proj_out_2")

    def hidden_size(self, model: nn.Module) -> int:
        """See `Family`."""
        config: Any = model.config
        return int(config.num_attention_heads * config.attention_head_dim)

    def num_classes(self, config: Any) -> int:
        """See `Family`."""
        return int(config.num_embeds_ada_norm)

    def check(self, model: nn.Module) -> None:
        """See `Family`."""
        config: Any = model.config
        if not config.num_embeds_ada_norm:
            raise ValueError(
                f"{type(model).__name__} has num_embeds_ada_norm = {config.num_embeds_ada_norm}: it always has class "
                "labels, so it needs at least 1; an unconditional model is diffusionblocks.models.DiT, num_classes=0"
            )
        if config.out_channels not in (None, config.in_channels):
            raise ValueError(
                f"{type(model).__name__} has out_channels = {config.out_channels} for in_channels = "
                f"{config.in_channels}: a learned sigma is not supported; set out_channels to {config.in_channels}"
            )

    def settle(self, network: nn.Module) -> None:
        """Keep the positions exact, and switch off what drops labels layer by layer."""
        network.add_module("pos_embed", _exact_positions(network.get_submodule("pos_embed")))
        for module in network.modules():
            if type(module).__name__ == "LabelEmbedding":
                setattr(module, "dropout_prob", 0.0)  # noqa: B010 - the attribute is a foreign class's

    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms | None]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Tensor],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Family`."""
        labels = inputs["labels"]
        stem = network.get_submodule("pos_embed")
        tokens = stem(z.to(next(stem.parameters()).dtype))
        for layer, _ in layers:
            tokens = layer(tokens, timestep=condition, class_labels=labels)
        c = network.get_submodule(self._head_embedder)(condition, labels, hidden_dtype=tokens.dtype)
        shift, scale = network.get_submodule("proj_out_1")(F.silu(c)).chunk(2, dim=1)
        out = network.get_submodule("norm_out")(tokens) * (1 + scale[:, None]) + shift[:, None]
        patches = network.get_submodule("proj_out_2")(out)
        n, count, _ = patches.shape
        side, channels = round(count**0.5), z.shape[1]
        patch = z.shape[-1] // side
        images = torch.einsum("nhwpqc->nchpwq", patches.reshape(n, side, side, patch, patch, channels))
        return tokens, images.reshape(z.shape)


def _exact_positions(patches: nn.Module) -> nn.Module:
    """The library's patch embedding with the same parameters, whose positions are not rounded with them.

    They are made anew: those of a model that was cast are rounded already, and no file holds them.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    exact: Any = _exact_class().__new__(_exact_class())
    vars(exact).update(vars(copy.copy(patches)))
    position = get_2d_sincos_pos_embed(
        exact.proj.out_channels,
        exact.height,  # of a square image
        base_size=exact.base_size,
        interpolation_scale=exact.interpolation_scale,
        output_type="pt",
    )
    exact._buffers = {"pos_embed": position.float()[None].to(exact.pos_embed.device)}
    return exact  # type: ignore[no-any-return]


@functools.cache
def _exact_class() -> Any:
    from diffusers.models.embeddings import PatchEmbed

    class ExactPatchEmbed(ExactBuffers, PatchEmbed):  # type: ignore[misc]
        """diffusers' `PatchEmbed`, whose positions keep float32's digits."""

    return ExactPatchEmbed
