"""Solvers of the probability-flow ODE dz/dsigma = (z - D(z, sigma)) / sigma. Stateless functions.

Each maps z at levels[0] to z at levels[-1]. Coefficients are Python floats, computed in double; tensors stay in the
dtype of z. A denoiser is called at the given levels and at no others, so a level on a boundary of a partition stays
there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, float, Tensor, Tensor], None]


class Solver(Protocol):
    """What every solver takes and gives: see `euler`."""

    def __call__(
        self, denoiser: Denoiser, z: Tensor, levels: Sequence[float], callback: Callback | None = None
    ) -> Tensor:
        """Return z at levels[-1]."""
        ...


def euler(denoiser: Denoiser, z: Tensor, levels: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Euler's method (paper, section 3.1; the sign of its printed eq. 3-5 is inverted, this one lowers the noise).

    z' = z + (sigma' - sigma) * (z - D) / sigma = (sigma'/sigma) * z + (1 - sigma'/sigma) * D.

    Args:
        denoiser: maps z and its level to D, of the shape of z; called once for each level but the last.
        z: noised target at levels[0], any shape, float32 or float64.
        levels: descending finite levels, at least two; all but the last > 0, the last >= 0.
        callback: called once a step with (step, level, z, D): the step's index from 0, the level it starts from, and
            z and D there, before the step.

    Returns:
        z at levels[-1], in the shape and dtype of z; at a last level of 0 that is the last D.

    Raises:
        ValueError: fewer than two levels, levels that do not descend or are out of range, z of another dtype, or
            D of another shape.
    """
    _check(z, levels)
    for step, (level, lower) in enumerate(itertools.pairwise(levels)):
        denoised = _denoise(denoiser, z, level)
        if callback is not None:
            callback(step, level, z, denoised)
        z = _first_order(z, denoised, lower / level)
    return z


def heun(denoiser: Denoiser, z: Tensor, levels: Sequence[float], callback: Callback | None = None) -> Tensor:
    """Heun's method, of second order (EDM algorithm 1, without its churn).

    An Euler step from sigma to sigma', then the same step with the mean of the slopes at both ends. A step to 0, where
    there is no slope, stays Euler's.

    Args:
        denoiser: as for `euler`; called twice a step, at its upper and its lower level, but once in a step to 0.
        z, levels, callback: as for `euler`. The correcting call is not reported to `callback`.

    Returns:
        z at levels[-1], in the shape and dtype of z.

    Raises:
        ValueError: as for `euler`.
    """
    _check(z, levels)
    for step, (level, lower) in enumerate(itertools.pairwise(levels)):
        denoised = _denoise(denoiser, z, level)
        if callback is not None:
            callback(step, level, z, denoised)
        predicted = _first_order(z, denoised, lower / level)
        if lower > 0:
            slope = (z - denoised) / level
            slope_there = (predicted - _denoise(denoiser, predicted, lower)) / lower
            z = z + (0.5 * (lower - level)) * (slope + slope_there)
        else:
            z = predicted
    return z


def dpmpp_2m(denoiser: Denoiser, z: Tensor, levels: Sequence[float], callback: Callback | None = None) -> Tensor:
    """DPM-Solver++(2M), of second order at one call a step (arXiv 2211.01095, algorithm 2; as k-diffusion writes it).

    With lambda = -log sigma, h the step and h' the one before it in lambda, r = h' / h:
    z' = (sigma'/sigma) * z + (1 - sigma'/sigma) * ((1 + 1/2r) * D - 1/2r * D_before).
    The first step, which has no D before it, and a last step to 0, where lambda has no end, are Euler's.

    Args:
        denoiser, z, levels, callback: as for `euler`.

    Returns:
        z at levels[-1], in the shape and dtype of z.

    Raises:
        ValueError: as for `euler`.
    """
    _check(z, levels)
    before: tuple[float, Tensor] | None = None  # the last step's level and D
    for step, (level, lower) in enumerate(itertools.pairwise(levels)):
        denoised = _denoise(denoiser, z, level)
        if callback is not None:
            callback(step, level, z, denoised)
        if before is None or lower == 0:
            z = _first_order(z, denoised, lower / level)
        else:
            higher, denoised_before = before
            weight = 0.5 * math.log(level / lower) / math.log(higher / level)  # 1 / 2r
            z = _first_order(z, (1.0 + weight) * denoised - weight * denoised_before, lower / level)
        before = level, denoised
    return z


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "dpmpp-2m": dpmpp_2m}


def solver_named(name: str) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; allowed: {', '.join(SOLVERS)}")
    return SOLVERS[name]


def calls(solver: str, steps: int, ends_at_zero: bool) -> int:
    """Network calls of a chain.

    Args:
        solver: a name in `SOLVERS`.
        steps: solver steps (levels less one), >= 1.
        ends_at_zero: whether the last level is 0.

    Raises:
        ValueError: unknown solver, or steps < 1.
    """
    solver_named(solver)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if solver == "heun":
        return 2 * steps - int(ends_at_zero)
    return steps


def _check(z: Tensor, levels: Sequence[float]) -> None:
    if len(levels) < 2 or not all(a > b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"levels must be at least two, descending; got {list(levels)}")
    if not math.isfinite(levels[0]) or levels[-1] < 0:  # those between are between
        raise ValueError(f"levels must be finite, descending, > 0 (the last one >= 0); got {list(levels)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z must be float32 or float64, got {z.dtype}: convert it with z.float()")


def _denoise(denoiser: Denoiser, z: Tensor, level: float) -> Tensor:
    denoised = denoiser(z, level)
    if denoised.shape != z.shape:
        raise ValueError(f"the denoiser must keep the shape of z, {tuple(z.shape)}; it gave {tuple(denoised.shape)}")
    return denoised.to(z.dtype)


def _first_order(z: Tensor, denoised: Tensor, ratio: float) -> Tensor:
    """The step that is exact for a constant D; ratio = sigma'/sigma."""
    return ratio * z + (1.0 - ratio) * denoised
