"""What fits into a budget of device memory: fewest blocks, largest batch, or the memory optimisations that it takes."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..data.placement import SHARE
from ..data.text_config import TextSection
from ..experiments.recipe import Recipe, parse_recipe
from ..experiments.recipe_changes import numbers_of_blocks
from ..families import family_named
from ..reports.tables import format_bytes
from ..training.train_config import LEAN_BUDGET
from .ledger import Forecast, Ledger
from .predictor import Predictor

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for kind, base in (("iB", 1024), ("B", 1000))
}

_SMALLEST = 2**20  # No training step fits less; a smaller budget lacks its unit.

#: Share of a predicted peak that a plan leaves free beside it: the error that a prediction may have.
MARGIN = 0.05

#: Settings that save memory, in the order in which they are tried where no number of blocks fits: checkpointing costs
#: about a third more time, 8-bit state its precision, the optimizer in the backward pass clipping and accumulation.
OPTIMISATIONS: tuple[dict[str, Any], ...] = (
    {"train.activation_checkpointing": True},
    {"train.optimizer": "adamw-8bit"},
    {"train.optimizer_in_backward": True, "train.gradient_clip": None, "train.accumulation": 1},
)

# Chunks of the logits of a text model: so many leave little of them. It costs the head's matrix product once more, less
# than `OPTIMISATIONS`, and is tried before them, behind torch.compile's budget, which costs no matrix product at all.
_CHUNKS = 16


def optimisations_of(recipe: Recipe) -> tuple[dict[str, Any], ...]:
    """The memory optimisations of a recipe: `OPTIMISATIONS`, behind those that only some recipes can have.

    These are torch.compile's budget, and chunks of a text's logits.
    """
    data, train = recipe.data, recipe.train
    first: list[dict[str, Any]] = []
    if train.compile and train.activation_memory_budget > LEAN_BUDGET:
        first.append({"train.activation_memory_budget": LEAN_BUDGET})
    if isinstance(data, TextSection) and train.loss_chunk is None:
        first.append({"train.loss_chunk": max(1, data.length // _CHUNKS)})
    again = "train.activation_checkpointing"
    whole = family_named(recipe.model.type).batch_norm  # its statistics would move twice a step
    return (*first, *(step for step in OPTIMISATIONS if not (whole and again in step)))


@dataclass(frozen=True)
class Fit:
    """A change of the recipe that fits, and what it takes then.

    Attributes:
        changes: fields of the recipe and their values.
        ledger: with them.
    """

    changes: dict[str, Any]
    ledger: Ledger

    @property
    def options(self) -> str:
        """The changes as options of the command line."""
        return options_of(self.changes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"changes": self.changes, "options": self.options, "ledger": self.ledger.to_dict()}


@dataclass(frozen=True)
class Plan:
    """What fits into a budget.

    Attributes:
        budget: bytes.
        margin: share of a predicted peak that must be free beside it.
        context: bytes of the budget that are the GPU's context, and no peak has.
        ledger: of the recipe as it stands, with `always`.
        blocks: the fewest blocks that fit at the recipe's batch size, one on the device at a time, of experts as many
            as the recipe has; None: no number does, or it was not asked for.
        batch: the largest batch that fits with the recipe's blocks; None: not even one example does, or it was not
            asked for.
        optimisations: where no number of blocks fits (of `vary="batch"`: not even one example), the first memory
            optimisations with which one does, at the recipe's batch size; at a smaller one only where `batch` is None
            too. None: not needed, or nothing fits.
        always: changes that are part of every answer: data that `data.placement: auto` would keep on the host of a GPU
            with the budget's memory are kept there on a larger one too, without a CUDA graph, which cannot read them.
    """

    budget: int
    ledger: Ledger
    blocks: Fit | None
    batch: Fit | None
    optimisations: Fit | None
    always: dict[str, Any] = dataclasses.field(default_factory=dict)
    margin: float = MARGIN
    context: int = 0

    @property
    def fits(self) -> bool:
        """Whether the recipe as it stands does."""
        return fits(self.ledger, self.budget - self.context, self.margin)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        fits = {name: getattr(self, name) for name in ("blocks", "batch", "optimisations")}
        answers = {name: None if fit is None else fit.to_dict() for name, fit in fits.items()}
        return {
            "budget": self.budget,
            "margin": self.margin,
            "context": self.context,
            "always": self.always,
            "ledger": self.ledger.to_dict(),
            **answers,
        }


def parse_budget(text: str, name: str = "budget") -> int:
    """Bytes of a budget like `12GiB`, `16GB`, `800MiB` or plain bytes.

    Args:
        text: the budget.
        name: what messages call it.

    Raises:
        ValueError: it is none of these, or less than 1 MiB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2] not in _UNITS or not float(match[1]) * _UNITS[match[2]] >= 1:
        raise ValueError(f"{name} = {text!r}: must be bytes above zero, as 12GiB, 16GB, 800MiB or 12884901888")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < _SMALLEST:
        many = "1 byte" if size == 1 else f"{size:,} bytes"
        unit = "GiB" if float(match[1]) < 256 else "MiB"
        raise ValueError(f"{name} = {text!r} is {many}: must be at least 1MiB; did you mean {match[1]}{unit}?")
    return size


def fits(ledger: Ledger, budget: int, margin: float) -> bool:
    """Whether a predicted peak, and a margin of it, are within a budget."""
    return ledger.peak * (1 + margin) <= budget


def check_margin(margin: float) -> None:
    """Refuse a margin below 0 or from 1 on (ValueError)."""
    if not 0 <= margin < 1:
        raise ValueError(f"margin = {margin:g}: must be a share of the predicted peak, 0 <= margin < 1, as 0.05")


def check_context(size: int, context: int, name: str) -> None:
    """Refuse memory that a GPU's context takes whole (ValueError).

    Args:
        size: bytes of a budget, or of a GPU.
        context: bytes of the context; 0: of a CPU.
        name: what the message calls the memory.
    """
    if size <= context:
        raise ValueError(
            f"{name} = {format_bytes(size)}: must exceed the {format_bytes(context)} that the context of a GPU takes "
            "(driver and kernels); give more, or plan for a CPU: --set device=cpu"
        )


def plan(
    recipe: Recipe,
    budget_bytes: int,
    *,
    vary: str | None = None,
    num_examples: int | None = None,
    margin: float = MARGIN,
) -> Plan:
    """Find what fits into a budget of device memory; see `plan_with`, and `Predictor` for `num_examples`."""
    return plan_with(Predictor(recipe, num_examples), budget_bytes, vary=vary, margin=margin)


def plan_with(predictor: Predictor, budget_bytes: int, *, vary: str | None = None, margin: float = MARGIN) -> Plan:
    """Find what fits into a budget of device memory, with the predictions that were made before.

    Args:
        predictor: of the recipe to start from.
        budget_bytes: bytes on the device, which the predicted peak and the GPU's context must not exceed.
        vary: only the number of `blocks`, or only the `batch` size; None tries both.
        margin: share of the predicted peak that must be free beside it.

    Raises:
        ValueError: a budget below one byte or within a GPU's context, an unknown `vary`, a margin outside [0, 1), or
            what `Predictor` refuses.
    """
    if budget_bytes < 1:
        raise ValueError(f"budget_bytes must be >= 1, got {budget_bytes}")
    check_margin(margin)
    if vary not in (None, "blocks", "batch"):
        raise ValueError(f"vary = {vary!r}: must be blocks or batch, or left out for both")
    context = predictor.context_bytes
    check_context(budget_bytes, context, "budget")
    always = _on_the_host(predictor, budget_bytes - context)
    search = _Search(predictor, budget_bytes - context, margin, always)
    blocks = search.fewest_blocks() if vary != "batch" else None
    batch = search.largest_batch() if vary != "blocks" else None
    optimisations = None
    if blocks is None and (vary != "batch" or batch is None):
        optimisations = search.first_optimisations(smaller_batch=batch is None)
    return Plan(budget_bytes, search.at({}).ledger, blocks, batch, optimisations, always, margin, context)


def cheapest_changes(predictor: Predictor, budget_bytes: int, *, margin: float = MARGIN, most: int = 3) -> list[Fit]:
    """Changes of a recipe that make it fit, each for itself, in the order of what they cost.

    Moving blocks in and out costs a few per cent of the time, as do smaller micro-batches of the same step and what
    torch.compile can compute again; then come checkpointing, more blocks, and `OPTIMISATIONS` together.

    Args:
        predictor: of the recipe, which does not fit.
        budget_bytes: bytes that are free on the device, where the process has its context already.
        margin: share of the predicted peak that must be free beside it.
        most: how many to find.
    """
    search = _Search(predictor, budget_bytes, margin, _on_the_host(predictor, budget_bytes))
    return list(itertools.islice((fit for fit in search.single_changes() if fit), most))


def _on_the_host(predictor: Predictor, budget: int) -> dict[str, Any]:
    """The changes that leave the data on the host where `data.placement: auto` would (`Plan.always`)."""
    recipe = predictor.recipe
    if not predictor.on_gpu or recipe.data.placement != "auto" or predictor.data_bytes() <= budget * SHARE:
        return {}
    return {"data.placement": "host"} | ({"train.cuda_graph": False} if recipe.train.cuda_graph else {})


class _Search:
    """Tries changes of a recipe against a budget."""

    def __init__(self, predictor: Predictor, budget: int, margin: float, always: dict[str, Any]) -> None:
        self.recipe = predictor.recipe
        self._budget = budget
        self._margin = margin
        self._predictor = predictor
        self._always = always
        self._forecasts: dict[str, Forecast] = {}

    def at(self, changes: Mapping[str, Any]) -> Forecast:
        """The forecast with the changes."""
        key = repr(sorted(changes.items()))
        if key not in self._forecasts:
            recipe = with_changes(self.recipe, {**changes, **self._always, "train.concurrent": False})
            self._forecasts[key] = self._predictor.forecast(recipe)
        return self._forecasts[key]

    @property
    def _smallest_batch(self) -> int:
        return 2 if family_named(self.recipe.model.type).batch_norm else 1

    def _fits(self, ledger: Ledger) -> bool:
        return fits(ledger, self._budget, self._margin)

    def fit(self, changes: dict[str, Any]) -> Fit | None:
        """The changes if they fit."""
        ledger = self.at(changes).ledger
        return Fit({**changes, **self._always}, ledger) if self._fits(ledger) else None

    def fewest_blocks(self, optimisations: Mapping[str, Any] | None = None) -> Fit | None:
        """The fewest blocks that fit, with one of them on the device at a time."""
        splits = [{**changes, **(optimisations or {})} for changes in self._splits()]
        # If the most blocks do not fit, neither do fewer. The recipe's own step is traced already, at several depths.
        if optimisations and self.fit(splits[-1]) is None:
            return None
        return next((fit for changes in splits if (fit := self.fit(changes))), None)

    def _splits(self) -> Iterator[dict[str, Any]]:
        """The numbers of blocks that there can be, ascending; one block is always on the device."""
        for many in numbers_of_blocks(self.recipe):
            number = {} if self.recipe.blocks.split == "experts" else {"blocks.num_blocks": many}
            changes: dict[str, Any] = {**number, "train.resident": "active"}
            if self.recipe.method != "diffusionblocks":
                changes = {"method": "diffusionblocks", **changes}
            if self.recipe.blocks.layers is not None:
                changes["blocks.layers"] = None
            if self.recipe.train.blocks is not None:
                changes["train.blocks"] = None
            yield changes

    def largest_batch(self) -> Fit | None:
        """The largest batch that fits, with the blocks as they are."""
        forecast, least = self.at({}), self._smallest_batch
        size = _largest(
            lambda batch: self._fits(forecast.of(batch).ledger), near=self.recipe.train.batch_size, least=least
        )
        return None if size is None else self.fit({"train.batch_size": size})

    def single_changes(self) -> Iterator[Fit | None]:
        """What each change makes of the recipe, the cheapest first; None where it does not fit with it."""
        recipe, train = self.recipe, self.recipe.train
        base: dict[str, Any] = {}
        if recipe.method == "diffusionblocks" and train.resident == "all" and recipe.blocks.num_blocks > 1:
            base = {"train.resident": "active"} | ({"train.concurrent": False} if train.concurrent else {})
            yield self.fit(base)
        steps = [step for step in optimisations_of(recipe) if step not in OPTIMISATIONS]
        yield from (self.fit({**base, **step}) for step in steps)
        size = train.batch_size
        while size % 2 == 0 and size > self._smallest_batch and not train.optimizer_in_backward:
            size //= 2
            parts = {"train.batch_size": size, "train.accumulation": train.accumulation * train.batch_size // size}
            if (fit := self.fit({**base, **parts})) or size == self._smallest_batch:
                yield fit
                break
        if not train.activation_checkpointing and OPTIMISATIONS[0] in optimisations_of(recipe):
            without = {} if train.activation_memory_budget == 1 else {"train.activation_memory_budget": 1.0}
            yield self.fit({**base, **OPTIMISATIONS[0], **without})
        if recipe.method == "diffusionblocks":
            yield self.fewest_blocks()
        yield self.first_optimisations(smaller_batch=True)

    def first_optimisations(self, *, smaller_batch: bool) -> Fit | None:
        """The first memory optimisations that fit, with the fewest blocks; then all of them with smaller batches."""
        steps = optimisations_of(self.recipe)
        for count in range(1, len(steps) + 1):
            changes = {name: value for step in steps[:count] for name, value in step.items()}
            if "train.activation_checkpointing" in changes:  # of a layer that is computed again nothing else is kept
                changes.pop("train.activation_memory_budget", None)
            if fit := self.fewest_blocks(changes):
                return fit
        if not smaller_batch:
            return None
        *_, deepest = self._splits()
        size = self.recipe.train.batch_size // 2
        while size >= self._smallest_batch:
            if fit := self.fit({**deepest, **changes, "train.batch_size": size}):
                return fit
            size //= 2
        return None


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values in some fields, checked.

    Raises:
        ValueError: a value that is not allowed.
    """
    values = recipe.model_dump(mode="json")
    for name, value in changes.items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return parse_recipe(values, "the recipe with " + ", ".join(f"{n} = {_yaml(v)}" for n, v in changes.items()))


def options_of(changes: Mapping[str, Any]) -> str:
    """Changes of a recipe as options of the command line."""
    return " ".join(f"--set {shlex.quote(f'{name}={_yaml(value)}')}" for name, value in changes.items())


def _largest(fits: Callable[[int], bool], *, near: int, least: int) -> int | None:
    """The largest n that fits, for what does not fit again once it has stopped.

    Args:
        fits: whether n does.
        near: where to begin. Of a text each batch may have chunks of its own, which have to be followed.
        least: the smallest n; None is returned where it does not fit.
    """
    low = max(near, least)
    high = 2 * low
    while not fits(low):
        if low == least:
            return None
        low, high = max(low // 2, least), low
    if low >= near:
        while high < 2**30 and fits(high):
            low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _yaml(value: Any) -> str:
    """A value as --set reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
