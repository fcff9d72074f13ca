"""Text-to-image transformers of diffusers: what each class is told, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..noise import DDPM
from ..targets import Condition
from .conditioned import ConditionedFamily, TwoKindsOfLayers, packed, places, unpacked
from .family import BlockCall, register_family
from .ordinary import OrdinaryModel
from .positions import exact_patch_embedding

_MASK = Condition((None,), "mask", optional=True)


@register_family
class SD3Family(ConditionedFamily):
    """Converts `SD3Transformer2DModel`.

    Its last layer gives no text states; in a block's last layer these are made, and nothing reads them.
    """

    classes = ("SD3Transformer2DModel",)
    layers = "transformer_blocks"
    head = ("norm_out", "proj_out")
    last_linear = "proj_out"
    layers_alike = False
    usual_length = 333

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return {
            "encoder_hidden_states": Condition((None, config.joint_attention_dim)),
            "pooled_projections": Condition((config.pooled_projection_dim,)),
        }

    @override
    def values_of_layers(self, config: Any, layers: Any) -> dict[str, Any]:
        dual = set(config.dual_attention_layers)
        return {"dual_attention_layers": tuple(place for place, i in enumerate(layers) if i in dual)}

    @override
    def check_exportable(self, model_class: str) -> None:
        """Each block is: see `fold`."""

    @override
    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        """The class's last layer gives no text states, so its norm of them has scale and shift alone."""
        last = ordinary.layers[-1]
        if not any(name.startswith("ff_context.") for name in last):
            return  # it is the last layer of the whole model
        for name in [n for n in last if n.startswith(("ff_context.", "attn.to_add_out."))]:
            del last[name]
        for name in ("norm1_context.linear.weight", "norm1_context.linear.bias"):
            shift, scale, *_ = last[name].chunk(6)
            last[name] = torch.cat([scale, shift])


class GuidedTransformer(TwoKindsOfLayers):
    """What Flux and Flux 2 share: a time from 0 to 1, and a guidance where the class embeds one."""

    head = ("norm_out", "proj_out")
    last_linear = "proj_out"
    time_scale = 1.0
    usual_length = 512

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        guidance = {"guidance": Condition(())} if config.guidance_embeds else {}
        return {"encoder_hidden_states": Condition((None, config.joint_attention_dim)), **guidance}


@register_family
class FluxFamily(GuidedTransformer):
    """Converts `FluxTransformer2DModel`: z is latents, of which 2 x 2 are a token, as in `FluxPipeline`."""

    classes = ("FluxTransformer2DModel",)
    usual_sizes = (128, 128)

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return super().conditions(config) | {"pooled_projections": Condition((config.pooled_projection_dim,))}

    @override
    def patch(self, config: Any) -> tuple[int, ...]:
        return (2, 2)

    @override
    def channels(self, config: Any) -> int:
        return int(config.in_channels) // 4

    @override
    def channels_out(self, config: Any) -> int:
        return int(config.out_channels or config.in_channels) // 4

    @override
    def options(self, config: Any, z: Tensor, time: Tensor, entries: dict[str, Tensor]) -> dict[str, Any]:
        height, width = z.shape[-2:]
        text = entries["encoder_hidden_states"].shape[1]
        ids = places(height // 2, width // 2, axes=3, device=z.device, dtype=z.dtype)
        text_ids = torch.zeros(text, 3, device=z.device, dtype=z.dtype)
        return {"hidden_states": packed(z), "timestep": time, "img_ids": ids, "txt_ids": text_ids, **entries}

    @override
    def prediction(self, config: Any, output: Tensor, z: Tensor) -> Tensor:
        return unpacked(output, z.shape)


@register_family
class Flux2Family(GuidedTransformer):
    """Converts `Flux2Transformer2DModel`: z is packed latents, of which each place is a token."""

    classes = ("Flux2Transformer2DModel",)
    usual_sizes = (64, 64)

    @override
    def patch(self, config: Any) -> tuple[int, ...]:
        return (1, 1)

    @override
    def options(self, config: Any, z: Tensor, time: Tensor, entries: dict[str, Tensor]) -> dict[str, Any]:
        text = entries["encoder_hidden_states"].shape[1]
        ids = places(*z.shape[-2:], axes=4, device=z.device, dtype=torch.int64)
        text_ids = places(text, axes=4, first=3, device=z.device, dtype=torch.int64)
        tokens = z.flatten(2).transpose(1, 2)
        return {"hidden_states": tokens, "timestep": time, "img_ids": ids, "txt_ids": text_ids, **entries}

    @override
    def prediction(self, config: Any, output: Tensor, z: Tensor) -> Tensor:
        return output.transpose(1, 2).reshape(z.shape)


@register_family
class AuraFlowFamily(TwoKindsOfLayers):
    """Converts `AuraFlowTransformer2DModel`."""

    classes = ("AuraFlowTransformer2DModel",)
    layers = "joint_transformer_blocks"
    depth_field = "num_mmdit_layers"
    more_depth_field = "num_single_dit_layers"
    head = ("norm_out", "proj_out")
    last_linear = "proj_out"
    time_scale = 1.0

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return {"encoder_hidden_states": Condition((None, config.joint_attention_dim))}

    @override
    def rounded_time(self, place: float, dtype: torch.dtype) -> float:
        return torch.tensor(place).to(dtype).item()


@register_family
class PixArtFamily(ConditionedFamily):
    """Converts `PixArtTransformer2DModel`, which predicts noise; a variance beside it is not read.

    With `use_additional_conditions` it is told `resolution` and `aspect_ratio`, which the class takes in
    `added_cond_kwargs`.
    """

    classes = ("PixArtTransformer2DModel",)
    layers = "transformer_blocks"
    head = ("norm_out", "scale_shift_table", "proj_out")
    last_linear = "proj_out"
    process = DDPM
    time_scale = 1.0  # of its process, which tells timesteps
    usual_length = 300

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        more = self._more(config) and {"resolution": Condition((2,)), "aspect_ratio": Condition((1,))}
        width = config.caption_channels or config.cross_attention_dim
        return {"encoder_hidden_states": Condition((None, width)), **(more or {}), "encoder_attention_mask": _MASK}

    @override
    def adjust(self, network: nn.Module) -> None:
        """Replace the positions by exact ones."""
        network.add_module("pos_embed", exact_patch_embedding(network.get_submodule("pos_embed")))

    @staticmethod
    def _more(config: Any) -> bool:
        value = config.use_additional_conditions
        return bool(config.sample_size == 128 if value is None else value)

    @override
    def options(self, config: Any, z: Tensor, time: Tensor, entries: dict[str, Tensor]) -> dict[str, Any]:
        more = {name: entries.pop(name, None) for name in ("resolution", "aspect_ratio")}
        return super().options(config, z, time, entries) | {"added_cond_kwargs": more}


@register_family
class SanaFamily(ConditionedFamily):
    """Converts `SanaTransformer2DModel`; one that is told a guidance (SANA-Sprint) is of another process."""

    classes = ("SanaTransformer2DModel",)
    layers = "transformer_blocks"
    head = ("norm_out", "scale_shift_table", "proj_out")
    last_linear = "proj_out"
    usual_length = 300
    unsupported_values: ClassVar[Mapping[str, str]] = {"guidance_embeds": "the angle of a trigonometric flow"}

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return {
            "encoder_hidden_states": Condition((None, config.caption_channels)),
            "encoder_attention_mask": _MASK,
        }

    @override
    def adjust(self, network: nn.Module) -> None:
        """Replace the positions by exact ones, where it has any."""
        if network.config.interpolation_scale is not None:  # type: ignore[union-attr]
            network.add_module("patch_embed", exact_patch_embedding(network.get_submodule("patch_embed")))

    @override
    def options(self, config: Any, z: Tensor, time: Tensor, entries: dict[str, Tensor]) -> dict[str, Any]:
        return super().options(config, z, time * config.timestep_scale, entries)

    @override
    def condition_of(self, config: Any, time: float) -> float:
        return super().condition_of(config, time / config.timestep_scale)


@register_family
class Lumina2Family(ConditionedFamily):
    """Converts `Lumina2Transformer2DModel`, whose time runs from noise, 0, to the image, 1.

    Its refiners are of the stem. It waits for the device, to count the tokens of each text.
    """

    classes = ("Lumina2Transformer2DModel",)
    reads_values = True
    layers = "layers"
    width_field = "hidden_size"
    head = ("norm_out",)
    last_linear = "norm_out.linear_2"

    @override
    def hidden_size(self, config: Any) -> int:
        return int(config.hidden_size)

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return {
            "encoder_hidden_states": Condition((None, config.cap_feat_dim)),
            "encoder_attention_mask": Condition((None,), "mask"),
        }

    @override
    def time(self, condition: Tensor) -> Tensor:
        return 1 - condition

    @override
    def condition_of(self, config: Any, time: float) -> float:
        return 1 - time

    @override
    def prediction(self, config: Any, output: Tensor, z: Tensor) -> Tensor:
        return -output


@register_family
class QwenImageFamily(ConditionedFamily):
    """Converts `QwenImageTransformer2DModel`: z is latents, of which 2 x 2 are a token, as in `QwenImagePipeline`."""

    classes = ("QwenImageTransformer2DModel",)
    layers = "transformer_blocks"
    head = ("norm_out", "proj_out")
    last_linear = "proj_out"
    time_scale = 1.0
    usual_sizes = (128, 128)
    usual_length = 512
    unsupported_values: ClassVar[Mapping[str, str]] = {
        "guidance_embeds": "a guidance that it then passes where its class expects none",
        "zero_cond_t": "images that are edited",
        "use_additional_t_cond": "a second kind of time",
        "use_layer3d_rope": "images in layers",
    }

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return {
            "encoder_hidden_states": Condition((None, config.joint_attention_dim)),
            "encoder_hidden_states_mask": _MASK,
        }

    @override
    def patch(self, config: Any) -> tuple[int, ...]:
        return (2, 2)

    @override
    def channels(self, config: Any) -> int:
        return int(config.in_channels) // 4

    @override
    def channels_out(self, config: Any) -> int:
        return int(config.out_channels or config.in_channels)

    @override
    def check(self, model: nn.Module) -> None:
        super().check(model)
        if model.config.patch_size != 2:  # type: ignore[union-attr]
            raise ValueError(f"{type(model).__name__} has patch_size = {model.config.patch_size}; it must be 2")  # type: ignore[union-attr]

    @override
    def options(self, config: Any, z: Tensor, time: Tensor, entries: dict[str, Tensor]) -> dict[str, Any]:
        shape = (1, z.shape[-2] // 2, z.shape[-1] // 2)
        # One stands for all of a batch: the class reads no more, and a batch that is only followed has billions.
        return {"hidden_states": packed(z), "timestep": time, "img_shapes": [[shape]], **entries}

    @override
    def prediction(self, config: Any, output: Tensor, z: Tensor) -> Tensor:
        return unpacked(output, z.shape)


@register_family
class CogView4Family(ConditionedFamily):
    """Converts `CogView4Transformer2DModel`, which is told sizes and crop as well."""

    classes = ("CogView4Transformer2DModel",)
    layers = "transformer_blocks"
    head = ("norm_out", "proj_out")
    last_linear = "proj_out"

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        sizes = ("original_size", "target_size", "crop_coords")
        return {
            "encoder_hidden_states": Condition((None, config.text_embed_dim)),
            **dict.fromkeys(sizes, Condition((2,))),
        }


@register_family
class PRXFamily(ConditionedFamily):
    """Converts `PRXTransformer2DModel`."""

    classes = ("PRXTransformer2DModel",)
    layers = "blocks"
    depth_field = "depth"
    head = ("final_layer",)
    last_linear = "final_layer.linear"
    time_scale = 1.0
    usual_sizes = (64, 64)

    @override
    def hidden_size(self, config: Any) -> int:
        return int(config.hidden_size)

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return {
            "encoder_hidden_states": Condition((None, config.context_in_dim)),
            "attention_mask": _MASK,
        }
