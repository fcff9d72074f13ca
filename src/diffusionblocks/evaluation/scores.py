"""Accuracy, negative log-likelihood and calibration of class probabilities, over all batches of a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.precision import as_float64

#: Bins of the expected calibration error.
BINS = 15


@dataclass(frozen=True)
class ScoreMeans:
    """Means over the examples: see `Scores`."""

    accuracy: float
    standard_error: float
    nll: float
    ece: float


class Scores:
    """Collects class probabilities of batches, without waiting for the device, and gives their means.

    The means are the accuracy in [0, 1] with its binomial standard error, the mean of -log p of the true label in nats
    (`nll`), and the expected calibration error (`ece`): examples are put into 15 bins of equal width by their highest
    probability, and the mean is taken, over the examples, of the difference between a bin's accuracy and its mean
    highest probability (Guo et al. 2017).
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch: log-probabilities (batch, num_classes), labels (batch,), int64."""
        self.add_sums(score_sums(log_probabilities, labels))

    def add_sums(self, sums: Tensor) -> None:
        """Add a batch by its `score_sums`."""
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self) -> ScoreMeans:
        """The means over all that was added.

        Raises:
            ValueError: nothing was.
        """
        count = 0.0 if self._sums is None else float(self._sums[0])
        if self._sums is None or not count:
            raise ValueError("there are no examples to measure an accuracy on: the batches are empty")
        accuracy, nll, *gaps = (self._sums[1:] / count).tolist()
        standard_error = (accuracy * (1 - accuracy) / count) ** 0.5
        return ScoreMeans(accuracy, standard_error, nll, sum(map(abs, gaps)))


def score_sums(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """What a batch adds to its `Scores`: count, hits, NLL, and the gaps of each bin.

    Args:
        log_probabilities: (batch, num_classes).
        labels: (batch,), int64.

    Returns:
        float64, shape (3 + BINS,), on the device of the batch, without a wait for it.
    """
    logs = log_probabilities.double()
    top, answers = logs.max(dim=-1)
    hits, confidence = (answers == labels).double(), top.exp()
    # A probability on the border of two bins belongs to the lower one.
    places = (confidence * BINS).ceil().clamp(1, BINS)
    in_bin = places[:, None] == torch.arange(1, BINS + 1, device=places.device)
    gaps = (in_bin * (hits - confidence)[:, None]).sum(dim=0)
    nll = -logs.gather(1, labels[:, None]).sum()
    count = torch.full_like(nll, len(labels))
    return torch.cat([torch.stack([count, hits.sum(), nll]), gaps])


class InceptionScoreAnalogue:
    """Collects class probabilities of images, and gives `exp(mean KL(p(y | x) || p(y)))` of them.

    That is the formula of the Inception Score (Salimans et al. 2016) over all images at once. It is called so only of
    Inception's own probabilities; of another network's it is an analogue, which compares images measured alike.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | None = None

    def add(self, log_probabilities: Tensor) -> None:
        """Add a batch: log-probabilities (batch, num_classes)."""
        logs = as_float64(log_probabilities)
        probabilities = logs.exp()
        # 0 log 0 is 0.
        negative_entropies = torch.where(probabilities > 0, probabilities * logs, 0.0).sum()
        sums = torch.cat([negative_entropies[None], probabilities.sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += len(logs)

    def value(self) -> float:
        """The score, from 1 (all images alike, or all unsure) to the number of classes.

        Raises:
            ValueError: there are no images, or probabilities that are not finite.
        """
        if self._sums is None or not self._count:
            raise ValueError("there are no images to score: add some first")
        negative_entropy, *of_classes = (self._sums / self._count).tolist()
        if not math.isfinite(sum(of_classes)):
            raise ValueError("class probabilities hold NaN: look for a damaged model or float16 overflow")
        return math.exp(negative_entropy - sum(p * math.log(p) for p in of_classes if p > 0))
