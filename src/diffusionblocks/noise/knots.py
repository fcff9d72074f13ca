"""A distribution that is given as a table: numbers at equal steps of the quantile, linear between neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.fields import MOST_LEVELS, check_count


class Knots:
    """Numbers at equal steps of the quantile, on whatever device they are needed.

    Args:
        values: float64 (n,), ascending, n >= 2.
    """

    def __init__(self, values: Tensor) -> None:
        self._on = {values.device: values}
        self._values = values

    def on(self, device: torch.device) -> Tensor:
        """The numbers, copied once to a device: a CUDA graph can hold no copy from the host."""
        if device not in self._on:
            self._on[device] = self._values.to(device)
        return self._on[device]

    def _below(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The index of the number at or below each place, at most the last but one, and all numbers."""
        knots = self.on(place.device)
        return torch.searchsorted(knots, place.detach(), right=True).sub(1).clamp(0, len(knots) - 2), knots

    def steps(self, place: Tensor) -> Tensor:
        """Where numbers lie among the knots, float64, from 0 to n - 1; beyond the ends they are these."""
        knots = self.on(place.device)
        place = place.clamp(knots[0], knots[-1])
        below, knots = self._below(place)
        return below + (place - knots[below]) / (knots[below + 1] - knots[below])

    def quantile(self, place: Tensor) -> Tensor:
        """The quantile of each number, float64 in [0, 1]."""
        return self.steps(place) / (len(self._values) - 1)

    def number(self, quantile: Tensor) -> Tensor:
        """The number at each quantile, float64: the inverse of `quantile`."""
        knots = self.on(quantile.device)
        steps = quantile * (len(knots) - 1)
        below = steps.floor().clamp(max=len(knots) - 2).long()
        return knots[below] + (steps - below) * (knots[below + 1] - knots[below])

    def slope(self, place: Tensor) -> Tensor:
        """d number / d quantile at each number, float64; at a knot that of the step above it."""
        below, knots = self._below(place)
        return (knots[below + 1] - knots[below]) * (len(knots) - 1)


def check_quantiles(levels: Sequence[float], low: tuple[str, float], high: tuple[str, float]) -> None:
    """Refuse levels that are no table of quantiles.

    Args:
        levels: at equal steps of the quantile.
        low, high: what the ends are called, and what they must be.

    Raises:
        ValueError: too many or too few, not finite or not strictly ascending, or other ends.
    """
    check_count("the number of quantiles", max(1, len(levels)), MOST_LEVELS)
    ascends = all(below < above for below, above in itertools.pairwise(levels))
    if len(levels) < 2 or not ascends or not all(math.isfinite(level) for level in levels):
        raise ValueError(
            f"quantiles must be at least 2 finite levels that ascend strictly, got "
            f"{list(levels[:8])}{' and more' * (len(levels) > 8)}"
        )
    if (levels[0], levels[-1]) != (low[1], high[1]):
        raise ValueError(
            f"quantiles must start at {low[0]} = {low[1]} and end at {high[0]} = {high[1]}, got {levels[0]} to "
            f"{levels[-1]}"
        )
