"""Gaussian noise of samples by their seeds: the same for a seed in every batch, drawn on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.mersenne_twister import LEAST_NORMALS, MersenneTwister
from .chain import check_seeds, generators_of


class SeedNoise:
    """Draws standard normal noise, one row a seed: row i of every draw depends on seeds[i] and the number of the draw.

    On a CPU each seed has a generator of torch. On another device all seeds draw the same numbers there, side by side
    (`MersenneTwister`), equal up to rounding. So a seed means one image, whatever the batch and the device.
    torch's generator goes by a seed's lower 32 bits: seeds that differ by 2^32 draw the same.

    Args:
        seeds: one a sample, whole numbers from 0 to 2^63 - 1; equal seeds give equal rows.
        shape: of one sample, such as (C, H, W).
        device: where the noise is needed; default the CPU.

    Raises:
        ValueError: no seed, or one that is no whole number from 0 to 2^63 - 1.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        check_seeds(seeds)
        self.shape = tuple(shape)
        self.device = torch.device("cpu" if device is None else device)
        self._count, self._size = len(seeds), torch.Size(shape).numel()
        together = self.device.type != "cpu" and self._size >= LEAST_NORMALS
        self._twister = MersenneTwister(seeds, self.device) if together else None
        self._generators = [] if together else generators_of(seeds)

    def draw(self) -> Tensor:
        """The next noise, float32 (seeds, *shape), on the device."""
        if self._twister is not None:
            return self._twister.normals(self._size).view(self._count, *self.shape)
        rows = [torch.randn(self.shape, generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self.device)
