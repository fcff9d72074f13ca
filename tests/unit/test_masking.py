"""Masking: schedules against their formulas, boundaries, antithetic levels, corruption, the two unbiased weights."""

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from helpers import seeded
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from diffusionblocks.core.partition import Partition
from diffusionblocks.noise import Masking

LINEAR, COSINE = Masking(), Masking(schedule="cosine")
BOTH = pytest.mark.parametrize("process", [LINEAR, COSINE], ids=["linear", "cosine"])
PROCESSES = st.builds(Masking, schedule=st.sampled_from(["linear", "cosine"]), epsilon=st.floats(1e-6, 0.1))
E = 1e-4


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def alpha(process: Masking, t: float) -> float:
    """MD4's formula, by another road than the code's."""
    a = 1 - t if process.schedule == "linear" else 1 - math.cos(math.pi / 2 * (1 - t))
    return (1 - 2 * process.epsilon) * a + process.epsilon


# ---- schedules --------------------------------------------------------------------------------------------


@given(PROCESSES, st.floats(0.0, 1.0))
def test_masked_is_one_minus_alpha(process: Masking, t: float) -> None:
    assert process.masked(double(t)).item() == pytest.approx(1 - alpha(process, t), abs=1e-12)


@given(PROCESSES, st.floats(0.0, 1.0))
def test_mass_is_the_decrement_of_alpha(process: Masking, t: float) -> None:
    whole = alpha(process, 0) - alpha(process, 1)
    assert process.cdf(double(t)).item() == pytest.approx((alpha(process, 0) - alpha(process, t)) / whole, abs=1e-11)


@given(PROCESSES, st.floats(0.0, 1.0))
def test_mass_of_inverts_level_of(process: Masking, u: float) -> None:
    assert process.cdf(process.icdf(double(u))).item() == pytest.approx(u, abs=1e-12)


@given(PROCESSES, st.floats(0.01, 0.99))
def test_weight_is_the_slope_of_alpha_over_one_minus_alpha(process: Masking, t: float) -> None:
    h = 1e-6
    slope = (alpha(process, t + h) - alpha(process, t - h)) / (2 * h)
    assert process.weight(double(t)).item() == pytest.approx(-slope / (1 - alpha(process, t)), rel=1e-5)


@BOTH
def test_the_whole_weight_of_a_masked_token_is_one(process: Masking) -> None:
    """The integral of w(t) * (1 - alpha(t)) over t is alpha(0) - alpha(1), by the trapezoidal rule."""
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert torch.trapezoid(process.weight(t) * process.masked(t), t).item() == pytest.approx(1 - 2 * E, abs=1e-9)


# ---- intervals --------------------------------------------------------------------------------------------


def test_boundaries_are_the_closed_forms() -> None:
    assert LINEAR.boundaries(4) == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-15)
    expected = [1 - 2 / math.pi * math.acos(b / 3) for b in range(4)]
    assert COSINE.boundaries(3) == pytest.approx(expected, abs=1e-12)
    assert COSINE.boundaries(3)[0] == 0.0
    assert COSINE.boundaries(3)[-1] == 1.0
    assert COSINE.boundaries(4, "uniform") == [0, 0.25, 0.5, 0.75, 1]


def test_block_0_masks_most() -> None:
    partition = Partition.build(COSINE, 6, 3)  # type: ignore[arg-type]
    shares = [COSINE.share(partition.interval(b)) for b in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=1e-12)
    assert partition.interval(0)[1] == 1.0
    assert partition.interval(2)[0] == 0.0
    assert [partition.block_of(t) for t in (1.0, 0.0)] == [0, 2]
    for block in range(3):
        drawn = COSINE.sample(64, partition.interval(block), generator=seeded())
        assert partition.block_of(drawn).unique().tolist() == [block]
    assert Partition.from_dict(partition.to_dict()) == partition


@BOTH
def test_overlap_is_a_share_of_the_mass(process: Masking) -> None:
    bottom, middle, top = itertools.pairwise(process.boundaries(3))
    assert process.share(process.widen(middle, 0.1)) == pytest.approx(1.2 / 3)
    assert process.share(process.widen(bottom, 0.1)) == pytest.approx(1.1 / 3)
    assert process.widen(bottom, 0.1)[0] == 0.0
    assert process.widen(top, 0.1)[1] == 1.0
    assert process.widen(middle, 0.0) == middle


@BOTH
@pytest.mark.parametrize("grid", ["equal-quantile", "uniform", "cosine"])
def test_level_grids_descend_from_1_to_0(process: Masking, grid: str) -> None:
    levels = process.levels(5, grid)
    assert len(levels) == 6
    assert (levels[0], levels[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in itertools.pairwise(levels))
    mass = process.cdf(double(*levels))
    if grid == "equal-quantile":
        assert mass.diff().tolist() == pytest.approx([-0.2] * 5)
    if grid == "cosine":
        assert mass.tolist() == pytest.approx([math.sin(math.pi / 2 * (1 - i / 5)) for i in range(6)], abs=1e-12)


# ---- levels -----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("coordinate", ["quantile", "level"])
def test_antithetic_levels_take_one_in_every_stratum(process: Masking, coordinate: str) -> None:
    low, high = process.boundaries(3)[1:3]
    level = process.sample(10, (low, high), generator=seeded(), coordinate=coordinate)
    assert level.dtype == torch.float32
    place = process.cdf(level) if coordinate == "quantile" else level.double()
    ends = process.cdf(double(low, high)).tolist() if coordinate == "quantile" else [low, high]
    strata = ((place - ends[0]) / (ends[1] - ends[0]) * 10).sort().values
    offsets = strata - torch.arange(10)
    assert offsets.tolist() == pytest.approx([offsets[0].item()] * 10, abs=1e-4)
    assert 0 <= offsets[0] < 1
    assert level.diff().sign().unique().numel() <= 2  # one wrap round the end at most
    assert int((level.diff() < 0).sum()) <= 1


def test_each_row_of_antithetic_levels_is_uniform() -> None:
    generator = seeded()
    third = torch.stack([COSINE.cdf(COSINE.sample(4, generator=generator))[2] for _ in range(2000)])
    counts = torch.histc(third.float(), 10, 0, 1)
    # 10 bins of 200: chi-square with 9 degrees of freedom is below 27.9 with probability 0.999.
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9


@BOTH
@pytest.mark.parametrize("antithetic", [True, False])
def test_both_coordinates_estimate_the_same_integral(process: Masking, antithetic: bool) -> None:
    """A loss of (1 - alpha)^2: the integral of (1 - alpha) d(1 - alpha) over one block of three."""
    low, high = process.boundaries(3)[1:3]
    m_low, m_high = process.masked(double(low, high)).tolist()
    exact = (m_high**2 - m_low**2) / 2
    generator = seeded()
    for coordinate, weight in (("level", process.weight), ("quantile", process.weight_by_quantile)):
        width = process.share((low, high)) if coordinate == "quantile" else high - low
        means = []
        for _ in range(400):
            t = process.sample(8, (low, high), generator=generator, coordinate=coordinate, antithetic=antithetic)
            means.append((width * weight(t) * process.masked(t) ** 2).mean())
        estimates = torch.stack(means)
        error = (estimates.std() / 20).item()
        assert abs(estimates.mean().item() - exact) < 4 * error + 1e-7
        assert error < 0.01 * exact


def test_mass_varies_less_than_level() -> None:
    """With the loss of a masked token the same at every level, a draw by mass has no variance at all."""
    t = COSINE.sample(1000, generator=seeded(), coordinate="quantile", antithetic=False)
    assert (COSINE.weight_by_quantile(t) * COSINE.masked(t)).std() < 1e-12
    t = COSINE.sample(1000, generator=seeded(), coordinate="level", antithetic=False)
    assert (COSINE.weight(t) * COSINE.masked(t)).std() > 0.1


def test_sampling_follows_its_generator() -> None:
    assert torch.equal(LINEAR.sample(9, generator=seeded(3)), LINEAR.sample(9, generator=seeded(3)))
    assert not torch.equal(LINEAR.sample(9, generator=seeded(3)), LINEAR.sample(9, generator=seeded(4)))


# ---- corruption -------------------------------------------------------------------------------------------


@BOTH
def test_tokens_are_masked_with_probability_one_minus_alpha(process: Masking) -> None:
    y = torch.randint(27, (3, 40_000), generator=seeded())
    level = torch.tensor([0.1, 0.5, 0.9])
    z = process.corrupt(y, level, process.draws(tuple(y.shape), generator=seeded(1)))
    assert z.dtype == y.dtype
    hidden = z == 27
    assert torch.equal(z[~hidden], y[~hidden])
    expected = process.masked(level)
    error = (expected * (1 - expected) / 40_000).sqrt()
    assert bool(((hidden.double().mean(dim=1) - expected).abs() < 4 * error).all())


def test_more_noise_masks_the_same_tokens_and_more() -> None:
    y = torch.randint(27, (1, 500), generator=seeded())
    noise = LINEAR.draws((1, 500), generator=seeded(1))
    less, more = (LINEAR.corrupt(y, torch.tensor([t]), noise) == 27 for t in (0.3, 0.6))
    assert bool((less <= more).all())
    assert less.sum() < more.sum()


def test_ends_of_the_chain() -> None:
    y = torch.randint(27, (1, 1000), generator=seeded(), dtype=torch.uint8)
    noise = torch.full((1, 1000), 0.5)
    assert torch.equal(LINEAR.corrupt(y, torch.tensor([0.0]), noise), y)
    assert bool((LINEAR.corrupt(y, torch.tensor([1.0]), noise) == 27).all())
    assert LINEAR.prior((2, 3)).tolist() == [[27] * 3] * 2
    assert LINEAR.reconstruction(256) == pytest.approx(256 * (1 - alpha(LINEAR, 0)) * math.log(27), rel=1e-9)
    assert LINEAR.prior_term(256) == pytest.approx(256 * alpha(LINEAR, 1) * math.log(27), rel=1e-9)


# ---- saving and refusals ----------------------------------------------------------------------------------


def test_to_dict_and_back_through_pydantic() -> None:
    family = TypeAdapter(Masking)
    process = Masking(vocab_size=5, schedule="cosine", epsilon=1e-3)
    assert family.validate_python(process.to_dict()) == process
    with pytest.raises(ValueError, match="sigma_max"):
        family.validate_python({"sigma_max": 80.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Masking(vocab_size=1), "vocab_size must be a whole number >= 2, got 1"),
        (lambda: Masking(schedule="sigmoid"), "unknown schedule 'sigmoid'; allowed: linear, cosine"),
        (lambda: Masking(epsilon=0.0), "epsilon must be in"),
        (lambda: LINEAR.boundaries(0), "must be >= 1, got 0"),
        (lambda: LINEAR.boundaries(3, "log-uniform"), "unknown partition strategy 'log-uniform'"),
        (lambda: LINEAR.levels(0), "steps must be >= 1"),
        (lambda: LINEAR.levels(4, "karras"), "unknown level grid 'karras'"),
        (lambda: LINEAR.sample(4, (0.5, 0.5)), "must ascend"),
        (lambda: LINEAR.sample(4, (0.5, 1.5)), "must ascend within the noise range"),
        (lambda: LINEAR.sample(4, coordinate="time"), "unknown coordinate 'time'"),
        (lambda: LINEAR.icdf(double(1.5)), "quantiles must be in"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- levels fitted to losses ---------------------------------------------------------------------------------


def fitted(process: Masking, loss_of_share: Callable[[torch.Tensor], torch.Tensor], *, floor: float = 0.05) -> Masking:
    """Fitted to a loss that is known: nats of a masked token where a share u of the text is masked."""
    levels = process.fit_grid(64)
    masked = process.masked(double(*levels))
    losses = masked * loss_of_share((masked - E) / (1 - 2 * E))
    return process.fit_to(levels, losses.tolist(), equal="loss", floor=floor)


@BOTH
def test_the_fitted_quantile_is_the_normalised_cumulative_of_the_loss(process: Masking) -> None:
    """Of a masked token's loss c + u it is (c u + u^2 / 2) / (c + 1 / 2), mixed with the share that stays even."""
    share = torch.linspace(0, 1, 65, dtype=torch.float64)
    quantile = fitted(process, lambda u: 0.5 + u).cdf(process.icdf(share))
    expected = 0.95 * (0.5 * share + share**2 / 2) + 0.05 * share
    # Between the grid's ends probability is even, and the table's steps cut the corners of that.
    torch.testing.assert_close(quantile, expected, atol=1e-3, rtol=0)
    even = fitted(process, lambda u: torch.ones_like(u)).cdf(process.icdf(share))
    torch.testing.assert_close(even, share, atol=1e-3, rtol=0)


@BOTH
def test_the_weighted_loss_is_the_same_at_all_fitted_levels(process: Masking) -> None:
    def weighted(noise: Masking) -> torch.Tensor:
        level = noise.icdf((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
        masked = noise.masked(level)
        return noise.training_weight(level) * masked * (0.2 + (masked - E) / (1 - 2 * E))

    def spread(noise: Masking) -> float:
        values = weighted(noise)
        return (values.std() / values.mean()).item()

    constant = fitted(process, lambda u: 0.2 + u, floor=1e-6)
    assert spread(constant) < 0.02
    assert spread(process) > 0.3
    # The integral, which is the bound, is that of the process that was fitted.
    expected = (1 - 2 * E) * (0.2 + 0.5)
    for noise in (process, constant, fitted(process, lambda u: 3 - 2 * u, floor=0.3)):
        assert weighted(noise).mean().item() == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_falls_is_made_monotone_and_the_floor_bounds_the_weight() -> None:
    noise = fitted(LINEAR, lambda u: 2 - u)
    torch.testing.assert_close(noise.cdf(double(0.25, 0.5)), double(0.25, 0.5), atol=1e-3, rtol=0)
    steep = fitted(LINEAR, lambda u: (u > 0.9).double(), floor=0.1)
    level = torch.linspace(0, 1, 1001, dtype=torch.float64)
    ratio = steep.weight_by_quantile(level) / LINEAR.weight_by_quantile(level)
    assert ratio.max().item() == pytest.approx(1 / 0.1, rel=0.02)


def test_fitted_levels_are_saved_and_their_weights_by_level_stay() -> None:
    noise = fitted(COSINE, lambda u: 0.1 + u)
    again = TypeAdapter(Masking).validate_python(json.loads(json.dumps(noise.to_dict())))
    assert again == noise
    assert hash(again) == hash(noise)
    level = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for name in ("weight", "masked", "condition"):
        torch.testing.assert_close(getattr(noise, name)(level), getattr(COSINE, name)(level), rtol=0, atol=0)
    torch.testing.assert_close(noise.icdf(noise.cdf(level)), level, atol=1e-12, rtol=0)
    h = 1e-7
    slope = (noise.cdf(level + h) - noise.cdf(level - h)) / (2 * h)
    torch.testing.assert_close(noise.density(level), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("quantiles", "message"),
    [
        ((0.0, 0.5), "must start at level = 0.0 and end at level = 1.0, got 0.0 to 0.5"),
        ((0.0, 0.5, 0.5, 1.0), "ascend strictly"),
        ((0.0, math.nan, 1.0), "ascend strictly"),
    ],
)
def test_tables_that_are_no_quantiles_are_refused(quantiles: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Masking(quantiles=quantiles)
