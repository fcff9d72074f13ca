"""Variance-exploding processes, z = y + sigma * eps, where a level is sigma: what EDM and DDPM have in common."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from .gaussian import GaussianProcess
from .process import match


class VarianceExploding(GaussianProcess):
    """A Gaussian process whose target is not scaled and whose level is sigma, the noise's standard deviation.

    Its distribution may be a table: sigmas at equal steps of the quantile, even over log sigma between neighbours.
    """

    symbol: ClassVar[str] = "sigma"
    logarithmic: ClassVar[bool] = True
    grids: ClassVar[tuple[str, ...]] = ("equal-quantile", "karras")
    sampling_grid: ClassVar[str] = "karras"

    @property
    def table(self) -> tuple[float, ...] | None:
        """The sigmas of the table, ascending; None where the distribution is no table."""
        return None

    @functools.cached_property
    def _knots_on(self) -> dict[torch.device, Tensor]:
        return {}

    def _knots(self, device: torch.device) -> Tensor:
        """Logarithms of the table, float64, made once a device: a CUDA graph can hold no copy from the host."""
        if device not in self._knots_on:
            assert self.table is not None
            self._knots_on[device] = torch.tensor(self.table, dtype=torch.float64).log().to(device)
        return self._knots_on[device]

    def place_in_table(self, level: Tensor) -> Tensor:
        """Where sigmas lie in the table, float64, shape of `level`: 0 is the first; beyond its ends they are these."""
        knots = self._knots(level.device)
        place = level.double().log().clamp(knots[0], knots[-1])
        below = _interval_of(place.detach(), knots)
        return below + (place - knots[below]) / (knots[below + 1] - knots[below])

    def _cdf_of_table(self, level: Tensor) -> Tensor:
        return self.place_in_table(level) / (len(self._knots(level.device)) - 1)

    def _icdf_of_table(self, quantile: Tensor) -> Tensor:
        knots = self._knots(quantile.device)
        steps = quantile * (len(knots) - 1)
        below = steps.floor().clamp(max=len(knots) - 2).long()
        return (knots[below] + (steps - below) * (knots[below + 1] - knots[below])).exp()

    def alpha(self, level: Tensor) -> Tensor:
        """1: the target is not scaled."""
        return torch.ones_like(level)

    def sigma(self, level: Tensor) -> Tensor:
        """The level itself."""
        return level

    def rates(self, level: float) -> tuple[float, float]:
        """0 and 1."""
        return 0.0, 1.0

    def noisier(self, level: float, factor: float) -> float:
        """`factor` times the level, at most `read_max`."""
        return max(level, min(level * factor, self.read_max))

    def corrupt(self, target: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """z = y + sigma * eps (EDM eq. 2), in float32 or better; `level` (batch,) broadcasts over the rest."""
        target = target if target.dtype == torch.float64 else target.float()
        return target + match(level, target) * noise


def _interval_of(place: Tensor, knots: Tensor) -> Tensor:
    """Index of the knot at or below each place, at most the last but one; int64, shape of `place`."""
    return torch.searchsorted(knots, place, right=True).sub(1).clamp(0, len(knots) - 2)
