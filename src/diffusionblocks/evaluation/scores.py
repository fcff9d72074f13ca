"""Accuracy, negative log-likelihood and calibration of class probabilities, over all batches of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        self._count = 0
        self._sums: Tensor | None = None

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch: log-probabilities (batch, num_classes), labels (batch,), int64."""
        logs = log_probabilities.double()
        top, answers = logs.max(dim=-1)
        hits, confidence = (answers == labels).double(), top.exp()
        # A probability on the border of two bins belongs to the lower one.
        places = (confidence * BINS).ceil().clamp(1, BINS)
        in_bin = places[:, None] == torch.arange(1, BINS + 1, device=places.device)
        gaps = (in_bin * (hits - confidence)[:, None]).sum(dim=0)
        nll = -logs.gather(1, labels[:, None]).sum()
        sums = torch.cat([torch.stack([hits.sum(), nll]), gaps])
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += len(labels)

    def means(self) -> ScoreMeans:
        """The means over all that was added.

        Raises:
            ValueError: nothing was.
        """
        if self._sums is None or not self._count:
            raise ValueError("there are no examples to measure an accuracy on: the batches are empty")
        accuracy, nll, *gaps = (self._sums / self._count).tolist()
        standard_error = (accuracy * (1 - accuracy) / self._count) ** 0.5
        return ScoreMeans(accuracy, standard_error, nll, sum(map(abs, gaps)))
