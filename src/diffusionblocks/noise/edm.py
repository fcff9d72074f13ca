"""The EDM noise process (Karras et al., arXiv 2206.00364), as DiffusionBlocks uses it (paper, section 3).

A *level* is sigma, the standard deviation of the noise added to the target. Its *mass* u in [0, 1] is its
quantile under the training distribution, log sigma ~ N(P_mean, P_std^2) truncated to
[sigma_min, sigma_max]; u = 0 is the cleanest level. `quantiles` puts a distribution in its place that was fitted to
measured losses (`fitting.py`). "EDM eq. n" refers to the EDM paper.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import ConfigDict
from torch import Tensor

from ..common.fields import MOST_LEVELS, Number, check_count
from .grids import grid_name

PARTITION_STRATEGIES = ("equi-probability", "log-uniform", "uniform")


class Preconditioning(NamedTuple):
    """The coefficients of D = c_skip * z + c_out * F(c_in * z, c_noise) (EDM eq. 7), each shaped like the level."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True)
class EDM:
    """Variance-exploding noise with EDM's training distribution, preconditioning and weight.

    Args:
        p_mean: mean of log sigma (EDM table 1; default -1.2).
        p_std: standard deviation of log sigma, > 0 (default 1.2).
        sigma_min: lowest level, > 0 (default 0.002).
        sigma_max: highest level, > sigma_min (default 80).
        sigma_data: standard deviation of the data that the preconditioning assumes, > 0 (default 0.5).
        quantiles: levels at equal steps of mass, ascending from sigma_min to sigma_max inclusive. Where given, they
            are the training distribution, with mass even over log sigma between neighbours; p_mean and p_std then
            mean nothing. Default None, the normal distribution.
        coverage: (lowest, highest) mass, 0 <= lowest < highest <= 1, between which levels are read: there chains begin
            and end, and the network is told no level outside. (0.001, 0.999) leaves out the levels at which next to
            nothing is trained. Drawn levels and the partition do not depend on it. None is the whole range here;
            conversion puts the default of the target in its place.
        kind: tells the noise processes apart in a config.

    Raises:
        ValueError: a parameter out of its range.
    """

    symbol: ClassVar[str] = "sigma"
    logarithmic: ClassVar[bool] = True
    # pydantic reads this when the process is a field of a config: unknown keys are refused there.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    p_mean: Number = -1.2
    p_std: Number = 1.2
    sigma_min: Number = 0.002
    sigma_max: Number = 80.0
    sigma_data: Number = 0.5
    quantiles: tuple[Number, ...] | None = None
    coverage: tuple[Number, Number] | None = None
    kind: Literal["edm"] = "edm"

    def __post_init__(self) -> None:
        for name in ("p_std", "sigma_min", "sigma_data"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        if not math.isfinite(self.p_mean):
            raise ValueError(f"p_mean must be finite, got {self.p_mean}")
        if not (math.isfinite(self.sigma_max) and self.sigma_max > self.sigma_min):
            raise ValueError(f"sigma_max must be finite and > sigma_min = {self.sigma_min}, got {self.sigma_max}")
        if self.quantiles is not None:
            check_count("the number of quantiles", max(1, len(self.quantiles)), MOST_LEVELS)
            object.__setattr__(self, "quantiles", tuple(self.quantiles))  # a list, from JSON, would have no hash
            self._check_quantiles()
        else:
            q_min, q_max = self._normal_cdf_ends
            if q_max - q_min < 1e-4:
                raise ValueError(
                    f"log sigma ~ N({self.p_mean}, {self.p_std}^2) has almost no mass in [{self.sigma_min}, "
                    f"{self.sigma_max}]: p_mean must lie about within the logarithms of that range"
                )
        if isinstance(self.coverage, list):
            object.__setattr__(self, "coverage", tuple(self.coverage))
        low, high = self._read  # looked up now: compiled graphs take finished numbers
        if not low < high:
            raise ValueError(f"coverage = {self.coverage} holds no more than the level {low:g}: widen it")

    def _check_quantiles(self) -> None:
        found = self.quantiles or ()
        ascends = all(low < high for low, high in itertools.pairwise(found))
        if len(found) < 2 or not ascends or not all(math.isfinite(level) for level in found):
            raise ValueError(
                f"quantiles must be at least 2 finite levels that ascend strictly, got "
                f"{list(found[:8])}{' and more' * (len(found) > 8)}"
            )
        if (found[0], found[-1]) != (self.sigma_min, self.sigma_max):
            raise ValueError(
                f"quantiles must start at sigma_min = {self.sigma_min} and end at sigma_max = {self.sigma_max}, got "
                f"{found[0]} to {found[-1]}"
            )

    @functools.cached_property
    def _read(self) -> tuple[float, float]:
        """The levels at both ends of `coverage`; those of the whole range exactly, free of rounding."""
        covered = (0.0, 1.0) if self.coverage is None else self.coverage
        ends = isinstance(covered, tuple) and len(covered) == 2
        if not (ends and 0.0 <= covered[0] < covered[1] <= 1.0):  # NaN is nowhere
            raise ValueError(
                f"coverage must be (lowest, highest) mass with 0 <= lowest < highest <= 1, got {covered}; leave it out "
                "for the default"
            )
        low, high = self.icdf(torch.tensor(covered, dtype=torch.float64, device="cpu")).tolist()
        return low if covered[0] > 0 else self.sigma_min, high if covered[1] < 1 else self.sigma_max

    # ---- the training distribution -------------------------------------------------------------------

    @property
    def level_min(self) -> float:
        """The cleanest level."""
        return self.sigma_min

    @property
    def level_max(self) -> float:
        """The noisiest level: z carries (almost) nothing of the target there."""
        return self.sigma_max

    @property
    def read_min(self) -> float:
        """The cleanest level at which the network is read, and the lowest that it is told: see `coverage`."""
        return self._read[0]

    @property
    def read_max(self) -> float:
        """The noisiest level at which the network is read, where chains start, and the highest that it is told."""
        return self._read[1]

    @functools.cached_property
    def _normal_cdf_ends(self) -> tuple[float, float]:
        ends = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64, device="cpu")
        q_min, q_max = _normal_cdf((ends.log() - self.p_mean) / self.p_std).tolist()
        return q_min, q_max

    @functools.cached_property
    def _knots_on(self) -> dict[torch.device, Tensor]:
        return {}

    def _knots(self, device: torch.device) -> Tensor:
        """Logarithms of the quantiles, float64, made once a device: a CUDA graph can hold no copy from the host."""
        if device not in self._knots_on:
            assert self.quantiles is not None
            self._knots_on[device] = torch.tensor(self.quantiles, dtype=torch.float64).log().to(device)
        return self._knots_on[device]

    def cdf(self, level: Tensor) -> Tensor:
        """Mass u in [0, 1] below each level, float64, shape of `level` (levels outside the range are clamped)."""
        sigma = level.double().clamp(self.sigma_min, self.sigma_max)
        if self.quantiles is not None:
            knots = self._knots(level.device)
            place = sigma.log().clamp(knots[0], knots[-1])
            below = _interval_of(place, knots)
            within = (place - knots[below]) / (knots[below + 1] - knots[below])
            fitted: Tensor = (below + within) / (len(knots) - 1)
            return fitted
        q_min, q_max = self._normal_cdf_ends
        q = _normal_cdf((sigma.log() - self.p_mean) / self.p_std)
        mass: Tensor = ((q - q_min) / (q_max - q_min)).clamp(0.0, 1.0)
        return mass

    def icdf(self, mass: Tensor) -> Tensor:
        """Level sigma at each mass u: the inverse of `cdf`, float64, shape of `mass`.

        Raises:
            ValueError: a mass outside [0, 1] (checked on the CPU; on a GPU it is clamped, to save a wait).
        """
        if mass.device.type == "cpu" and not bool(((mass >= -1e-9) & (mass <= 1 + 1e-9)).all()):
            raise ValueError(f"mass must be in [0, 1], got {mass.min().item():g} to {mass.max().item():g}")
        if self.quantiles is not None:
            knots = self._knots(mass.device)
            steps = mass.double().clamp(0.0, 1.0) * (len(knots) - 1)
            below = steps.floor().clamp(max=len(knots) - 2).long()
            place = knots[below] + (steps - below) * (knots[below + 1] - knots[below])
            return place.exp().clamp(self.sigma_min, self.sigma_max)
        q_min, q_max = self._normal_cdf_ends
        q = q_min + mass.double().clamp(0.0, 1.0) * (q_max - q_min)
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(q))
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def sample(
        self,
        n: int,
        interval: tuple[float, float] | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw n levels from the training distribution restricted to a level interval.

        Args:
            n: how many.
            interval: (lowest, highest) level; default the whole range.
            generator: source of randomness (its device must be `device`).
            device: where to draw.

        Returns:
            Levels, float32, shape (n,). The quantile is inverted in float64.

        Raises:
            ValueError: an interval that does not ascend within the range of levels.
        """
        low, high = interval if interval is not None else (self.sigma_min, self.sigma_max)
        if not self.sigma_min <= low < high <= self.sigma_max:
            raise ValueError(
                f"interval ({low}, {high}) must ascend within the noise range [{self.sigma_min}, {self.sigma_max}]"
            )
        u_low, u_high = self.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        return self.icdf(u_low + u * (u_high - u_low)).clamp(low, high).float()

    def density(self, level: Tensor) -> Tensor:
        """Density of the training distribution per unit of log sigma, float64, shape of `level`."""
        if self.quantiles is not None:
            knots = self._knots(level.device)
            below = _interval_of(level.double().log(), knots)
            return 1.0 / ((len(knots) - 1) * (knots[below + 1] - knots[below]))
        q_min, q_max = self._normal_cdf_ends
        x = (level.double().log() - self.p_mean) / self.p_std
        density: Tensor = torch.exp(-0.5 * x * x) / (math.sqrt(2 * math.pi) * self.p_std * (q_max - q_min))
        return density

    # ---- intervals of levels -------------------------------------------------------------------------

    def boundaries(self, num_intervals: int, strategy: str = "equi-probability") -> list[float]:
        """Ascending boundaries of `num_intervals` intervals that tile [sigma_min, sigma_max].

        Args:
            num_intervals: B >= 1.
            strategy: `equi-probability` (equal mass, paper section 3.3), `log-uniform` (equal width in
                log sigma) or `uniform` (equal width in sigma, the paper's ablation).

        Raises:
            ValueError: unknown strategy or num_intervals < 1.
        """
        check_count("the number of blocks", num_intervals, MOST_LEVELS)
        fraction = torch.linspace(0.0, 1.0, num_intervals + 1, dtype=torch.float64)
        if strategy == "equi-probability":
            sigma = self.icdf(fraction)
        elif strategy == "log-uniform":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** fraction
        elif strategy == "uniform":
            sigma = self.sigma_min + fraction * (self.sigma_max - self.sigma_min)
        else:
            raise ValueError(f"unknown partition strategy {strategy!r}; allowed: {', '.join(PARTITION_STRATEGIES)}")
        inner: list[float] = sigma[1:-1].tolist()
        return [self.sigma_min, *inner, self.sigma_max]  # the ends exactly, free of rounding

    def widen(self, interval: tuple[float, float], overlap: float) -> tuple[float, float]:
        """The interval a block trains on: [lo/alpha, hi*alpha], alpha = (hi/lo)^overlap, clipped (paper 3.3)."""
        low, high = interval
        alpha = (high / low) ** overlap
        return max(self.sigma_min, low / alpha), min(self.sigma_max, high * alpha)

    # ---- level grids for sampling --------------------------------------------------------------------

    def levels(self, steps: int, grid: str = "equal-quantile", *, rho: float = 7.0) -> list[float]:
        """`steps` + 1 descending levels from `read_max` to `read_min`: one network call at each but the last.

        Args:
            steps: number of solver steps, >= 1.
            grid: `equal-quantile` (equal steps of u, its ends cut to what is read) or `karras` (EDM eq. 5).
            rho: the exponent of the Karras grid, > 0.

        Raises:
            ValueError: steps < 1, unknown grid, or rho <= 0.
        """
        check_count("steps", steps, MOST_LEVELS)
        grid = grid_name(grid)
        if grid == "equal-quantile":
            return self._equal_mass(steps)
        if grid == "karras":
            if not (math.isfinite(rho) and rho > 0):
                raise ValueError(f"rho must be a finite number > 0, got {rho}")
            ramp = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
            top, bottom = self.read_max ** (1 / rho), self.read_min ** (1 / rho)
            inner: list[float] = ((top + ramp * (bottom - top)) ** rho)[1:-1].tolist()
            return [self.read_max, *inner, self.read_min]
        raise ValueError(f"unknown level grid {grid!r}; allowed: equal-quantile, karras")

    def _equal_mass(self, steps: int) -> list[float]:
        mass = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64).flip(0)
        low, high = (0.0, 1.0) if self.coverage is None else self.coverage
        if steps > 1 and not (low < 0.5 / steps and high > 1 - 0.5 / steps):
            mass = low + mass * (high - low)
        # Else the inner levels stay those of the whole range: with a step a block they are the blocks' boundaries.
        inner: list[float] = self.icdf(mass)[1:-1].tolist()
        return [self.read_max, *inner, self.read_min]

    def sampling_levels(self, steps: int, grid: str = "equal-quantile", rho: float = 7.0) -> list[float]:
        """`steps` + 1 descending levels that end at 0: `read_max` ... `read_min`, 0 (EDM eq. 5 with t_N = 0).

        The network is called at the first `steps` of them, which run from `read_max` to `read_min` inclusive; with
        steps=1 only at `read_max`. The step to 0 returns the last D.

        Args:
            steps: number of solver steps, >= 1.
            grid: `equal-quantile` (equal steps of u) or `karras` (equal steps of sigma^(1/rho)).
            rho: the exponent of the Karras grid, > 0.

        Raises:
            ValueError: steps < 1, unknown grid, or rho <= 0.
        """
        check_count("steps", steps, MOST_LEVELS)
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
        """z = y + sigma * eps (EDM eq. 2), in float32 or better; `level` (batch,) broadcasts over the rest."""
        target = target if target.dtype == torch.float64 else target.float()
        return target + match(level, target) * noise

    def prior(self, shape: tuple[int, ...], *, generator: torch.Generator | None, device: Any = None) -> Tensor:
        """z at `read_max`, where the chain starts: read_max * eps, float32 (y is negligible there)."""
        return self.read_max * torch.randn(shape, generator=generator, device=device)

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

    def training_weight(self, level: Tensor) -> Tensor:
        """`weight`: levels are drawn as EDM draws them."""
        return self.weight(level)

    def weight(self, level: Tensor) -> Tensor:
        """w(sigma) = (sigma^2 + sd^2) / (sigma * sd)^2 = 1 / c_out^2 (EDM eq. 144), shape of `level`."""
        sigma = level if level.dtype == torch.float64 else level.float()
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    # ---- saving --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return asdict(self)


def _interval_of(place: Tensor, knots: Tensor) -> Tensor:
    """Index of the knot at or below each place, at most the last but one; int64, shape of `place`."""
    return torch.searchsorted(knots, place, right=True).sub(1).clamp(0, len(knots) - 2)


def _normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), exact in the far tails too (torch.special.ndtr loses digits there)."""
    mass: Tensor = 0.5 * torch.special.erfc(-x / math.sqrt(2.0))
    return mass


def match(level: Tensor, like: Tensor) -> Tensor:
    """View a (batch,) tensor so that it broadcasts over the trailing dimensions of `like`."""
    return level.reshape(level.shape[0], *([1] * (like.dim() - 1))).to(
        torch.float64 if like.dtype == torch.float64 else torch.float32
    )
