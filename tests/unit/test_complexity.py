"""Boundaries by complexity: monitors against targets whose denoiser is known, and equal shares of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusionblocks import EDM, FlowMatching
from diffusionblocks.evaluation.trajectories import Acceleration, energy
from diffusionblocks.noise import GaussianProcess, Monitor, path_time, quantile_times
from diffusionblocks.sampling import sample_images

PROCESSES = [EDM(), EDM(sigma_data=1.7, sigma_max=300.0), FlowMatching(), FlowMatching(shift=3.0)]
CENTRES = torch.tensor([[-1.0, 0.5], [0.8, 0.9], [0.2, -1.1]], dtype=torch.float64)
WIDTH = 0.25  # of each component of the mixture, in units of sigma_data


def variance(time: float) -> float:
    """Of x on the straight path between unit Gaussians."""
    return (1 - time) ** 2 + time**2


def integral(function: Callable[[float], float], low: float, high: float, steps: int = 4000) -> float:
    width = (high - low) / steps
    return width * math.fsum(function(low + (i + 0.5) * width) for i in range(steps))


def gaussian(noise: GaussianProcess) -> Callable[[Tensor, float], Tensor]:
    """D of data N(0, sigma_data^2)."""

    def denoise(z: Tensor, level: float) -> Tensor:
        alpha, sigma = noise.alpha_sigma(level)
        prior = noise.sigma_data**2
        return z * (alpha * prior / (alpha**2 * prior + sigma**2))

    return denoise


def mixture(noise: GaussianProcess) -> Callable[[Tensor, float], Tensor]:
    """D of a mixture of three Gaussians in two dimensions."""

    def denoise(z: Tensor, level: float) -> Tensor:
        alpha, sigma = noise.alpha_sigma(level)
        centres, width = CENTRES * noise.sigma_data, WIDTH * noise.sigma_data
        total = alpha**2 * width**2 + sigma**2
        distances = (z[:, None] - alpha * centres).square().sum(-1)
        shares = (-distances / (2 * total)).softmax(1)
        means = centres + (alpha * width**2 / total) * (z[:, None] - alpha * centres)
        return (shares[..., None] * means).sum(1)

    return denoise


def measured(noise: GaussianProcess, denoise: Callable[[Tensor, float], Tensor], dim: int, steps: int) -> Monitor:
    generator = torch.Generator().manual_seed(0)
    watch = Acceleration(noise)
    for _ in range(2):  # in batches
        start = noise.prior((32, dim), generator=generator).double()
        sample_images(denoise, start, noise.sampling_levels(steps), noise, solver="heun", callback=watch)
    return watch.monitor()


@pytest.mark.parametrize("noise", PROCESSES, ids=repr)
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_acceleration_of_a_gaussian_is_known(noise: GaussianProcess, power: float) -> None:
    monitor = measured(noise, gaussian(noise), 3, 128)
    # x(t) is proportional to the root of its variance, whose second derivative is variance^(-3/2).
    values = monitor.values
    ratios = [
        value / integral(lambda t: variance(t) ** -1.5, low, high, 50) * (high - low)
        for value, low, high in zip(values, monitor.times[:-1], monitor.times[1:], strict=True)
        if high - low > 1e-3  # differences over less are of rounding
    ]
    assert max(ratios) / min(ratios) < 1.03
    boundaries = monitor.boundaries(3, noise, power)
    times = [path_time(noise, level) for level in boundaries]
    shares = [integral(lambda t: variance(t) ** (-1.5 * power), *pair) for pair in itertools.pairwise(times)]
    assert shares == pytest.approx([sum(shares) / 3] * 3, rel=0.02)
    assert times[1] + times[2] == pytest.approx(1, abs=0.01), "data and noise are both unit Gaussians"
    assert (boundaries[0], boundaries[-1]) == (noise.level_min, noise.level_max)


@pytest.mark.parametrize("noise", PROCESSES, ids=repr)
def test_energy_of_a_gaussian_is_known(noise: GaussianProcess) -> None:
    levels = noise.sampling_levels(40)[:-1][::-1]
    target = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * noise.sigma_data
    generator = torch.Generator().manual_seed(1)
    monitor = energy(noise, [(target[:3], gaussian(noise)), (target[3:], gaussian(noise))], levels, generator)

    def exact(level: float) -> float:  # v = x * variance' / (2 variance)
        time = path_time(noise, level)
        return ((2 * time - 1) / variance(time)) ** 2

    between = [(exact(low) + exact(high)) / 2 for low, high in itertools.pairwise(levels)]
    assert monitor.values == pytest.approx(between, rel=1e-4, abs=1e-9)  # a scalar Jacobian: no draw matters


@pytest.mark.parametrize("noise", [EDM(), FlowMatching()], ids=repr)
def test_monitors_of_a_mixture(noise: GaussianProcess) -> None:
    denoise = mixture(noise)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        """By the closed form on the straight path alone, without the process."""
        total = (1 - time) ** 2 * WIDTH**2 + time**2
        shares = (-(x[..., None, :] - (1 - time) * CENTRES).square().sum(-1) / (2 * total)).softmax(-1)
        means = CENTRES + ((1 - time) * WIDTH**2 / total) * (x[..., None, :] - (1 - time) * CENTRES)
        return (x - (shares[..., None] * means).sum(-2)) / time

    # Acceleration: the derivative of v along v, at the points of a much finer chain.
    fine: dict[float, float] = {}

    def watch(step: int, level: float, z: Tensor, denoised: Tensor) -> None:
        time = torch.tensor(path_time(noise, level), dtype=torch.float64)
        alpha, sigma = noise.alpha_sigma(level)
        x = z / (sigma + alpha * noise.sigma_data)
        v = velocity(x, time)
        _, rate = torch.func.jvp(velocity, (x, time), (v, torch.ones_like(time)))
        fine[float(time)] = float(rate.square().mean(1).sqrt().mean())

    generator = torch.Generator().manual_seed(0)
    start = torch.cat([noise.prior((32, 2), generator=generator) for _ in range(2)]).double()
    sample_images(denoise, start, noise.sampling_levels(200), noise, solver="heun", callback=watch)
    monitor = measured(noise, denoise, 2, 100)
    for low, high, value in zip(monitor.times[:-1], monitor.times[1:], monitor.values, strict=True):
        inside = [rate for time, rate in fine.items() if low <= time <= high]
        if high - low > 4e-3 and len(inside) >= 2:
            assert value == pytest.approx(sum(inside) / len(inside), rel=0.15)

    # Energy: the whole Jacobian.
    levels = noise.sampling_levels(12)[:-1][::-1]
    random = torch.Generator().manual_seed(0)
    centres = CENTRES[torch.randint(0, 3, (4000,), generator=random)]
    target = (centres + WIDTH * torch.randn(4000, 2, dtype=torch.float64, generator=random)) * noise.sigma_data
    result = energy(noise, [(target, denoise)], levels, torch.Generator().manual_seed(1))
    draws = noise.draws(target.shape, generator=torch.Generator().manual_seed(1)).double()
    at_levels = []
    for level in levels:
        alpha, sigma = noise.alpha_sigma(level)
        x = (alpha * target + sigma * draws) / (sigma + alpha * noise.sigma_data)
        time = torch.tensor(path_time(noise, level), dtype=torch.float64)
        whole = torch.func.vmap(torch.func.jacrev(velocity), in_dims=(0, None))(x, time)
        at_levels.append(float(whole.square().sum((1, 2)).mean() / 2))
    expected = [(one + other) / 2 for one, other in itertools.pairwise(at_levels)]
    assert result.values == pytest.approx(expected, rel=0.1)


def test_boundaries_share_a_monitor_equally() -> None:
    noise = FlowMatching(distribution="uniform")
    # A monitor of 3 on the cleaner half, of 1 on the other.
    monitor = Monitor((0.0, 0.5, 1.0), (0.0, 0.5, 1.0), (3.0, 1.0))
    assert monitor.boundaries(2, noise) == pytest.approx((0, 1 / 3, 1))
    assert monitor.boundaries(4, noise) == pytest.approx((0, 1 / 6, 1 / 3, 0.5, 1))
    assert monitor.boundaries(2, noise, power=1e-9) == pytest.approx((0, 0.5, 1)), "no power: even in time"
    assert monitor.boundaries(1, noise) == (0, 1)
    # What was measured between 0.2 and 0.8 alone goes on beyond them.
    part = Monitor((0.2, 0.5, 0.8), (0.2, 0.5, 0.8), (3.0, 1.0))
    assert part.boundaries(4, noise) == pytest.approx((0, 1 / 6, 1 / 3, 0.5, 1))
    # Where nothing happens, there is still a little.
    gap = Monitor((0.0, 0.5, 1.0), (0.0, 0.5, 1.0), (0.0, 1.0)).boundaries(2, noise)
    assert gap == pytest.approx((0, 0.75, 1), abs=1e-5)
    edm = EDM()
    levels = edm.levels(20, "karras")[::-1]
    by_quantile = Monitor(tuple(levels), quantile_times(edm, levels), (1.0,) * 20)
    assert by_quantile.boundaries(3, edm) == pytest.approx(edm.boundaries(3), rel=0.1), "equal probability"


@pytest.mark.parametrize(
    ("levels", "values", "message"),
    [
        ((0.0, 1.0), (1.0, 1.0), "2 values need 3 levels and times, got 2"),
        ((0.0, 0.0, 1.0), (1.0, 1.0), "levels must ascend strictly"),
        ((0.0, 0.5, 1.0), (1.0, float("nan")), "finite, >= 0 and not all 0"),
        ((0.0, 0.5, 1.0), (0.0, 0.0), "finite, >= 0 and not all 0"),
        ((0.0, 0.5, 1.0), (-1.0, 1.0), "finite, >= 0 and not all 0"),
    ],
)
def test_a_monitor_that_is_none(levels: tuple[float, ...], values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Monitor(levels, levels, values)


def test_resolutions_share_the_mean_of_their_integrals() -> None:
    """Of equal blocks in t, each has the same part of the examples' mean of the integrals over their own paths."""
    noise, levels = FlowMatching(), torch.linspace(0, 1, 400, dtype=torch.float64).tolist()
    processes, examples, power = [FlowMatching(shift=1.5), FlowMatching(shift=4.0)], [30, 10], 0.5
    complexity = [lambda t: 1 + t**2, lambda t: 2 - t]
    monitors = [
        Monitor.of_levels(levels, [path_time(at, level) for level in levels], [m(path_time(at, x)) for x in levels])
        for at, m in zip(processes, complexity, strict=True)
    ]
    together = Monitor.together(monitors, examples, power)
    boundaries = together.boundaries(3, noise, power)

    def share(low: float, high: float) -> float:
        parts = [
            integral(lambda t, m=m: m(t) ** power, path_time(at, low), path_time(at, high), 500)  # type: ignore[misc]
            for at, m in zip(processes, complexity, strict=True)
        ]
        return sum(count * part for count, part in zip(examples, parts, strict=True))

    shares = [share(low, high) for low, high in itertools.pairwise(boundaries)]
    assert shares == pytest.approx([sum(shares) / 3] * 3, rel=1e-3)
    alone = [each.boundaries(3, noise, power)[1] for each in monitors]
    assert min(alone) < boundaries[1] < max(alone)
    assert Monitor.together(monitors[:1], [5], power) is monitors[0]
