"""How sets of features lie among one another: improved precision and recall, density and coverage.

A ball around each point reaches to its k-th nearest neighbour in its own set. Distances are float64, and are taken a
few rows at a time: of two sets of 50,000 features 256 MiB are held, not the 20 GB of all their distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.precision import as_float64

#: Neighbours of improved precision and recall (Kynkaanniemi et al. 2019), and of density and coverage (Naeem et al.
#: 2020), as published.
K_PRECISION, K_DENSITY = 3, 5

#: Distances that are held at a time: 256 MiB.
_MOST_DISTANCES = 2**25
#: What lies on the edge of a ball is inside, whichever way rounding went.
_EDGE = 1 + 1e-9


@dataclass(frozen=True)
class Neighbours:
    """How generated images lie among real ones, all by features.

    Attributes:
        precision: share of generated images in the ball of a real one, 0 to 1.
        recall: share of real images in the ball of a generated one, 0 to 1.
        density: mean number of real images' balls that a generated one is in, divided by k; 1 is expected of real ones.
        coverage: share of real images with a generated one in their ball, 0 to 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


class RealNeighbours:
    """Real images' features with the balls around them, which are computed once.

    Args:
        real: (n, dim), n > 5, any float dtype, on any device; a device without float64 leaves the work to the CPU.

    Attributes:
        count: n.

    Raises:
        ValueError: too few features, or features that are not finite.
    """

    def __init__(self, real: Tensor) -> None:
        self.count = len(real)
        points = as_float64(real)
        self._centre = points.mean(0)  # squared lengths must not swallow distances
        self._real = points - self._centre
        radii = squared_radii(self._real, K_PRECISION, K_DENSITY)
        self._precision_radii, self._density_radii = (radius * _EDGE for radius in radii)

    def measure(self, generated: Tensor) -> Neighbours:
        """Measure generated images; take as many as there are real ones, for recall depends on both numbers.

        Args:
            generated: features (m, dim), m > 3, of the same network.

        Raises:
            ValueError: too few, of another length, or features that are not finite.
        """
        points = as_float64(generated).to(self._real.device)
        if points.dim() != 2 or points.shape[1] != self._real.shape[1]:
            raise ValueError(
                f"features {tuple(points.shape)} beside {tuple(self._real.shape)}: both must come from one network"
            )
        points = points - self._centre
        own_radii = squared_radii(points, K_PRECISION)[0] * _EDGE
        inside = self._real.new_zeros((), dtype=torch.int64)
        balls = inside.clone()
        recalled = torch.zeros(self.count, dtype=torch.bool, device=self._real.device)
        covered = recalled.clone()
        for start, distances in _squared_distances(points, self._real):
            inside += (distances <= self._precision_radii).any(1).sum()
            recalled |= (distances <= own_radii[start : start + len(distances), None]).any(0)
            within = distances <= self._density_radii
            balls += within.sum()
            covered |= within.any(0)
        counts = torch.stack([inside, recalled.sum(), balls, covered.sum()]).tolist()  # the one wait for the device
        return Neighbours(
            precision=counts[0] / len(points),
            recall=counts[1] / self.count,
            density=counts[2] / (K_DENSITY * len(points)),
            coverage=counts[3] / self.count,
        )


def squared_radii(features: Tensor, *ks: int) -> list[Tensor]:
    """Squared distances from each feature to its k-th nearest other one.

    Args:
        features: (n, dim), n > every k, any float dtype.
        ks: each >= 1.

    Returns:
        For each k float64 (n,).

    Raises:
        ValueError: too few features, another shape, or features that are not finite.
    """
    if features.dim() != 2 or len(features) <= max(ks):
        raise ValueError(f"features {tuple(features.shape)}: must be (n, dim) with more than {max(ks)} of them")
    points = as_float64(features)
    if not bool(torch.isfinite(points).all()):
        raise ValueError("features hold NaN or infinite values; look for a damaged model or float16 overflow")
    nearest = points.new_empty(len(points), max(ks))
    for start, distances in _squared_distances(points, points):
        distances.diagonal(start).fill_(torch.inf)  # not itself
        nearest[start : start + len(distances)] = distances.topk(max(ks), largest=False, sorted=True).values
    return [nearest[:, k - 1].contiguous() for k in ks]


def _squared_distances(points: Tensor, others: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, squared distances of some rows of points to all others), float64."""
    squares = others.square().sum(1)
    for start in range(0, len(points), max(1, _MOST_DISTANCES // len(others))):
        rows = points[start : start + max(1, _MOST_DISTANCES // len(others))]
        products = torch.addmm(squares, rows, others.T, alpha=-2)
        yield start, products.add_(rows.square().sum(1)[:, None]).clamp_(min=0)
