"""Diffusion transformers that are told more than a label: a block runs its class's own `forward` on its own layers.

A block's network is an instance of the model's class that has stem, head and the block's layers alone. So a block of
all layers computes what the class does, bit for bit, and what the class does between its layers is its own business.
A family says where the head is, what the class is told, and in which units it is told the time.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..config import BlocksConfig, ImageTargetConfig, NoiseConfig
from ..noise import DDPM, FlowMatching
from ..targets import Condition, ImageTarget
from ..targets.image import MASK
from .family import BlockCall
from .kinds import ImageFamily
from .libraries import DIFFUSERS
from .module_tree import shell_of


class ConditionedFamily(ImageFamily):
    """Diffusion transformers of diffusers that are told a text, or more: they predict the velocity of flow matching.

    What the class is told beside z and the time are entries of the batch, by the names of its own `forward`.
    """

    library = DIFFUSERS
    class_count_field = "num_classes"  # there are none
    #: the noise process by which the class's published weights were trained
    process: ClassVar[type[FlowMatching] | type[DDPM]] = FlowMatching
    #: what the class is told at noise, t = 1
    time_scale: ClassVar[float] = 1000.0
    #: sizes of an example after its channels, where the config does not say: of a tiny one, to measure
    usual_sizes: ClassVar[tuple[int, ...]] = ()
    #: tokens of a text that a batch has where nobody says
    usual_length: ClassVar[int] = 256
    #: values of the config with which the class reads what no entry of a batch says -> what it then reads
    unsupported_values: ClassVar[Mapping[str, str]] = {}

    # ---- what the class is told --------------------------------------------------------------------------

    @abc.abstractmethod
    def conditions(self, config: Any) -> dict[str, Condition]:
        """What the class is told beside z and the time, by the names of its `forward`."""

    def patch(self, config: Any) -> tuple[int, ...]:
        """Sizes of a patch: those of an example are multiples of these."""
        return (config.patch_size, config.patch_size)

    def channels(self, config: Any) -> int:
        """Channels of an example."""
        return int(config.in_channels)

    @override
    def num_classes(self, config: Any) -> int:
        return 0

    @override
    def hidden_size(self, config: Any) -> int:
        return int(config.num_attention_heads * config.attention_head_dim)

    @override
    def example_shape(self, config: Any) -> tuple[int, ...]:
        side = getattr(config, "sample_size", None)
        return (self.channels(config), *(self.usual_sizes if side is None else (side, side)))

    @override
    def takes_shape(self, config: Any, shape: tuple[int, ...]) -> bool:
        sizes = shape[1:] if len(shape) > 3 or len(self.patch(config)) == 2 else (1, *shape[1:])  # one frame
        fits = len(sizes) == len(self.patch(config)) and shape[0] == self.channels(config)
        return fits and all(size % patch == 0 for size, patch in zip(sizes, self.patch(config), strict=True))

    @override
    def input_names(self, config: Any) -> tuple[str, ...]:
        return tuple(name for name, condition in self.conditions(config).items() if not condition.optional)

    @override
    def optional_inputs(self, config: Any) -> tuple[str, ...]:
        return tuple(name for name, condition in self.conditions(config).items() if condition.optional)

    @override
    def empty_batch(self, config: Any, size: int, length: int | None = None) -> dict[str, Tensor]:
        batch = {"pixel_values": torch.empty(size, *self.example_shape(config))}
        for name, condition in self.conditions(config).items():
            shape = [length or self.usual_length if n is None else n for n in condition.shape]
            dtype = torch.float32 if condition.dtype == "float" else torch.bool
            batch[name] = torch.ones(size, *shape, dtype=dtype)  # all of a text is seen
        return batch

    @override
    def make_target(self, model: nn.Module, config: BlocksConfig) -> ImageTarget:
        assert isinstance(config.target, ImageTargetConfig)
        patch = self.patch(model.config)
        return ImageTarget(
            (self.channels(model.config), *[None] * len(patch)),
            num_classes=0,
            label_dropout=0.0,
            conditions=self.conditions(model.config),
            multiples=patch,
        )

    @override
    def batch_of(self, config: Any) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None:
        """Latents with cached states of prompts, by the class's own names; an image is a video of one frame.

        States that the class does not read are left out, and where it reads no mask all tokens count.
        """
        conditions, sizes = self.conditions(config), len(self.patch(config))
        masks = [name for name, condition in conditions.items() if condition.dtype == "mask"]

        def batch_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            entries = {masks[0] if masks and name == MASK else name: value for name, value in batch.items()}
            result = {name: value for name, value in entries.items() if name in conditions}
            if (images := entries.get("pixel_values")) is not None:
                result["pixel_values"] = images.unsqueeze(2) if images.dim() == 4 and sizes == 3 else images
            return result

        return batch_of

    @override
    def check_conditions(self, config: Any, entries: Mapping[str, Tensor], model: str) -> None:
        super().check_conditions(config, entries, model)
        for name, condition in self.conditions(config).items():
            if name in entries:
                try:
                    condition.check(name, entries[name], 1)
                except ValueError as error:
                    raise ValueError(f"{error}: encode prompts by the text encoder of this model") from None

    # ---- noise -------------------------------------------------------------------------------------------

    @override
    def default_noise(self, config: Any) -> NoiseConfig:
        return self.process()

    @override
    def check(self, model: nn.Module) -> None:
        for name, reads in self.unsupported_values.items():
            if value := getattr(model.config, name, None):
                raise ValueError(
                    f"cannot convert {type(model).__name__}: {name} = {value}: it reads {reads}, which no entry of a "
                    "batch says; convert a model without it"
                )
        own, out = self.channels(model.config), self.channels_out(model.config)
        if out not in (own, 2 * own):
            raise ValueError(
                f"cannot convert {type(model).__name__}: it reads {own} channels and predicts {out}: the others are a "
                "condition, an image or a mask, which no entry of a batch says; convert a model whose out_channels are "
                "its in_channels"
            )

    def channels_out(self, config: Any) -> int:
        """Channels of what the class predicts; twice those of an example where it predicts a variance as well."""
        out = getattr(config, "out_channels", None)
        return self.channels(config) if out is None else int(out)

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        super().check_config(model, config)
        if not isinstance(config.noise, self.process):
            kind = self.process.kind
            raise ValueError(
                f"blocks.noise.kind = {getattr(config.noise, 'kind', config.noise)}, but {type(model).__name__} "
                f"predicts by {kind}, and is told its times; set noise.kind to {kind}, or leave noise out"
            )

    # ---- how a block runs --------------------------------------------------------------------------------

    @override
    def stem_paths(self, model: nn.Module) -> tuple[str, ...]:
        """All that the class has beside its layers and its head."""
        lists = (self.layers, *self.more_layers)
        parts = [*model._modules, *model._parameters]
        return tuple(name for name in parts if name not in lists and name not in self.head)

    @override
    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        return self.head

    @override
    def root(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        assert isinstance(self.layers, str)
        return shell_of(model, (self.layers, *self.more_layers), memo=memo)

    @override
    def compute_again(self, network: Any, recompute: Callable[..., Any] | None) -> None:
        if recompute is None:
            network.disable_gradient_checkpointing()
        else:
            network.enable_gradient_checkpointing(recompute)

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        network: Any = call.network
        dtype = next(call.module(self.last_linear).parameters()).dtype
        entries = {n: v.to(dtype) if v.is_floating_point() else v for n, v in call.inputs.items()}
        options = self.options(network.config, call.z.to(dtype), self.time(call.condition), entries)
        output = network(**options, return_dict=False)[0]
        raw = self.prediction(network.config, output, call.z)
        return raw, raw

    def time(self, condition: Tensor) -> Tensor:
        """What the class is told of the levels, (batch,): float32, as its scheduler gives it."""
        return condition * self.time_scale

    def condition_of(self, config: Any, time: float) -> float:
        """The inverse of `time`, of what the class is told by its pipeline."""
        return time / self.time_scale

    def rounded_time(self, place: float, dtype: torch.dtype) -> float:
        """What the class is told of t' where its pipeline first rounds a scheduler's time to a precision."""
        return (torch.tensor(place * 1000.0).to(dtype) / (1000.0 / self.time_scale)).item()

    def options(self, config: Any, z: Tensor, time: Tensor, entries: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of the class's `forward`.

        Args:
            config: of the class.
            z: the noised image (batch, channels, ...), in the model's precision.
            time: what `time` gives.
            entries: the conditions, those with digits in the model's precision.
        """
        return {"hidden_states": z, "timestep": time, **entries}

    def prediction(self, config: Any, output: Tensor, z: Tensor) -> Tensor:
        """F of the shape of z, of what the class returns; channels that predict a variance are left out."""
        return output[:, : z.shape[1]]


class TwoKindsOfLayers(ConditionedFamily):
    """Classes whose stack is two lists of layers of different kinds: text and image apart, then both together."""

    #: the config value that holds the number of layers of the second list
    more_depth_field: ClassVar[str] = "num_single_layers"
    layers = "transformer_blocks"
    more_layers = ("single_transformer_blocks",)
    layers_alike = False

    @property
    @override
    def depth_fields(self) -> tuple[str, str]:
        return self.depth_field, self.more_depth_field

    @override
    def values_of_layers(self, config: Any, layers: Any) -> dict[str, Any]:
        of_first = sum(i < getattr(config, self.depth_fields[0]) for i in layers)
        return dict(zip(self.depth_fields, (of_first, len(layers) - of_first), strict=True))

    @override
    def with_depth(self, values: Mapping[str, Any], layers: int) -> dict[str, Any]:
        first, second = (int(values.get(name, 0)) for name in self.depth_fields)
        if first + second != layers:  # in about the same proportion
            first = min(layers, max(1, round(layers * first / max(first + second, 1))))
        return {**values, **dict(zip(self.depth_fields, (first, layers - first), strict=True))}

    @override
    def check_exportable(self, model_class: str) -> None:
        """A block of either kind of layers, or of both, is a model of the class."""


def packed(z: Tensor) -> Tensor:
    """Squares of 2 x 2 as tokens: (batch, channels, height, width) -> (batch, height * width / 4, channels * 4)."""
    n, channels, height, width = z.shape
    squares = z.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(n, height * width // 4, channels * 4)


def unpacked(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `packed`, for images of a shape (batch, channels, height, width)."""
    n, channels, height, width = shape
    squares = tokens.view(n, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(shape)


def places(*sizes: int, axes: int, first: int = 1, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The place of each token of a grid: (tokens, axes); its axes begin at `first`, the others are zero."""
    grids = torch.meshgrid(*(torch.arange(size, device=device, dtype=dtype) for size in sizes), indexing="ij")
    ids = torch.zeros(*sizes, axes, device=device, dtype=dtype)
    for axis, grid in enumerate(grids):
        ids[..., first + axis] = grid
    return ids.flatten(0, -2)
