"""Label smoothing and distillation in closed form: what the loss is, and where it is least."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seeded
from torch import Tensor
from torch.nn import functional as F

from diffusionblocks.targets import LabelLoss, label_losses

CLASSES = 5


def batch(size: int = 6, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    g = seeded(seed)
    labels = torch.randint(CLASSES, (size,), generator=g)
    logits, teacher = torch.randn(2, size, CLASSES, generator=g)
    return logits, {"labels": labels, "teacher_logits": teacher}


def test_smoothing_without_z_is_the_ordinary_one() -> None:
    logits, entries = batch()
    expected = F.cross_entropy(logits, entries["labels"], reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(LabelLoss(0.2)(logits, entries), expected)
    # By hand: a uniform prediction costs ln K whatever the label.
    assert LabelLoss(0.2)(torch.zeros(6, CLASSES), entries).tolist() == pytest.approx([math.log(CLASSES)] * 6)


def test_none_of_either_is_the_plain_cross_entropy_bit_for_bit() -> None:
    logits, entries = batch()
    assert torch.equal(LabelLoss()(logits, entries), label_losses(logits, entries["labels"]))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 30.0])
def test_smoothed_blocks_are_best_at_the_same_context_logits_at_every_level(sigma: float) -> None:
    """Two inputs' worth of labels with known p(y | x): the mean gradient vanishes at log((1 - e) p + e / K).

    The expectation over z is a sum over many draws; the sum over y is exact. The baseline, the posterior against the
    smoothed label itself, is not least there: at low noise it pushes the likeliest label's logit down.
    """
    smoothing, draws = 0.3, 20_000
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    rows = torch.eye(3, dtype=torch.float64)
    loss = LabelLoss(smoothing)
    g = seeded()
    context = ((1 - smoothing) * p + smoothing / 3).log().requires_grad_()

    def gradient(*, ours: bool) -> Tensor:
        total = torch.zeros(())
        for y in range(3):
            entries = {"labels": torch.full((draws,), y)}
            shown = loss.draw(entries, 3, g) if ours else entries
            z = rows[shown["labels"]] + sigma * torch.randn(draws, 3, generator=g, dtype=torch.float64)

            def bayes(logits: Tensor, z: Tensor = z) -> Tensor:
                return logits + z @ rows.T / sigma**2

            posterior = bayes(context.expand(draws, 3))
            losses = loss(posterior, entries, context=context, bayes=bayes if ours else None)
            total = total + p[y] * losses.mean()
        return torch.autograd.grad(total, context)[0]

    assert gradient(ours=True).abs().max() < 0.01
    if sigma < 10:
        assert gradient(ours=False)[0] > 0.03


def test_labels_are_drawn_anew_as_often_as_smoothing_says() -> None:
    entries = {"labels": torch.zeros(20_000, dtype=torch.int64)}
    shares = LabelLoss(0.4).draw(entries, 4, seeded())["labels"].bincount() / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.015, rtol=0)
    assert LabelLoss(distillation=0.5).draw(entries, 4, None) is entries


def test_a_student_like_its_teacher_has_no_divergence_and_no_gradient_of_it() -> None:
    logits, entries = batch()
    student = (entries["teacher_logits"] + 3.0).requires_grad_()  # logits are free in a constant
    losses = LabelLoss(distillation=1.0, temperature=2.0)(student, entries)
    torch.testing.assert_close(losses, torch.zeros(6), atol=1e-6, rtol=0)
    assert torch.autograd.grad(losses.sum(), student)[0].abs().max() < 1e-6
    assert bool((LabelLoss(distillation=1.0)(logits, entries) > 1e-3).all())


def test_distillation_is_the_weighted_sum_of_both_losses() -> None:
    logits, entries = batch()
    ours, theirs = ((x / 2).softmax(-1) for x in (logits, entries["teacher_logits"]))
    divergence = (theirs * (theirs / ours).log()).sum(-1)
    expected = 0.75 * label_losses(logits, entries["labels"]) + 0.25 * 4 * divergence
    torch.testing.assert_close(LabelLoss(distillation=0.25, temperature=2.0)(logits, entries), expected)


def test_what_z_says_is_in_the_cross_entropy_and_not_in_the_divergence() -> None:
    context, entries = batch()
    z_says = 5 * F.one_hot(entries["labels"], CLASSES)
    loss = LabelLoss(distillation=0.5)
    expected = 0.5 * label_losses(context + z_says, entries["labels"])
    expected += 0.5 * LabelLoss(distillation=1.0)(context, entries)
    torch.testing.assert_close(loss(context + z_says, entries, context=context), expected)


def test_a_batch_without_the_teachers_logits_is_refused() -> None:
    logits, entries = batch()
    with pytest.raises(ValueError, match="the batch has no teacher_logits"):
        LabelLoss(distillation=0.5)(logits, {"labels": entries["labels"]})
