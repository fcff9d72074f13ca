"""The extrapolated Frechet distance: on a line in 1/n, and on draws of Gaussians whose distance is known."""

from __future__ import annotations

import pytest
import torch
from helpers import seeded

from diffusionblocks.evaluation.frechet import FeatureStatistics, frechet_distance
from diffusionblocks.evaluation.frechet_infinity import GrowingStatistics, extrapolate, sizes_to_extrapolate


def test_a_line_in_one_over_n_is_extrapolated_exactly() -> None:
    sizes = [100, 250, 400, 1000]
    assert extrapolate(sizes, [3.5 + 42 / n for n in sizes]) == pytest.approx(3.5, rel=1e-12)
    assert extrapolate(sizes, [-0.1 + 42 / n for n in sizes]) == pytest.approx(-0.1, rel=1e-9), "noise may go below 0"
    # Least squares: of a line with equal deviations up and down at the ends of 1/n = 0.1, 0.2, 0.3.
    assert extrapolate([10, 5, 3], [1.0, 3.0, 2.0]) == pytest.approx(_fit([0.1, 0.2, 1 / 3], [1.0, 3.0, 2.0]))


def _fit(x: list[float], y: list[float]) -> float:
    """The intercept by the normal equations."""
    n, sx, sy = len(x), sum(x), sum(y)
    sxx, sxy = sum(a * a for a in x), sum(a * b for a, b in zip(x, y, strict=True))
    return (sy * sxx - sx * sxy) / (n * sxx - sx**2)


@pytest.mark.parametrize(("sizes", "distances"), [([5], [1.0]), ([5, 5], [1.0, 1.0]), ([5, 6], [1.0])])
def test_what_is_no_line_is_refused(sizes: list[int], distances: list[float]) -> None:
    with pytest.raises(ValueError, match="must be as many, of two sizes or more"):
        extrapolate(sizes, distances)


def test_sizes_go_from_a_tenth_to_all_where_covariances_are_not_singular() -> None:
    sizes = sizes_to_extrapolate(50_000, 1280)
    assert (sizes[0], sizes[-1], len(sizes)) == (5_000, 50_000, 8)
    assert sizes_to_extrapolate(10_000, 1280)[0] == 2 * 1280
    assert sizes_to_extrapolate(4 * 1280 - 1, 1280) == []
    assert sizes_to_extrapolate(4 * 1280, 1280)[-1] == 4 * 1280


@pytest.mark.parametrize("batch", [1, 7, 100, 400])
def test_statistics_grow_by_whole_prefixes_whatever_the_batches(batch: int) -> None:
    features = torch.randn(400, 5, generator=seeded())
    sizes = [20, 21, 150, 400]
    growing = GrowingStatistics(5, sizes)
    for part in features.split(batch):
        growing.update(part)
    assert growing.total.count == 400
    for size in sizes:
        alone = FeatureStatistics(5)
        alone.update(features[:size])
        assert growing._first[size].count == size
        torch.testing.assert_close(growing._first[size].mean, alone.mean)
        torch.testing.assert_close(growing._first[size].covariance, alone.covariance)


def test_the_bias_of_gaussians_is_taken_away() -> None:
    """Of N(m, (1.1 a)^2) to N(0, a^2) the distance is |m|^2 + 0.01 tr a^2."""
    dim, count = 16, 320
    scales = torch.logspace(0, -1, dim, dtype=torch.float64)
    real = FeatureStatistics.of(torch.zeros(dim), scales.square().diag(), 10**6)
    exact = 0.04 + 0.01 * scales.square().sum().item()
    finite, infinite = [], []
    for seed in range(40):
        draws = 1.1 * scales * torch.randn(count, dim, generator=seeded(seed), dtype=torch.float64)
        draws[:, 0] += 0.2
        growing = GrowingStatistics(dim, sizes_to_extrapolate(count, dim))
        growing.update(draws)
        distance, at_infinity = growing.distances(real)
        assert distance == frechet_distance(growing.total, real) == frechet_distance(growing._first[count], real)
        finite.append(distance)
        infinite.append(at_infinity)
    bias = sum(finite) / 40 - exact
    assert bias > 0.02, "there is a bias to take away"
    assert abs(sum(infinite) / 40 - exact) < bias / 4


def test_too_few_features_are_not_extrapolated() -> None:
    real = FeatureStatistics.of(torch.zeros(4), torch.eye(4), 100)
    for sizes in ([], [10, 20]):
        growing = GrowingStatistics(4, sizes)
        growing.update(torch.randn(15, 4, generator=seeded()))
        distance, at_infinity = growing.distances(real)
        assert distance > 0
        assert at_infinity is None
