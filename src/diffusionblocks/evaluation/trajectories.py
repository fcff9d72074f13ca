"""How hard a diffusion model's task is over noise levels: acceleration of its trajectories, energy of its velocity.

Both are measured on the straight path x = (1 - t) y + t eps of unit-variance data (`noise.path_time`), where the
probability-flow ODE of every Gaussian process is dx/dt = v = (x - D / sigma_data) / t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..noise import GaussianProcess, Monitor, path_time

#: z (n, ...) and a level to D, each row on its own.
Denoise = Callable[[Tensor, float], Tensor]


class Acceleration:
    """A solver's callback that measures the norm of d2x/dt2 along its chains: `model.sample(..., callback=it)`.

    Of each two neighbouring levels it is that of the velocity's difference over the time between, divided by the square
    root of the number of dimensions, and averaged over all chains of one list of levels. A second-order solver follows
    the trajectories closely enough. Nothing waits for the device.

    Args:
        noise: the noise process.
    """

    def __init__(self, noise: GaussianProcess) -> None:
        self._noise = noise
        self._levels: list[float] = []
        self._sums: list[Tensor] = []
        self._chains = 0
        self._last: tuple[float, Tensor] | None = None

    def __call__(self, step: int, level: float, z: Tensor, denoised: Tensor) -> None:
        """Take a step's z and D."""
        time, velocity = path_time(self._noise, level), path_velocity(self._noise, level, z, denoised)
        if step == 0:
            self._last = None
            self._chains += len(z)
        if self._last is not None:
            norms = ((self._last[1] - velocity) / (self._last[0] - time)).flatten(1).double().square().mean(1).sqrt()
            if step > len(self._sums):
                self._sums.append(torch.zeros((), dtype=torch.float64, device=z.device))
            self._sums[step - 1] = self._sums[step - 1] + norms.sum()
        if step == len(self._levels):
            self._levels.append(level)
        self._last = time, velocity

    def monitor(self) -> Monitor:
        """The mean over all chains.

        Raises:
            ValueError: chains of fewer than two levels, or values that are not finite.
        """
        levels = self._levels[::-1]
        means = (torch.stack(self._sums) / self._chains).tolist() if self._sums else []
        return Monitor(tuple(levels), tuple(path_time(self._noise, level) for level in levels), tuple(means[::-1]))


def energy(
    noise: GaussianProcess,
    batches: Iterable[tuple[Tensor, Denoise]],
    levels: Sequence[float],
    generator: torch.Generator | None = None,
) -> Monitor:
    """The mean squared norm of the velocity's spatial Jacobian dv/dx, a dimension, at noised data.

    Hutchinson's estimator: the squared norm of e^T dv/dx, with signs e drawn for each example and level.

    Args:
        noise: the noise process.
        batches: targets y (n, ...) on the device, each with what denoises them.
        levels: where to measure, > 0, ascending.
        generator: source of noise and signs, on the device.

    Raises:
        ValueError: values that are not finite.
    """
    sums: list[Tensor] = []
    count = 0
    for target, denoise in batches:
        draws = noise.draws(target.shape, generator=generator, device=target.device)
        signs = torch.randint(0, 2, target.shape, generator=generator, device=target.device).to(draws.dtype) * 2 - 1
        at_levels = torch.stack([_squared_row(noise, denoise, target, level, draws, signs) for level in levels])
        sums.append(at_levels)
        count += len(target)
    means = (torch.stack(sums).sum(0) / count).tolist()
    return Monitor.of_levels(levels, [path_time(noise, level) for level in levels], means)


def _squared_row(
    noise: GaussianProcess, denoise: Denoise, target: Tensor, level: float, draws: Tensor, signs: Tensor
) -> Tensor:
    """The sum over examples of |e^T dv/dx|^2 / d, float64."""
    levels = torch.full((len(target),), level, dtype=torch.float64, device=target.device)
    z = noise.corrupt(target, levels.to(target.dtype), draws).detach()
    with torch.enable_grad():
        z.requires_grad_()
        product = (path_velocity(noise, level, z, denoise(z, level)) * signs).sum()
        (row,) = torch.autograd.grad(product, z)
    row = row.double() * _length(noise, level)  # by x, of which z is so many times as long
    return row.square().flatten(1).mean(1).sum()


def _length(noise: GaussianProcess, level: float) -> float:
    """z / x."""
    alpha, sigma = noise.alpha_sigma(level)
    return sigma + alpha * noise.sigma_data


def path_velocity(noise: GaussianProcess, level: float, z: Tensor, denoised: Tensor) -> Tensor:
    """v = (x - D / sigma_data) / t of z at a level > 0 and its D, on the straight path of unit-variance data."""
    return (z / _length(noise, level) - denoised / noise.sigma_data) / path_time(noise, level)
