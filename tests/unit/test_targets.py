"""The label target: one unit row a class, the same everywhere; its loss and its feedback."""

import pytest
import torch
from helpers import seeded
from torch.nn import functional as F

from diffusionblocks.targets import LabelTarget


def target(**kwargs: object) -> LabelTarget:
    return LabelTarget(**({"num_classes": 5, "dim": 16, "learned": False, "seed": 0} | kwargs))  # type: ignore[arg-type]


def test_rows_are_unit_float32_and_distinct() -> None:
    table = target().table
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(5))
    assert len({tuple(row.tolist()) for row in table}) == 5


def test_rows_stay_unit_when_the_embedding_does_not() -> None:
    learned = target(learned=True)
    with torch.no_grad():
        learned.embedding.mul_(torch.tensor([0.1, 1.0, 7.0, 100.0, 3.0])[:, None])
    torch.testing.assert_close(learned.table.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(learned.encode({"labels": torch.arange(5)}).norm(dim=-1), torch.ones(5))


def test_rows_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = target().table
    torch.manual_seed(2)
    assert torch.equal(first, target().table)
    assert not torch.equal(first, target(seed=1).table)


def test_encode_is_the_row_of_the_label() -> None:
    t = target()
    labels = torch.tensor([3, 0, 3])
    assert torch.equal(t.encode({"labels": labels}), t.table[labels])


def test_learned_rows_get_gradients_and_frozen_rows_none() -> None:
    learned = target(learned=True)
    learned.encode({"labels": torch.tensor([1])}).sum().backward()
    assert learned.embedding.grad is not None
    assert bool((learned.embedding.grad[1] != 0).any())
    assert bool((learned.embedding.grad[0] == 0).all())
    assert not target().encode({"labels": torch.tensor([1])}).requires_grad


def test_loss_is_the_cross_entropy_of_each_sample_in_float32() -> None:
    logits = torch.randn(4, 5, generator=seeded()).bfloat16()
    labels = torch.tensor([0, 4, 2, 2])
    loss = target().loss(logits, {"labels": labels})
    assert loss.dtype == torch.float32
    assert loss.shape == (4,)
    torch.testing.assert_close(loss, -logits.float().log_softmax(-1)[range(4), labels])


def test_bridges_agree_when_the_prediction_is_sure_and_shrink_when_it_is_not() -> None:
    t = target()
    sure = 1000.0 * F.one_hot(torch.tensor([2, 4]), 5)
    torch.testing.assert_close(t.denoised(sure, "soft"), t.table[[2, 4]])
    assert torch.equal(t.denoised(sure, "hard"), t.table[[2, 4]])
    with torch.autocast("cpu", torch.bfloat16):  # z stays float32
        assert torch.equal(t.denoised(sure, "soft"), t.table[[2, 4]])
    unsure = torch.zeros(1, 5)
    torch.testing.assert_close(t.denoised(unsure, "soft"), t.table.mean(dim=0, keepdim=True))
    assert t.denoised(unsure, "soft").norm() < 0.9
    torch.testing.assert_close(t.denoised(unsure, "hard").norm(), torch.ones(()))


def test_soft_bridge_is_the_expectation() -> None:
    t = target()
    logits = torch.randn(3, 5, generator=seeded())
    expected = sum(logits.softmax(-1)[:, k, None] * t.table[k] for k in range(5))
    torch.testing.assert_close(t.denoised(logits, "soft"), expected)


def test_bfloat16_embedding_still_gives_float32_unit_targets() -> None:
    t = target().bfloat16()
    y = t.encode({"labels": torch.arange(5)})
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(5))


@pytest.mark.parametrize("classes", [0, 1])
def test_a_single_class_is_refused(classes: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 labels, got {classes}"):
        target(num_classes=classes)
