"""The masking process of discrete diffusion (MD4, arXiv 2406.04329), as DiffusionBlocks uses it for masked text.

A *level* is t in [0, 1]: each token of the target is masked by itself with probability 1 - alpha(t), where alpha falls
from almost 1 at t = 0 (clean) to almost 0 at t = 1 (all masked). The *mass* u of a level is its quantile when equal
mass is an equal decrement of alpha, so 1 - alpha = e + (1 - 2e) * u; u = 0 is the cleanest level. Names are those of
`EDM` wherever both have the thing.

The negative evidence lower bound of a sequence x of n tokens is, in nats,

    integral over t of w(t) * E[S(t)] dt + reconstruction + prior,     w = |alpha'| / (1 - alpha),

with S(t) the sum of -log p(x_i | z_t, t) over the masked positions of z_t. Over one interval of levels the integral has
two unbiased estimates, both of which average over draws of t and z:

    t uniform in the interval:          (t_high - t_low) * w(t) * S(t)
    its mass uniform in the interval:   (u_high - u_low) * v(t) * S(t),     v = (1 - 2e) / (1 - alpha),

because dt = du / (du/dt) and w = v * du/dt. For the linear schedule they are the same. Since E[number of masked tokens]
is n * (1 - alpha), the second has the same expectation at every level where the loss of a masked token is the same, so
it varies less; `sample` draws mass unless told otherwise. Integrals over the intervals of a partition add up.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from ..common.fields import MOST_LEVELS, MOST_TOKENS, Int, Number, check_count
from .edm import match
from .grids import grid_name

SCHEDULES = ("linear", "cosine")
_STRATEGIES = ("equi-probability", "uniform")
_GRIDS = ("equal-quantile", "uniform", "cosine")


@dataclass(frozen=True)
class Masking:
    """Tokens masked one by one, with MD4's schedules, weight and constant terms.

    Args:
        vocab_size: number of tokens, >= 2; ids 0 to vocab_size - 1. The mask is the id after them, `mask_id`.
        schedule: alpha(t) = (1 - 2e) * a(t) + e with a = 1 - t (`linear`) or 1 - cos(pi/2 * (1 - t)) (`cosine`).
        epsilon: e, in (0, 0.5), default 1e-4: keeps the weight finite at t = 0.
        kind: tells the noise processes apart in a config.

    Raises:
        ValueError: a parameter out of its range.
    """

    symbol: ClassVar[str] = "t"
    logarithmic: ClassVar[bool] = False
    # pydantic reads this when the process is a field of a config: unknown keys are refused there.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    vocab_size: Int = 27
    schedule: str = "linear"
    epsilon: Number = 1e-4
    kind: Literal["masking"] = "masking"

    def __post_init__(self) -> None:
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int) or self.vocab_size < 2:
            raise ValueError(f"vocab_size must be a whole number >= 2, got {self.vocab_size!r}")
        if self.vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size must be at most {MOST_TOKENS:,}, got {self.vocab_size}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; allowed: {', '.join(SCHEDULES)}")
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"epsilon must be in (0, 0.5), got {self.epsilon}; MD4 uses 1e-4")

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.vocab_size

    # ---- the schedule and the training distribution --------------------------------------------------

    @property
    def level_min(self) -> float:
        """The cleanest level."""
        return 0.0

    @property
    def level_max(self) -> float:
        """The level where (almost) every token is masked."""
        return 1.0

    # Mass is drawn evenly up to both ends, t is told as it is, and the bound is an integral over the whole range: so
    # all of it is read. Near t = 1 the cosine schedule is the thinner, yet with n levels drawn the highest of them is
    # within 1 / sqrt(n) of 1, where the network sees and is told what it does at 1.
    read_min = level_min
    read_max = level_max

    def masked(self, level: Tensor) -> Tensor:
        """1 - alpha(t), the probability that a token is masked: float64, shape of `level`."""
        return self.epsilon + (1 - 2 * self.epsilon) * self.cdf(level)

    def cdf(self, level: Tensor) -> Tensor:
        """Mass u in [0, 1] below each level, float64, shape of `level` (levels outside [0, 1] are clamped).

        u = t (linear) or cos(pi/2 * (1 - t)) (cosine).
        """
        t = level.double().clamp(0.0, 1.0)
        return t if self.schedule == "linear" else torch.sin(math.pi / 2 * t)

    def icdf(self, mass: Tensor) -> Tensor:
        """Level t at each mass u: the inverse of `cdf`, float64, shape of `mass`.

        t = u (linear) or 1 - 2/pi * arccos(u) (cosine).

        Raises:
            ValueError: a mass outside [0, 1] (checked on the CPU; on a GPU it is clamped, to save a wait).
        """
        if mass.device.type == "cpu" and not bool(((mass >= -1e-9) & (mass <= 1 + 1e-9)).all()):
            raise ValueError(f"mass must be in [0, 1], got {mass.min().item():g} to {mass.max().item():g}")
        u = mass.double().clamp(0.0, 1.0)
        return u if self.schedule == "linear" else 2 / math.pi * torch.asin(u)

    def density(self, level: Tensor) -> Tensor:
        """Density du/dt of the training distribution per unit of t, float64, shape of `level`."""
        t = level.double().clamp(0.0, 1.0)
        return torch.ones_like(t) if self.schedule == "linear" else math.pi / 2 * torch.cos(math.pi / 2 * t)

    def share(self, interval: tuple[float, float]) -> float:
        """Mass of a (lowest, highest) level interval: 1/B for each of B blocks of equal mass."""
        low, high = self.cdf(torch.tensor(interval, dtype=torch.float64)).tolist()
        return float(high - low)

    def sample(
        self,
        n: int,
        interval: tuple[float, float] | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        coordinate: str = "quantile",
        antithetic: bool = True,
    ) -> Tensor:
        """Draw n levels in an interval; weight their losses by `weight_by_quantile` (or `weight`, with "level").

        Args:
            n: how many.
            interval: (lowest, highest) level; default the whole range.
            generator: source of randomness (its device must be `device`).
            device: where to draw.
            coordinate: what is uniform in the interval: "mass" (the training distribution) or "level" (t itself).
            antithetic: spread the levels evenly, (u + i/n) mod 1 with a single uniform u (arXiv 2107.00630, and MD4):
                each level by itself is uniform, so nothing is biased, and their mean varies less. Else independent.

        Returns:
            Levels, float32, shape (n,). The quantile is inverted in float64.

        Raises:
            ValueError: an interval that does not ascend within [0, 1], or another coordinate.
        """
        low, high = interval if interval is not None else (0.0, 1.0)
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"interval ({low}, {high}) must ascend within the range of levels, [0, 1]")
        u = torch.rand(1 if antithetic else n, generator=generator, device=device, dtype=torch.float64)
        if antithetic:
            u = (u + torch.arange(n, device=device, dtype=torch.float64) / n) % 1.0
        if coordinate == "level":
            level = low + u * (high - low)
        elif coordinate == "quantile":
            u_low, u_high = self.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
            level = self.icdf(u_low + u * (u_high - u_low))
        else:
            raise ValueError(f"unknown coordinate {coordinate!r}; allowed: quantile, level")
        return level.clamp(low, high).float()

    # ---- intervals of levels -------------------------------------------------------------------------

    def boundaries(self, num_intervals: int, strategy: str = "equi-probability") -> list[float]:
        """Ascending boundaries of `num_intervals` intervals that tile [0, 1].

        With equal mass they are at equal decrements of alpha (paper, masked diffusion): t_b = b/B for the linear
        schedule, 1 - 2/pi * arccos(b/B) for the cosine one, b counted from the clean end. (Block 0 owns the last.)

        Args:
            num_intervals: B >= 1.
            strategy: `equi-probability` (equal mass) or `uniform` (equal width in t).

        Raises:
            ValueError: unknown strategy or num_intervals < 1.
        """
        check_count("the number of blocks", num_intervals, MOST_LEVELS)
        if strategy not in _STRATEGIES:
            raise ValueError(
                f"unknown partition strategy {strategy!r} for masking; allowed: {', '.join(_STRATEGIES)} (its levels "
                "start at 0, where a logarithm has no value)"
            )
        fraction = torch.linspace(0.0, 1.0, num_intervals + 1, dtype=torch.float64)
        level = self.icdf(fraction) if strategy == "equi-probability" else fraction
        inner: list[float] = level[1:-1].tolist()
        return [0.0, *inner, 1.0]  # the ends exactly, free of rounding

    def widen(self, interval: tuple[float, float], overlap: float) -> tuple[float, float]:
        """The interval a block trains on: wider at each end by `overlap` times its own mass, clipped to [0, 1].

        EDM widens by a share of the interval in log sigma, where its levels are spread; masking's are spread in mass.
        (The paper gives the rule for sigma only, which has no meaning at t = 0.)
        """
        if overlap == 0:
            return interval
        low, high = self.cdf(torch.tensor(interval, dtype=torch.float64)).tolist()
        extra = overlap * (high - low)
        ends = torch.tensor([max(0.0, low - extra), min(1.0, high + extra)], dtype=torch.float64)
        wide_low, wide_high = self.icdf(ends).tolist()
        return wide_low, wide_high

    def levels(self, steps: int, grid: str = "equal-quantile") -> list[float]:
        """`steps` + 1 descending levels from 1 to 0: one network call at each but the last.

        Args:
            steps: number of sampling steps, >= 1.
            grid: `equal-quantile` (about as many tokens are revealed in every step), `cosine` (mass
                sin(pi/2 * (1 - i/steps)) at step i: fewest tokens at first, when least is known; MD4's for the linear
                schedule) or `uniform` (equal steps of t).

        Raises:
            ValueError: steps < 1, or unknown grid.
        """
        check_count("steps", steps, MOST_LEVELS)
        grid = grid_name(grid)
        if grid not in _GRIDS:
            raise ValueError(f"unknown level grid {grid!r} for masking; allowed: {', '.join(_GRIDS)}")
        if grid == "uniform":
            return self.boundaries(steps, "uniform")[::-1]
        if grid == "equal-quantile":
            return self.boundaries(steps)[::-1]
        ramp = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
        inner: list[float] = self.icdf(torch.sin(math.pi / 2 * ramp))[1:-1].tolist()
        return [1.0, *inner, 0.0]

    # ---- corruption, weights, constant terms ---------------------------------------------------------

    def draws(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The randomness that `corrupt` takes: uniform in [0, 1), float32."""
        return torch.rand(shape, generator=generator, device=device)

    def corrupt(self, target: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """z: each token masked where its uniform is below 1 - alpha(t).

        Args:
            target: token ids, any integer dtype that holds `mask_id`, shape (batch, ...).
            level: shape (batch,).
            noise: uniform in [0, 1), shape of `target`. At a higher level the same noise masks more.

        Returns:
            Token ids with `mask_id` in them, in the shape and dtype of `target`.
        """
        uniform = noise.double()
        return target.masked_fill(uniform < match(self.masked(level), uniform), self.mask_id)

    def prior(self, shape: tuple[int, ...], *, generator: torch.Generator | None = None, device: Any = None) -> Tensor:
        """z at level 1, where the chain starts: all masked, int64 (nothing is drawn)."""
        return torch.full(shape, self.mask_id, dtype=torch.int64, device=device)

    def condition(self, level: Tensor) -> Tensor:
        """t, which the network is told, in float32 or better."""
        return level if level.dtype == torch.float64 else level.float()

    def scaled(self, z: Tensor, level: Tensor) -> Tensor:
        """z itself: tokens have no scale."""
        return z

    def combine(self, z: Tensor, raw: Tensor, level: Tensor) -> Tensor:
        """F itself, float32: there is nothing of z to mix in."""
        return raw.float()

    def training_weight(self, level: Tensor) -> Tensor:
        """`weight_by_quantile`, because `sample` draws mass."""
        return self.weight_by_quantile(level)

    def weight(self, level: Tensor) -> Tensor:
        """w(t) = |alpha'| / (1 - alpha), for levels uniform in t; float64, shape of `level`."""
        return self.density(level) * self.weight_by_quantile(level)

    def weight_by_quantile(self, level: Tensor) -> Tensor:
        """v(t) = (1 - 2e) / (1 - alpha), for levels uniform in mass; float64, shape of `level`."""
        return (1 - 2 * self.epsilon) / self.masked(level)

    def reconstruction(self, length: int) -> float:
        """Nats of guessing what is still masked at level 0, length * (1 - alpha(0)) * ln V."""
        return length * self.epsilon * math.log(self.vocab_size)

    def prior_term(self, length: int) -> float:
        """Nats for what z at level 1 still shows, length * alpha(1) * ln V.

        MD4 leaves it out as negligible (e * log2 V, 0.0005 bits a character); with it the bound is strict.
        """
        return length * self.epsilon * math.log(self.vocab_size)

    # ---- saving --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return asdict(self)
