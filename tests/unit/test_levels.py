"""What each block tells at each noise level: context and posterior cross-entropies, of levels of its own or of all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import convert, noise_batch, randomise_adaptive, record_calls, seeded
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.evaluation.diagnostics import accuracy_by_level
from diffusionblocks.reports.figures import draw_label_levels


def batches(*seeds: int) -> Callable[[], list[dict[str, Tensor]]]:
    return lambda: [noise_batch(seed=seed) for seed in seeds]


def model_of(**target: str) -> db.DiffusionBlocks:
    model = convert("vit", target=target).eval()
    randomise_adaptive(model)
    return model


def test_rows_by_hand() -> None:
    model = model_of()
    rows = accuracy_by_level(model, batches(0), seed=3)
    assert [row.block for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(row.own_level for row in rows)
    assert rows[0].level == model.noise.read_max
    for row in (rows[0], rows[6], rows[-1]):
        batch, block = noise_batch(), model.block(row.block)
        level = torch.full((6,), row.level)
        labels = batch.pop("labels")
        z = block.target.rows(labels) + row.level * torch.randn(6, 32, generator=seeded(3))  # type: ignore[operator]
        with torch.no_grad():
            context = block(batch, z, level, context=True)
            posterior = block(batch, z, level)
        for logits, loss, accuracy in (
            (context, row.context_cross_entropy, row.context_accuracy),
            (posterior, row.cross_entropy, row.accuracy),
        ):
            assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
            assert accuracy == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    # The lower the level, the more z says; the image says what it says at every level.
    assert rows[-1].cross_entropy < 0.01 < rows[0].cross_entropy
    assert rows[-1].context_cross_entropy > 0.5


def test_what_z_tells_by_itself_is_not_rounded_under_autocast() -> None:
    """z and the rows stay float32: in bfloat16 rows that are near one another are one."""
    model = model_of()
    rows = torch.nn.functional.normalize(torch.eye(4, 32)[:1] + 0.02 * torch.randn(4, 32, generator=seeded(5)), dim=-1)
    for block in model.blocks:
        block.target.embedding.data[:4] = rows  # type: ignore[union-attr, operator, index]
    exact = accuracy_by_level(model, batches(*range(8)))
    with torch.autocast("cpu", torch.bfloat16):
        below = accuracy_by_level(model, batches(*range(8)))
    assert [row.nearest for row in below] == [row.nearest for row in exact]


def test_every_block_is_asked_with_the_same_z_in_one_pass_over_the_data() -> None:
    model = model_of()
    reads: list[int] = []

    def counted() -> list[dict[str, Tensor]]:
        reads.append(1)
        return batches(0, 1)()

    own = accuracy_by_level(model, counted)
    reads.clear()
    calls = record_calls(model)
    rows = accuracy_by_level(model, counted, every_block=True)
    assert len(reads) == 12
    assert len(calls) == 12 * 3 * 2
    assert [row.block for row in rows] == [0, 1, 2] * 12
    assert [row for row in rows if row.own_level] == own
    assert len({row.nearest for row in rows if row.level == own[0].level}) == 1
    foreign = [row for row in rows if row.level == own[0].level]
    assert len({row.context_cross_entropy for row in foreign}) == 3


def test_levels_of_each_block_whatever_the_partition() -> None:
    for partition, blocks in (("uniform", 3), ("log-uniform", 2), ("equi-probability", 1)):
        model = convert("vit", layers=6, num_blocks=blocks, partition=partition).eval()
        rows = accuracy_by_level(model, batches(0))
        assert [row.block for row in rows] == [b for b in range(blocks) for _ in range(12 // blocks)]


def test_blocks_that_see_no_noise_say_the_same_of_an_image_at_every_level() -> None:
    model = convert("vit", target={"noise_input": False}).eval()
    rows = accuracy_by_level(model, batches(0))
    for block in range(3):
        losses = [row.context_cross_entropy for row in rows if row.block == block]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    images = noise_batch()["pixel_values"]
    first, second = (model.predict(images, generator=seeded(seed)).logits for seed in (0, 1))
    assert torch.equal(first, second)
    seen = accuracy_by_level(model_of(), batches(0))  # the positive control: blocks that see z
    assert seen[0].context_cross_entropy != pytest.approx(seen[3].context_cross_entropy, rel=1e-4)


def test_blocks_that_learn_the_likelihood_have_no_context(tmp_path: Path) -> None:
    model = model_of(likelihood="learned")
    rows = accuracy_by_level(model, batches(0))
    assert {(row.context_accuracy, row.context_cross_entropy) for row in rows} == {(None, None)}
    draw_label_levels(rows, model.partition, model.noise, tmp_path / "levels.png")
    assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")
