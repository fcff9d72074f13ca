"""Solvers of the probability-flow ODE dz/dsigma = (z - D(z, sigma)) / sigma. Stateless functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]


def euler(denoiser: Denoiser, z: Tensor, levels: Sequence[float]) -> Tensor:
    """Euler's method (paper, section 3.1; the sign of its printed eq. 3-5 is inverted, this one lowers the noise).

    z' = z + (sigma' - sigma) * (z - D) / sigma = (sigma'/sigma) * z + (1 - sigma'/sigma) * D.

    Args:
        denoiser: maps z and its level to D, of the shape of z; called once for each level but the last.
        z: noised target at levels[0], any shape, float32 or float64.
        levels: descending levels; all but the last > 0.

    Returns:
        z at levels[-1].

    Raises:
        ValueError: fewer than two levels, or levels that do not descend.
    """
    if len(levels) < 2 or any(b >= a for a, b in itertools.pairwise(levels)):
        raise ValueError(f"levels must be at least two, descending; got {list(levels)}")
    for level, lower in itertools.pairwise(levels):
        ratio = lower / level
        z = ratio * z + (1.0 - ratio) * denoiser(z, level)
    return z
