"""EDM noise: quantiles against the standard library's normal, sampling, boundaries, grids, preconditioning."""

import copy
import dataclasses
import itertools
import json
import math
from statistics import NormalDist

import pytest
import torch
from helpers import convert, seeded
from hypothesis import given
from hypothesis import strategies as st

from diffusionblocks import EDM, BlocksConfig
from diffusionblocks.core.partition import Partition

DEFAULT = EDM()
PROCESSES = st.builds(
    EDM,
    p_mean=st.floats(-2.0, 0.5),
    p_std=st.floats(0.8, 1.8),
    sigma_min=st.floats(0.002, 0.05),
    sigma_max=st.floats(5.0, 80.0),
    sigma_data=st.floats(0.05, 2.0),
).filter(
    # Five standard deviations to either side: further out float64 quantiles near 0 and 1 lose their digits.
    lambda noise: (
        max(noise.p_mean - math.log(noise.sigma_min), math.log(noise.sigma_max) - noise.p_mean) < 5 * noise.p_std
    )
)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reference_boundaries(noise: EDM, n: int) -> list[float]:
    """The paper's formula by another road: the standard library's normal distribution."""
    normal = NormalDist(noise.p_mean, noise.p_std)
    q_min, q_max = normal.cdf(math.log(noise.sigma_min)), normal.cdf(math.log(noise.sigma_max))
    return [math.exp(normal.inv_cdf(q_min + k / n * (q_max - q_min))) for k in range(n + 1)]


# ---- quantiles --------------------------------------------------------------------------------------------


@given(PROCESSES, st.floats(0.0, 1.0))
def test_mass_of_inverts_level_of(noise: EDM, u: float) -> None:
    assert noise.cdf(noise.icdf(double(u))).item() == pytest.approx(u, abs=1e-9)


@given(PROCESSES, st.floats(0.0, 1.0))
def test_level_of_inverts_mass_of(noise: EDM, fraction: float) -> None:
    level = noise.sigma_min * (min(noise.sigma_max, 20.0) / noise.sigma_min) ** fraction
    assert noise.icdf(noise.cdf(double(level))).item() == pytest.approx(level, rel=1e-6)


@given(PROCESSES, st.lists(st.floats(0.0, 1.0), min_size=2, max_size=20))
def test_levels_ascend_with_mass(noise: EDM, masses: list[float]) -> None:
    levels = noise.icdf(double(*sorted(masses)))
    assert bool((levels.diff() >= 0).all())
    assert noise.sigma_min <= levels.min()
    assert levels.max() <= noise.sigma_max


@given(PROCESSES)
def test_ends_of_the_quantile_function(noise: EDM) -> None:
    assert noise.cdf(double(noise.sigma_min, noise.sigma_max)).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    assert noise.icdf(double(0.0)).item() == pytest.approx(noise.sigma_min, rel=1e-6)
    assert (noise.level_min, noise.level_max) == (noise.sigma_min, noise.sigma_max)


def test_mass_strictly_ascends_over_the_default_range() -> None:
    levels = torch.logspace(math.log10(0.002), math.log10(80.0), 1000, dtype=torch.float64).clamp(0.002, 80.0)
    assert bool((DEFAULT.cdf(levels).diff() > 0).all())


def test_levels_outside_the_range_are_clamped_by_mass_of() -> None:
    assert DEFAULT.cdf(double(1e-6, 1e6)).tolist() == [0.0, 1.0]


def test_quantiles_are_float64_and_keep_the_shape() -> None:
    u = torch.rand(2, 3, generator=seeded())
    assert DEFAULT.icdf(u).dtype == torch.float64
    assert DEFAULT.icdf(u).shape == (2, 3)
    assert DEFAULT.cdf(u).dtype == torch.float64


def test_density_is_the_derivative_of_mass_and_integrates_to_one() -> None:
    log_sigma = torch.linspace(math.log(0.002), math.log(80.0), 20001, dtype=torch.float64)
    density = DEFAULT.density(log_sigma.exp())
    assert torch.trapezoid(density, log_sigma).item() == pytest.approx(1.0, abs=1e-6)
    slope = DEFAULT.cdf((log_sigma + 1e-5).exp()) - DEFAULT.cdf((log_sigma - 1e-5).exp())
    torch.testing.assert_close(slope[1:-1] / 2e-5, density[1:-1], rtol=1e-4, atol=1e-6)


# ---- sampling ---------------------------------------------------------------------------------------------


def kolmogorov_smirnov(u: torch.Tensor) -> float:
    """Largest distance between the empirical distribution of u and the uniform one on [0, 1]."""
    u = u.double().sort().values
    n = len(u)
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    return max((grid[1:] - u).max().item(), (u - grid[:-1]).max().item())


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("overlap", [0.0, 0.1])
def test_sampled_levels_lie_in_the_interval_with_uniform_mass(block: int, overlap: float) -> None:
    interval = DEFAULT.widen(list(itertools.pairwise(DEFAULT.boundaries(3)))[block], overlap)
    n = 20_000
    sigma = DEFAULT.sample(n, interval, generator=seeded(block))
    assert sigma.dtype == torch.float32
    assert sigma.shape == (n,)
    assert sigma.min().item() >= interval[0] * (1 - 1e-6)
    assert sigma.max().item() <= interval[1] * (1 + 1e-6)
    low, high = DEFAULT.cdf(double(*interval)).tolist()
    assert kolmogorov_smirnov((DEFAULT.cdf(sigma) - low) / (high - low)) < 1.63 / math.sqrt(n)  # 1% level


def test_the_uniformity_test_can_fail() -> None:
    n = 20_000
    sigma = DEFAULT.sample(n, generator=seeded())
    assert kolmogorov_smirnov(EDM(p_mean=-1.1).cdf(sigma)) > 1.63 / math.sqrt(n)


def test_sampled_log_levels_have_the_moments_of_the_training_distribution() -> None:
    log_sigma = DEFAULT.sample(100_000, generator=seeded()).double().log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.02)


def test_sampling_follows_its_generator_alone() -> None:
    first = DEFAULT.sample(100, generator=seeded(3))
    torch.rand(7)
    assert torch.equal(first, DEFAULT.sample(100, generator=seeded(3)))
    assert not torch.equal(first, DEFAULT.sample(100, generator=seeded(4)))
    before = torch.get_rng_state()
    DEFAULT.sample(100, generator=seeded(3))
    assert torch.equal(before, torch.get_rng_state())


# ---- boundaries and grids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "expected"), [(3, [0.002, 0.180, 0.505, 80.0]), (4, [0.002, 0.134, 0.301, 0.677, 80.0])]
)
def test_boundaries_at_the_defaults(blocks: int, expected: list[float]) -> None:
    assert [round(sigma, 3) for sigma in DEFAULT.boundaries(blocks)] == expected


@given(PROCESSES, st.integers(1, 16))
def test_boundaries_follow_the_papers_formula(noise: EDM, n: int) -> None:
    boundaries = noise.boundaries(n)
    assert boundaries == pytest.approx(reference_boundaries(noise, n), rel=1e-6)
    assert (boundaries[0], boundaries[-1]) == (noise.sigma_min, noise.sigma_max)  # exact
    masses = noise.cdf(double(*boundaries)).diff()
    torch.testing.assert_close(masses, torch.full_like(masses, 1 / n), rtol=0, atol=1e-9)


@given(st.integers(1, 16))
def test_log_uniform_boundaries_have_equal_ratios(n: int) -> None:
    boundaries = double(*DEFAULT.boundaries(n, "log-uniform"))
    ratios = boundaries[1:] / boundaries[:-1]
    torch.testing.assert_close(ratios, torch.full_like(ratios, (80.0 / 0.002) ** (1 / n)))
    assert boundaries[[0, -1]].tolist() == [0.002, 80.0]


@given(st.integers(1, 16))
def test_uniform_boundaries_have_equal_widths(n: int) -> None:
    boundaries = double(*DEFAULT.boundaries(n, "uniform"))
    widths = boundaries.diff()
    torch.testing.assert_close(widths, torch.full_like(widths, (80.0 - 0.002) / n))
    assert boundaries[[0, -1]].tolist() == [0.002, 80.0]


@given(PROCESSES, st.integers(1, 8), st.floats(0.0, 0.5))
def test_widening_follows_the_papers_formula_and_is_clipped(noise: EDM, n: int, gamma: float) -> None:
    for low, high in itertools.pairwise(noise.boundaries(n)):
        alpha = (high / low) ** gamma
        wide = noise.widen((low, high), gamma)
        assert wide[0] == pytest.approx(max(noise.sigma_min, low / alpha))
        assert wide[1] == pytest.approx(min(noise.sigma_max, alpha * high))
        assert noise.sigma_min <= wide[0] <= low < high <= wide[1] <= noise.sigma_max


def test_widening_by_hand() -> None:
    assert DEFAULT.widen((0.1, 0.4), 0.5) == pytest.approx((0.05, 0.8))
    assert DEFAULT.widen((0.1, 0.4), 0.0) == (0.1, 0.4)
    assert DEFAULT.widen((0.002, 0.18), 0.05)[0] == 0.002
    assert DEFAULT.widen((0.505, 80.0), 0.05)[1] == 80.0


@given(PROCESSES, st.integers(1, 60), st.sampled_from(["equal-quantile", "karras"]))
def test_level_grids_descend_between_exact_ends(noise: EDM, steps: int, grid: str) -> None:
    levels = noise.levels(steps, grid)
    assert len(levels) == steps + 1
    assert all(b < a for a, b in itertools.pairwise(levels))
    assert (levels[0], levels[-1]) == (noise.sigma_max, noise.sigma_min)


def test_karras_grid_is_edm_equation_5() -> None:
    n, rho = 18, 7.0
    levels = DEFAULT.levels(n - 1, "karras", rho=rho)
    expected = [(80.0 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho for i in range(n)]
    assert levels == pytest.approx(expected, rel=1e-12)


def test_equal_mass_grid_is_the_partition_upside_down() -> None:
    assert DEFAULT.levels(4) == DEFAULT.boundaries(4)[::-1]


@given(PROCESSES, st.integers(1, 60), st.sampled_from(["equal-quantile", "karras"]))
def test_sampling_levels_descend_from_the_highest_to_zero(noise: EDM, steps: int, grid: str) -> None:
    levels = noise.sampling_levels(steps, grid)
    assert len(levels) == steps + 1
    assert all(b < a for a, b in itertools.pairwise(levels))
    assert (levels[0], levels[-1]) == (noise.sigma_max, 0.0)
    if steps > 1:
        assert levels[:-1] == noise.levels(steps - 1, grid)


def test_sampling_levels_are_edm_equation_5_with_its_last_level() -> None:
    n, rho = 18, 5.0
    levels = DEFAULT.sampling_levels(n, "karras", rho)
    expected = [(80.0 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho for i in range(n)]
    assert levels == pytest.approx([*expected, 0.0], rel=1e-12)
    assert levels[-2:] == [0.002, 0.0]


@pytest.mark.parametrize("grid", ["equal-quantile", "karras"])
def test_sampling_levels_of_one_and_two_steps(grid: str) -> None:
    assert DEFAULT.sampling_levels(1, grid) == [80.0, 0.0]
    assert DEFAULT.sampling_levels(2, grid) == [80.0, 0.002, 0.0]


@pytest.mark.parametrize("steps", [1, 2, 5])  # one step needs no grid, and refuses an unknown one all the same
def test_sampling_levels_refuse_what_levels_refuse(steps: int) -> None:
    with pytest.raises(ValueError, match=r"'linear'.*; allowed: equal-quantile, karras"):
        DEFAULT.sampling_levels(steps, "linear")
    for rho in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"rho must be a finite number > 0, got {rho}"):
            DEFAULT.sampling_levels(steps, "karras", rho)
    with pytest.raises(ValueError, match=f"steps must be >= 1, got {-steps}"):
        DEFAULT.sampling_levels(-steps)


# ---- corruption, preconditioning, weight ------------------------------------------------------------------


@given(PROCESSES)
def test_preconditioning_identities(noise: EDM) -> None:
    sigma = torch.logspace(-2.5, 1.9, 50, dtype=torch.float64)
    sd = noise.sigma_data
    c = noise.precondition(sigma)
    ones = torch.ones_like(sigma)
    torch.testing.assert_close(c.c_out**2 * noise.weight(sigma), ones)
    torch.testing.assert_close(c.c_in**2 * (sigma**2 + sd**2), ones)
    torch.testing.assert_close(c.c_skip, sd**2 / (sigma**2 + sd**2))
    torch.testing.assert_close(c.c_noise, 0.25 * sigma.log())
    torch.testing.assert_close(noise.weight(sigma), (sigma**2 + sd**2) / (sigma * sd) ** 2)
    # Variance of what F must predict, (y - c_skip * (y + sigma * eps)) / c_out, for data of variance sd^2.
    torch.testing.assert_close(((1 - c.c_skip) ** 2 * sd**2 + c.c_skip**2 * sigma**2) / c.c_out**2, ones)


def test_input_and_target_of_the_network_have_unit_variance_on_gaussian_data() -> None:
    noise = EDM(sigma_data=0.7)
    g = seeded()
    for sigma in (0.01, 0.3, 0.7, 5.0, 80.0):
        level = torch.full((20_000,), sigma, dtype=torch.float64)
        y = 0.7 * torch.randn(20_000, 4, generator=g, dtype=torch.float64)
        z = noise.corrupt(y, level, torch.randn(20_000, 4, generator=g, dtype=torch.float64))
        c = noise.precondition(level)
        assert (c.c_in[:, None] * z).var().item() == pytest.approx(1.0, abs=0.03)
        assert ((y - c.c_skip[:, None] * z) / c.c_out[:, None]).var().item() == pytest.approx(1.0, abs=0.03)


def test_zero_network_is_the_perfect_denoiser_of_gaussian_data() -> None:
    sigma = torch.logspace(-2.5, 1.9, 50, dtype=torch.float64)
    z = torch.randn(50, 3, generator=seeded(), dtype=torch.float64)
    perfect = (0.5**2 * z + sigma[:, None] ** 2 * 0.0) / (0.5**2 + sigma[:, None] ** 2)
    c = DEFAULT.precondition(sigma)
    torch.testing.assert_close(c.c_skip[:, None] * z + c.c_out[:, None] * torch.zeros_like(z), perfect)


def test_corruption_adds_sigma_times_noise_sample_by_sample() -> None:
    y, eps = torch.randn(3, 2, 5, generator=seeded(1)), torch.randn(3, 2, 5, generator=seeded(2))
    level = torch.tensor([0.1, 1.0, 10.0])
    z = DEFAULT.corrupt(y, level, eps)
    for i in range(3):
        torch.testing.assert_close(z[i], y[i] + level[i] * eps[i])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_noise_maths_is_float32_whatever_the_dtype(low: torch.dtype) -> None:
    level = torch.tensor([0.1, 1.0]).to(low)
    y = torch.randn(2, 3, generator=seeded()).to(low)
    assert DEFAULT.corrupt(y, level, torch.zeros(2, 3)).dtype == torch.float32
    assert {t.dtype for t in DEFAULT.precondition(level)} == {torch.float32}
    assert DEFAULT.weight(level).dtype == torch.float32


def test_prior_has_the_highest_noise() -> None:
    z = DEFAULT.prior((5000, 4), generator=seeded())
    assert z.dtype == torch.float32
    assert z.std().item() == pytest.approx(80.0, rel=0.02)
    assert torch.equal(z, DEFAULT.prior((5000, 4), generator=seeded()))


def test_to_dict_rebuilds_the_process() -> None:
    noise = EDM(p_mean=-0.4, p_std=1.0, sigma_min=0.01, sigma_max=50.0, sigma_data=1.0)
    assert EDM(**noise.to_dict()) == noise


# ---- quantiles that were fitted ------------------------------------------------------------------------------

KNOTS = (0.002, 0.05, 0.3, 0.4, 2.0, 80.0)
FITTED = EDM(quantiles=KNOTS)


def ascending_levels(low: float, high: float) -> st.SearchStrategy[tuple[float, ...]]:
    """2 to 12 levels from low to high, at least a hundredth part of the range in log sigma apart."""
    inner = st.lists(st.integers(1, 99), max_size=10, unique=True).map(sorted)
    return inner.map(lambda places: (low, *(low * (high / low) ** (place / 100) for place in places), high))


def test_the_quantiles_are_levels_at_equal_steps_of_mass() -> None:
    masses = torch.linspace(0.0, 1.0, 6, dtype=torch.float64)
    torch.testing.assert_close(FITTED.cdf(double(*KNOTS)), masses, rtol=0, atol=1e-12)
    torch.testing.assert_close(FITTED.icdf(masses), double(*KNOTS), rtol=1e-12, atol=0)
    assert FITTED.boundaries(5) == pytest.approx(KNOTS, rel=1e-12)
    assert FITTED.levels(5) == pytest.approx(KNOTS[::-1], rel=1e-12)
    # Between them mass is even over log sigma: the middle of the mass is the geometric mean of its neighbours.
    assert FITTED.icdf(double(0.3)).item() == pytest.approx(math.sqrt(0.05 * 0.3))
    assert FITTED.icdf(double(0.98)).item() == pytest.approx(2.0 * 40.0**0.9)


def test_two_quantiles_are_levels_even_over_log_sigma() -> None:
    noise = EDM(quantiles=(0.002, 80.0))
    assert noise.boundaries(7) == pytest.approx(noise.boundaries(7, "log-uniform"), rel=1e-12)
    levels = torch.logspace(-2, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(noise.density(levels), torch.full_like(levels, 1 / math.log(80.0 / 0.002)))


def test_the_normals_quantiles_are_the_normal() -> None:
    """Parity: at 4,000 steps of mass the interpolation and the closed form differ by little."""
    fine = EDM(quantiles=tuple(DEFAULT.boundaries(4000)))
    masses = torch.linspace(0.01, 0.99, 500, dtype=torch.float64)
    torch.testing.assert_close(fine.icdf(masses), DEFAULT.icdf(masses), rtol=1e-4, atol=0)
    levels = DEFAULT.icdf(masses)
    torch.testing.assert_close(fine.cdf(levels), masses, rtol=0, atol=1e-6)
    torch.testing.assert_close(fine.density(levels), DEFAULT.density(levels), rtol=0.02, atol=0)
    assert torch.equal(fine.weight(levels), DEFAULT.weight(levels))
    assert all(torch.equal(a, b) for a, b in zip(fine.precondition(levels), DEFAULT.precondition(levels), strict=True))


@given(ascending_levels(0.002, 80.0), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_mass_and_level_invert_each_other_between_any_quantiles(knots: tuple[float, ...], masses: list[float]) -> None:
    noise = EDM(quantiles=knots)
    levels = noise.icdf(double(*sorted(masses)))
    assert bool((levels.diff() >= 0).all())
    assert 0.002 <= levels.min() <= levels.max() <= 80.0
    torch.testing.assert_close(noise.cdf(levels), double(*sorted(masses)), rtol=0, atol=1e-9)
    grid = torch.linspace(math.log(0.002), math.log(80.0), 100_001, dtype=torch.float64)
    middle = (grid[1:] + grid[:-1]) / 2
    assert noise.density(middle.exp()).mean().item() * (grid[-1] - grid[0]).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("interval", [(0.002, 80.0), (0.1, 0.35), (0.3, 0.4), (1.0, 80.0)])
def test_levels_are_drawn_with_uniform_mass_of_the_quantiles(interval: tuple[float, float]) -> None:
    n = 20_000
    sigma = FITTED.sample(n, interval, generator=seeded(7))
    assert sigma.dtype == torch.float32
    assert sigma.min().item() >= interval[0] * (1 - 1e-6)
    assert sigma.max().item() <= interval[1] * (1 + 1e-6)
    low, high = FITTED.cdf(double(*interval)).tolist()
    assert kolmogorov_smirnov((FITTED.cdf(sigma) - low) / (high - low)) < 1.63 / math.sqrt(n)  # 1% level
    of_the_normal = DEFAULT.sample(n, interval, generator=seeded(7))
    assert (kolmogorov_smirnov((FITTED.cdf(of_the_normal) - low) / (high - low)) > 1.63 / math.sqrt(n)) == (
        interval != (0.3, 0.4)  # where both are all but even over log sigma
    )


def test_levels_outside_the_range_are_clamped_and_masses_outside_refused() -> None:
    assert FITTED.cdf(double(1e-6, 1e6)).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"quantiles must be in \[0, 1\]"):
        FITTED.icdf(double(1.2))


def test_quantiles_keep_dtype_shape_and_the_graph_whole() -> None:
    u = torch.rand(2, 3, generator=seeded())
    assert FITTED.icdf(u).dtype == torch.float64
    assert FITTED.icdf(u).shape == FITTED.cdf(u).shape == (2, 3)
    compiled = torch.compile(lambda levels: FITTED.density(levels) * FITTED.cdf(levels), backend="eager")
    levels = torch.tensor([0.01, 0.35, 5.0])
    assert torch.equal(compiled(levels), FITTED.density(levels) * FITTED.cdf(levels))


def test_quantiles_survive_json_and_copies() -> None:
    FITTED.sample(4, generator=seeded())  # what it keeps beside its fields goes nowhere
    assert EDM(**json.loads(json.dumps(FITTED.to_dict()))) == FITTED
    assert hash(EDM(quantiles=list(KNOTS))) == hash(FITTED)  # type: ignore[arg-type]
    config = BlocksConfig(noise=FITTED)
    again = BlocksConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.noise == FITTED
    assert again.noise != EDM(quantiles=(*KNOTS[:-2], 3.0, 80.0))
    assert torch.equal(copy.deepcopy(FITTED).icdf(double(0.3)), FITTED.icdf(double(0.3)))
    # A replaced distribution has knots of its own, not those kept for the old one.
    other = dataclasses.replace(FITTED, quantiles=(0.002, 80.0))
    assert other.icdf(double(0.5)).item() == pytest.approx(math.sqrt(0.002 * 80.0))


@pytest.mark.parametrize(
    ("knots", "words"),
    [
        ((), "at least 2 finite levels"),
        ((0.002,), "at least 2 finite levels"),
        ((0.002, 1.0, 1.0, 80.0), "ascend strictly"),
        ((0.002, 2.0, 1.0, 80.0), "ascend strictly"),
        ((0.002, math.nan, 80.0), "ascend strictly"),
        ((0.002, 1.0, math.inf), "finite levels"),
        ((0.003, 1.0, 80.0), "start at sigma_min = 0.002 and end at sigma_max = 80.0, got 0.003 to 80.0"),
        ((0.002, 1.0, 79.0), "got 0.002 to 79.0"),
    ],
)
def test_wrong_quantiles_are_refused(knots: tuple[float, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EDM(quantiles=knots)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_drawing_fitted_levels_waits_for_no_gpu_and_fits_in_a_graph() -> None:
    noise = EDM(quantiles=KNOTS)
    generator = torch.Generator("cuda").manual_seed(3)
    noise.sample(64, generator=generator, device="cuda")  # the knots go there once
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            noise.sample(64, (0.1, 1.0), generator=generator, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            levels = noise.sample(64, (0.1, 1.0), generator=generator, device="cuda")
        generator.manual_seed(3)
        graph.replay()
    torch.cuda.synchronize()
    expected = noise.sample(64, (0.1, 1.0), generator=generator.manual_seed(3), device="cuda")
    torch.testing.assert_close(levels, expected)


# ---- the levels that are read --------------------------------------------------------------------------------

COVERED = EDM(coverage=(0.001, 0.999))


@given(PROCESSES, st.floats(1e-4, 0.4), st.floats(0.6, 1 - 1e-4))
def test_coverage_ends_at_quantiles_of_the_training_distribution(noise: EDM, low: float, high: float) -> None:
    covered = dataclasses.replace(noise, coverage=(low, high))
    normal = NormalDist(noise.p_mean, noise.p_std)
    q_min, q_max = normal.cdf(math.log(noise.sigma_min)), normal.cdf(math.log(noise.sigma_max))
    expected = [math.exp(normal.inv_cdf(q_min + u * (q_max - q_min))) for u in (low, high)]
    assert [covered.read_min, covered.read_max] == pytest.approx(expected, rel=1e-6)


def test_coverage_by_hand() -> None:
    # log sigma ~ N(-1.2, 1.2^2), of which nearly all lies in [0.002, 80]; the normal's quantile of 0.999 is 3.0902.
    assert COVERED.read_max == pytest.approx(math.exp(-1.2 + 1.2 * 3.0902), rel=2e-3)
    assert COVERED.read_min == pytest.approx(math.exp(-1.2 - 1.2 * 3.0902), rel=1e-2)
    fitted = EDM(quantiles=KNOTS, coverage=(0.1, 0.95))  # five steps of mass 0.2, even over log sigma within each
    assert fitted.read_min == pytest.approx((0.002 * 0.05) ** 0.5)
    assert fitted.read_max == pytest.approx(2.0 * (80.0 / 2.0) ** 0.75)
    for whole in (EDM(), EDM(coverage=(0.0, 1.0)), EDM(coverage=[0.0, 1.0])):  # type: ignore[arg-type]
        assert (whole.read_min, whole.read_max) == (0.002, 80.0)


@given(PROCESSES, st.integers(1, 60), st.sampled_from(["equal-quantile", "karras"]))
def test_grids_and_prior_keep_to_what_is_covered(noise: EDM, steps: int, grid: str) -> None:
    noise = dataclasses.replace(noise, coverage=(0.01, 0.98))
    for levels in (noise.levels(steps, grid), noise.sampling_levels(steps + 1, grid)[:-1]):
        assert (levels[0], levels[-1]) == (noise.read_max, noise.read_min)
        assert all(b < a for a, b in itertools.pairwise(levels))
    torch.testing.assert_close(
        noise.prior((3,), generator=seeded()), noise.read_max * torch.randn(3, generator=seeded())
    )


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 12])
def test_with_a_step_a_block_every_block_is_called_once(blocks: int) -> None:
    partition = Partition.build(COVERED, blocks, blocks)
    assert [partition.block_of(level) for level in COVERED.levels(blocks)[:-1]] == list(range(blocks))


@pytest.mark.parametrize("steps", [2, 499, 500, 501, 3000])
def test_an_equal_mass_grid_finer_than_what_is_left_out_still_descends(steps: int) -> None:
    levels = COVERED.levels(steps)
    assert len(levels) == steps + 1
    assert all(b < a for a, b in itertools.pairwise(levels))


def test_the_network_is_told_no_level_that_is_not_read() -> None:
    level = torch.tensor([80.0, 20.0, 1.0, 0.003, 0.002])
    told = COVERED.condition(level)
    assert told.dtype == torch.float32
    ends = double(COVERED.read_max, COVERED.read_max, 1.0, COVERED.read_min, COVERED.read_min)
    torch.testing.assert_close(told, (0.25 * ends.log()).float())
    torch.testing.assert_close(DEFAULT.condition(level), 0.25 * level.log())
    # Only what is told: the preconditioning stays that of the level itself.
    for c, other in zip(COVERED.precondition(level), DEFAULT.precondition(level), strict=True):
        assert torch.equal(c, other)


def test_coverage_changes_neither_draws_nor_partition() -> None:
    assert torch.equal(COVERED.sample(100, generator=seeded()), DEFAULT.sample(100, generator=seeded()))
    assert COVERED.boundaries(7) == DEFAULT.boundaries(7)
    assert Partition.build(COVERED, 6, 3, overlap=0.1) == Partition.build(DEFAULT, 6, 3, overlap=0.1)
    assert EDM(**json.loads(json.dumps(COVERED.to_dict()))) == COVERED
    assert copy.deepcopy(COVERED).read_max == COVERED.read_max


@pytest.mark.parametrize("coverage", [(0.9, 0.1), (-0.1, 0.9), (0.1, 1.1), (math.nan, 1.0), (0.5, 0.5), (0.1,), 0.9])
def test_coverage_must_be_an_interval_of_mass(coverage: object) -> None:
    with pytest.raises(
        ValueError, match=r"coverage must be \(lowest, highest\) quantile with 0 <= lowest < highest <= 1"
    ):
        EDM(coverage=coverage)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "unread"), [("vit", 0.001), ("llama", 0.001), ("dit", 0.0)], ids=["labels", "next tokens", "images"]
)
def test_conversion_resolves_the_coverage_by_the_target(family: str, unread: float) -> None:
    for changes in ({}, {"noise": EDM(p_mean=-0.5)}):
        noise = convert(family, **changes).noise
        assert isinstance(noise, EDM)
        assert noise.coverage == (unread, 1 - unread)
    given = convert(family, noise=EDM(coverage=(0.0, 0.9))).noise
    assert isinstance(given, EDM)
    assert given.coverage == (0.0, 0.9)


@pytest.mark.parametrize("partition", ["log-uniform", "uniform"])
def test_under_other_partitions_coverage_is_of_what_all_blocks_draw_together(partition: str) -> None:
    model = convert("vit", partition=partition, overlap=0.0)
    drawn = torch.cat(
        [model.noise.sample(200_000, block.interval, generator=seeded(b)) for b, block in enumerate(model.blocks)]
    )  # type: ignore[arg-type]
    assert (drawn > model.noise.read_max).double().mean().item() == pytest.approx(0.001, abs=2e-4)
    assert (drawn < model.noise.read_min).double().mean().item() == pytest.approx(0.001, abs=2e-4)
