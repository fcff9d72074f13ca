"""The Frechet distance extrapolated to infinitely many images, and so the bias of a finite number.

The distance of n images is too large by about a constant over n. Distances of the first 1/10 to all of the images are
fitted by a straight line in 1/n; its value at 0 is the distance without that bias.

Source: Chong and Forsyth, "Effectively Unbiased FID and Inception Score and where to find them" (1911.07023).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from .frechet import FeatureStatistics, frechet_distance

#: Sizes at which the distance is taken, evenly spaced.
_POINTS = 8
#: The least size, in lengths of a feature vector: with fewer images covariances are nearly singular, and the bias is
#: no line in 1/n.
_LEAST = 2


def sizes_to_extrapolate(count: int, dim: int) -> list[int]:
    """The numbers of images at which a distance is taken to extrapolate it.

    Args:
        count: all images, >= 1.
        dim: length of a feature vector, >= 1.

    Returns:
        Ascending numbers, the last of them `count`; none where there are too few images (below four times `dim`).
    """
    least = max(_LEAST * dim, count // 10)
    if count < 2 * _LEAST * dim:
        return []
    return [round(least + (count - least) * i / (_POINTS - 1)) for i in range(_POINTS)]


def extrapolate(sizes: Sequence[int], distances: Sequence[float]) -> float:
    """The value at 1/n = 0 of the straight line in 1/n that fits distances best (least squares).

    It may be below 0, by the noise of the distances.

    Args:
        sizes: numbers of images n, at least two different ones.
        distances: of as many images.

    Raises:
        ValueError: fewer than two sizes, or not as many distances.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(distances):
        raise ValueError(f"{len(distances)} distances at sizes {list(sizes)}: must be as many, of two sizes or more")
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    values = torch.tensor(distances, dtype=torch.float64)
    centred = inverse - inverse.mean()
    slope = (centred @ (values - values.mean())) / (centred @ centred)
    return float(values.mean() - slope * inverse.mean())


class GrowingStatistics:
    """Statistics of the first n features that arrive, for several n at once; no feature is kept.

    Features must arrive in random order: generated images do, by their seeds; of real ones, draw the order.

    Args:
        dim: length of a feature vector.
        sizes: the numbers n, ascending; see `sizes_to_extrapolate`.

    Attributes:
        total: statistics of all features so far.
    """

    def __init__(self, dim: int, sizes: Sequence[int] = ()) -> None:
        self.total = FeatureStatistics(dim)
        self._sizes = list(sizes)
        self._first: dict[int, FeatureStatistics] = {}

    def update(self, features: Tensor) -> None:
        """Add a batch: see `FeatureStatistics.update`."""
        for size in [size for size in self._sizes if size not in self._first]:
            missing = size - self.total.count
            if missing > len(features):
                break
            self.total.update(features[:missing])
            self._first[size] = copy.copy(self.total)  # an update replaces its tensors, and changes none
            features = features[missing:]
        self.total.update(features)

    def distances(self, real: FeatureStatistics) -> tuple[float, float | None]:
        """The distance of all features to real ones, and the same extrapolated; None where they are too few to say.

        The bias that is taken away is that of these features' number; real ones should be as many as there are.
        """
        distance = frechet_distance(self.total, real)
        if not self._sizes or any(size not in self._first for size in self._sizes):
            return distance, None
        first = [self._first[size] for size in self._sizes]
        # Of hundreds of features each takes seconds: that of all of them is known.
        each = [distance if one.count == self.total.count else frechet_distance(one, real) for one in first]
        return distance, extrapolate(self._sizes, each)
