"""Positions of diffusers' transformers that no file holds, and that a cast of the model does not round."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.exact_buffers import with_exact_buffers


def exact_patch_embedding(patches: Any) -> nn.Module:
    """The library's `PatchEmbed` with the same parameters, whose sin-cos positions stay float32."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    position = get_2d_sincos_pos_embed(
        patches.proj.out_channels,
        patches.height,  # of a square image
        base_size=patches.base_size,
        interpolation_scale=patches.interpolation_scale,
        output_type="pt",
    )
    return with_exact_buffers(patches, {"pos_embed": position[None]})


def exact_video_rotation(rotary: Any) -> nn.Module:
    """The library's `WanRotaryPosEmbed`, whose cosines and sines stay float32."""
    fresh = type(rotary)(rotary.attention_head_dim, rotary.patch_size, rotary.max_seq_len)
    return with_exact_buffers(rotary, dict(fresh.named_buffers()))
