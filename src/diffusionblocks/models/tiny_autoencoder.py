"""Tiny image autoencoders: TAESD (github.com/madebyollin/taesd, MIT) and its successors of eightfold reduction.

diffusers' `AutoencoderTiny` is the same without the global branches that the weights for FLUX.2 (TAEF2) have.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["TinyAutoencoder"]

_WIDTH = 64
_GROUPS = 4
_BOUND = 3.0  # decoders see 3 * tanh(latent / 3)


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=bias)


class _Bound(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / _BOUND) * _BOUND


class _Residual(nn.Module):
    """Three convolutions beside the identity; with `pool` after a branch whose norm sees the whole image."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(_WIDTH, _WIDTH), nn.ReLU(), _conv(_WIDTH, _WIDTH), nn.ReLU(), _conv(_WIDTH, _WIDTH)
        )
        wide = _GROUPS * _WIDTH
        self.pool = (
            nn.Sequential(
                nn.Conv2d(_WIDTH, wide, 1, bias=False),
                nn.GroupNorm(_GROUPS, wide),
                nn.ReLU(),
                nn.Conv2d(wide, _WIDTH, 1, bias=False),
            )
            if pool
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _residuals(pool: bool = False) -> list[nn.Module]:
    return [_Residual(pool) for _ in range(3)]


class TinyAutoencoder(nn.Module):
    """Encode images to latents of an eighth of their height and width, and decode them, without any noise.

    Parameters have the names of the published files, below `encoder` and `decoder`.

    Args:
        latent_channels: C; 4 of Stable Diffusion's latents, 16 of FLUX.1's, 32 of FLUX.2's.
        pool: whether the blocks at the lowest resolution have a global branch, as the weights for FLUX.2 do.
    """

    def __init__(self, latent_channels: int = 32, pool: bool = True) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        encoder: list[nn.Module] = [_conv(3, _WIDTH), _Residual()]
        for stage in range(3):
            encoder += [_conv(_WIDTH, _WIDTH, stride=2, bias=False), *_residuals(pool and stage == 2)]
        self.encoder = nn.Sequential(*encoder, _conv(_WIDTH, latent_channels))
        decoder: list[nn.Module] = [_Bound(), _conv(latent_channels, _WIDTH), nn.ReLU()]
        for stage in range(3):
            decoder += [
                *_residuals(pool and stage == 0),
                nn.Upsample(scale_factor=2),
                _conv(_WIDTH, _WIDTH, bias=False),
            ]
        self.decoder = nn.Sequential(*decoder, _Residual(), _conv(_WIDTH, 3))

    def encode(self, images: Tensor) -> Tensor:
        """Latents (n, C, H / 8, W / 8) of images (n, 3, H, W) in [-1, 1]; the network itself sees [0, 1]."""
        latents: Tensor = self.encoder((images + 1) / 2)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, 8h, 8w), about in [-1, 1], of latents (n, C, h, w)."""
        images: Tensor = self.decoder(latents)
        return images * 2 - 1

    @staticmethod
    def files_in(folder: Path) -> tuple[Path, Path] | None:
        """The files `*encoder.safetensors` and `*decoder.safetensors` of a folder; None unless there is one of each."""
        pair = [sorted(folder.glob(f"*{half}.safetensors")) for half in ("encoder", "decoder")]
        return (pair[0][0], pair[1][0]) if [len(files) for files in pair] == [1, 1] else None

    @classmethod
    def from_files(cls, encoder: Path, decoder: Path) -> TinyAutoencoder:
        """Read published weights, in float32; the number of channels and the global branches are as in the files.

        Raises:
            ValueError: a file is damaged, or holds another network.
        """
        weights: dict[str, Tensor] = {}
        for half, file in (("encoder", encoder), ("decoder", decoder)):
            try:
                weights |= {f"{half}.{name}": tensor.float() for name, tensor in load_file(file).items()}
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or not safetensors: {error}; copy it again") from None
        first = weights.get("decoder.1.weight")
        model = cls(
            1 if first is None or first.dim() != 4 else first.shape[1], any(".pool." in name for name in weights)
        )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{encoder} and {decoder.name} hold another network than TAESD's of eightfold reduction: {error}"
            ) from None
        return model
