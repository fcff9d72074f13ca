"""The Frechet distance against closed forms and scipy; streaming statistics against one-shot NumPy."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks.common.formats import read_tensors, write_tensors
from diffusionblocks.evaluation.frechet import FeatureStatistics, frechet_distance


def statistics(features: Tensor, split: int | None = None) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    for batch in features.split(split or len(features)):
        result.update(batch)
    return result


def covariance(dim: int, seed: int, rank: int | None = None) -> Tensor:
    """Of the given rank, with eigenvalues of different sizes."""
    root = torch.randn(dim, rank or dim, generator=seeded(seed), dtype=torch.float64)
    root = root * torch.logspace(0, -2, rank or dim, dtype=torch.float64)
    return root @ root.T


def correlated(n: int, dim: int, seed: int) -> Tensor:
    mixing = torch.randn(dim, dim, generator=seeded(seed), dtype=torch.float64)
    return torch.randn(n, dim, generator=seeded(seed + 1), dtype=torch.float64) @ mixing + seed


def reference(x: Tensor, y: Tensor) -> float:
    """The textbook formula in NumPy and scipy, all features at once."""
    a, b = x.double().numpy(), y.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


# ---- the distance ----------------------------------------------------------------------------------------


def test_of_diagonal_gaussians_is_the_closed_form() -> None:
    m1, m2 = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, 1.0, 2.0])
    s1, s2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 0.25, 9.0])
    a = FeatureStatistics.of(m1, s1.diag(), 100)
    b = FeatureStatistics.of(m2, s2.diag(), 50)
    expected = (9 + 0 + 16) + (1 + 2.25 + 0)  # squared differences of the means and of the standard deviations
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-14)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-14)


def test_of_commuting_gaussians_is_the_closed_form() -> None:
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=seeded(), dtype=torch.float64))
    s1, s2 = torch.logspace(-3, 2, 16, dtype=torch.float64), torch.linspace(0.5, 3, 16, dtype=torch.float64)
    mean = torch.zeros(16)
    a, b = (FeatureStatistics.of(mean, turn @ s.diag() @ turn.T, 100) for s in (s1, s2))
    expected = (s1.sqrt() - s2.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-11)


def test_of_general_gaussians_is_scipys() -> None:
    s, t = covariance(24, 1), covariance(24, 2)
    mean = torch.zeros(24)
    root = scipy.linalg.sqrtm((s @ t).numpy()).real
    expected = (s.trace() + t.trace()).item() - 2 * np.trace(root)
    distance = frechet_distance(FeatureStatistics.of(mean, s, 99), FeatureStatistics.of(mean, t, 99))
    assert distance == pytest.approx(expected, rel=1e-9)


def test_of_samples_comes_close_to_the_gaussians_own() -> None:
    dim, n = 4, 40_000
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0])
    x = torch.randn(n, dim, generator=seeded(1))
    y = torch.randn(n, dim, generator=seeded(2)) * scale + 1.0
    expected = dim + (scale - 1).square().sum().item()
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=0.03)


def test_of_identical_sets_is_zero() -> None:
    x = correlated(500, 32, 5)
    a, b = statistics(x), statistics(x, 37)
    assert frechet_distance(a, a) < 1e-12 * a.covariance.trace().item()
    assert frechet_distance(a, b) < 1e-8 * a.covariance.trace().item()


def test_singular_covariances_give_a_warning_and_no_rounding() -> None:
    x = correlated(20, 64, 3)
    with pytest.warns(UserWarning, match="20 features of length 64"):
        distance = frechet_distance(statistics(x), statistics(x, 7))
    assert distance < 1e-8 * statistics(x).covariance.trace().item()
    # Two planes at right angles: nothing is common to them, so the cross term is exactly 0.
    s, t = torch.zeros(6, 6), torch.zeros(6, 6)
    s[:2, :2], t[3:5, 3:5] = 4 * torch.eye(2), 9 * torch.eye(2)
    a, b = (FeatureStatistics.of(torch.zeros(6), c, 10) for c in (s, t))
    assert frechet_distance(a, b) == pytest.approx(8 + 18, rel=1e-14)


def test_a_constant_set_is_a_point() -> None:
    a, b = statistics(torch.full((10, 3), 2.0)), statistics(torch.zeros(10, 3))
    assert frechet_distance(a, b) == pytest.approx(12.0, rel=1e-14)


def test_enough_features_give_no_warning() -> None:
    a = statistics(correlated(9, 8, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(a, a)


# ---- streaming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 7, 64, 300])
def test_any_split_equals_one_shot_numpy(split: int) -> None:
    x, y = correlated(300, 16, 1), correlated(250, 16, 4)
    a, b = statistics(x, split), statistics(y, split)
    assert a.count == 300
    torch.testing.assert_close(a.mean, x.mean(0), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(a.covariance, torch.from_numpy(np.cov(x.numpy(), rowvar=False)), rtol=1e-9, atol=1e-11)
    assert torch.equal(a.covariance, a.covariance.T)
    assert frechet_distance(a, b) == pytest.approx(reference(x, y), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_summed_in_float64(dtype: torch.dtype) -> None:
    x = correlated(5000, 4, 1).to(dtype)
    expected = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    torch.testing.assert_close(statistics(x, 999).covariance, expected, rtol=1e-12, atol=1e-12)


def test_a_large_offset_costs_no_precision() -> None:
    x = (correlated(2000, 8, 1) + 1e5).float()  # its variance is 1e-9 of its mean's square
    x[:100] -= 2e5  # and the first batch is not like the others
    a = statistics(x, 100)
    expected = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    torch.testing.assert_close(a.covariance, expected, rtol=1e-12, atol=0.0)
    tail = statistics(x[100:], 100)
    expected = torch.from_numpy(np.cov(x[100:].double().numpy(), rowvar=False))
    torch.testing.assert_close(tail.covariance, expected, rtol=1e-9, atol=1e-9)


def test_merge_equals_one_stream() -> None:
    x = correlated(300, 8, 1)
    a, b = statistics(x[:90], 20), statistics(x[90:], 50)
    before = b.covariance
    a.merge(b)
    a.merge(FeatureStatistics(8))  # of nothing: no change
    whole = statistics(x)
    assert a.count == 300
    torch.testing.assert_close(a.mean, whole.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(a.covariance, whole.covariance, rtol=1e-11, atol=1e-12)
    assert torch.equal(b.covariance, before)
    empty = FeatureStatistics(8)
    empty.merge(b)
    a.update(x)  # must not move what was merged
    assert torch.equal(empty.covariance, before)


def test_an_empty_batch_changes_nothing() -> None:
    a = statistics(correlated(10, 3, 1))
    before = a.covariance
    a.update(torch.zeros(0, 3))
    assert a.count == 10
    assert torch.equal(a.covariance, before)


def test_of_and_reading_agree() -> None:
    mean, s = torch.randn(5, generator=seeded()), covariance(5, 1)
    a = FeatureStatistics.of(mean, s, 17)
    assert a.count == 17
    torch.testing.assert_close(a.mean, mean.double(), rtol=0, atol=0)
    torch.testing.assert_close(a.covariance, s, rtol=1e-14, atol=1e-15)


def test_tensors_hold_the_whole_state(tmp_path: Path) -> None:
    x = correlated(60, 8, 1)
    a = statistics(x[:40], 9)
    write_tensors(tmp_path / "reference.safetensors", a.to_tensors())
    b = FeatureStatistics.from_tensors(read_tensors(tmp_path / "reference.safetensors"))
    assert b.count == 40
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.covariance, b.covariance)
    a.update(x[40:])
    b.update(x[40:])
    assert torch.equal(a.covariance, b.covariance)


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features", [torch.zeros(4, 5), torch.zeros(3), torch.zeros(4, 3, 1), torch.zeros(4, 3, dtype=torch.int64)]
)
def test_other_shapes_and_dtypes_are_refused(features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be floats \(n, 3\)"):
        FeatureStatistics(3).update(features)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_noticed(value: float) -> None:
    x = torch.zeros(20, 3)
    x[13, 1] = value
    a = statistics(x, 5)
    for read in (lambda: a.mean, lambda: a.covariance, a.to_tensors, lambda: frechet_distance(a, a)):
        with pytest.raises(ValueError, match="20 features one or more hold NaN or infinite"):
            read()


def test_too_few_features_are_refused() -> None:
    a = FeatureStatistics(3)
    with pytest.raises(ValueError, match="no features yet"):
        _ = a.mean
    a.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least 2 features, there are 1"):
        _ = a.covariance
    with pytest.raises(ValueError, match="at least 2 features, there are 1"):
        frechet_distance(a, a)


def test_other_lengths_are_refused() -> None:
    a, b = statistics(torch.zeros(4, 3)), statistics(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="lengths 3 and 2"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="length 2 into features of length 3"):
        a.merge(b)
    with pytest.raises(ValueError, match="dim = 0"):
        FeatureStatistics(0)


@pytest.mark.parametrize(
    ("mean", "matrix", "count", "message"),
    [
        (torch.zeros(2), torch.eye(3), 9, r"must be \(dim,\) and \(dim, dim\)"),
        (torch.zeros(2), torch.eye(2), 1, "count = 1"),
        (torch.tensor([0.0, float("nan")]), torch.eye(2), 9, "must be finite"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 9, "must be symmetric"),
        (torch.zeros(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]]), 9, "eigenvalue -1"),
    ],
)
def test_known_statistics_are_checked(mean: Tensor, matrix: Tensor, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.of(mean, matrix, count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scatter": None}, r"\['scatter'\] missing"),
        ({"mean": torch.zeros(4, dtype=torch.float64)}, "have shapes"),
        ({"mean": torch.zeros(3)}, "have dtypes"),
        ({"count": torch.tensor(-1)}, "count = -1"),
        ({"mean": torch.full((3,), float("nan"), dtype=torch.float64)}, "NaN"),
    ],
)
def test_foreign_tensors_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    tensors = statistics(torch.zeros(4, 3)).to_tensors() | change
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_tensors({name: t for name, t in tensors.items() if t is not None})
