"""How well an autoencoder gives images back."""

from __future__ import annotations

from torch import Tensor


def psnr(images: Tensor, decoded: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, `10 log10(255^2 / mean squared error)` of each image, and the mean of these.

    Args:
        images, decoded: uint8 (n, C, H, W), of one shape.
    """
    if images.shape != decoded.shape:
        raise ValueError(f"images {tuple(images.shape)} and decoded {tuple(decoded.shape)}: must be of one shape")
    error = (images.double() - decoded.double()).square().flatten(1).mean(1)
    return float((10 * (255**2 / error).log10()).mean())
