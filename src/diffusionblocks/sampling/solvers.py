"""Solvers of the probability-flow ODE of a Gaussian process z = alpha * y + sigma * eps. Stateless functions.

Each maps z at levels[0] to z at levels[-1]. Coefficients are Python floats, computed in double; tensors stay in the
dtype of z. A denoiser is called at the given levels and at no others, so a level on a boundary of a partition stays
there. What alpha and sigma are at a level, the noise process says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..common.registry import Registry
from ..noise import GaussianProcess
from .chain import Callback, Denoiser, check_levels


class SolverFunction(Protocol):
    """What every solver takes and gives: see `euler`."""

    def __call__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        levels: Sequence[float],
        process: GaussianProcess,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return z at levels[-1]."""
        ...


@dataclass(frozen=True)
class Solver:
    """A solver and what its callers need to know of it.

    Attributes:
        function: what runs the chain.
        order: how fast its error falls: as steps^-order.
        calls_per_step: network calls in a step.
        calls_to_zero: network calls in a last step to level 0.
    """

    function: SolverFunction
    order: int
    calls_per_step: int = 1
    calls_to_zero: int = 1

    def __call__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        levels: Sequence[float],
        process: GaussianProcess,
        callback: Callback | None = None,
    ) -> Tensor:
        """Run the chain: see `euler`."""
        return self.function(denoiser, z, levels, process, callback)


#: Solvers by name.
SOLVERS: Registry[Solver] = Registry("solver")


def register_solver(
    name: str, function: SolverFunction, *, order: int = 1, calls_per_step: int = 1, calls_to_zero: int = 1
) -> SolverFunction:
    """Make a solver known by a name, in recipes, on the command line and in `DiffusionBlocks.sample`.

    Args:
        name: letters, digits, '_', '.' or '-', the first a letter.
        function: of the arguments of `euler`.
        order: how fast its error falls: as steps^-order.
        calls_per_step: network calls in a step, >= 1.
        calls_to_zero: network calls in a last step to level 0, >= 1.

    Returns:
        The function.

    Raises:
        TypeError: a function that cannot be called, or a number that is not whole.
        ValueError: no such name, one that is taken, or a number below 1.
    """
    if not callable(function):
        raise TypeError(f"solver {name!r} must be a function, got {function!r}")
    for field, value in (("order", order), ("calls_per_step", calls_per_step), ("calls_to_zero", calls_to_zero)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"solver {name!r}: {field} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"solver {name!r}: {field} must be >= 1, got {value}")
    SOLVERS.register(name, Solver(function, order, calls_per_step, calls_to_zero))
    return function


def euler(
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method (paper, section 3.1; the sign of its printed eq. 3-5 is inverted, this one lowers the noise).

    A step keeps the noise that D leaves in z: z' = (sigma'/sigma) * z + (alpha' - alpha * sigma'/sigma) * D. Where
    alpha and sigma are straight lines, as in EDM and in flow matching, that is Euler's method along them.

    Args:
        denoiser: maps z and its level to D, of the shape of z; called once for each level but the last.
        z: noised target at levels[0], any shape, float32 or float64.
        levels: descending finite levels, at least two; all but the last > 0, the last >= 0.
        process: the noise process: alpha and sigma at each level.
        callback: called once a step with (step, level, z, D): the step's index from 0, the level it starts from, and
            z and D there, before the step.

    Returns:
        z at levels[-1], in the shape and dtype of z; at a last level of 0 that is the last D.

    Raises:
        ValueError: fewer than two levels, levels that do not descend or are out of range, z of another dtype, or
            D of another shape.
    """
    for step, here, lower in _steps(z, levels, process):
        denoised = _denoise(denoiser, z, here.level)
        if callback is not None:
            callback(step, here.level, z, denoised)
        z = _first_order(z, denoised, here, lower)
    return z


def heun(
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method, of second order (EDM algorithm 1, without its churn).

    An Euler step to the lower level, then the same step with the mean of the slopes at both ends. A step to 0, where
    there is no slope, stays Euler's.

    Args:
        denoiser: as for `euler`; called twice a step, at its upper and its lower level, but once in a step to 0.
        z, levels, process, callback: as for `euler`. The correcting call is not reported to `callback`.

    Returns:
        z at levels[-1], in the shape and dtype of z.

    Raises:
        ValueError: as for `euler`.
    """
    for step, here, lower in _steps(z, levels, process):
        denoised = _denoise(denoiser, z, here.level)
        if callback is not None:
            callback(step, here.level, z, denoised)
        predicted = _first_order(z, denoised, here, lower)
        if lower.sigma > 0:
            slope = process.velocity(z, denoised, here.level)
            slope_there = process.velocity(predicted, _denoise(denoiser, predicted, lower.level), lower.level)
            z = z + (0.5 * (process.time(lower.level) - process.time(here.level))) * (slope + slope_there)
        else:
            z = predicted
    return z


def dpmpp_2m(
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), of second order at one call a step (arXiv 2211.01095, algorithm 2; as k-diffusion writes it).

    It works in lambda = log(alpha / sigma), half the log-SNR. With h the step and h' the one before it in lambda,
    r = h' / h, it is Euler's step with (1 + 1/2r) * D - 1/2r * D_before in place of D. Euler's are the first step, the
    second where the first began at alpha = 0, and one to sigma = 0: there lambda has no value.

    Args:
        denoiser, z, levels, process, callback: as for `euler`.

    Returns:
        z at levels[-1], in the shape and dtype of z.

    Raises:
        ValueError: as for `euler`.
    """
    before: tuple[_Place, Tensor] | None = None  # the last step's place and D
    for step, here, lower in _steps(z, levels, process):
        denoised = _denoise(denoiser, z, here.level)
        if callback is not None:
            callback(step, here.level, z, denoised)
        if before is None or lower.sigma == 0 or before[0].alpha == 0:
            z = _first_order(z, denoised, here, lower)
        else:
            higher, denoised_before = before
            weight = 0.5 * _log_snr_rise(here, lower) / _log_snr_rise(higher, here)  # 1 / 2r
            z = _first_order(z, (1.0 + weight) * denoised - weight * denoised_before, here, lower)
        before = here, denoised
    return z


register_solver("euler", euler, order=1)
register_solver("heun", heun, order=2, calls_per_step=2)
register_solver("dpmpp-2m", dpmpp_2m, order=2)


def calls(solver: str, steps: int, ends_at_zero: bool) -> int:
    """Network calls of a chain.

    Args:
        solver: a name in `SOLVERS`.
        steps: solver steps (levels less one), >= 1.
        ends_at_zero: whether the last level is 0.

    Raises:
        ValueError: unknown solver, or steps < 1.
    """
    facts = SOLVERS[SOLVERS.check(solver)]
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    last = facts.calls_to_zero if ends_at_zero else facts.calls_per_step
    return facts.calls_per_step * (steps - 1) + last


@dataclass(frozen=True)
class _Place:
    """A level, and alpha and sigma there."""

    level: float
    alpha: float
    sigma: float


def _steps(z: Tensor, levels: Sequence[float], process: GaussianProcess) -> Iterator[tuple[int, _Place, _Place]]:
    """The steps of a chain, checked: (index, where it starts, where it ends)."""
    check_levels(levels)
    if not math.isfinite(levels[0]) or levels[-1] < 0:  # those between are between
        raise ValueError(f"levels must be finite, descending, > 0 (the last one >= 0); got {list(levels)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z must be float32 or float64, got {z.dtype}: convert it with z.float()")
    places = [_Place(level, *process.alpha_sigma(level)) for level in levels]
    for step, (here, lower) in enumerate(itertools.pairwise(places)):
        yield step, here, lower


def _denoise(denoiser: Denoiser, z: Tensor, level: float) -> Tensor:
    denoised = denoiser(z, level)
    if denoised.shape != z.shape:
        raise ValueError(f"the denoiser must keep the shape of z, {tuple(z.shape)}; it gave {tuple(denoised.shape)}")
    return denoised.to(z.dtype)


def _first_order(z: Tensor, denoised: Tensor, here: _Place, lower: _Place) -> Tensor:
    """The step that is exact for a constant D."""
    ratio = lower.sigma / here.sigma
    return ratio * z + (lower.alpha - here.alpha * ratio) * denoised


def _log_snr_rise(here: _Place, lower: _Place) -> float:
    """How far log(alpha / sigma) rises in a step."""
    return math.log(lower.alpha * here.sigma / (lower.sigma * here.alpha))
