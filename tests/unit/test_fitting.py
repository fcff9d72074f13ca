"""Levels from measured losses: closed forms, isotonic regression against scikit-learn's, the floor's bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from diffusionblocks import EDM
from diffusionblocks.noise import accumulated, fitted_quantiles
from diffusionblocks.noise.fitted_levels import STEPS, isotonic

LOW, HIGH, WIDTH = 0.002, 80.0, math.log(80.0 / 0.002)
GRID = EDM().boundaries(32, "log-uniform")
LOSSES = st.lists(st.floats(0.0, 10.0), min_size=len(GRID), max_size=len(GRID))


def mass_between(quantiles: tuple[float, ...], low: float, high: float) -> float:
    return EDM(quantiles=quantiles).cdf(torch.tensor([low, high], dtype=torch.float64)).diff().item()


# ---- monotone ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=40))
def test_isotonic_is_scikit_learns(values: list[float]) -> None:
    expected = IsotonicRegression().fit_transform(range(len(values)), values)
    assert isotonic(values) == pytest.approx(expected.tolist(), abs=1e-9)


def test_isotonic_by_hand() -> None:
    assert isotonic([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert isotonic([0.0, 3.0, 1.0, 2.0, 5.0]) == [0.0, 2.0, 2.0, 2.0, 5.0]
    assert isotonic([]) == []


# ---- closed forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [0.01, 0.3, 1.0])
def test_a_loss_that_rises_evenly_gives_levels_even_over_log_sigma(floor: float) -> None:
    losses = [0.2 + 0.07 * math.log(level) for level in GRID]
    expected = EDM().boundaries(STEPS, "log-uniform")
    assert fitted_quantiles(GRID, losses, floor=floor) == pytest.approx(expected, rel=1e-9)


def test_a_loss_that_rises_in_one_place_puts_all_but_the_floor_there() -> None:
    losses = [0.0] * 16 + [1.0] * 17
    quantiles = fitted_quantiles(GRID, losses, floor=0.1, steps=1000)
    inside = mass_between(quantiles, GRID[15], GRID[16])
    assert inside == pytest.approx(0.9 + 0.1 / 32, abs=2e-3)
    assert mass_between(quantiles, LOW, GRID[15]) == pytest.approx(0.1 * 15 / 32, abs=2e-3)
    # Within the interval it is even over log sigma.
    middle = math.sqrt(GRID[15] * GRID[16])
    assert mass_between(quantiles, GRID[15], middle) == pytest.approx(inside / 2, abs=2e-3)


def test_equal_mass_is_equal_rise() -> None:
    """A logistic rise, and a floor of nearly nothing: the levels at equal steps of mass are those of equal rise."""
    fine = EDM().boundaries(4000, "log-uniform")
    losses = [2.3 / (1 + math.exp(-2 * math.log(level))) for level in fine]
    bottom, top = losses[0], losses[-1]
    quantiles = fitted_quantiles(fine, losses, floor=1e-9, steps=10)
    rises = [(2.3 / (1 + level**-2) - bottom) / (top - bottom) for level in quantiles]
    assert rises == pytest.approx([k / 10 for k in range(11)], abs=1e-5)


def test_levels_of_equal_loss_lie_where_the_loss_is_and_not_where_it_rises() -> None:
    """A loss of 0 up to sigma = 1 and of 2 above it, on a grid with two levels close to 1."""
    levels = [LOW, 1.0, 1.0001, HIGH]
    losses = [0.0, 0.0, 2.0, 2.0]
    assert accumulated(levels, losses) == pytest.approx([0.0, 0.0, 1e-4, 2 * math.log(HIGH)], abs=1e-3)
    of_loss = fitted_quantiles(levels, accumulated(levels, losses), floor=0.01)
    of_rise = fitted_quantiles(levels, losses, floor=0.01)
    assert mass_between(of_loss, 1.0, HIGH) > 0.98
    assert mass_between(of_loss, 1.0, math.sqrt(HIGH)) == pytest.approx(0.5, abs=0.02)  # even over log sigma there
    assert mass_between(of_rise, 0.99, 1.01) > 0.98


def test_the_scale_and_the_offset_of_the_loss_do_not_matter_and_its_shape_does() -> None:
    losses = [math.tanh(math.log(level)) for level in GRID]
    quantiles = fitted_quantiles(GRID, losses)
    assert fitted_quantiles(GRID, [5 + 40 * loss for loss in losses]) == pytest.approx(quantiles, rel=1e-9)
    shifted = fitted_quantiles(GRID, [math.tanh(math.log(level) - 1) for level in GRID])
    assert shifted[64] > 1.5 * quantiles[64]


def test_an_interval_of_any_width_gets_its_share() -> None:
    """The grid need not be even: what counts is the rise between neighbours."""
    quantiles = fitted_quantiles([LOW, 0.5, 0.6, HIGH], [0.0, 1.0, 3.0, 4.0], floor=1e-6, steps=4)
    assert quantiles == pytest.approx([LOW, 0.5, math.sqrt(0.5 * 0.6), 0.6, HIGH], rel=1e-4)


@pytest.mark.parametrize("losses", [[1.0] * 33, [33.0 - place for place in range(33)]])
def test_a_loss_that_does_not_rise_says_nothing(losses: list[float]) -> None:
    assert fitted_quantiles(GRID, losses) == pytest.approx(EDM().boundaries(STEPS, "log-uniform"), rel=1e-9)


# ---- whatever is measured ------------------------------------------------------------------------------------


@given(LOSSES, st.floats(0.001, 1.0), st.integers(1, 200))
def test_any_losses_give_levels_that_edm_takes(losses: list[float], floor: float, steps: int) -> None:
    quantiles = fitted_quantiles(GRID, losses, floor=floor, steps=steps)
    assert len(quantiles) == steps + 1
    assert (quantiles[0], quantiles[-1]) == (LOW, HIGH)
    assert all(low < high for low, high in itertools.pairwise(quantiles))
    EDM(quantiles=quantiles)


@given(LOSSES, st.floats(0.01, 1.0))
def test_every_level_keeps_the_floors_density_at_least(losses: list[float], floor: float) -> None:
    quantiles = fitted_quantiles(GRID, losses, floor=floor, steps=256)
    widest = max(math.log(high / low) for low, high in itertools.pairwise(quantiles))
    assert 1 / 256 / widest >= floor / WIDTH * (1 - 1e-6)


@given(st.integers(0, 1000))
def test_noise_of_the_measurement_moves_little(seed: int) -> None:
    clean = [math.tanh(math.log(level)) for level in GRID]
    noise = torch.randn(len(GRID), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    noisy = [loss + 0.02 * error for loss, error in zip(clean, noise, strict=True)]
    masses = EDM(quantiles=fitted_quantiles(GRID, clean)).cdf(torch.tensor(fitted_quantiles(GRID, noisy)))
    assert (masses - torch.linspace(0, 1, STEPS + 1)).abs().max().item() < 0.06


# ---- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "losses", "options", "words"),
    [
        ([1.0], [1.0], {}, "at least 2 levels, got 1 at 1"),
        ([1.0, 2.0], [1.0], {}, "got 1 at 2"),
        ([2.0, 1.0], [1.0, 2.0], {}, "ascend strictly"),
        ([0.0, 1.0], [1.0, 2.0], {}, "> 0"),
        ([1.0, math.inf], [1.0, 2.0], {}, "finite"),
        ([1.0, 2.0], [1.0, math.nan], {}, "got nan at level 2"),
        ([1.0, 2.0], [1.0, 2.0], {"floor": 0.0}, r"floor must be in \(0, 1\], got 0.0"),
        ([1.0, 2.0], [1.0, 2.0], {"floor": 1.1}, "got 1.1"),
        ([1.0, 2.0], [1.0, 2.0], {"steps": 0}, "steps must be >= 1, got 0"),
    ],
)
def test_refused(levels: list[float], losses: list[float], options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fitted_quantiles(levels, losses, **options)  # type: ignore[arg-type]
