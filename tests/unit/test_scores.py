"""Accuracy, NLL and expected calibration error in closed form."""

import math

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks.evaluation.scores import InceptionScoreAnalogue, Scores


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


# ---- the analogue of the Inception Score -------------------------------------------------------------------------


def analogue(*batches: Tensor) -> float:
    score = InceptionScoreAnalogue()
    for probabilities in batches:
        score.add(probabilities.log())
    return score.value()


def test_the_analogue_is_1_of_uniform_or_equal_and_the_number_of_classes_of_distinct_answers() -> None:
    uniform = torch.full((6, 10), 0.1)
    assert analogue(uniform) == pytest.approx(1, abs=1e-6)
    assert analogue(torch.eye(10)[[3, 3, 3]]) == pytest.approx(1, abs=1e-12)
    assert analogue(torch.eye(10)) == pytest.approx(10, rel=1e-12)
    assert analogue(torch.eye(1000)[:400]) == pytest.approx(400, rel=1e-12)


def test_the_analogue_of_half_certain_answers_and_of_batches() -> None:
    # p = (0.9, 0.1) and (0.1, 0.9): the mean is uniform, KL = log 2 - H(0.1).
    rows = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    kl = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert analogue(rows) == pytest.approx(math.exp(kl), rel=1e-12)
    assert analogue(rows[:1], rows[1:]) == pytest.approx(math.exp(kl), rel=1e-12)


def test_the_analogue_of_nothing_or_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="no images to score"):
        InceptionScoreAnalogue().value()
    with pytest.raises(ValueError, match="hold NaN"):
        analogue(torch.full((2, 3), torch.nan))
