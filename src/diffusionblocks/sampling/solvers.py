"""Solvers of the probability-flow ODE of a Gaussian process z = alpha * y + sigma * eps. Stateless functions.

Each maps z at levels[0] to z at levels[-1]. Coefficients are Python floats, computed in double; tensors stay in the
dtype of z. A denoiser is called at the given levels and at no others, so a level on a boundary of a partition stays
there. (Only churn raises levels, see `Churn`.) What alpha and sigma are at a level, the noise process says.

Multistep solvers go on with what D was in earlier steps when another block takes over: all blocks estimate the same
E[y | z], so D has no seam but the blocks' errors. A restart would take a step of first order there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..common.registry import Registry
from ..noise import GaussianProcess
from .chain import Callback, Denoiser, check_interval, check_levels


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
class Churn:
    """Fresh noise before every step: EDM's stochastic sampler (arXiv 2206.00364, algorithm 2), with `heun`.

    A step of N first raises sigma / alpha by the factor 1 + min(amount / N, sqrt(2) - 1), at most to the highest level
    that is read, and adds as much noise to z. EDM's own values for ImageNet at 64 pixels are 40, (0.05, 50) and 1.003.

    Attributes:
        amount: S_churn, >= 0; 0 adds nothing.
        draw: gives standard normal noise of the shape of z, anew at each call.
        interval: (S_min, S_max): steps that begin at a sigma / alpha outside it are left alone; None: all are raised.
        noise: S_noise, > 0: the standard deviation of the noise that is added, over what the levels say.

    Raises:
        ValueError: a value out of its range.
    """

    amount: float
    draw: Callable[[], Tensor]
    interval: tuple[float, float] | None = None
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amount) and self.amount >= 0):
            raise ValueError(f"churn must be a finite number >= 0, got {self.amount}")
        if not (math.isfinite(self.noise) and self.noise > 0):
            raise ValueError(f"churn_noise must be a finite number > 0, got {self.noise}")
        check_interval("churn_interval", self.interval)

    def raised(self, z: Tensor, place: Place, steps: int, process: GaussianProcess) -> tuple[Tensor, Place]:
        """z with fresh noise, and the place whose noise it then has, before one of that many steps."""
        if not self.amount or not _is_churned(place, self.interval):
            return z, place
        level = process.noisier(place.level, 1.0 + min(self.amount / steps, math.sqrt(2.0) - 1.0))
        if level <= place.level:
            return z, place
        there = Place(level, *process.alpha_sigma(level))
        scale = there.alpha / place.alpha
        fresh = math.sqrt(max(there.sigma**2 - (scale * place.sigma) ** 2, 0.0))
        return scale * z + (self.noise * fresh) * self.draw().to(z), there


class Place(NamedTuple):
    """A level, and alpha and sigma there."""

    level: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha; infinite without a signal."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf


def _is_churned(place: Place, interval: tuple[float, float] | None) -> bool:
    low, high = interval or (0.0, math.inf)
    return low <= place.ratio <= high


def check_churned_levels(
    levels: Sequence[float],
    process: GaussianProcess,
    interval: tuple[float, float] | None,
    name: str = "churn_interval",
) -> None:
    """Raise ValueError unless some step of a chain begins at a sigma / alpha within the churn interval."""
    check_interval(name, interval)
    places = [Place(level, *process.alpha_sigma(level)) for level in levels[:-1]]
    if not any(_is_churned(place, interval) for place in places):
        raise ValueError(
            f"{name} = {list(interval or ())} holds the sigma / alpha of no step of the chain, which go from "
            f"{places[0].ratio:.4g} down to {places[-1].ratio:.4g}, so no noise would be added: widen it, or set churn "
            "to 0"
        )


@dataclass(frozen=True)
class Solver:
    """A solver and what its callers need to know of it.

    Attributes:
        function: what runs the chain.
        order: how fast its error falls: as steps^-order.
        calls_per_step: network calls in a step.
        calls_to_zero: network calls in a last step to level 0.
        churns: whether the function takes `churn`, a `Churn`, by keyword.
    """

    function: SolverFunction
    order: int
    calls_per_step: int = 1
    calls_to_zero: int = 1
    churns: bool = False

    def __call__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        levels: Sequence[float],
        process: GaussianProcess,
        callback: Callback | None = None,
        churn: Churn | None = None,
    ) -> Tensor:
        """Run the chain: see `euler`. ValueError for churn where the solver takes none."""
        if churn is None or not churn.amount:
            return self.function(denoiser, z, levels, process, callback)
        self.check_churn(churn.amount)
        return self.function(denoiser, z, levels, process, callback, churn=churn)  # type: ignore[call-arg]

    def check_churn(self, amount: float, name: str = "churn") -> None:
        """Raise ValueError for churn other than 0 where the solver takes none."""
        if amount and not self.churns:
            taking = [other for other, solver in SOLVERS.items() if solver.churns]
            own = next((other for other, solver in SOLVERS.items() if solver is self), "this solver")
            raise ValueError(
                f"{name} = {amount:g} is for solvers of one step at a time, {', '.join(taking)}, and not for {own}, "
                f"which relies on its earlier steps: set {name} to 0, or take one of these"
            )


#: Solvers by name.
SOLVERS: Registry[Solver] = Registry("solver")


def register_solver(
    name: str,
    function: SolverFunction,
    *,
    order: int = 1,
    calls_per_step: int = 1,
    calls_to_zero: int = 1,
    churns: bool = False,
) -> SolverFunction:
    """Make a solver known by a name, in recipes, on the command line and in `DiffusionBlocks.sample`.

    Args:
        name: letters, digits, '_', '.' or '-', the first a letter.
        function: of the arguments of `euler`.
        order: how fast its error falls: as steps^-order.
        calls_per_step: network calls in a step, >= 1.
        calls_to_zero: network calls in a last step to level 0, >= 1.
        churns: whether the function takes `churn` by keyword, a `Churn`, which may raise z before each step.

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
    SOLVERS.register(name, Solver(function, order, calls_per_step, calls_to_zero, churns))
    return function


def euler(
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    callback: Callback | None = None,
    *,
    churn: Churn | None = None,
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
        churn: fresh noise before every step, after which the step starts from a higher level; None: no noise.

    Returns:
        z at levels[-1], in the shape and dtype of z; at a last level of 0 that is the last D.

    Raises:
        ValueError: fewer than two levels, levels that do not descend or are out of range, z of another dtype, or
            D of another shape.
    """
    for step, here, lower in _steps(z, levels, process):
        z, here = _churned(z, here, levels, process, churn)
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
    *,
    churn: Churn | None = None,
) -> Tensor:
    """Heun's method, of second order (EDM algorithm 1); with churn EDM's stochastic sampler (algorithm 2).

    An Euler step to the lower level, then the same step with the mean of the slopes at both ends. A step to 0, where
    there is no slope, stays Euler's.

    Args:
        denoiser: as for `euler`; called twice a step, at its upper and its lower level, but once in a step to 0.
        z, levels, process, callback, churn: as for `euler`. The correcting call is not reported to `callback`.

    Returns:
        z at levels[-1], in the shape and dtype of z.

    Raises:
        ValueError: as for `euler`.
    """
    for step, here, lower in _steps(z, levels, process):
        z, here = _churned(z, here, levels, process, churn)
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
    return _dpmpp(2, denoiser, z, levels, process, callback)


def dpmpp_3m(
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(3M), at one call a step (arXiv 2211.01095; as its authors, k-diffusion and diffusers write it).

    As `dpmpp_2m`, with D extrapolated by a parabola in lambda through three steps. The bend counts half of what the
    parabola says, as in all of that code: so the order is 2, with a smaller error than that of `dpmpp_2m`. (`unipc` is
    of third order.) The first two steps, and those after a start at alpha = 0, have fewer earlier steps to go by.

    Args:
        denoiser, z, levels, process, callback: as for `euler`.

    Returns:
        z at levels[-1], in the shape and dtype of z.

    Raises:
        ValueError: as for `euler`.
    """
    return _dpmpp(3, denoiser, z, levels, process, callback)


def unipc(
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC of second order, corrected to the third, at one call a step (arXiv 2302.04867, B2(h); as diffusers).

    Every step is predicted as in `dpmpp_2m`. The D that the next step asks for at its end then corrects it, before the
    next step starts from there: the corrector costs no call. A step from alpha = 0 is not corrected.

    Args:
        denoiser, z, levels, process, callback: as for `euler`; `callback` sees the predicted z, at which D was asked.

    Returns:
        z at levels[-1], in the shape and dtype of z; the last step is predicted only.

    Raises:
        ValueError: as for `euler`.
    """
    history = _History(2)
    start = z  # of the step before, corrected
    for step, here, lower in _steps(z, levels, process):
        denoised = _denoise(denoiser, z, here.level)
        if callback is not None:
            callback(step, here.level, z, denoised)
        if history.entries:
            z = _first_order(start, _corrected(denoised, here, history.entries), history.entries[0][0], here)
        history.add(here, denoised)
        start, z = z, _first_order(z, _extrapolated(denoised, here, lower, history.before), here, lower)
    return z


class _History:
    """The latest places of a chain and D there, newest first: those at which log(alpha / sigma) has a value."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.entries: list[tuple[Place, Tensor]] = []

    @property
    def before(self) -> list[tuple[Place, Tensor]]:
        """All but the newest."""
        return self.entries[1:]

    def add(self, place: Place, denoised: Tensor) -> None:
        """Note what a step began with."""
        if place.alpha > 0:
            self.entries = [(place, denoised), *self.entries][: self.length]


def _dpmpp(
    order: int,
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    callback: Callback | None,
) -> Tensor:
    history = _History(order)
    for step, here, lower in _steps(z, levels, process):
        denoised = _denoise(denoiser, z, here.level)
        if callback is not None:
            callback(step, here.level, z, denoised)
        history.add(here, denoised)
        z = _first_order(z, _extrapolated(denoised, here, lower, history.before), here, lower)
    return z


def _extrapolated(denoised: Tensor, here: Place, lower: Place, before: list[tuple[Place, Tensor]]) -> Tensor:
    """The constant D whose step is that of the polynomial through this D and those before it, newest first."""
    if not before or lower.sigma == 0:  # to sigma = 0 the step has no length in lambda
        return denoised
    (higher, first), *older = before
    h = _log_snr_rise(here, lower)
    if not older:
        weight = 0.5 * h / _log_snr_rise(higher, here)  # 1 / 2r
        return (1.0 + weight) * denoised - weight * first
    ((highest, second),) = older
    r0, r1 = _log_snr_rise(higher, here) / h, _log_snr_rise(highest, higher) / h
    near, far = (denoised - first) / r0, (first - second) / r1
    bend = (near - far) / (r0 + r1)
    slope = near + r0 * bend
    decay = math.expm1(-h)
    return denoised - ((decay / h + 1.0) * slope - ((decay + h) / h**2 - 0.5) * bend) / decay


def _corrected(denoised: Tensor, here: Place, before: list[tuple[Place, Tensor]]) -> Tensor:
    """The constant D of the step that led here, from D at both of its ends and at the start of the step before it."""
    (higher, first), *older = before
    if not older:
        return first + 0.5 * (denoised - first)
    ((highest, second),) = older
    h = _log_snr_rise(higher, here)
    r = -_log_snr_rise(highest, higher) / h  # places in lambda, over the step: r < 0, its start at 0, its end at 1
    decay = math.expm1(-h)
    one = -decay / h - 1.0
    two = 2.0 * (-one / h - 0.5)
    one, two = one / decay, two / decay
    # one = a + b, two = a * r + b: what makes the rule exact where D is a parabola.
    old = (one - two) / (1.0 - r)
    return first + (old / r) * (second - first) + (one - old) * (denoised - first)


register_solver("euler", euler, order=1, churns=True)
register_solver("heun", heun, order=2, calls_per_step=2, churns=True)
register_solver("dpmpp-2m", dpmpp_2m, order=2)
register_solver("dpmpp-3m", dpmpp_3m, order=2)
register_solver("unipc", unipc, order=3)


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


class Call(NamedTuple):
    """One network call of a chain.

    Attributes:
        step: index of the solver step.
        level: at which the network is called.
        starts: whether the step starts from there; else the call corrects it.
    """

    step: int
    level: float
    starts: bool


def network_calls(
    solver: str,
    levels: Sequence[float],
    process: GaussianProcess,
    *,
    churn: float = 0.0,
    churn_interval: tuple[float, float] | None = None,
) -> list[Call]:
    """The network calls of a chain, in order: the solver itself is run, on one number.

    Args:
        solver: a name in `SOLVERS`.
        levels: descending, see `euler`.
        process: the noise process.
        churn: its amount, see `Churn`.
        churn_interval: see there.

    Raises:
        ValueError: unknown solver, or what the solver refuses.
    """
    solve = SOLVERS[SOLVERS.check(solver)]
    listed: list[Call] = []

    def denoise(z: Tensor, level: float) -> Tensor:
        listed.append(Call(listed[-1].step if listed else 0, level, False))
        return z

    def note(step: int, level: float, z: Tensor, denoised: Tensor) -> None:
        listed[-1] = Call(step, level, True)

    z = torch.zeros(1, dtype=torch.float64, device="cpu")
    solve(denoise, z, levels, process, note, Churn(churn, lambda: z, churn_interval))
    return listed


def _steps(z: Tensor, levels: Sequence[float], process: GaussianProcess) -> Iterator[tuple[int, Place, Place]]:
    """The steps of a chain, checked: (index, where it starts, where it ends)."""
    check_levels(levels)
    if not math.isfinite(levels[0]) or levels[-1] < 0:  # those between are between
        raise ValueError(f"levels must be finite, descending, > 0 (the last one >= 0); got {list(levels)}")
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z must be float32 or float64, got {z.dtype}: convert it with z.float()")
    places = [Place(level, *process.alpha_sigma(level)) for level in levels]
    for step, (here, lower) in enumerate(itertools.pairwise(places)):
        yield step, here, lower


def _churned(
    z: Tensor, here: Place, levels: Sequence[float], process: GaussianProcess, churn: Churn | None
) -> tuple[Tensor, Place]:
    return (z, here) if churn is None else churn.raised(z, here, len(levels) - 1, process)


def _denoise(denoiser: Denoiser, z: Tensor, level: float) -> Tensor:
    denoised = denoiser(z, level)
    if denoised.shape != z.shape:
        raise ValueError(f"the denoiser must keep the shape of z, {tuple(z.shape)}; it gave {tuple(denoised.shape)}")
    return denoised.to(z.dtype)


def _first_order(z: Tensor, denoised: Tensor, here: Place, lower: Place) -> Tensor:
    """The step that is exact for a constant D."""
    ratio = lower.sigma / here.sigma
    return ratio * z + (lower.alpha - here.alpha * ratio) * denoised


def _log_snr_rise(here: Place, lower: Place) -> float:
    """How far log(alpha / sigma) rises in a step."""
    return math.log(lower.alpha * here.sigma / (lower.sigma * here.alpha))
