"""Test accuracy of a classifier, over denoising steps and averaged noise seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.model import DiffusionBlocks
from ..training import Baseline
from .row import Row


@dataclass(frozen=True)
class AccuracyRow(Row):
    """Accuracy in [0, 1] with its binomial standard error; steps and seeds are None for a baseline.

    Attributes:
        combine: how parts of a model were brought together, of a model that has several ways.
    """

    steps: int | None
    seeds: int | None
    accuracy: float
    standard_error: float
    combine: str | None = None


def accuracy_grid(
    model: nn.Module,
    batches: Callable[[], Iterable[Mapping[str, Tensor]]],
    *,
    steps: Sequence[int] = (1,),
    seeds: Sequence[int] = (1,),
    feedback: str | None = None,
    grid: str = "equal-quantile",
    seed: int = 0,
) -> list[AccuracyRow]:
    """Accuracy for every pair of steps and seeds.

    The row with n seeds averages the first n of the same chains, so rows differ by averaging alone.

    Args:
        model: a `DiffusionBlocks`, or a `Baseline` (a row for each of its `answers`; steps and seeds do not apply).
        batches: makes an iterable of {"pixel_values", "labels"} on the model's device; read once per number of steps.
        steps, seeds: what to measure; all >= 1.
        feedback, grid: see `predict_labels`.
        seed: of the starting noise.

    Returns:
        Rows in the order of steps, then seeds.

    Raises:
        ValueError: there are no examples, or logits are not finite.
    """
    if isinstance(model, Baseline):
        correct: dict[str | None, int] = {}
        count = 0
        for batch in batches():
            for name, prediction in model.predictions(batch["pixel_values"]).items():
                right = int((prediction.probabilities.argmax(-1) == batch["labels"]).sum())
                correct[name] = correct.get(name, 0) + right
            count += len(batch["labels"])
        return [_row(None, None, hits, count, name) for name, hits in (correct or {None: 0}).items()]
    assert isinstance(model, DiffusionBlocks), type(model).__name__
    rows = []
    counts = sorted(set(seeds))
    for n in steps:
        generator = torch.Generator(device=model.device).manual_seed(seed)
        hits = dict.fromkeys(counts, 0)
        count = 0
        for batch in batches():
            total = torch.zeros((), device=model.device)
            for chain in range(1, counts[-1] + 1):
                prediction = model.predict(
                    batch["pixel_values"], steps=n, seeds=1, feedback=feedback, grid=grid, generator=generator
                )
                total = total + prediction.probabilities
                if chain in hits:
                    hits[chain] += int((total.argmax(-1) == batch["labels"]).sum())
            count += len(batch["labels"])
        rows += [_row(n, s, hits[s], count) for s in seeds]
    return rows


def _row(steps: int | None, seeds: int | None, correct: int, count: int, combine: str | None = None) -> AccuracyRow:
    if not count:
        raise ValueError("there are no examples to measure an accuracy on: the batches are empty")
    p = correct / count
    return AccuracyRow(steps, seeds, p, (p * (1 - p) / count) ** 0.5, combine)
