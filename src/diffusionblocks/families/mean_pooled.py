"""Vision transformers of transformers for image classification whose head reads the mean of the patch tokens.

F is the mean of the last layer's patch tokens. Where the head normalises each token before it takes their mean, it is
given tokens that are moved alike, so that D is their mean.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..config import BlocksConfig, LabelTargetConfig
from .family import BlockCall, register_family
from .vit import ViTFamily, backbone_of, embeddings_of


class MeanPooledFamily(ViTFamily):
    """Classifiers whose head reads the mean of the tokens from the place `first` on."""

    #: place of the first token that the head reads
    first: ClassVar[int] = 0

    def reads_cls(self, config: Any) -> bool:
        """Whether the head of a model with that config reads its [CLS] token instead."""
        return False

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        assert isinstance(config.target, LabelTargetConfig)
        if config.target.token == "replace-cls" and not self.reads_cls(model.config):
            raise ValueError(
                f"target.token = replace-cls: the head of a {type(model).__name__} reads the mean of the patches, no "
                "[CLS] token; use extra or linear"
            )

    @override
    def pooled(self, network: nn.Module, tokens: Tensor, length: int) -> Tensor:
        return tokens[:, self.first : length].mean(dim=1)


@register_family
class IJepaFamily(MeanPooledFamily):
    """Converts `IJepaForImageClassification`: each token is normalised, and then their mean is taken."""

    classes = ("IJepaForImageClassification",)

    @override
    def classify(self, network: nn.Module, tokens: Tensor) -> Tensor:
        norm = backbone_of(network).get_submodule("layernorm")
        return network.get_submodule("classifier")(norm(tokens).mean(dim=1))  # type: ignore[no-any-return]

    @override
    def hidden(self, call: BlockCall) -> tuple[Any, Tensor]:
        tokens, mean = super().hidden(call)
        return (tokens, mean), mean

    @override
    def readout(self, call: BlockCall, hidden: Any, denoised: Tensor) -> Tensor:
        assert call.final_norm is not None
        tokens, mean = hidden
        # Where D is F, nothing moves, to the bit.
        states = tokens + (denoised - mean).to(tokens.dtype)[:, None, :]
        return call.module("classifier")(call.final_norm(states).mean(dim=1))  # type: ignore[no-any-return]


@register_family
class SiglipFamily(IJepaFamily):
    """Converts `SiglipForImageClassification`.

    Its attention pooling serves the contrast with texts; the classifier reads the mean of the tokens instead.
    """

    classes = ("SiglipForImageClassification",)
    config_part = "vision_config"
    layers = "vision_model.encoder.layers"
    stem = ("vision_model.embeddings",)
    head = ("vision_model.post_layernorm", "classifier")
    unused = ("vision_model.head",)
    norms = ("layer_norm1", "layer_norm2")
    final_norm = "vision_model.post_layernorm"
    patches = "patch_embedding"

    @override
    def layer_options(self, network: nn.Module, pixel_values: Tensor, length: int) -> dict[str, Any]:
        return {"attention_mask": None}


@register_family
class Siglip2Family(SiglipFamily):
    """Converts `Siglip2ForImageClassification`, whose blocks take images, all of one size, and not their patches.

    Its positions are resized to the patches of an image, as the class does. None is padding.
    """

    classes = ("Siglip2ForImageClassification",)

    @override
    def check(self, model: nn.Module) -> None:
        super().check(model)
        count = self.sizes(model.config).num_patches
        if math.isqrt(count) ** 2 != count:
            raise ValueError(
                f"cannot convert {type(model).__name__}: its config has num_patches = {count}, but its positions are "
                f"those of a square; set num_patches to a square number, such as {math.isqrt(count) ** 2}"
            )

    @override
    def example_shape(self, config: Any) -> tuple[int, ...]:
        """(channels, height, width) of images whose positions are not resized."""
        sizes = self.sizes(config)
        pixels = math.isqrt(sizes.num_patches) * int(sizes.patch_size)
        return int(sizes.num_channels), pixels, pixels

    @override
    def embed(self, network: nn.Module, pixel_values: Tensor) -> Tensor:
        embeddings: Any = embeddings_of(network)
        side = embeddings.position_embedding_size
        patches, (rows, columns) = self._patches(embeddings, pixel_values)
        # One image's positions stand for all: the class resizes them image by image.
        positions = embeddings.resize_positional_embeddings(
            embeddings.position_embedding.weight.reshape(side, side, -1),
            torch.tensor([[rows, columns]], device="cpu"),
            max_length=rows * columns,
        )
        tokens = embeddings.patch_embedding(patches.to(embeddings.patch_embedding.weight.dtype))
        return tokens + positions  # type: ignore[no-any-return]

    @staticmethod
    def _patches(embeddings: Any, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images -> (patches (batch, count, values), channels last in each; how many rows and columns there are)."""
        size = embeddings.patch_size
        patches = pixel_values.unfold(2, size, size).unfold(3, size, size)  # (n, channels, rows, columns, size, size)
        rows, columns = patches.shape[2:4]
        return patches.permute(0, 2, 3, 4, 5, 1).reshape(len(pixel_values), rows * columns, -1), (rows, columns)

    @override
    def whole_logits(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        patches, shape = self._patches(embeddings_of(model), pixel_values)
        shapes = torch.tensor([shape]).expand(len(pixel_values), 2)
        return model(patches, None, shapes).logits  # type: ignore[no-any-return]


@register_family
class CLIPFamily(MeanPooledFamily):
    """Converts `CLIPForImageClassification` and `MetaClip2ForImageClassification`.

    [CLS] and the norm of it serve the contrast with texts; the classifier reads the mean of the others as they are.
    """

    classes = ("CLIPForImageClassification", "MetaClip2ForImageClassification")
    config_part = "vision_config"
    layers = "vision_model.encoder.layers"
    stem = ("vision_model.embeddings", "vision_model.pre_layrnorm")
    head = ("classifier",)
    unused = ("vision_model.post_layernorm",)
    norms = ("layer_norm1", "layer_norm2")
    final_norm = None
    patches = "patch_embedding"
    first = 1

    @override
    def embed(self, network: nn.Module, pixel_values: Tensor) -> Tensor:
        norm = backbone_of(network).get_submodule("pre_layrnorm")
        return norm(super().embed(network, pixel_values))  # type: ignore[no-any-return]

    @override
    def layer_options(self, network: nn.Module, pixel_values: Tensor, length: int) -> dict[str, Any]:
        return {"attention_mask": None}

    @override
    def readout(self, call: BlockCall, hidden: Any, denoised: Tensor) -> Tensor:
        return call.module("classifier")(denoised.to(hidden.dtype))  # type: ignore[no-any-return]


@register_family
class BeitFamily(MeanPooledFamily):
    """Converts `BeitForImageClassification`, whose head reads the mean of the patches, or [CLS], as its config says.

    Attention adds a bias for each pair of places. What blocks append (the label's token) has none: a bias of zero.
    """

    classes = ("BeitForImageClassification",)
    layers = "{base}.layers"  # in earlier versions of the library they are called in another way
    first = 1

    @override
    def reads_cls(self, config: Any) -> bool:
        return not config.use_mean_pooling

    @override
    def stem_paths(self, model: nn.Module) -> tuple[str, ...]:
        bias = self._at(model, ("{base}.shared_position_bias",))
        shared: Any = model.config
        return (*super().stem_paths(model), *(bias if shared.use_shared_relative_position_bias else ()))

    @override
    def final_norm_path(self, model: nn.Module) -> str:
        norm = "{base}.layernorm" if self.reads_cls(model.config) else "{base}.pooler.layernorm"
        return self._at(model, (norm,))[0]

    @override
    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        return (self.final_norm_path(model), "classifier")

    @override
    def adjust(self, network: nn.Module) -> None:
        """Let each bias of places cover the tokens that blocks append."""
        for module in network.modules():
            if type(module).__name__.endswith("RelativePositionBias"):
                module.register_forward_hook(_cover, with_kwargs=True)

    @override
    def layer_options(self, network: nn.Module, pixel_values: Tensor, length: int) -> dict[str, Any]:
        size = pixel_values.shape[-2:]
        shared = getattr(backbone_of(network), "shared_position_bias", None)
        if shared is None:
            return {"resolution": size}
        window = tuple(pixels // int(embeddings_of(network).patch_size) for pixels in size)  # type: ignore[arg-type]
        return {"resolution": size, "attention_mask": shared(window, dim_size=length)}

    @override
    def pooled(self, network: nn.Module, tokens: Tensor, length: int) -> Tensor:
        norm_after_mean = hasattr(backbone_of(network), "pooler")
        return super().pooled(network, tokens, length) if norm_after_mean else tokens[:, 0]


def _cover(module: nn.Module, args: Any, options: dict[str, Any], bias: Tensor) -> Tensor:
    """Bias (1, heads, length, length) of places -> as much larger as there are more tokens, with zeros."""
    more = options["dim_size"] - bias.shape[-1]
    return F.pad(bias, (0, more, 0, more)) if more else bias
