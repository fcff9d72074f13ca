"""Gaussian noise processes: z = alpha * y + sigma * eps, with alpha and sigma functions of the level."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.fields import MOST_LEVELS, check_count
from .process import NoiseProcess, match

#: The least sigma that `evidence` tells apart: a level of less, such as the target itself at sigma 0, counts as this.
LEAST_SIGMA = 1e-4


class Preconditioning(NamedTuple):
    """The coefficients of D = c_skip * z + c_out * F(c_in * z, c_noise) (EDM eq. 7), each shaped like the level."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class GaussianProcess(NoiseProcess):
    """A process z = alpha(level) * y + sigma(level) * eps, eps standard normal.

    A subclass gives `alpha` and `sigma`, and its distribution of levels (`_cdf`, `_icdf`). Preconditioning, weight and
    what solvers need follow; each can be given anew.

    Attributes:
        sigma_data: standard deviation of the data that the preconditioning assumes.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_one = self.for_tokens(1)
        for level in (self.read_min, self.read_max):
            if not at_one.condition(torch.tensor([level], dtype=torch.float64, device="cpu")).isfinite().all():
                raise ValueError(
                    f"{self.kind}: what the network is told of level {level:g}, c_noise, is not finite; give "
                    "precondition anew, or levels that begin and end where neither alpha nor sigma is 0"
                )

    def for_tokens(self, tokens: int) -> GaussianProcess:
        """The Gaussian process at a resolution of so many tokens: itself, but where its path depends on it."""
        return self

    @abc.abstractmethod
    def alpha(self, level: Tensor) -> Tensor:
        """The factor of the target at each level, shape and dtype of `level`."""

    @abc.abstractmethod
    def sigma(self, level: Tensor) -> Tensor:
        """The standard deviation of the noise at each level, shape and dtype of `level`."""

    def log_snr(self, level: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) of each level, shape of `level`: the logarithm of the signal-to-noise ratio."""
        return 2.0 * (self.alpha(level) / self.sigma(level)).log()

    # ---- for solvers: numbers in double precision ----------------------------------------------------

    def alpha_sigma(self, level: float) -> tuple[float, float]:
        """alpha and sigma of one level."""
        place = torch.tensor(level, dtype=torch.float64, device="cpu")
        return self.alpha(place).item(), self.sigma(place).item()

    def time(self, level: float) -> float:
        """The variable in which solvers take differences: by default the level itself."""
        return level

    def rates(self, level: float) -> tuple[float, float]:
        """The derivatives of alpha and sigma by `time` (by the level, which `time` is unless it is given anew)."""
        with torch.enable_grad():
            place = torch.tensor(level, dtype=torch.float64, device="cpu", requires_grad=True)
            pair = torch.stack([self.alpha(place), self.sigma(place)])
            (slopes,) = torch.autograd.grad(pair, place, torch.eye(2, dtype=torch.float64), is_grads_batched=True)
        return slopes[0].item(), slopes[1].item()

    def noisier(self, level: float, factor: float) -> float:
        """The level at which sigma / alpha is `factor` times that of `level`; at most `read_max`, at least `level`.

        Args:
            level: > 0.
            factor: >= 1.
        """
        low, high = level, max(level, self.read_max)
        alpha, sigma = self.alpha_sigma(level)
        # alpha may be 0 at the highest level: products, no quotients.
        if factor <= 1:
            return level
        if not self._is_above(high, factor * sigma, alpha):
            return high
        while (middle := 0.5 * (low + high)) not in (low, high):  # until no float lies between
            low, high = (low, middle) if self._is_above(middle, factor * sigma, alpha) else (middle, high)
        return high

    def _is_above(self, level: float, sigma: float, alpha: float) -> bool:
        there = self.alpha_sigma(level)
        return there[1] * alpha > sigma * there[0]

    def velocity(self, z: Tensor, denoised: Tensor, level: float) -> Tensor:
        """dz/dtime of the probability-flow ODE: alpha' * D + sigma' * (z - alpha * D) / sigma, in the dtype of z."""
        (alpha, sigma), (alpha_rate, sigma_rate) = self.alpha_sigma(level), self.rates(level)
        return alpha_rate * denoised + sigma_rate * ((z - alpha * denoised) / sigma)

    def sampling_levels(self, steps: int, grid: str | None = None, rho: float = 7.0) -> list[float]:
        """`steps` + 1 descending levels that end at 0, where z is the target (EDM eq. 5 with t_N = 0).

        The network is called at the first `steps` of them, which begin at `read_max`. Where the cleanest level that is
        read is above 0, it is the last of these; with steps=1 only `read_max` is. The step to 0 returns the last D.

        Args:
            steps: number of solver steps, >= 1.
            grid: one of `grids`; None takes `sampling_grid`.
            rho: the exponent of the grid `karras`, > 0.

        Raises:
            ValueError: steps < 1, unknown grid, or rho <= 0.
        """
        check_count("steps", steps, MOST_LEVELS)
        grid = self.sampling_grid if grid is None else grid
        if self.read_min == 0:
            return self.levels(steps, grid, rho=rho)
        above_zero = self.levels(max(steps - 1, 1), grid, rho=rho)
        return [*above_zero[:steps], 0.0]

    # ---- corruption, preconditioning, weight ---------------------------------------------------------

    def draws(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The randomness that `corrupt` takes: eps, standard normal, float32."""
        return torch.randn(shape, generator=generator, device=device)

    def corrupt(self, target: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """z = alpha * y + sigma * eps, in float32 or better; `level` (batch,) broadcasts over the rest."""
        target = target if target.dtype == torch.float64 else target.float()
        return match(self.alpha(level), target) * target + match(self.sigma(level), target) * noise

    def prior(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: Any = None,
        level: float | None = None,
    ) -> Tensor:
        """z at the level where a chain starts, default `read_max`: sigma * eps, float32 (y is negligible there)."""
        sigma = self.alpha_sigma(self.read_max if level is None else level)[1]
        return sigma * torch.randn(shape, generator=generator, device=device)

    def precondition(self, level: Tensor) -> Preconditioning:
        """c_skip, c_out, c_in, c_noise, each of the shape and dtype (>= float32) of `level`.

        By default those that EDM derives (appendix B.6), for alpha as well: F sees unit variance and is asked for unit
        variance, with as little of its error in D as can be. c_noise = -log_snr / 8.
        """
        level = level if level.dtype == torch.float64 else level.float()
        alpha, sigma, sd = self.alpha(level), self.sigma(level), self.sigma_data
        total = (alpha * sd) ** 2 + sigma**2
        return Preconditioning(
            c_skip=alpha * sd**2 / total,
            c_out=sigma * sd * total.rsqrt(),
            c_in=total.rsqrt(),
            c_noise=-0.125 * self.log_snr(level),
        )

    def condition(self, level: Tensor) -> Tensor:
        """c_noise, which the network is told of levels (batch,): that of the nearest level between those that are read.

        Beyond these next to nothing is trained, so a level there is told as one that was.
        """
        return self.precondition(level.clamp(self.read_min, self.read_max)).c_noise

    def scaled(self, z: Tensor, level: Tensor) -> Tensor:
        """c_in * z, which the network is shown; `level` (batch,) broadcasts over the rest."""
        return match(self.precondition(level).c_in, z) * z

    def combine(self, z: Tensor, raw: Tensor, level: Tensor) -> Tensor:
        """D = c_skip * z + c_out * F (EDM eq. 7), in float32."""
        c = self.precondition(level)
        return match(c.c_skip, z) * z + match(c.c_out, z) * raw.float()

    def evidence(self, z: Tensor, level: Tensor) -> Tensor:
        """alpha * z / sigma^2, float32 or better: what z says of a target of unit norm.

        Its product with such a row e is log p(z | e), up to a constant that is the same for all rows.

        Args:
            z: noised target (batch, ..., dim).
            level: (batch,), for each sample its own. Where sigma is below 1e-4 it counts as 1e-4, so none gives NaN.
        """
        z = z if z.dtype == torch.float64 else z.float()
        level = level if level.dtype == torch.float64 else level.float()
        return match(self.alpha(level) * self.sigma(level).clamp(min=LEAST_SIGMA).pow(-2), z) * z

    def weight(self, level: Tensor) -> Tensor:
        """1 / c_out^2, shape of `level`: with it the squared error of D is that of the network's own output F."""
        return self.precondition(level).c_out.square().reciprocal()

    def training_weight(self, level: Tensor) -> Tensor:
        """`weight`: it is for levels as they are drawn."""
        return self.weight(level)
