"""Accuracy, NLL and expected calibration error in closed form."""

import math

import pytest
import torch
from helpers import seeded

from diffusionblocks.evaluation.scores import Scores


def of(probabilities: list[list[float]], labels: list[int], split: int | None = None) -> Scores:
    scores = Scores()
    logs, answers = torch.tensor(probabilities).log(), torch.tensor(labels)
    for part in (slice(split), slice(split, None)) if split else (slice(None),):
        scores.add(logs[part], answers[part])
    return scores


def test_scores_by_hand() -> None:
    # Two bins: 0.9 twice, one right; 0.6 three times, all right.
    rows = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.6, 0.4]]
    labels = [0, 1, 0, 1, 0]
    for split in (None, 2):
        means = of(rows, labels, split).means()
        assert means.accuracy == pytest.approx(4 / 5)
        assert means.standard_error == pytest.approx(math.sqrt(4 / 5 * 1 / 5 / 5))
        assert means.nll == pytest.approx(-(math.log(0.9) + math.log(0.1) + 3 * math.log(0.6)) / 5, rel=1e-6)
        assert means.ece == pytest.approx((2 * abs(0.5 - 0.9) + 3 * abs(1 - 0.6)) / 5, rel=1e-6)


def test_errors_of_opposite_sign_cancel_within_a_bin_alone() -> None:
    same_bin = of([[0.61, 0.39], [0.64, 0.36]], [0, 1]).means()
    assert same_bin.ece == pytest.approx(abs(1 - 0.61 - 0.64) / 2, rel=1e-5)
    two_bins = of([[0.59, 0.41], [0.64, 0.36]], [0, 1]).means()
    assert two_bins.ece == pytest.approx((1 - 0.59 + 0.64) / 2, rel=1e-5)


def test_a_calibrated_classifier_has_no_calibration_error() -> None:
    g = seeded()
    probabilities = torch.randn(40_000, 3, generator=g).softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=g)[:, 0]
    scores, sure = Scores(), Scores()
    scores.add(probabilities.log(), labels)
    assert scores.means().ece < 0.01
    sure.add((3 * probabilities.log()).log_softmax(-1), labels)  # the positive control: three times as sure
    assert sure.means().ece > 0.1


def test_without_examples_there_is_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="no examples"):
        Scores().means()
    empty = Scores()
    empty.add(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no examples"):
        empty.means()
