"""The masking process of discrete diffusion (MD4, arXiv 2406.04329), as DiffusionBlocks uses it for masked text.

A *level* is t in [0, 1]: each token of the target is masked by itself with probability 1 - alpha(t), where alpha falls
from almost 1 at t = 0 (clean) to almost 0 at t = 1 (all masked). Levels are drawn so that equal steps of their quantile
u are equal decrements of alpha: 1 - alpha = e + (1 - 2e) * u; u = 0 is the cleanest level.

The negative evidence lower bound of a sequence x of n tokens is, in nats,

    integral over t of w(t) * E[S(t)] dt + reconstruction + prior,     w = |alpha'| / (1 - alpha),

with S(t) the sum of -log p(x_i | z_t, t) over the masked positions of z_t. Over one interval of levels the integral has
two unbiased estimates, both of which average over draws of t and z:

    t uniform in the interval:          (t_high - t_low) * w(t) * S(t)
    u uniform in the interval:          (u_high - u_low) * v(t) * S(t),     v = (1 - 2e) / (1 - alpha),

because dt = du / (du/dt) and w = v * du/dt. For the linear schedule they are the same. Since E[number of masked tokens]
is n * (1 - alpha), the second has the same expectation at every level where the loss of a masked token is the same, so
it varies less; `sample` draws u unless told otherwise. Integrals over the intervals of a partition add up.

The loss of a masked token falls as more of the text shows. `Masking.quantiles` takes another quantile q(u) in u's
place, fitted so that the weighted loss is the same at all levels (as VDM learns its schedule, arXiv 2107.00630):

    q uniform in the interval:          (q_high - q_low) * v(t) * (du/dq) * S(t)

has the same integral whatever q(u) is, so the bound does not depend on it, and varies least over levels there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ..common.fields import MOST_TOKENS, Int, Number
from .fitted_levels import isotonic, places_by_share
from .knots import Knots, check_quantiles
from .process import NoiseProcess, match, register_noise_process

SCHEDULES = ("linear", "cosine")


@register_noise_process
@dataclass(frozen=True)
class Masking(NoiseProcess):
    """Tokens masked one by one, with MD4's schedules, weight and constant terms.

    All levels are read (there is no `coverage`): quantiles are drawn evenly up to both ends, t is told as it is, and
    the bound is an integral over the whole range.

    Args:
        vocab_size: number of ids that the model has logits of, >= 2; ids 0 to vocab_size - 1.
        schedule: alpha(t) = (1 - 2e) * a(t) + e with a = 1 - t (`linear`) or 1 - cos(pi/2 * (1 - t)) (`cosine`).
        epsilon: e, in (0, 0.5), default 1e-4: keeps the weight finite at t = 0.
        mask_token_id: the id that stands for a masked token, where it is one of the vocabulary's (a tokenizer's
            `mask_token_id`): no text has it, and it is never generated. null: it is the id after them, `vocab_size`.
        quantiles: levels at equal steps of the training distribution's quantile, ascending from 0 to 1 inclusive, even
            over the masked share between neighbours; a recipe's `fit` writes them. Weights follow, so that the bound
            is the same. null: even over the masked share.
        kind: tells the noise processes apart in a config.

    Raises:
        ValueError: a parameter out of its range.
    """

    symbol: ClassVar[str] = "t"
    discrete: ClassVar[bool] = True
    grids: ClassVar[tuple[str, ...]] = ("equal-quantile", "uniform", "cosine")

    vocab_size: Int = 27
    schedule: str = "linear"
    epsilon: Number = 1e-4
    mask_token_id: Int | None = None
    quantiles: tuple[Number, ...] | None = None
    kind: Literal["masking"] = "masking"

    def _check(self) -> None:
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int) or self.vocab_size < 2:
            raise ValueError(f"vocab_size must be a whole number >= 2, got {self.vocab_size!r}")
        if self.vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size must be at most {MOST_TOKENS:,}, got {self.vocab_size}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; allowed: {', '.join(SCHEDULES)}")
        if not 0 < self.epsilon < 0.5:
            raise ValueError(f"epsilon must be in (0, 0.5), got {self.epsilon}; MD4 uses 1e-4")
        mask = self.mask_token_id
        if isinstance(mask, bool) or not (mask is None or (isinstance(mask, int) and 0 <= mask < self.vocab_size)):
            raise ValueError(
                f"mask_token_id must be an id below vocab_size = {self.vocab_size}, or null for the id after them; got "
                f"{mask!r}"
            )
        if self.quantiles is not None:
            check_quantiles(self.quantiles, ("level", 0.0), ("level", 1.0))
            object.__setattr__(self, "quantiles", tuple(self.quantiles))  # a list, from JSON, would have no hash

    @property
    def mask_id(self) -> int:
        """The id that stands for a masked token."""
        return self.vocab_size if self.mask_token_id is None else self.mask_token_id

    @property
    def num_tokens(self) -> int:
        """How many different tokens a text can have: all ids but the mask."""
        return self.vocab_size - (self.mask_token_id is not None)

    # ---- the schedule and the training distribution --------------------------------------------------

    def masked(self, level: Tensor) -> Tensor:
        """1 - alpha(t), the probability that a token is masked: float64, shape of `level`."""
        return self.epsilon + (1 - 2 * self.epsilon) * self._share(level.double().clamp(0.0, 1.0))

    def _share(self, level: Tensor) -> Tensor:
        """u = t (linear) or cos(pi/2 * (1 - t)) (cosine): the masked share, but for e."""
        return level if self.schedule == "linear" else torch.sin(math.pi / 2 * level)

    def _level(self, share: Tensor) -> Tensor:
        """t = u (linear) or 1 - 2/pi * arccos(u) (cosine)."""
        return share if self.schedule == "linear" else 2 / math.pi * torch.asin(share)

    @functools.cached_property
    def _knots(self) -> Knots | None:
        """The masked shares at equal steps of the quantile; None where it is the masked share itself."""
        if self.quantiles is None:
            return None
        return Knots(self._share(torch.tensor(self.quantiles, dtype=torch.float64, device="cpu")))

    def _cdf(self, level: Tensor) -> Tensor:
        share = self._share(level)
        return share if self._knots is None else self._knots.quantile(share)

    def _icdf(self, quantile: Tensor) -> Tensor:
        return self._level(quantile if self._knots is None else self._knots.number(quantile))

    def _share_density(self, level: Tensor) -> Tensor:
        """du/dt, float64, shape of `level`."""
        t = level.double().clamp(0.0, 1.0)
        return torch.ones_like(t) if self.schedule == "linear" else math.pi / 2 * torch.cos(math.pi / 2 * t)

    def _share_by_quantile(self, level: Tensor) -> Tensor | float:
        """du/dq, float64, shape of `level`; 1 where the quantile is the masked share."""
        return 1.0 if self._knots is None else self._knots.slope(self._share(level.double().clamp(0.0, 1.0)))

    def density(self, level: Tensor) -> Tensor:
        """Density dq/dt of the training distribution per unit of t, float64, shape of `level`."""
        return self._share_density(level) / self._share_by_quantile(level)

    # ---- levels fitted to losses ---------------------------------------------------------------------

    def fit_grid(self, count: int) -> list[float]:
        """The middles of `count` equal steps of the masked share."""
        middles = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
        levels: list[float] = self._level(middles).tolist()
        return levels

    def fit_to(self, levels: Sequence[float], losses: Sequence[float], *, equal: str, floor: float) -> Self:
        """With quantiles of equal weighted loss over the masked share, where it is made monotone: see `NoiseProcess`.

        Args:
            levels: all of `fit_grid`.
            losses: mean loss at each, in nats of the masked tokens.
            equal: `loss` alone: what is equalised is the bound's own integrand.
            floor: see there; no weight is above 1 / `floor` times that of even levels.
        """
        assert equal == "loss", "recipes of masked text have no other"
        count = len(levels)
        weights = self._weight_by_share(torch.tensor(levels, dtype=torch.float64, device="cpu")).tolist()
        parts = isotonic([loss * weight for loss, weight in zip(losses, weights, strict=True)])
        shares = places_by_share([step / count for step in range(count + 1)], parts, floor=floor)
        inner = self._level(torch.tensor(shares, dtype=torch.float64, device="cpu")).tolist()
        return dataclasses.replace(self, quantiles=(0.0, *inner, 1.0))

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
            n: how many levels.
            interval: (lowest, highest) level; default the whole range.
            generator: source of the draws.
            device: where the levels are made.
            coordinate: what is uniform in the interval: "quantile" (the training distribution) or "level" (t itself).
            antithetic: spread the levels evenly, (u + i/n) mod 1 with a single uniform u (arXiv 2107.00630, and MD4):
                each level by itself is uniform, so nothing is biased, and their mean varies less. Else independent.

        Returns:
            Levels, float32, shape (n,). The quantile is inverted in float64.

        Raises:
            ValueError: an interval that does not ascend within [0, 1], or another coordinate.
        """
        low, high = self._inside(interval)
        u = torch.rand(1 if antithetic else n, generator=generator, device=device, dtype=torch.float64)
        if antithetic:
            u = (u + torch.arange(n, device=device, dtype=torch.float64) / n) % 1.0
        if coordinate == "level":
            level = low + u * (high - low)
        elif coordinate == "quantile":
            u_low, u_high = self._quantiles(low, high)
            level = self.icdf(u_low + u * (u_high - u_low))
        else:
            raise ValueError(f"unknown coordinate {coordinate!r}; allowed: quantile, level")
        return level.clamp(low, high).float()

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
        """`weight_by_quantile`, because `sample` draws quantiles."""
        return self.weight_by_quantile(level)

    def weight(self, level: Tensor) -> Tensor:
        """w(t) = |alpha'| / (1 - alpha), for levels uniform in t; float64, shape of `level`."""
        return self._share_density(level) * self._weight_by_share(level)

    def weight_by_quantile(self, level: Tensor) -> Tensor:
        """v(t) * du/dq, for levels uniform in quantile; float64, shape of `level`."""
        return self._weight_by_share(level) * self._share_by_quantile(level)

    def _weight_by_share(self, level: Tensor) -> Tensor:
        """v(t) = (1 - 2e) / (1 - alpha), for levels uniform in the masked share; float64, shape of `level`."""
        return (1 - 2 * self.epsilon) / self.masked(level)

    def reconstruction(self, length: int) -> float:
        """Nats of guessing what is still masked at level 0, length * (1 - alpha(0)) * ln V of V different tokens."""
        return length * self.epsilon * math.log(self.num_tokens)

    def prior_term(self, length: int) -> float:
        """Nats for what z at level 1 still shows, length * alpha(1) * ln V.

        MD4 leaves it out as negligible (e * log2 V, 0.0005 bits per character); with it the bound is strict.
        """
        return length * self.epsilon * math.log(self.num_tokens)
