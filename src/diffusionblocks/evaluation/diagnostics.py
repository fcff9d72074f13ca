"""What each block tells at each noise level: its accuracy and cross-entropies, beside what z gives away by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.finite import FiniteCheck
from ..common.modules import evaluating
from ..common.precision import without_autocast
from ..core.block import Block
from ..core.model import DiffusionBlocks
from ..targets import LabelTarget, label_losses
from .row import Row
from .work import ALONE, Work

#: About how many levels are measured by default: as many of each block.
LEVELS = 12


@dataclass(frozen=True)
class LevelRow(Row):
    """What a block tells of the labels at one noise level, given z of the true label.

    Attributes:
        level: sigma, or t of flow matching.
        block: index of the block that was asked.
        own_level: whether it owns the level.
        accuracy: of the block's prediction from the image and z.
        nearest: accuracy of the nearest target to z alone. Where it approaches 1 the label can be read off z without a
            look at the image: such a level teaches nothing about it.
        cross_entropy: of the prediction from the image and z, in nats; it falls towards 0 with the level.
        context_accuracy, context_cross_entropy: of the block's context logits, which are of the image alone. At the
            optimum they are the same at every level. None under `target.likelihood: learned`.
    """

    level: float
    block: int
    own_level: bool
    accuracy: float
    nearest: float
    cross_entropy: float
    context_accuracy: float | None
    context_cross_entropy: float | None


def accuracy_by_level(
    model: DiffusionBlocks,
    batches: Callable[[], Iterable[Mapping[str, Tensor]]],
    levels: Sequence[float] | None = None,
    *,
    every_block: bool = False,
    seed: int = 0,
    work: Work = ALONE,
) -> list[LevelRow]:
    """Accuracy and cross-entropies of the owning block at each level, given the true label's noised target.

    Args:
        model: a classifier's blocks.
        batches: makes an iterable of {"pixel_values", "labels"} on the model's device; read once a level.
        levels: what to measure; default about twelve, as many of each block (`Partition.levels`).
        every_block: ask every block at every level, with the same z.
        seed: of the noise.
        work: who computes which batch.

    Returns:
        Rows in the order of levels, then blocks; none on ranks but the first.

    Raises:
        ValueError: the model is no classifier, there are no examples, or logits are not finite.
    """
    target, partition = model.target, model.partition
    if not isinstance(target, LabelTarget):
        raise ValueError(f"accuracy by level is for classifiers, and {model.model_class} is none")
    if levels is None:
        levels = partition.levels(model.noise, max(1, LEVELS // partition.num_blocks))[:-1]
    rows = []
    with torch.no_grad(), evaluating(model):
        for level in levels:
            owner = partition.block_of(level)
            blocks = [model.block(b) for b in (range(partition.num_blocks) if every_block else [owner])]
            generator = torch.Generator(device=model.device).manual_seed(seed)
            means = _means_at(level, model.block(owner), blocks, batches(), generator, work)
            for block, (hits, nearest, loss, *context) in zip(blocks, means, strict=work.leads):
                context_hits, context_loss = context or (None, None)
                own_level = block.index == owner
                rows.append(LevelRow(level, block.index, own_level, hits, nearest, loss, context_hits, context_loss))
    return rows


def _means_at(
    level: float,
    owner: Block,
    blocks: Sequence[Block],
    batches: Iterable[Mapping[str, Tensor]],
    generator: torch.Generator,
    work: Work,
) -> list[list[float]]:
    """The means of `_sums` over all examples, of each block; none on ranks but the first."""

    def measure(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        noise = owner.draw_noise(batch, generator)
        sums = torch.stack([_sums(block, batch, level, noise) for block in blocks])
        return {"sums": sums, "count": torch.tensor(len(batch["labels"]))}

    skip = functools.partial(owner.draw_noise, generator=generator)
    parts = list(work.in_order(batches, measure, skip=skip))
    if not work.leads:
        return []
    count = sum(int(part["count"]) for part in parts)
    if not count:
        raise ValueError("there are no examples to measure an accuracy on: the batches are empty")
    means: list[list[float]] = (torch.stack([part["sums"] for part in parts]).sum(dim=0) / count).tolist()
    return means


def _sums(block: Block, batch: Mapping[str, Tensor], level: float, noise: Tensor) -> Tensor:
    """Sums over a batch: hits, hits of the nearest target, and losses; of context logits, too, where there are any."""
    check = FiniteCheck(owner=lambda _: block.index)
    labels = batch["labels"]
    result = block.losses_at(batch, level, noise=noise)
    assert isinstance(block.target, LabelTarget)
    outputs = [result.output] if result.context is None else [result.output, result.context]
    with without_autocast(result.z):  # in bfloat16 neighbouring rows are one
        products = result.z @ block.target.table.T
    similarities = check.values(products, "products of z and the targets", level)
    sums = []
    for logits in (check.logits(output.float(), level) for output in outputs):
        sums += [(logits.argmax(dim=-1) == labels).sum(), label_losses(logits, labels).sum()]
    check.read()
    nearest = (similarities.argmax(dim=-1) == labels).sum()
    return torch.stack([value.double() for value in (sums[0], nearest, *sums[1:])])
