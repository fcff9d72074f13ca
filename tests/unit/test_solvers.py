"""Solvers against the closed form of the probability-flow ODE for Gaussian data."""

import itertools
import math

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks import EDM, Partition
from diffusionblocks.sampling import SOLVERS, Callback, Denoiser, calls, dpmpp_2m, euler, heun

NOISE = EDM()
MU, S = 0.3, 0.8


def run(solver: str, denoiser: Denoiser, z: Tensor, levels: list[float], *more: Callback) -> Tensor:
    return SOLVERS[solver](denoiser, z, levels, NOISE, *more)


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


def start() -> Tensor:
    return NOISE.sigma_max * torch.randn(64, 4, generator=seeded(), dtype=torch.float64)


def error(levels: list[float], solver: str = "euler") -> float:
    z = start()
    return (run(solver, perfect, z, levels) - exact(z, levels[-1])).abs().max().item()


@pytest.mark.parametrize("name", ["karras", "log-uniform"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2)])
def test_solvers_converge_at_their_order(solver: str, order: int, name: str) -> None:
    errors = [error(grid(name, steps), solver) for steps in (128, 256, 512, 1024)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)
    assert errors[-1] < {1: 0.02, 2: 1e-4}[order]


def test_euler_error_falls_on_the_equal_mass_grid() -> None:
    errors = [error(grid("equal-quantile", steps)) for steps in (4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)


def test_the_exact_solution_solves_the_ode() -> None:
    z_max = torch.linspace(-100, 100, 7, dtype=torch.float64)
    for sigma in (0.01, 0.5, 3.0, 70.0):
        h = 1e-6 * sigma
        slope = (exact(z_max, sigma + h) - exact(z_max, sigma - h)) / (2 * h)
        z = exact(z_max, sigma)
        torch.testing.assert_close(slope, (z - perfect(z, sigma)) / sigma, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_of_a_perfect_denoiser_of_a_point_lands_exactly(solver: str) -> None:
    y = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    eps = torch.randn(5, 3, generator=seeded(2), dtype=torch.float64)
    for sigma, lower in [(80.0, 0.5), (0.5, 0.18), (0.18, 0.002), (1.0, 0.0)]:
        landed = run(solver, lambda z, level: y, y + sigma * eps, [sigma, lower])
        torch.testing.assert_close(landed, y + lower * eps, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", SOLVERS)
def test_many_steps_of_a_perfect_denoiser_of_a_point_land_exactly(solver: str) -> None:
    y = torch.randn(5, 3, generator=seeded(1), dtype=torch.float64)
    eps = torch.randn(5, 3, generator=seeded(2), dtype=torch.float64)
    landed = run(solver, lambda z, level: y, y + 80.0 * eps, NOISE.levels(37, "karras"))
    torch.testing.assert_close(landed, y + 0.002 * eps, rtol=1e-11, atol=1e-11)


def test_every_step_lowers_the_noise() -> None:
    """The paper's printed equations 3-5 have the opposite sign: there the distance to y would grow."""
    y = torch.full((2000,), 0.7, dtype=torch.float64)
    visited: list[float] = []

    def denoise(z: Tensor, level: float) -> Tensor:
        visited.append((z - y).std().item() / level)
        return y

    z = y + 80.0 * torch.randn(2000, generator=seeded(), dtype=torch.float64)
    last = euler(denoise, z, NOISE.levels(10), NOISE)
    assert visited == pytest.approx([visited[0]] * 10)  # the noise in z is at each level what the level says
    assert (last - y).std().item() < 0.003


def test_step_is_the_ode_form() -> None:
    z = torch.randn(4, generator=seeded(), dtype=torch.float64)
    stepped = euler(perfect, z, [2.0, 1.5], NOISE)
    torch.testing.assert_close(stepped, z + (1.5 - 2.0) * (z - perfect(z, 2.0)) / 2.0)


def test_denoiser_is_called_once_a_level_but_the_last_in_order() -> None:
    calls: list[float] = []
    levels = NOISE.levels(6)
    euler(lambda z, level: calls.append(level) or z, torch.zeros(2), levels, NOISE)
    assert calls == levels[:-1]


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_keep_dtype_and_shape(solver: str) -> None:
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(2, 3, 4, generator=seeded(), dtype=dtype)
        stepped = run(solver, perfect, z, NOISE.levels(5))
        assert stepped.dtype == dtype
        assert stepped.shape == z.shape


# ---- second order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [25, 35, 51, 79])
def test_at_equal_calls_dpmpp_beats_heun_beats_euler(made: int) -> None:
    steps = {"euler": made, "heun": (made + 1) // 2, "dpmpp-2m": made}
    assert {calls(solver, n, True) for solver, n in steps.items()} == {made}
    errors = {solver: error(NOISE.sampling_levels(n, "karras"), solver) for solver, n in steps.items()}
    assert 2 * errors["dpmpp-2m"] < errors["heun"] < errors["euler"]


def test_heun_is_edm_algorithm_1() -> None:
    """Written as the algorithm is printed."""
    levels = NOISE.sampling_levels(9, "karras")
    x = start()
    for t, t_next in itertools.pairwise(levels):
        d = (x - perfect(x, t)) / t
        x_next = x + (t_next - t) * d
        if t_next != 0:
            d_next = (x_next - perfect(x_next, t_next)) / t_next
            x_next = x + (t_next - t) * (d / 2 + d_next / 2)
        x = x_next
    torch.testing.assert_close(heun(perfect, start(), levels, NOISE), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [NOISE.sampling_levels(9, "karras"), NOISE.levels(9), [5.0, 4.9, 0.3, 0.29, 0.0]])
def test_dpmpp_2m_is_that_of_k_diffusion(levels: list[float]) -> None:
    """In lambda, as k-diffusion writes it."""
    sigma = torch.tensor(levels, dtype=torch.float64)
    lam = -sigma.log()
    x, before = start(), None
    for i in range(len(levels) - 1):
        denoised = perfect(x, levels[i])
        h = lam[i + 1] - lam[i]
        if before is None or levels[i + 1] == 0:
            x = (sigma[i + 1] / sigma[i]) * x - (-h).expm1() * denoised
        else:
            r = (lam[i] - lam[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * before
            x = (sigma[i + 1] / sigma[i]) * x - (-h).expm1() * mixed
        before = denoised
    torch.testing.assert_close(dpmpp_2m(perfect, start(), levels, NOISE), x, rtol=1e-11, atol=1e-11)


def test_first_step_of_dpmpp_2m_is_eulers_and_the_second_is_not() -> None:
    levels = NOISE.levels(4, "karras")
    assert torch.equal(dpmpp_2m(perfect, start(), levels[:2], NOISE), euler(perfect, start(), levels[:2], NOISE))
    assert not torch.allclose(dpmpp_2m(perfect, start(), levels[:3], NOISE), euler(perfect, start(), levels[:3], NOISE))


def test_second_order_solvers_in_float32_follow_float64() -> None:
    levels = NOISE.sampling_levels(40, "karras")
    for solver in SOLVERS.values():
        torch.testing.assert_close(
            solver(perfect, start().float(), levels, NOISE).double(),
            solver(perfect, start(), levels, NOISE),
            rtol=1e-4,
            atol=1e-4,
        )


# ---- what all solvers promise -----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_last_level_of_zero_gives_the_last_denoised(solver: str) -> None:
    visited: list[tuple[float, Tensor]] = []

    def denoise(z: Tensor, level: float) -> Tensor:
        visited.append((level, perfect(z, level)))
        return visited[-1][1]

    levels = NOISE.sampling_levels(6, "karras")
    landed = run(solver, denoise, start(), levels)
    assert torch.equal(landed, visited[-1][1])
    assert visited[-1][0] == NOISE.sigma_min
    assert min(level for level, _ in visited) > 0
    # From the same z, the result is that of a chain which stops at sigma_min, denoised once more.
    assert torch.equal(landed, perfect(run(solver, perfect, start(), levels[:-1]), NOISE.sigma_min))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_calls_says_how_often_the_network_runs(solver: str, steps: int, ends_at_zero: bool) -> None:
    made: list[float] = []
    levels = NOISE.sampling_levels(steps) if ends_at_zero else NOISE.levels(steps)
    run(solver, lambda z, level: made.append(level) or z, torch.zeros(2), levels)
    assert len(made) == calls(solver, steps, ends_at_zero)
    expected = [level for pair in itertools.pairwise(levels) for level in pair[: 1 + (solver == "heun")] if level > 0]
    assert made == expected  # at the given levels, bit by bit, and in order


@pytest.mark.parametrize("solver", SOLVERS)
def test_callback_sees_each_step_once_before_it_is_made(solver: str) -> None:
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    levels = NOISE.sampling_levels(5, "karras")
    landed = run(solver, perfect, start(), levels, lambda *shown: seen.append(shown))
    assert [(step, level) for step, level, _, _ in seen] == list(enumerate(levels[:-1]))
    assert torch.equal(seen[0][2], start())
    for step, (_, level, z, denoised) in enumerate(seen):
        assert torch.equal(denoised, perfect(z, level))
        if step:  # z is where the chain to this level ends
            assert torch.equal(z, run(solver, perfect, start(), levels[: step + 1]))
    assert torch.equal(landed, run(solver, perfect, start(), levels))  # looking changes nothing


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_leave_their_input_alone(solver: str) -> None:
    z = start()
    run(solver, perfect, z, NOISE.levels(3))
    assert torch.equal(z, start())


def blocks_of_calls(solver: str, partition: Partition, levels: list[float]) -> list[int]:
    made: list[int] = []

    def denoise(z: Tensor, level: float) -> Tensor:
        made.append(partition.block_of(level))
        return perfect(z, level)

    run(solver, denoise, start(), levels)
    return made


def test_a_step_onto_a_boundary_is_corrected_by_the_block_below_it() -> None:
    partition = Partition.build(NOISE, num_layers=3, num_blocks=3)
    low, high = partition.boundaries[1:3]
    assert blocks_of_calls("heun", partition, [80.0, 2.0, high, 0.3, low, 0.0]) == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert blocks_of_calls("euler", partition, [80.0, 2.0, high, 0.3, low, 0.0]) == [0, 0, 1, 1, 2]
    assert blocks_of_calls("dpmpp-2m", partition, [80.0, 2.0, high, 0.3, low, 0.0]) == [0, 0, 1, 1, 2]
    # Positive control: just above the boundaries the corrections are the upper blocks' work.
    above = [80.0, 2.0, high * 1.001, 0.3, low * 1.001, 0.0]
    assert blocks_of_calls("heun", partition, above) == [0, 0, 0, 0, 0, 1, 1, 1, 1]


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("levels", [[], [1.0], [1.0, 2.0], [2.0, 2.0], [3.0, 1.0, 2.0], [0.0], [1.0, 0.0, 0.0]])
def test_levels_that_do_not_descend_are_refused(levels: list[float], solver: str) -> None:
    with pytest.raises(ValueError, match="descending"):
        run(solver, perfect, torch.zeros(2), levels)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("levels", [[1.0, -0.1], [math.inf, 1.0], [math.nan, 1.0], [2.0, math.nan, 1.0]])
def test_levels_out_of_range_are_refused_before_the_first_call(levels: list[float], solver: str) -> None:
    def denoise(z: Tensor, level: float) -> Tensor:
        raise AssertionError("called")

    with pytest.raises(ValueError, match="levels must be") as error:
        run(solver, denoise, torch.zeros(2), levels)
    assert str(levels) in str(error.value)


@pytest.mark.parametrize("solver", SOLVERS)
def test_low_precision_z_and_d_of_another_shape_are_refused(solver: str) -> None:
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.bfloat16"):
        run(solver, perfect, torch.zeros(2, dtype=torch.bfloat16), [1.0, 0.5])
    with pytest.raises(ValueError, match=r"shape of z, \(2, 1\); it gave \(2,\)"):
        run(solver, lambda z, level: z[:, 0], torch.zeros(2, 1), [1.0, 0.5])


def test_calls_refuses_what_is_no_chain() -> None:
    with pytest.raises(ValueError, match="unknown solver 'rk4'; allowed: euler, heun, dpmpp-2m"):
        calls("rk4", 3, True)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        calls("heun", 0, True)
