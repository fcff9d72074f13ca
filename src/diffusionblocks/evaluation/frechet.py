"""The Frechet distance between two sets of images, from the mean and covariance of their features."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..common.precision import as_float64

_TENSORS = ("count", "mean", "scatter")


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches; the features are not kept.

    Everything is float64. Batches are centred on their own mean before they are joined (Chan's update), so neither a
    large offset nor the way the features were split costs precision. The state lives on the first batch's device (on
    the CPU where a device has no float64), and `update` never waits for that device: what is not finite is noticed
    when the mean or the covariance is read.

    Args:
        dim: length of a feature vector, >= 1.

    Attributes:
        dim: the same.
        count: how many features have arrived.

    Raises:
        ValueError: dim < 1.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim = {dim!r}: must be at least 1")
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)
        self._root: Tensor | None = None

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, count: int) -> FeatureStatistics:
        """Statistics that are known already.

        Args:
            mean: (dim,), any float dtype.
            covariance: (dim, dim), symmetric and positive semi-definite (both up to rounding), unbiased.
            count: how many features they are of, >= 2.

        Raises:
            ValueError: a shape, a value or the count is not as above.
        """
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean {tuple(mean.shape)}, covariance {tuple(covariance.shape)}: must be (dim,) and (dim, dim)"
            )
        if count < 2:
            raise ValueError(f"count = {count!r}: must be at least 2, or there is no covariance")
        mean, covariance = mean.detach().double(), covariance.detach().double()
        if not bool(torch.isfinite(mean).all() & torch.isfinite(covariance).all()):
            raise ValueError("mean, covariance: every value must be finite")
        asymmetry, size = float((covariance - covariance.T).abs().max()), float(covariance.abs().max())
        if asymmetry > 1e-6 * size:
            raise ValueError(f"covariance: differs from its transpose by {asymmetry:.3g}: must be symmetric")
        lowest = float(torch.linalg.eigvalsh(covariance.cpu())[0])
        if lowest < -1e-6 * size:
            raise ValueError(f"covariance: has the eigenvalue {lowest:.3g}: none may be negative")
        result = cls(len(mean))
        result.count, result._mean, result._scatter = count, mean.clone(), covariance * (count - 1)
        return result

    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: (n, dim), n >= 0, of any float dtype, on any device.

        Raises:
            ValueError: another shape or dtype.
        """
        if features.dim() != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise ValueError(f"features: {features.dtype} {tuple(features.shape)}: must be floats (n, {self.dim})")
        if len(features) == 0:
            return
        rows = as_float64(features)
        if self.count == 0:
            self._mean, self._scatter = self._mean.to(rows.device), self._scatter.to(rows.device)
        rows = rows.to(self._mean.device)
        mean = rows.mean(0)
        rows = rows - mean
        self._join(len(rows), mean, rows.T @ rows)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the features that `other` has seen, as if they had arrived here; `other` stays as it is.

        Raises:
            ValueError: features of another length.
        """
        if other.dim != self.dim:
            raise ValueError(f"cannot merge features of length {other.dim} into features of length {self.dim}")
        if other.count:
            device = self._mean.device
            self._join(other.count, other._mean.to(device), other._scatter.to(device))

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        difference = mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._scatter = self._scatter + scatter
        self._scatter.addr_(difference, difference, alpha=self.count * count / total)
        self.count, self._root = total, None

    @property
    def mean(self) -> Tensor:
        """Mean, float64 (dim,).

        Raises:
            ValueError: no features yet, or a value among them was not finite.
        """
        if self.count < 1:
            raise ValueError("there are no features yet: call update first")
        self._check_finite()
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (divided by count - 1), float64 (dim, dim), exactly symmetric.

        Raises:
            ValueError: fewer than two features, or a value among them was not finite.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, there are {self.count}: call update with more")
        self._check_finite()
        return (self._scatter + self._scatter.T) / (2 * (self.count - 1))

    @property
    def root(self) -> Tensor:
        """R (dim, rank) with R R^T = covariance, without directions of no variance; on the CPU, computed once.

        Raises:
            ValueError: see `covariance`.
        """
        if self._root is None:
            values, vectors = torch.linalg.eigh(self.covariance.cpu())
            positive = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
            self._root = vectors[:, positive] * values[positive].sqrt()
        return self._root

    def _check_finite(self) -> None:
        if not bool(torch.isfinite(self._mean).all() & torch.isfinite(self._scatter).all()):
            raise ValueError(
                f"of the {self.count} features one or more hold NaN or infinite values; look for a damaged model or "
                "float16 overflow in what made them"
            )

    def to_tensors(self) -> dict[str, Tensor]:
        """The whole state, for a safetensors file: "count" int64 (), "mean" (dim,), "scatter" (dim, dim) float64.

        Raises:
            ValueError: a value was not finite.
        """
        self._check_finite()
        return {"count": torch.tensor(self.count), "mean": self._mean.clone(), "scatter": self._scatter.clone()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureStatistics:
        """The statistics that `to_tensors` gave, bit for bit; more may be added to them.

        Raises:
            ValueError: a tensor is missing, or is not as `to_tensors` gives it.
        """
        if missing := [name for name in _TENSORS if name not in tensors]:
            raise ValueError(f"{missing} missing among {sorted(tensors)}: not feature statistics")
        count, mean, scatter = (tensors[name] for name in _TENSORS)
        shapes = [tuple(t.shape) for t in (count, mean, scatter)]
        dtypes = [t.dtype for t in (count, mean, scatter)]
        if mean.dim() != 1 or len(mean) < 1 or shapes != [(), (len(mean),), (len(mean), len(mean))]:
            raise ValueError(f"count, mean, scatter have shapes {shapes}: must be (), (dim,), (dim, dim)")
        if dtypes != [torch.int64, torch.float64, torch.float64]:
            raise ValueError(f"count, mean, scatter have dtypes {dtypes}: must be int64, float64, float64")
        if int(count) < 0:
            raise ValueError(f"count = {int(count)}: must be at least 0")
        result = cls(len(mean))
        result.count, result._mean, result._scatter = int(count), mean.clone(), scatter.clone()
        result._check_finite()
        return result


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the squared Frechet distance of two Gaussians.

    With factors S = R R^T from the eigenvectors of each covariance, the trace of the root is the sum of the singular
    values of R_a^T R_b: nothing is squared that must be rooted again, so identical sets give 0 up to rounding also
    where covariances are singular. Eigenvalues below rounding (largest * dim * 2e-16) count as 0.

    A set's finite size biases the distance upwards; compare only distances of equal counts.

    Args:
        a, b: of features of the same kind, at least two each.

    Returns:
        The distance, >= 0, computed in float64 on the CPU. (What is called FID is this squared distance.)

    Raises:
        ValueError: lengths differ, fewer than two features, or values that are not finite.

    Warns:
        UserWarning: a set has no more features than their length, so its covariance is singular.
    """
    if a.dim != b.dim:
        raise ValueError(f"features of lengths {a.dim} and {b.dim}: both sets must come from the same network")
    difference = a.mean.cpu() - b.mean.cpu()
    root_a, root_b = a.root, b.root
    if (fewest := min(a.count, b.count)) <= a.dim:
        warnings.warn(
            f"{fewest} features of length {a.dim}: the covariance is singular and the distance strongly biased "
            f"upwards; use more than {a.dim} images",
            stacklevel=2,
        )
    cross: Tensor = torch.linalg.svdvals(root_a.T @ root_b).sum()
    distance = difference.square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    if not distance.isfinite():  # which max would take for 0
        raise ValueError(
            f"the distance of {a.count} and {b.count} features is {distance.item()}: they are too large for float64"
        )
    return max(0.0, distance.item())
