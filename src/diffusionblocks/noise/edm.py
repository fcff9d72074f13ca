"""The EDM noise process (Karras et al., arXiv 2206.00364), as DiffusionBlocks uses it (paper, section 3).

A *level* is sigma, the standard deviation of the noise added to the target. Training draws log sigma ~ N(p_mean,
p_std^2), truncated to [sigma_min, sigma_max]. `quantiles` puts a distribution in its place that was fitted to measured
losses (`fitted_levels.py`). "EDM eq. n" refers to the EDM paper.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from ..common.fields import Number
from .exploding import VarianceExploding
from .fitted_levels import accumulated, fitted_quantiles
from .gaussian import Preconditioning
from .knots import check_quantiles
from .process import normal_cdf, register_noise_process


@register_noise_process
@dataclass(frozen=True)
class EDM(VarianceExploding):
    """Variance-exploding noise with EDM's training distribution, preconditioning and weight.

    Args:
        p_mean: mean of log sigma (EDM table 1; default -1.2).
        p_std: standard deviation of log sigma, > 0 (default 1.2).
        sigma_min: lowest level, > 0 (default 0.002).
        sigma_max: highest level, > sigma_min (default 80).
        sigma_data: standard deviation of the data that the preconditioning assumes, > 0 (default 0.5).
        quantiles: levels at equal steps of the quantile, ascending from sigma_min to sigma_max inclusive. Where given,
            they are the training distribution, even over log sigma between neighbours; p_mean and p_std then mean
            nothing. null: the normal distribution.
        coverage: (lowest, highest) quantile, 0 <= lowest < highest <= 1, between which levels are read: there chains
            begin and end, and the network is told no level outside. (0.001, 0.999) leaves out the levels at which next
            to nothing is trained. Drawn levels and the partition do not depend on it. null: the default of the target
            at conversion, else the whole range.
        kind: tells the noise processes apart in a config.

    Raises:
        ValueError: a parameter out of its range.
    """

    p_mean: Number = -1.2
    p_std: Number = 1.2
    sigma_min: Number = 0.002
    sigma_max: Number = 80.0
    sigma_data: Number = 0.5
    quantiles: tuple[Number, ...] | None = None
    coverage: tuple[Number, Number] | None = None
    kind: Literal["edm"] = "edm"

    def _check(self) -> None:
        for name in ("p_std", "sigma_min", "sigma_data"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        if not math.isfinite(self.p_mean):
            raise ValueError(f"p_mean must be finite, got {self.p_mean}")
        if not (math.isfinite(self.sigma_max) and self.sigma_max > self.sigma_min):
            raise ValueError(f"sigma_max must be finite and > sigma_min = {self.sigma_min}, got {self.sigma_max}")
        if self.quantiles is not None:
            check_quantiles(self.quantiles, ("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max))
            object.__setattr__(self, "quantiles", tuple(self.quantiles))  # a list, from JSON, would have no hash
        elif self._normal_ends[1] - self._normal_ends[0] < 1e-4:
            raise ValueError(
                f"log sigma ~ N({self.p_mean}, {self.p_std}^2) has almost no probability in [{self.sigma_min}, "
                f"{self.sigma_max}]: p_mean must lie about within the logarithms of that range"
            )

    # ---- the training distribution -------------------------------------------------------------------

    @property
    def level_min(self) -> float:
        """sigma_min."""
        return self.sigma_min

    @property
    def level_max(self) -> float:
        """sigma_max."""
        return self.sigma_max

    @functools.cached_property
    def _normal_ends(self) -> tuple[float, float]:
        """The normal distribution's quantiles of sigma_min and sigma_max, between which it is truncated."""
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64, device="cpu")
        q_min, q_max = normal_cdf((ends.log() - self.p_mean) / self.p_std).tolist()
        return q_min, q_max

    @property
    def table(self) -> tuple[float, ...] | None:
        """`quantiles`."""
        return self.quantiles

    def _cdf(self, level: Tensor) -> Tensor:
        if self.quantiles is not None:
            return self._cdf_of_table(level)
        q_min, q_max = self._normal_ends
        q = normal_cdf((level.log() - self.p_mean) / self.p_std)
        return ((q - q_min) / (q_max - q_min)).clamp(0.0, 1.0)

    def _icdf(self, quantile: Tensor) -> Tensor:
        if self.quantiles is not None:
            return self._icdf_of_table(quantile)
        q_min, q_max = self._normal_ends
        q = q_min + quantile * (q_max - q_min)
        return torch.exp(self.p_mean + self.p_std * torch.special.ndtri(q))

    # ---- levels fitted to losses ---------------------------------------------------------------------

    def fit_grid(self, count: int) -> list[float]:
        """Levels that are even over log sigma."""
        return self.boundaries(count - 1, "log-uniform")

    def fit_to(self, levels: Sequence[float], losses: Sequence[float], *, equal: str, floor: float) -> Self:
        """With quantiles by the losses' rise, or by the losses themselves, over log sigma: `fitted_quantiles`."""
        of_rise = losses if equal == "rise" else accumulated(levels, losses)
        return dataclasses.replace(self, quantiles=fitted_quantiles(levels, of_rise, floor=floor))

    # ---- preconditioning, weight ---------------------------------------------------------------------

    def precondition(self, level: Tensor) -> Preconditioning:
        """c_skip, c_out, c_in, c_noise (EDM table 1), each of the shape and dtype (>= float32) of `level`."""
        sigma = level if level.dtype == torch.float64 else level.float()
        sd = self.sigma_data
        total = sigma**2 + sd**2
        return Preconditioning(
            c_skip=sd**2 / total,
            c_out=sigma * sd * total.rsqrt(),
            c_in=total.rsqrt(),
            c_noise=0.25 * sigma.log(),
        )

    def weight(self, level: Tensor) -> Tensor:
        """w(sigma) = (sigma^2 + sd^2) / (sigma * sd)^2 = 1 / c_out^2 (EDM eq. 144), shape of `level`."""
        sigma = level if level.dtype == torch.float64 else level.float()
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
