"""Flow matching: its path and distributions, the one space of its levels, the order of solvers on Gaussian data."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers import DIT_FAMILIES, convert, image_batch, noise_batch, seeded, token_batch, train_a_little
from torch import Tensor

from diffusionblocks import EDM, BlocksConfig, FlowMatching, Partition, load
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.noise import GaussianProcess
from diffusionblocks.sampling import SOLVERS

MU, S = 0.3, 0.8
DISTRIBUTIONS = [{"distribution": "uniform"}, {}, {"mean": -0.5, "std": 0.7}]
SHIFTS = [1.0, 3.0, 0.4]


def double(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def shift_of(t: float, s: float) -> float:
    """As it is printed (arXiv 2403.03206, eq. 23)."""
    return s * t / (1 + (s - 1) * t)


# ---- the path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_path_is_straight_and_the_shift_is_the_printed_one(shift: float) -> None:
    noise = FlowMatching(shift=shift)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    moved = double([shift_of(float(place), shift) for place in t])
    y, eps = torch.randn(2, 11, 5, generator=seeded(), dtype=torch.float64)
    z = noise.corrupt(y, t, eps)
    torch.testing.assert_close(z, (1 - moved)[:, None] * y + moved[:, None] * eps)
    # D = z - t' * v gives y for the velocity v = eps - y; and its loss under the weight is that of the velocity.
    raw = (eps - y).float()
    torch.testing.assert_close(noise.combine(z, raw, t), y, rtol=1e-6, atol=1e-6)
    wrong = raw + 0.25
    loss = (noise.combine(z, wrong, t) - y).square().mean(dim=1) * noise.training_weight(t)
    torch.testing.assert_close(loss[1:], torch.full((10,), 0.25**2, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    assert loss.isfinite().all()


def test_the_network_is_shown_z_itself_and_told_the_shifted_time() -> None:
    noise, t = FlowMatching(shift=3.0), torch.tensor([0.0, 0.25, 1.0])
    assert noise.condition(t).tolist() == [0.0, 0.5, 1.0]
    z = torch.randn(3, 4, generator=seeded())
    assert torch.equal(noise.scaled(z, t), z)
    assert torch.equal(noise.prior((2, 3), generator=seeded()), torch.randn(2, 3, generator=seeded()))


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_both_ends_of_the_path_are_exact_whatever_the_shift(solver: str) -> None:
    for shift in (0.05, 0.1, 0.2, 0.3, 0.45, 1.0, 1.1, 3.0, 7.3, 1e3):  # s / (1 + (s - 1)) is not 1 for some
        noise = FlowMatching(shift=shift)
        assert (noise.alpha_sigma(0.0), noise.alpha_sigma(1.0)) == ((1.0, 0.0), (0.0, 1.0))
        z = torch.randn(4, generator=seeded(), dtype=torch.float64)
        drawn = SOLVERS[solver](lambda z, level: torch.full_like(z, 0.3), z, noise.sampling_levels(4), noise)
        torch.testing.assert_close(drawn, torch.full_like(z, 0.3))


@pytest.mark.parametrize("process", [EDM(), FlowMatching(), FlowMatching(shift=3.0)], ids=str)
def test_rates_and_log_snr_are_those_of_alpha_and_sigma(process: GaussianProcess) -> None:
    for level in (0.1, 0.5, 0.9):
        step = 1e-6
        above, below = (process.alpha_sigma(level + end) for end in (step, -step))
        times = process.time(level + step) - process.time(level - step)
        for rate, high, low in zip(process.rates(level), above, below, strict=True):
            assert rate == pytest.approx((high - low) / times, abs=1e-6)
        alpha, sigma = process.alpha_sigma(level)
        assert process.log_snr(double(level)).item() == pytest.approx(math.log(alpha**2 / sigma**2), abs=1e-12)


# ---- the training distribution ----------------------------------------------------------------------------


def density_in_shifted_time(noise: FlowMatching, moved: Tensor) -> Tensor:
    """Written in t', where the density of t has the factor dt/dt'."""
    s = noise.shift
    t = moved / (s - (s - 1) * moved)
    if noise.distribution == "uniform":
        return s / (s - (s - 1) * moved).square()
    # The logit of t' is that of t plus log s: a logit-normal again.
    x = (moved.logit() - noise.mean - math.log(s)) / noise.std
    assert torch.allclose(t.logit() + math.log(s), moved.logit())
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi) / (noise.std * moved * (1 - moved))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("options", DISTRIBUTIONS, ids=str)
def test_boundaries_of_equal_probability_agree_with_quadrature(options: dict, shift: float) -> None:
    """Boundaries are closed forms in t; the probability between them is integrated in t', after the shift."""
    noise = FlowMatching(shift=shift, **options)
    boundaries = noise.boundaries(4)
    assert boundaries == FlowMatching(**options).boundaries(4)  # in the unshifted time
    for low, high in itertools.pairwise(boundaries):
        ends = [shift_of(low, shift), shift_of(high, shift)]
        width = (ends[1] - ends[0]) / 20_000
        middles = ends[0] + width * (torch.arange(20_000, dtype=torch.float64) + 0.5)
        assert float(density_in_shifted_time(noise, middles).sum() * width) == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("options", DISTRIBUTIONS, ids=str)
def test_cdf_icdf_density_and_draws_agree(options: dict) -> None:
    noise = FlowMatching(shift=3.0, **options)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(noise.cdf(noise.icdf(u)), u, rtol=0, atol=1e-12)
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    slope = (noise.cdf(t + 1e-6) - noise.cdf(t - 1e-6)) / 2e-6
    torch.testing.assert_close(noise.density(t), slope, rtol=1e-5, atol=1e-7)
    assert noise.density(double([0.0, 1.0])).isfinite().all()
    drawn = noise.sample(4000, (0.3, 0.6), generator=seeded())
    assert 0.3 <= float(drawn.min()) < float(drawn.max()) <= 0.6
    low, high = noise.cdf(double([0.3, 0.6])).tolist()
    uniform = ((noise.cdf(drawn) - low) / (high - low)).sort().values
    assert float((uniform - torch.linspace(0, 1, 4000, dtype=torch.float64)).abs().max()) < 0.03  # Kolmogorov-Smirnov


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_uniform_grid_is_linspace_shifted(shift: float) -> None:
    """What diffusers' FlowMatchEulerDiscreteScheduler steps through."""
    noise = FlowMatching(shift=shift)
    sigmas = [noise.alpha_sigma(level)[1] for level in noise.sampling_levels(4)]
    assert sigmas == pytest.approx([shift_of(t, shift) for t in (1.0, 0.75, 0.5, 0.25, 0.0)])
    assert len(noise.sampling_levels(1)) == 2  # one network call


# ---- one space: the block of a level ----------------------------------------------------------------------


def test_training_and_sampling_choose_a_level_s_block_by_one_function_under_a_shift(tmp_path) -> None:
    """With the shifted time in place of the level, another block would be chosen: the mistake that this rules out."""
    config = BlocksConfig(num_blocks=3, overlap=0.0, noise=FlowMatching(distribution="uniform", shift=3.0))
    model = convert("dit", layers=3, num_blocks=3, overlap=0.0, noise=config.noise).eval()
    noise, partition = model.noise, model.partition
    assert partition.boundaries == pytest.approx([0, 1 / 3, 2 / 3, 1])
    # Training: what the block draws, tells its network of and noises with.
    for b, block in enumerate(model.blocks):
        _, _, level = block.corrupted(noise_batch(64), seeded(b))
        assert set(partition.block_of(level).tolist()) == {b}
        assert noise.condition(level).tolist() == pytest.approx([shift_of(t, 3.0) for t in level.tolist()], abs=1e-6)
    # Sampling: which block runs at each level of a chain, and what it is told.
    told: list[tuple[int, float]] = []
    for b, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, b=b: told.append((b, float(args[2][0]))))
    model.sample([1], steps=8)
    levels = noise.sampling_levels(8)[:-1]
    assert told == [(partition.block_of(t), pytest.approx(t)) for t in levels]
    # Positive control: the shifted time names another block for some of these levels.
    other = [partition.block_of(shift_of(t, 3.0)) for t in levels]
    assert other != [b for b, _ in told]
    # What is saved says it all: boundaries in t, and the shift beside them.
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert (loaded.partition, loaded.noise) == (partition, noise)
    assert loaded.noise.shift == 3.0


def test_loss_of_a_block_is_that_of_the_velocity() -> None:
    """A model that gives nothing (adaLN-zero's start) predicts velocity 0: the loss is the mean square of eps - y."""
    model = convert("dit", layers=3, noise=FlowMatching(), target={"kind": "image", "weight": "edm"})
    for parameter in model.parameters():
        parameter.data.zero_()
    batch = noise_batch(256)
    loss = model.loss(batch, 1, seeded()).mean().item()
    assert loss == pytest.approx(1 + batch["pixel_values"].square().mean().item(), rel=0.05)


# ---- families ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DIT_FAMILIES)
def test_a_diffusion_model_trains_and_draws(family: str) -> None:
    model = convert(family, layers=3, noise={"kind": "flow", "shift": 2.0})
    before = [model.loss(noise_batch(64), b, seeded()).mean().item() for b in range(3)]
    train_a_little(model, noise_batch, steps=5)
    after = [model.loss(noise_batch(64), b, seeded()).mean().item() for b in range(3)]
    assert all(new < old for new, old in zip(after, before, strict=True)), (before, after)
    for solver in SOLVERS:
        assert model.sample([0, 1], steps=4, solver=solver).isfinite().all()


def test_a_classifier_and_a_language_model_take_it_too() -> None:
    """By what the process offers: their target is numbers, so it is noised as an image is."""
    classifier = convert("vit", noise={"kind": "flow"}).eval()
    assert classifier.noise.coverage == (0.001, 0.999)  # the target's default, as under EDM
    images = image_batch(2)["pixel_values"]
    assert classifier.predict(images, steps=4).probabilities.sum(dim=1).tolist() == pytest.approx([1, 1])
    text = convert("llama", noise={"kind": "flow"}).eval()
    assert text.loss(token_batch(2), 0, seeded()).isfinite().all()
    assert [len(row) for row in text.continue_texts([[1, 2]], 3).tokens] == [5]


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "vit",
            ["blocks.noise={kind: flow}", "fit={steps: 9}"],
            "fit writes the levels .* process flow has not",
        ),
        ("dit", ["blocks.noise.kind=flow", "blocks.noise.p_mean=0"], r"blocks\.noise\.p_mean: no such field"),
        (
            "dit",
            ["blocks.noise.kind=flow", "blocks.noise.shift=0"],
            r"blocks\.noise\.shift: shift must be a finite",
        ),
        ("dit", ["blocks.noise.kind=folw"], r"kind = 'folw' is no noise process .*allowed: ddpm, edm, flow, masking"),
    ],
)
def test_recipes_are_refused_in_one_line(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(Path(__file__).parents[2] / "recipes" / recipe / "digits.yaml", overrides)


# ---- solvers on Gaussian data -----------------------------------------------------------------------------


def perfect(process: GaussianProcess):
    """E[y | z] for y ~ N(MU, S^2)."""

    def denoise(z: Tensor, level: float) -> Tensor:
        alpha, sigma = process.alpha_sigma(level)
        gain = alpha * S**2 / (alpha**2 * S**2 + sigma**2)
        return MU + gain * (z - alpha * MU)

    return denoise


def exact(process: GaussianProcess, z: Tensor, high: float, low: float) -> Tensor:
    """Where the probability flow takes z: marginals are Gaussian, and their quantiles are kept."""

    def scale(level: float) -> tuple[float, float]:
        alpha, sigma = process.alpha_sigma(level)
        return alpha * MU, math.sqrt(alpha**2 * S**2 + sigma**2)

    (mean, std), (mean_low, std_low) = scale(high), scale(low)
    return mean_low + std_low / std * (z - mean)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp-2m"])
def test_solvers_reach_their_order_under_flow(solver: str, shift: float) -> None:
    process = FlowMatching(shift=shift)
    z = torch.randn(64, generator=seeded(), dtype=torch.float64)

    def error(steps: int, low: float) -> float:
        levels = [1 - (1 - low) * i / steps for i in range(steps + 1)]
        return (SOLVERS[solver](perfect(process), z, levels, process) - exact(process, z, 1.0, low)).abs().max().item()

    errors = [error(steps, 0.02) for steps in (64, 128, 256, 512)]
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert orders[-1] == pytest.approx(SOLVERS[solver].order, abs=0.2), orders
    # Down to the data: the last step is Euler's.
    landed = SOLVERS[solver](perfect(process), z, process.sampling_levels(256), process)
    assert (landed - exact(process, z, 1.0, 0.0)).abs().max().item() < 0.03


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp-2m"])
def test_a_chain_towards_a_point_is_exact_in_any_number_of_steps(solver: str) -> None:
    process = FlowMatching(shift=3.0)
    y, eps = torch.randn(2, 5, generator=seeded(), dtype=torch.float64)
    for steps in (1, 2, 7):
        levels = [*process.sampling_levels(steps)[:-1], 0.1]
        alpha, sigma = process.alpha_sigma(0.1)
        landed = SOLVERS[solver](lambda z, level: y, eps, levels, process)
        torch.testing.assert_close(landed, alpha * y + sigma * eps, rtol=1e-12, atol=1e-12)


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowMatching(shift=0.0), "shift must be a finite number > 0, got 0.0"),
        (lambda: FlowMatching(std=math.nan), "std must be a finite number > 0, got nan"),
        (lambda: FlowMatching(mean=math.inf), "mean must be finite"),
        (lambda: FlowMatching(distribution="beta"), "unknown distribution 'beta'; allowed: logit-normal, uniform"),
        (lambda: FlowMatching().boundaries(3, "log-uniform"), "for flow; allowed: equi-probability, uniform"),
        (lambda: FlowMatching().levels(4, "karras"), "'karras' for flow; allowed: equal-quantile, uniform"),
        (lambda: FlowMatching().levels(0), "steps must be >= 1"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_process_of_tokens_is_refused_for_images_and_the_message_says_what_fits() -> None:
    with pytest.raises(ValueError, match=r"blocks.noise.kind = masking, but .*DiT.* needs ddpm or edm or flow"):
        convert("dit", noise={"kind": "masking"})
    assert isinstance(Partition.build(FlowMatching(), 3, 3), Partition)
