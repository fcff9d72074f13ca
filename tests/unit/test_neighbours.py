"""Precision, recall, density and coverage on points whose answers are worked out by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks.evaluation import neighbours
from diffusionblocks.evaluation.neighbours import RealNeighbours, squared_radii


def on_a_line(*places: float) -> Tensor:
    """Points of two dimensions."""
    return torch.tensor([[place, 2.0] for place in places])


def test_radii_reach_to_the_kth_other_point() -> None:
    radii = squared_radii(on_a_line(0, 1, 3, 7, 7), 1, 2, 3)
    assert [r.tolist() for r in radii] == [
        [1.0, 1.0, 4.0, 0.0, 0.0],  # the two points at 7 are each other's nearest
        [9.0, 4.0, 9.0, 16.0, 16.0],
        [49.0, 36.0, 16.0, 36.0, 36.0],
    ]


def test_measures_of_points_on_a_line() -> None:
    """Real: 0, 1, ..., 7; their third neighbours are at 3 2 2 2 2 2 2 3, their fifth at 5 4 3 3 3 3 4 5."""
    result = RealNeighbours(on_a_line(*range(8))).measure(on_a_line(-3, 0, 0.5, 20))
    # The generated point at -3 is on the edge of the ball of 0; that at 20 is in none.
    assert result.precision == 3 / 4
    # Third neighbours of the generated points: 23, 20, 19.5, 23; the ball of 20 around 0 holds all.
    assert result.recall == 1.0
    # Balls of density: -3 is in those of 0 and 1; 0 in those of 0 1 2 3; 0.5 in those of 0 1 2 3 and no more.
    assert result.density == pytest.approx((2 + 4 + 4) / (5 * 4))
    # ... so that 0, 1, 2 and 3 are covered.
    assert result.coverage == 4 / 8


def test_what_is_left_out_lowers_recall_and_coverage_alone() -> None:
    """Two clusters of real points, one of them generated."""
    left, right = on_a_line(*range(6)), on_a_line(*range(100, 106))
    result = RealNeighbours(torch.cat([left, right])).measure(left)
    assert (result.precision, result.recall, result.coverage) == (1.0, 0.5, 0.5)
    # Each left ball reaches to five others: it holds all six points.
    assert result.density == pytest.approx(6 * 6 / (5 * 6))
    # The other way round half of what is generated is wrong, and nothing is left out.
    turned = RealNeighbours(left).measure(torch.cat([left, right]))
    assert (turned.precision, turned.recall, turned.coverage) == (0.5, 1.0, 1.0)


def test_the_same_set_is_all_there() -> None:
    points = torch.randn(300, 8, generator=seeded())
    result = RealNeighbours(points).measure(points)
    assert (result.precision, result.recall, result.coverage) == (1.0, 1.0, 1.0)
    # Each point's ball holds itself and its five neighbours.
    assert result.density == pytest.approx(6 / 5)


def test_draws_of_one_distribution_have_the_expected_density_and_coverage() -> None:
    real, generated = torch.randn(2, 1500, 4, generator=seeded(1))
    result = RealNeighbours(real).measure(generated)
    assert result.density == pytest.approx(1.0, abs=0.05)
    assert result.coverage == pytest.approx(
        1 - 2.0**-5, abs=0.02
    )  # Naeem et al., lemma 2: 1 - (1/2)^k for equal numbers


def test_a_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = torch.randn(2, 60, 3, generator=seeded(2))
    whole = RealNeighbours(real).measure(generated)
    shapes: list[torch.Size] = []
    monkeypatch.setattr(neighbours, "_MOST_DISTANCES", 7 * 60)
    original = neighbours._squared_distances

    def noted(points: Tensor, others: Tensor):  # type: ignore[no-untyped-def]
        for start, distances in original(points, others):
            shapes.append(distances.shape)
            yield start, distances

    monkeypatch.setattr(neighbours, "_squared_distances", noted)
    assert RealNeighbours(real).measure(generated) == whole
    assert {shape[0] for shape in shapes} == {7, 4}, "no more distances than there is room for"


def test_near_points_far_from_zero_keep_their_digits() -> None:
    """In float32, |a|^2 + |b|^2 - 2 a b of such points would be noise."""
    real, generated = torch.randn(2, 80, 3, generator=seeded(3), dtype=torch.float64)
    assert RealNeighbours(real + 1e6).measure(generated + 1e6) == RealNeighbours(real).measure(generated)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(9, 2), r"\(5, 2\): must be \(n, dim\) with more than 5"),
        (torch.zeros(9, 2), torch.zeros(3, 2), r"\(3, 2\): must be \(n, dim\) with more than 3"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "from one network"),
        (torch.full((9, 2), torch.nan), torch.zeros(9, 2), "NaN or infinite"),
        (torch.zeros(9, 2), torch.full((9, 2), torch.inf), "NaN or infinite"),
    ],
)
def test_what_cannot_be_measured_is_refused(real: Tensor, generated: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RealNeighbours(real).measure(generated)
