"""Boundaries by complexity: each block gets an equal share of what was measured on one network over all levels.

Complexity-Balanced Splitting (arXiv 2606.06477): a monitor m of time says how hard the network's task is there, and the
boundaries share the integral of a power of m equally (equidistribution, de Boor). Time is that of the straight path
between unit-variance data and noise, whatever the process: all Gaussian processes follow the same trajectories on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .fitted_levels import inverse
from .gaussian import GaussianProcess
from .process import NoiseProcess


def path_time(noise: GaussianProcess, level: float) -> float:
    """t = sigma / (sigma + alpha * sigma_data): the place of a level on the straight path x = (1 - t) y + t eps.

    There the data y have unit variance, x is z / (sigma + alpha * sigma_data), and t is 0 at the data and 1 at noise.
    """
    alpha, sigma = noise.alpha_sigma(level)
    return sigma / (sigma + alpha * noise.sigma_data)


@dataclass(frozen=True)
class Monitor:
    """What was measured over noise levels, a number between any two neighbours.

    Attributes:
        levels: n + 1, ascending.
        times: n + 1, ascending: the variable that is integrated over, at the levels.
        values: n, finite and >= 0, not all 0.

    Raises:
        ValueError: they are not as above.
    """

    levels: tuple[float, ...]
    times: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        count = len(self.values)
        if count < 1 or len(self.levels) != count + 1 or len(self.times) != count + 1:
            raise ValueError(
                f"{count} values need {count + 1} levels and times, got {len(self.levels)} and {len(self.times)}"
            )
        for name, numbers in (("levels", self.levels), ("times", self.times)):
            if not all(low < high for low, high in itertools.pairwise(numbers)):
                raise ValueError(f"{name} must ascend strictly, got {list(numbers)}")
        if not all(math.isfinite(value) and value >= 0 for value in self.values) or not any(self.values):
            raise ValueError(f"values must be finite, >= 0 and not all 0, got {list(self.values)}")

    @classmethod
    def of_levels(cls, levels: Sequence[float], times: Sequence[float], values: Sequence[float]) -> Monitor:
        """That of values measured at the levels themselves: between neighbours it is their mean."""
        between = [(one + other) / 2 for one, other in itertools.pairwise(values)]
        return cls(tuple(levels), tuple(times), tuple(between))

    @classmethod
    def together(cls, monitors: Sequence[Monitor], examples: Sequence[int], power: float) -> Monitor:
        """One of the same levels at several resolutions: its `boundaries` share the mean of their integrals equally.

        Args:
            monitors: one a resolution, measured at the same levels; a level's time may differ.
            examples: how many each is of.
            power: of `boundaries`.
        """
        if len(monitors) == 1:
            return monitors[0]
        shares = [count / sum(examples) for count in examples]

        def mean(values: Iterable[float]) -> float:
            return math.fsum(share * value for share, value in zip(shares, values, strict=True))

        values = []
        for place in range(len(monitors[0].values)):
            widths = [each.times[place + 1] - each.times[place] for each in monitors]
            integrals = [each.values[place] ** power * width for each, width in zip(monitors, widths, strict=True)]
            values.append((mean(integrals) / mean(widths)) ** (1 / power))
        times = [mean(each) for each in zip(*(each.times for each in monitors), strict=True)]
        return cls(monitors[0].levels, tuple(times), tuple(values))

    def boundaries(self, num_blocks: int, noise: NoiseProcess, power: float = 1.0) -> tuple[float, ...]:
        """Levels between which the integral of `values ** power` over time is the same.

        Beyond the first and the last level that was measured, the nearest value counts.

        Args:
            num_blocks: B >= 1.
            noise: the process, whose range the boundaries tile.
            power: > 0; the smaller, the more even the intervals are in time.

        Returns:
            B + 1 ascending levels, the ends exactly the process's.
        """
        low, high = noise.level_min, noise.level_max
        levels, times, values = list(self.levels), list(self.times), list(self.values)
        if low < levels[0]:
            levels, values = [low, *levels], [values[0], *values]
            times = [_beyond(times[0], times[1], self.levels[0], self.levels[1], low), *times]
        if high > levels[-1]:
            levels, values = [*levels, high], [*values, values[-1]]
            times = [*times, _beyond(times[-1], times[-2], self.levels[-1], self.levels[-2], high)]
        widths = [later - earlier for earlier, later in itertools.pairwise(times)]
        shares = [value**power * width for value, width in zip(values, widths, strict=True)]
        # No block is without levels, where nothing was measured but in a few places.
        least = 1e-6 * math.fsum(shares) / len(shares)
        shares = [max(share, least) for share in shares]
        places = [math.log(level) for level in levels] if noise.logarithmic else levels
        inner = inverse(places, shares, [block / num_blocks for block in range(1, num_blocks)])
        return (low, *(math.exp(place) if noise.logarithmic else place for place in inner), high)


def _beyond(time: float, next_time: float, level: float, next_level: float, end: float) -> float:
    """The time of a level beyond the measured ones, by the slope at the last of them."""
    return time + (next_time - time) / (next_level - level) * (end - level)


def quantile_times(noise: NoiseProcess, levels: Sequence[float]) -> tuple[float, ...]:
    """The quantiles of levels: over them a loss counts as often as training meets it."""
    quantiles: list[float] = noise.cdf(torch.tensor(levels, dtype=torch.float64, device="cpu")).tolist()
    return tuple(quantiles)
