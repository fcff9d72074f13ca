"""Tiny models of diffusers' text-to-image and text-to-video classes, with batches and what each class is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class TinyClass:
    """A class, its tiny config of four layers, and sizes of an example after its channels."""

    name: str
    config: dict[str, Any]
    sizes: tuple[int, ...] = (8, 8)
    channels: int = 4
    kinds: dict[str, Any] = field(default_factory=dict)


TINY = {
    tiny.name: tiny
    for tiny in [
        TinyClass(
            "SD3Transformer2DModel",
            {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4}
            | {"joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20}
            | {"pos_embed_max_size": 8, "dual_attention_layers": (0, 2), "qk_norm": "rms_norm"},
        ),
        TinyClass(
            "FluxTransformer2DModel",
            {**HEADS, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24}
            | {"pooled_projection_dim": 20, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
        ),
        TinyClass(
            "Flux2Transformer2DModel",
            {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 24}
            | {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        ),
        TinyClass(
            "AuraFlowTransformer2DModel",
            {**HEADS, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2}
            | {"joint_attention_dim": 24, "caption_projection_dim": 32, "pos_embed_max_size": 16},
        ),
        TinyClass(
            "PixArtTransformer2DModel",
            {**HEADS, "sample_size": 8, "num_layers": 4, "cross_attention_dim": 32, "caption_channels": 24},
        ),
        TinyClass(
            "SanaTransformer2DModel",
            {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 4, "caption_channels": 24}
            | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32},
        ),
        TinyClass(
            "Lumina2Transformer2DModel",
            {"sample_size": 8, "in_channels": 4, "hidden_size": 48, "num_layers": 4, "num_refiner_layers": 1}
            | {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (8, 8, 8)}
            | {"axes_lens": (32, 8, 8), "cap_feat_dim": 24},
        ),
        TinyClass(
            "QwenImageTransformer2DModel",
            {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 4, "joint_attention_dim": 24}
            | {"axes_dims_rope": (4, 6, 6)},
        ),
        TinyClass(
            "CogView4Transformer2DModel",
            {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "text_embed_dim": 24}
            | {"time_embed_dim": 16, "condition_dim": 8, "rope_axes_dim": (8, 8), "sample_size": 8},
        ),
        TinyClass(
            "PRXTransformer2DModel",
            {"in_channels": 4, "context_in_dim": 24, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 4}
            | {"axes_dim": [8, 8]},
        ),
        TinyClass(
            "WanTransformer3DModel",
            {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48}
            | {"num_layers": 4, "rope_max_seq_len": 32},
            sizes=(3, 8, 8),
        ),
        TinyClass(
            "LTXVideoTransformer3DModel",
            {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 4}
            | {"caption_channels": 24},
            sizes=(3, 4, 4),
        ),
        TinyClass(
            "HunyuanVideoTransformer3DModel",
            {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2}
            | {"num_refiner_layers": 1, "text_embed_dim": 24, "pooled_projection_dim": 20, "rope_axes_dim": (4, 6, 6)},
            sizes=(3, 4, 4),
        ),
    ]
}


def tiny_diffuser(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny model of a class, whose every parameter is random, none zero."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(diffusers, name)(**(TINY[name].config | overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch_for(model: Any, name: str, size: int = 2, seed: int = 1, text: int = 5) -> dict[str, Tensor]:
    """A batch that the class reads: pixels, and what it is told."""
    generator = torch.Generator().manual_seed(seed)
    tiny = TINY[name]
    batch = {"pixel_values": torch.randn(size, tiny.channels, *tiny.sizes, generator=generator)}
    for entry, condition in model.target.conditions.items():
        shape = [size, *(text if n is None else n for n in condition.shape)]
        batch[entry] = torch.randn(shape, generator=generator)
        if condition.dtype == "mask":
            batch[entry] = torch.arange(text)[None] < torch.tensor([[text], [text - 2], *[[text]] * (size - 2)])
    return batch


def told_time(name: str) -> Callable[[Tensor], Tensor]:
    """What the class's pipeline tells it of t."""
    return {
        "FluxTransformer2DModel": lambda t: t,
        "Flux2Transformer2DModel": lambda t: t,
        "AuraFlowTransformer2DModel": lambda t: t,
        "QwenImageTransformer2DModel": lambda t: t,
        "PRXTransformer2DModel": lambda t: t,
        "Lumina2Transformer2DModel": lambda t: 1 - t,
    }.get(name, lambda t: t * 1000)


def velocity(model: Any, name: str, z: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
    """The class's own forward, as its pipeline calls it: (batch, channels, ...) -> eps - y of that shape."""
    import diffusers

    n, c, *sizes = z.shape
    options: dict[str, Any] = {"timestep": told_time(name)(t), **told, "return_dict": False}
    text = told["encoder_hidden_states"].shape[1]
    if name == "FluxTransformer2DModel":
        pipeline: Any = diffusers.FluxPipeline
        tokens = pipeline._pack_latents(z, n, c, *sizes)
        ids = pipeline._prepare_latent_image_ids(n, sizes[0] // 2, sizes[1] // 2, z.device, z.dtype)
        out = model(hidden_states=tokens, img_ids=ids, txt_ids=torch.zeros(text, 3), **options)[0]
        return pipeline._unpack_latents(out, sizes[0] * 8, sizes[1] * 8, 8)
    if name == "Flux2Transformer2DModel":
        pipeline = diffusers.Flux2Pipeline
        tokens, ids = pipeline._pack_latents(z), pipeline._prepare_latent_ids(z)
        text_ids = pipeline._prepare_text_ids(told["encoder_hidden_states"])
        out = model(hidden_states=tokens, img_ids=ids, txt_ids=text_ids, **options)[0]
        return pipeline._unpack_latents_with_ids(out, ids)
    if name == "QwenImageTransformer2DModel":
        pipeline = diffusers.QwenImagePipeline
        tokens = pipeline._pack_latents(z, n, c, *sizes)
        out = model(hidden_states=tokens, img_shapes=[[(1, sizes[0] // 2, sizes[1] // 2)]] * n, **options)[0]
        return pipeline._unpack_latents(out, sizes[0] * 8, sizes[1] * 8, 8)[:, :, 0]
    if name == "LTXVideoTransformer3DModel":
        pipeline = diffusers.LTXPipeline
        grid = dict(zip(("num_frames", "height", "width"), sizes, strict=True))
        scale = (8 / 25, 32, 32)
        out = model(hidden_states=pipeline._pack_latents(z), rope_interpolation_scale=scale, **grid, **options)[0]
        return pipeline._unpack_latents(out, *sizes)
    if name == "PixArtTransformer2DModel":
        options["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    out = model(hidden_states=z, **options)[0]
    return -out if name == "Lumina2Transformer2DModel" else out[:, :c]
