"""Test accuracy of a classifier and how far its probabilities can be trusted, over ways to predict."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.model import DiffusionBlocks
from ..sampling import Votes, check_combination
from ..training import Baseline
from ..training.ensemble import Ensemble
from .row import Row
from .scores import Scores, score_sums
from .work import ALONE, Work

Batches = Callable[[], Iterable[Mapping[str, Tensor]]]
Views = Sequence[Callable[[Tensor], Tensor]]
T = TypeVar("T")

#: What is shown of images (batch, channels, height, width): themselves, or their mirror images as well.
_ONE: Views = (lambda images: images,)
_BOTH: Views = (*_ONE, lambda images: images.flip(-1))


@dataclass(frozen=True)
class AccuracyRow(Row):
    """What one way to predict gave on all examples.

    Attributes:
        combine: how parts of a model were brought together, see `DiffusionBlocks.predict`; None for a model of one.
        steps, seeds: see there; None for a baseline, which does not denoise.
        accuracy, standard_error, nll, ece: see `Scores`.
        alone: accuracy of each part by itself: of an ensemble each member, of blocks whose votes are averaged (`mean`)
            each step's own vote, in the order of the steps; None of other rows.
    """

    combine: str | None
    steps: int | None
    seeds: int | None
    accuracy: float
    standard_error: float
    nll: float
    ece: float
    alone: tuple[float, ...] | None = None


def is_vote(row: Mapping[str, object]) -> bool:
    """Whether the JSON values of a row are a classifier's, whose accuracy depends on how its blocks are combined."""
    return row.get("combine") is not None and "accuracy" in row


def accuracy_grid(
    model: nn.Module,
    batches: Batches,
    *,
    combine: Sequence[str | None] = (None,),
    steps: Sequence[int | None] = (None,),
    seeds: Sequence[int | None] = (None,),
    feedback: str | None = None,
    grid: str | None = None,
    seed: int = 0,
    flip: bool = False,
    work: Work = ALONE,
) -> list[AccuracyRow]:
    """Accuracy, NLL and calibration error for every combination of `combine`, `steps` and `seeds`.

    The row with n seeds combines the first n of the same chains, and all rules combine the same network calls: rows
    differ by what is made of them alone.

    Args:
        model: a `DiffusionBlocks`, or a `Baseline` (a row for each of its `answers`; the settings do not apply).
        batches: makes an iterable of {"pixel_values", "labels"} on the model's device; read once per number of steps.
        combine, steps, seeds: what to measure; None stands for the default of `DiffusionBlocks.predict`.
        feedback, grid: see there.
        seed: of the starting noise.
        flip: average the log-probabilities of each image and of its mirror image, in every row.
        work: who computes which batch.

    Returns:
        Rows in the order of `combine`, then steps, then seeds, each once; none on ranks but the first.

    Raises:
        ValueError: an argument that `predict` refuses, no examples, or logits that are not finite.
    """
    views = _BOTH if flip else _ONE
    if isinstance(model, Baseline):
        return _baseline_rows(model, batches, views, work)
    assert isinstance(model, DiffusionBlocks), type(model).__name__
    defaults = model.inference.defaults
    rules = _resolve(combine, defaults.combine)
    counts, chains = _resolve(steps, defaults.steps), _resolve(seeds, defaults.seeds)
    for rule in rules:
        check_combination(rule, contexts=model.block(0).adds_likelihood)
    table = {setting: Scores() for setting in itertools.product(rules, counts, chains)}
    alone = {setting: [Scores() for _ in range(setting[1])] for setting in table if setting[0] == "mean"}
    for count in counts:
        settings = [(rule, count, chain) for chain in sorted(chains) for rule in rules]
        places = [scores for key in settings for scores in (table[key], *alone.get(key, ()))]
        generator = torch.Generator(device=model.device).manual_seed(seed)
        options = {"feedback": feedback, "grid": grid, "generator": generator}
        chains_of = _Chains(model, count, rules, chains, views, options)
        for results in work.in_order(batches(), chains_of.sums, skip=chains_of.skip):
            for scores, sums in zip(places, results["sums"], strict=True):
                scores.add_sums(sums)
    if not work.leads:
        return []
    return [_row(setting, scores, alone.get(setting)) for setting, scores in table.items()]


@dataclass(frozen=True)
class _Chains:
    """The chains of one number of steps, which all rules and numbers of seeds share."""

    model: DiffusionBlocks
    steps: int
    rules: Sequence[str]
    seeds: Sequence[int]
    views: Views
    options: Mapping[str, Any]

    def sums(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`score_sums` of a batch, one row each: by number of seeds, then rule; of a mean, then each step's own."""
        votes: list[Votes] = []
        rows: list[Tensor] = []
        for chain in range(1, max(self.seeds) + 1):
            new = [self._votes(view(batch["pixel_values"])) for view in self.views]
            votes = [a + b for a, b in zip(votes, new, strict=True)] if votes else new
            for rule in self.rules if chain in self.seeds else ():
                logs = [_average([each.answer(rule)[1] for each in votes])]
                if rule == "mean":
                    means = [each.context_means() for each in votes]
                    logs += [_average([mean[step] for mean in means]) for step in range(self.steps)]
                rows += [score_sums(each, batch["labels"]) for each in logs]
        return {"sums": torch.stack(rows)}

    def skip(self, batch: Mapping[str, Tensor]) -> None:
        """Make the draws of a batch that another rank measures."""
        grid, generator = self.options["grid"], self.options["generator"]
        for _ in range(max(self.seeds) * len(self.views)):
            self.model.inference.skip_draws(len(batch["labels"]), generator, steps=self.steps, grid=grid)

    def _votes(self, images: Tensor) -> Votes:
        prediction = self.model.predict(images, steps=self.steps, seeds=1, **self.options)
        assert prediction.votes is not None
        return prediction.votes


def _resolve(values: Sequence[T | None], default: T) -> list[T]:
    """The values, each once, with the default in the place of None."""
    return list(dict.fromkeys(default if value is None else value for value in values))


def _baseline_rows(model: Baseline, batches: Batches, views: Views, work: Work) -> list[AccuracyRow]:
    def measure(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        predictions = [model.predictions(view(batch["pixel_values"])) for view in views]
        logs = {way: [prediction[way].logits for prediction in predictions] for way in predictions[0]}
        return {way or "": score_sums(_average(each), batch["labels"]) for way, each in logs.items()}

    ways: dict[str | None, Scores] = {}
    for results in work.in_order(batches(), measure):
        for way, sums in results.items():
            ways.setdefault(way or None, Scores()).add_sums(sums)
    parts = []
    if isinstance(model, Ensemble):
        parts = [_baseline_rows(model.member(index), batches, views, work) for index in range(len(model.members))]
    if not work.leads:
        return []
    rows = [_row((way, None, None), scores) for way, scores in (ways or {None: Scores()}).items()]
    return [replace(row, alone=tuple(part[0].accuracy for part in parts)) for row in rows] if parts else rows


def _average(logs: Sequence[Tensor]) -> Tensor:
    """Log-probabilities of the mean of log-probabilities (batch, num_classes)."""
    return logs[0] if len(logs) == 1 else torch.stack(list(logs)).mean(dim=0).log_softmax(dim=-1)


def _row(
    setting: tuple[str | None, int | None, int | None], scores: Scores, alone: Sequence[Scores] | None = None
) -> AccuracyRow:
    parts = None if alone is None else tuple(part.means().accuracy for part in alone)
    return AccuracyRow(*setting, **asdict(scores.means()), alone=parts)
