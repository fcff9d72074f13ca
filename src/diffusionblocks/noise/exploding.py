"""Variance-exploding processes, z = y + sigma * eps, where a level is sigma: what EDM and DDPM have in common."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from .gaussian import GaussianProcess
from .knots import Knots
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
    def _knots(self) -> Knots:
        """The logarithms of the table."""
        assert self.table is not None
        return Knots(torch.tensor(self.table, dtype=torch.float64, device="cpu").log())

    def place_in_table(self, level: Tensor) -> Tensor:
        """Where sigmas lie in the table, float64, shape of `level`: 0 is the first; beyond its ends they are these."""
        return self._knots.steps(level.double().log())

    def _cdf_of_table(self, level: Tensor) -> Tensor:
        return self._knots.quantile(level.double().log())

    def _icdf_of_table(self, quantile: Tensor) -> Tensor:
        return self._knots.number(quantile).exp()

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
