"""What the levels teach: accuracy of each block at levels of its own, beside what z gives away by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.finite import FiniteCheck
from ..common.modules import evaluating
from ..core.model import DiffusionBlocks
from ..targets import LabelTarget
from .row import Row


@dataclass(frozen=True)
class LevelRow(Row):
    """One level: the block that owns it, its accuracy there, and the accuracy of the nearest target to z alone.

    Where `nearest` approaches 1 the label can be read off z without looking at the input: such levels teach nothing
    about it, and only the accuracy near the highest level tells how well the input is understood.
    """

    level: float
    block: int
    accuracy: float
    nearest: float


def accuracy_by_level(
    model: DiffusionBlocks,
    batches: Callable[[], Iterable[Mapping[str, Tensor]]],
    levels: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> list[LevelRow]:
    """Accuracy of the owning block at each level, given the true label's noised target.

    Args:
        model: a classifier's blocks.
        batches: makes an iterable of {"pixel_values", "labels"} on the model's device; read once a level.
        levels: what to measure; default the twelve of a chain, from the highest that is read.
        seed: of the noise.

    Raises:
        ValueError: the model is no classifier, there are no examples, or logits are not finite.
    """
    target = model.target
    if not isinstance(target, LabelTarget):
        raise ValueError(f"accuracy by level is for classifiers, and {model.model_class} is none")
    if levels is None:
        levels = model.noise.levels(12)[:-1]
    rows = []
    check = FiniteCheck(owner=model.partition.block_of)
    with torch.no_grad(), evaluating(model):
        for level in levels:
            block = model.block(model.partition.block_of(level))
            generator = torch.Generator(device=model.device).manual_seed(seed)
            hits = nearest = count = 0
            for batch in batches():
                labels = batch["labels"]
                result = block.losses_at(batch, level, generator)
                logits = check.logits(result.output, level)
                hits += int((logits.argmax(-1) == labels).sum())
                similarities = check.values(result.z @ target.table.T, "products of z and the targets", level)
                nearest += int((similarities.argmax(-1) == labels).sum())
                check.read()
                count += len(labels)
            if not count:
                raise ValueError("there are no examples to measure an accuracy on: the batches are empty")
            rows.append(LevelRow(level, block.index, hits / count, nearest / count))
    return rows
