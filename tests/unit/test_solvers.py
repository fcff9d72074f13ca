"""Euler's method against the closed form of the probability-flow ODE for Gaussian data."""

import itertools
import math

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks import EDM
from diffusionblocks.sampling import euler

NOISE = EDM()
MU, S = 0.3, 0.8


def perfect(z: Tensor, sigma: float) -> Tensor:
    """E[y | z] for y ~ N(MU, S^2)."""
    return (S**2 * z + sigma**2 * MU) / (S**2 + sigma**2)


def exact(z_max: Tensor, sigma: float) -> Tensor:
    """The solution of dz/dsigma = (z - D)/sigma at sigma."""
    return MU + math.sqrt((S**2 + sigma**2) / (S**2 + NOISE.sigma_max**2)) * (z_max - MU)


def grid(name: str, steps: int) -> list[float]:
    if name == "log-uniform":
        return NOISE.boundaries(steps, "log-uniform")[::-1]
    return NOISE.levels(steps, name)


def error(name: str, steps: int) -> float:
    z = NOISE.sigma_max * torch.randn(64, 4, generator=seeded(), dtype=torch.float64)
    return (euler(perfect, z, grid(name, steps)) - exact(z, NOISE.sigma_min)).abs().max().item()


@pytest.mark.parametrize("name", ["karras", "log-uniform"])
def test_euler_converges_at_first_order(name: str) -> None:
    errors = [error(name, steps) for steps in (128, 256, 512, 1024)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2.0, abs=0.15)
    assert errors[-1] < 0.02


def test_euler_error_falls_on_the_equal_mass_grid() -> None:
    errors = [error("equal-mass", steps) for steps in (4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)


def test_the_exact_solution_solves_the_ode() -> None:
    z_max = torch.linspace(-100, 100, 7, dtype=torch.float64)
    for sigma in (0.01, 0.5, 3.0, 70.0):
        h = 1e-6 * sigma
        slope = (exact(z_max, sigma + h) - exact(z_max, sigma - h)) / (2 * h)
        z = exact(z_max, sigma)
        torch.testing.assert_close(slope, (z - perfect(z, sigma)) / sigma, rtol=1e-5, atol=1e-6)


def test_one_step_of_a_perfect_denoiser_of_a_point_lands_exactly() -> None:
    y = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    eps = torch.randn(5, 3, generator=seeded(2), dtype=torch.float64)
    for sigma, lower in [(80.0, 0.5), (0.5, 0.18), (0.18, 0.002), (1.0, 0.0)]:
        landed = euler(lambda z, level: y, y + sigma * eps, [sigma, lower])
        torch.testing.assert_close(landed, y + lower * eps, rtol=1e-13, atol=1e-13)


def test_many_steps_of_a_perfect_denoiser_of_a_point_land_exactly() -> None:
    y = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    eps = torch.randn(5, 3, generator=seeded(2), dtype=torch.float64)
    landed = euler(lambda z, level: y, y + 80.0 * eps, NOISE.levels(37, "karras"))
    torch.testing.assert_close(landed, y + 0.002 * eps, rtol=1e-11, atol=1e-11)


def test_every_step_lowers_the_noise() -> None:
    """The paper's printed equations 3-5 have the opposite sign: there the distance to y would grow."""
    y = torch.full((2000,), 0.7, dtype=torch.float64)
    visited: list[float] = []

    def denoise(z: Tensor, level: float) -> Tensor:
        visited.append((z - y).std().item() / level)
        return y

    z = y + 80.0 * torch.randn(2000, generator=seeded(), dtype=torch.float64)
    last = euler(denoise, z, NOISE.levels(10))
    assert visited == pytest.approx([visited[0]] * 10)  # the noise in z is at each level what the level says
    assert (last - y).std().item() < 0.003


def test_step_is_the_ode_form() -> None:
    z = torch.randn(4, generator=seeded(), dtype=torch.float64)
    stepped = euler(perfect, z, [2.0, 1.5])
    torch.testing.assert_close(stepped, z + (1.5 - 2.0) * (z - perfect(z, 2.0)) / 2.0)


def test_denoiser_is_called_once_a_level_but_the_last_in_order() -> None:
    calls: list[float] = []
    levels = NOISE.levels(6)
    euler(lambda z, level: calls.append(level) or z, torch.zeros(2), levels)
    assert calls == levels[:-1]


def test_euler_keeps_dtype_and_shape() -> None:
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(2, 3, 4, generator=seeded(), dtype=dtype)
        stepped = euler(perfect, z, NOISE.levels(5))
        assert stepped.dtype == dtype
        assert stepped.shape == z.shape


@pytest.mark.parametrize("levels", [[], [1.0], [1.0, 2.0], [2.0, 2.0], [3.0, 1.0, 2.0]])
def test_levels_that_do_not_descend_are_refused(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="descending"):
        euler(perfect, torch.zeros(2), levels)
