"""An image autoencoder of diffusers, and latents on the scale on which they are stored and trained on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .latent_data import LatentScale

__all__ = ["decode", "encode", "latent_scale", "load_vae"]


def load_vae(name: str, device: torch.device) -> nn.Module:
    """Load diffusers' `AutoencoderKL` in float32, for inference. No code and no pickle is loaded with it.

    Args:
        name: a local folder, or a name on the hub such as "stabilityai/sd-vae-ft-ema".
        device: where to.

    Raises:
        FileNotFoundError: no such folder or name, or it has no safetensors weights.
        ValueError: it is no autoencoder of this class.
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(f"an autoencoder needs the diffusers library ({error}): pip install diffusers") from error
    try:
        result: Any = AutoencoderKL.from_pretrained(
            name, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise FileNotFoundError(
            f"vae = {name!r}: {error}; give a folder with config.json and diffusion_pytorch_model.safetensors, or the "
            "name of one on the hub such as 'stabilityai/sd-vae-ft-ema'"
        ) from error
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # Another class of model, or other shapes.
        raise ValueError(f"vae = {name!r}: not an AutoencoderKL of diffusers: {error}") from error
    vae, report = result
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"vae = {name!r}: not an AutoencoderKL of diffusers: its file lacks {missing[:3]}, ...")
    model: nn.Module = vae.to(device).eval().requires_grad_(False)
    return model


def latent_scale(vae: Any) -> LatentScale:
    """What an autoencoder's config says of its latents' mean and deviation.

    Raises:
        ValueError: its values are not those of a `LatentScale`.
    """
    config = vae.config
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    scale = LatentScale(
        float(config.scaling_factor),
        float(getattr(config, "shift_factor", None) or 0.0),
        None if mean is None else tuple(map(float, mean)),
        None if std is None else tuple(map(float, std)),
    )
    scale.check_channels(config.latent_channels)
    return scale


@torch.no_grad()
def encode(images: Tensor, vae: Any, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """The posterior of the latents of some images.

    Args:
        images: floating (n, 3, H, W) in [-1, 1], on the autoencoder's device.
        vae: a diffusers `AutoencoderKL`.
        scaling_factor: multiplies the latents; the autoencoder's own is `vae.config.scaling_factor`.

    Returns:
        Mean and standard deviation, float32 (n, C, h, w) each, scaled as diffusers does: by `scaling_factor` and by
        what the autoencoder's config has of shift_factor, latents_mean and latents_std (see `LatentScale`).

    Raises:
        ValueError: see `latent_scale`.
    """
    scale = dataclasses.replace(latent_scale(vae), scaling_factor=scaling_factor)
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    shift, factor = scale.shift_and_factor(images)
    return (posterior.mean.float() - shift) * factor, posterior.std.float() * factor


@torch.no_grad()
def decode(latents: Tensor, vae: Any, scaling_factor: float) -> Tensor:
    """The images of some latents, all at once.

    Args:
        latents: floating (n, C, h, w), on the autoencoder's device.
        vae: a diffusers `AutoencoderKL`.
        scaling_factor: what the latents were multiplied by, which is undone first: `LatentData.scaling_factor`, times
            `LatentBatches.scale` for latents as a model sees them.

    Returns:
        float32 (n, 3, H, W), clamped to [-1, 1].

    Raises:
        ValueError: see `latent_scale`.
    """
    scale = dataclasses.replace(latent_scale(vae), scaling_factor=scaling_factor)
    shift, factor = scale.shift_and_factor(latents)
    images: Tensor = vae.decode((latents.float() / factor + shift).to(vae.dtype)).sample
    return images.float().clamp(-1, 1)
