"""Solvers against the closed form of the probability-flow ODE for Gaussian data."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks import EDM, FlowMatching, Partition
from diffusionblocks.noise import GaussianProcess
from diffusionblocks.sampling import (
    SOLVERS,
    Callback,
    Churn,
    Denoiser,
    calls,
    dpmpp_2m,
    dpmpp_3m,
    euler,
    heun,
    network_calls,
    unipc,
)

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
@pytest.mark.parametrize(
    ("solver", "order", "most"),
    [("euler", 1, 0.02), ("heun", 2, 1e-4), ("dpmpp-2m", 2, 1e-4), ("dpmpp-3m", 2, 1e-5), ("unipc", 3, 1e-6)],
)
def test_solvers_converge_at_their_order(solver: str, order: int, most: float, name: str) -> None:
    assert SOLVERS[solver].order == order
    errors = [error(grid(name, steps), solver) for steps in (128, 256, 512, 1024)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06 if solver != "dpmpp-3m" else 0.12)
    assert errors[-1] < most


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
    steps = {"euler": made, "heun": (made + 1) // 2, "dpmpp-2m": made, "dpmpp-3m": made, "unipc": made}
    assert {calls(solver, n, True) for solver, n in steps.items()} == {made}
    errors = {solver: error(NOISE.sampling_levels(n, "karras"), solver) for solver, n in steps.items()}
    assert 2 * errors["dpmpp-2m"] < errors["heun"] < errors["euler"]
    assert errors["unipc"] < errors["dpmpp-2m"]
    assert 1.5 * errors["dpmpp-3m"] < errors["dpmpp-2m"]


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


PATHS = {"edm": NOISE, "flow": FlowMatching(), "shifted": FlowMatching(shift=3.0)}


def by_diffusers(scheduler: str, process: GaussianProcess, levels: list[float], order: int) -> Tensor:
    """A chain of a scheduler of diffusers at the same levels, for a target of known mean and deviation.

    It computes in float32. Its variance-preserving z is ours times alpha = 1 / sqrt(1 + sigma^2).
    """
    import diffusers

    flow = isinstance(process, FlowMatching)
    options = {"solver_order": order, "prediction_type": "flow_prediction" if flow else "sample"}
    options |= {"use_flow_sigmas": True} if flow else {}
    options |= {"lower_order_final": True, "final_sigmas_type": "zero"}
    if scheduler == "UniPCMultistepScheduler":
        options["solver_type"] = "bh2"
    steps = getattr(diffusers, scheduler)(**options)
    steps.set_timesteps(len(levels) - 1)
    steps.sigmas = torch.tensor([process.alpha_sigma(level)[1] for level in levels], dtype=torch.float64)
    z = path_start(process, levels[0])
    scale = [1.0 if flow else (1.0 + sigma**2) ** -0.5 for sigma in steps.sigmas.tolist()]
    x = z * scale[0]
    for i, t in enumerate(steps.timesteps):
        d = on_path(process)(x / scale[i], levels[i])
        output = (x - d) / steps.sigmas[i] if flow else d
        x = steps.step(output, t, x, return_dict=False)[0]
    return x


def on_path(process: GaussianProcess) -> Denoiser:
    """E[y | z] for y ~ N(MU, S^2) and z = alpha * y + sigma * eps."""

    def denoise(z: Tensor, level: float) -> Tensor:
        alpha, sigma = process.alpha_sigma(level)
        return MU + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (z - alpha * MU)

    return denoise


def path_start(process: GaussianProcess, level: float) -> Tensor:
    return process.alpha_sigma(level)[1] * torch.randn(64, 4, generator=seeded(), dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("solver", "scheduler", "order"),
    [
        ("dpmpp-2m", "DPMSolverMultistepScheduler", 2),
        ("dpmpp-3m", "DPMSolverMultistepScheduler", 3),
        ("unipc", "UniPCMultistepScheduler", 2),
    ],
)
def test_multistep_solvers_are_those_of_diffusers(solver: str, scheduler: str, order: int, path: str) -> None:
    process = PATHS[path]
    levels = process.sampling_levels(20)  # below 15 steps diffusers lowers the order of the last but one
    if path != "edm":
        levels[0] = 0.999  # at t = 1 diffusers divides by alpha = 0
    ours = SOLVERS[solver](on_path(process), path_start(process, levels[0]), levels, process)
    torch.testing.assert_close(ours, by_diffusers(scheduler, process, levels, order), rtol=1e-4, atol=1e-5)
    # Positive control: the closest other solver is another chain.
    other = {"dpmpp-2m": unipc, "dpmpp-3m": dpmpp_2m, "unipc": dpmpp_2m}[solver]
    assert (other(on_path(process), path_start(process, levels[0]), levels, process) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("function", [dpmpp_3m, unipc])
def test_a_start_without_signal_has_a_finite_chain(function: Callable[..., Tensor]) -> None:
    """At alpha = 0 lambda is -inf: that step is Euler's, and no history."""
    process = PATHS["flow"]
    levels = process.sampling_levels(64)
    assert process.alpha_sigma(levels[0])[0] == 0
    z = path_start(process, levels[0])
    assert torch.equal(
        function(on_path(process), z, levels[:2], process), euler(on_path(process), z, levels[:2], process)
    )
    landed = function(on_path(process), z, levels, process)
    exact_end = MU + S * z  # the flow maps quantiles to quantiles
    assert (landed - exact_end).abs().max() < 0.25 * (
        euler(on_path(process), z, levels, process) - exact_end
    ).abs().max()


@pytest.mark.parametrize("solver", ["dpmpp-2m", "dpmpp-3m", "unipc"])
def test_multistep_solvers_go_on_with_their_history_over_a_boundary_of_blocks(solver: str) -> None:
    """Blocks that are both exact are one denoiser; had the history ended at the boundary, it would show."""
    levels = NOISE.sampling_levels(12)
    partition = Partition.build(NOISE, num_layers=2, num_blocks=2)
    crossed = next(i for i in range(12) if partition.block_of(levels[i]) == 1)
    assert 2 < crossed < 9
    whole = run(solver, perfect, start(), levels)
    restarted = run(solver, perfect, run(solver, perfect, start(), levels[: crossed + 1]), levels[crossed:])
    blocks = {0: perfect, 1: lambda z, level: perfect(z, level)}
    assert torch.equal(
        run(solver, lambda z, level: blocks[partition.block_of(level)](z, level), start(), levels), whole
    )
    assert (whole - restarted).abs().max() > 1e-3


# ---- churn ------------------------------------------------------------------------------------------------


def churn(amount: float, seed: int = 3, **options: Any) -> Churn:
    generator = seeded(seed)
    return Churn(amount, lambda: torch.randn(64, 4, generator=generator, dtype=torch.float64), **options)


def test_stochastic_heun_is_edm_algorithm_2() -> None:
    """Written as the algorithm is printed, and as NVIDIA's `edm_sampler` caps gamma."""
    levels, amount, (low, high), inflation = NOISE.sampling_levels(9, "karras"), 5.0, (0.05, 50.0), 1.01
    x, eps = start(), seeded(3)
    for t, t_next in itertools.pairwise(levels):
        gamma = min(amount / 9, math.sqrt(2) - 1) if low <= t <= high else 0.0
        t_hat = t + gamma * t
        if gamma:
            noise = torch.randn(64, 4, generator=eps, dtype=torch.float64)
            x = x + math.sqrt(t_hat**2 - t**2) * inflation * noise
        d = (x - perfect(x, t_hat)) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (x_next - perfect(x_next, t_next)) / t_next
            x_next = x + (t_next - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    ours = heun(perfect, start(), levels, NOISE, churn=churn(amount, interval=(low, high), noise=inflation))
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours, heun(perfect, start(), levels, NOISE))


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if solver.churns])
def test_churn_of_zero_is_the_solver_without_it(solver: str) -> None:
    levels = NOISE.sampling_levels(9, "karras")

    def refuse() -> Tensor:
        raise AssertionError("noise was drawn")

    function = SOLVERS[solver].function
    for none in (Churn(0.0, refuse), Churn(40.0, refuse, interval=(100.0, 200.0))):
        assert torch.equal(function(perfect, start(), levels, NOISE, churn=none), run(solver, perfect, start(), levels))  # type: ignore[call-arg]


@pytest.mark.each_value
@pytest.mark.parametrize("path", PATHS)
def test_churned_samples_have_the_targets_distribution(path: str) -> None:
    """The stochastic sampler's own noise is what the levels say: mean and deviation of the target come out."""
    process, n = PATHS[path], 20_000
    levels, eps = process.sampling_levels(80), seeded(5)
    z = process.alpha_sigma(levels[0])[1] * torch.randn(n, generator=seeded(4), dtype=torch.float64)
    fresh = Churn(40.0, lambda: torch.randn(n, generator=eps, dtype=torch.float64))
    landed = heun(on_path(process), z, levels, process, churn=fresh)
    assert landed.mean().item() == pytest.approx(MU, abs=0.02)
    assert landed.std().item() == pytest.approx(S, abs=0.02)
    # Most of what they came from is forgotten, which is what the noise is for.
    plain = heun(on_path(process), z, levels, process)
    together = torch.stack([landed, z]).corrcoef()[0, 1], torch.stack([plain, z]).corrcoef()[0, 1]
    assert together[0] < 0.5 < 0.99 < together[1]


@pytest.mark.parametrize("path", PATHS)
def test_churn_raises_the_ratio_by_its_factor_and_not_past_the_highest_level(path: str) -> None:
    process = PATHS[path]

    def ratio(level: float) -> float:
        alpha, sigma = process.alpha_sigma(level)
        return sigma / alpha

    for level in (0.1, 0.5, 0.7):
        assert ratio(process.noisier(level, 1.3)) == pytest.approx(1.3 * ratio(level), rel=1e-9)
    assert process.noisier(process.read_max, 1.3) == process.read_max
    assert process.noisier(0.9 * process.read_max, 1e9) <= process.read_max
    assert process.noisier(0.5, 1.0) == 0.5


def test_solvers_that_rely_on_earlier_steps_take_no_churn() -> None:
    for solver in ("dpmpp-2m", "dpmpp-3m", "unipc"):
        with pytest.raises(ValueError, match=f"churn = 40 .* euler, heun, and not for {solver}.* set churn to 0"):
            SOLVERS[solver](perfect, start(), [2.0, 1.0], NOISE, None, churn(40.0))
        assert torch.equal(
            SOLVERS[solver](perfect, start(), [2.0, 1.0], NOISE, None, churn(0.0)),
            run(solver, perfect, start(), [2.0, 1.0]),
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amount": -1.0}, "churn must be a finite number >= 0, got -1.0"),
        ({"amount": math.inf}, "churn must be a finite number >= 0, got inf"),
        ({"amount": 1.0, "noise": 0.0}, "churn_noise must be a finite number > 0, got 0.0"),
        ({"amount": 1.0, "interval": (2.0, 1.0)}, r"churn_interval must be two finite numbers.*\[2.0, 1.0\]"),
    ],
)
def test_churn_out_of_range_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        churn(**options)


def test_network_calls_lists_what_a_chain_asks() -> None:
    levels = NOISE.sampling_levels(3)
    for solver in SOLVERS:
        listed = network_calls(solver, levels, NOISE)
        assert len(listed) == calls(solver, 3, True)
        assert [(step, level) for step, level, starts in listed if starts] == list(enumerate(levels[:-1]))
    assert [(call.step, call.level) for call in network_calls("heun", levels, NOISE) if not call.starts] == [
        (0, levels[1]),
        (1, levels[2]),
    ]
    raised = network_calls("euler", levels, NOISE, churn=0.3, churn_interval=(0.1, 50.0))
    assert [call.level for call in raised] == pytest.approx([levels[0], 1.1 * levels[1], levels[2]])


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
    with pytest.raises(ValueError, match="unknown solver 'rk4'; allowed: euler, heun, dpmpp-2m, dpmpp-3m, unipc"):
        calls("rk4", 3, True)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        calls("heun", 0, True)
