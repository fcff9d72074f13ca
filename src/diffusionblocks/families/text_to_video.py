"""Text-to-video transformers of diffusers: what each class is told, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from ..targets import Condition
from .conditioned import ConditionedFamily, TwoKindsOfLayers
from .family import register_family
from .positions import exact_video_rotation


@register_family
class WanFamily(ConditionedFamily):
    """Converts `WanTransformer3DModel`: of Wan 2.1 and 2.2, from text, or from text and an image's states."""

    classes = ("WanTransformer3DModel",)
    layers = "blocks"
    head = ("norm_out", "scale_shift_table", "proj_out")
    last_linear = "proj_out"
    usual_sizes = (21, 60, 104)
    usual_length = 512

    @override
    def patch(self, config: Any) -> tuple[int, ...]:
        return tuple(config.patch_size)

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        image = config.image_dim
        of_image = {} if image is None else {"encoder_hidden_states_image": Condition((None, image), optional=True)}
        return {"encoder_hidden_states": Condition((None, config.text_dim)), **of_image}

    @override
    def adjust(self, network: nn.Module) -> None:
        """Replace the positions by exact ones."""
        network.add_module("rope", exact_video_rotation(network.get_submodule("rope")))


@register_family
class LTXVideoFamily(ConditionedFamily):
    """Converts `LTXVideoTransformer3DModel`, of latents of 25 frames a second that are packed 8 x 32 x 32, as in
    `LTXPipeline`."""

    classes = ("LTXVideoTransformer3DModel",)
    layers = "transformer_blocks"
    head = ("norm_out", "scale_shift_table", "proj_out")
    last_linear = "proj_out"
    usual_sizes = (21, 16, 22)
    usual_length = 128

    @override
    def patch(self, config: Any) -> tuple[int, ...]:
        return (config.patch_size_t, config.patch_size, config.patch_size)

    @override
    def channels(self, config: Any) -> int:
        return int(config.in_channels) // math.prod(self.patch(config))

    @override
    def channels_out(self, config: Any) -> int:
        return int(config.out_channels or config.in_channels) // math.prod(self.patch(config))

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        return {
            "encoder_hidden_states": Condition((None, config.caption_channels)),
            "encoder_attention_mask": Condition((None,), "mask"),
        }

    @override
    def options(self, config: Any, z: Tensor, time: Tensor, entries: dict[str, Tensor]) -> dict[str, Any]:
        (n, channels, *sizes), (t, p, _) = z.shape, self.patch(config)
        frames, height, width = sizes[0] // t, sizes[1] // p, sizes[2] // p
        patches = z.reshape(n, channels, frames, t, height, p, width, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "hidden_states": patches.flatten(4, 7).flatten(1, 3),
            "timestep": time,
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (8 / 25, 32, 32),
            **entries,
        }

    @override
    def prediction(self, config: Any, output: Tensor, z: Tensor) -> Tensor:
        (n, channels, *sizes), (t, p, _) = z.shape, self.patch(config)
        patches = output.reshape(n, sizes[0] // t, sizes[1] // p, sizes[2] // p, channels, t, p, p)
        return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(z.shape)


@register_family
class HunyuanVideoFamily(TwoKindsOfLayers):
    """Converts `HunyuanVideoTransformer3DModel`; guidance is told as the class takes it, times 1000."""

    classes = ("HunyuanVideoTransformer3DModel",)
    head = ("norm_out", "proj_out")
    last_linear = "proj_out"
    usual_sizes = (17, 60, 104)
    unsupported_values: ClassVar[Mapping[str, str]] = {"image_condition_type": "an image in its frames"}

    @override
    def patch(self, config: Any) -> tuple[int, ...]:
        return (config.patch_size_t, config.patch_size, config.patch_size)

    @override
    def conditions(self, config: Any) -> dict[str, Condition]:
        guidance = {"guidance": Condition(())} if config.guidance_embeds else {}
        return {
            "encoder_hidden_states": Condition((None, config.text_embed_dim)),
            "encoder_attention_mask": Condition((None,), "mask"),
            "pooled_projections": Condition((config.pooled_projection_dim,)),
            **guidance,
        }
