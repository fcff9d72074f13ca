"""What several GPUs make of a recipe: the mesh of its blocks, beside the whole model under DDP and FSDP2.

Peaks are the planner's, plus what each way to share keeps. Bytes between GPUs are closed forms of ring collectives:

    blocks, a GPU each      nothing
    blocks, d GPUs each     all-reduce of a block's gradients:  2 (d - 1) / d G_block
                            (`parallel.within_block: shard`: as FSDP2, of a block and d)
    DDP                     all-reduce of all gradients:        2 (N - 1) / N G
    FSDP2                   all-gather of the layers' weights, forward and backward, and of the others' once, and
                            reduce-scatter of the gradients, for each micro-batch: (N - 1) / N (2 L + O + G)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..common.modules import bytes_of
from ..experiments.baselines import variants
from ..experiments.experiment import Experiment
from ..experiments.parts import has_parts
from ..experiments.recipe import Recipe
from ..experiments.recipe_changes import numbers_of_blocks
from ..training import TrainConfig, Unit
from ..training.ranks import TOGETHER
from ..training.shards import gathered_dtype
from .ledger import Forecast
from .planner import MARGIN, check_context, check_margin, parse_budget, plan_with, with_changes
from .predictor import Predictor

_MOST = 100_000


@dataclass(frozen=True)
class Gpus:
    """GPUs that share a run.

    Attributes:
        machines: how many.
        each: GPUs of a machine.
        memory: bytes of a GPU.
        margin: share of a predicted peak that must be free beside it.
    """

    machines: int
    each: int
    memory: int
    margin: float = MARGIN

    def hold(self, peak: int, context: int) -> bool:
        """Whether a GPU has room for a predicted peak and a margin of it, beside its context."""
        return peak * (1 + self.margin) <= self.memory - context

    @property
    def count(self) -> int:
        """Of all machines."""
        return self.machines * self.each

    def spans_machines(self, group: int) -> bool:
        """Whether groups of so many neighbours are on more than one machine."""
        return self.machines > 1 and (group > self.each or self.each % group > 0)


@dataclass(frozen=True)
class Row:
    """A way to share a run.

    Attributes:
        method: `blocks`, `ddp`, `fsdp2`.
        blocks: of the model.
        mesh: GPUs along (block, data).
        batch: examples of a step: of each block, or of the whole model.
        batch_per_gpu: of them on a GPU.
        peak: bytes of a GPU at its fullest.
        traffic_bytes: bytes that a GPU sends to others in a step.
        network_bytes: of them those that leave its machine.
        fits: whether the peak is within a GPU's memory.
    """

    method: str
    blocks: int
    mesh: tuple[int, int]
    batch: int
    batch_per_gpu: int
    peak: int
    traffic_bytes: int
    network_bytes: int
    fits: bool


@dataclass(frozen=True)
class ParallelPlan:
    """What several GPUs make of a recipe.

    Attributes:
        gpus: they.
        rows: blocks, and beside them the end-to-end model under DDP and FSDP2 at equal layer-updates of a GPU.
        changes: of the recipe, with which the blocks are as in the first row.
        largest_batch: of each block that fits; None: not even one example does.
        context: bytes of each GPU's memory that are its context, and no peak has.
    """

    gpus: Gpus
    rows: tuple[Row, Row, Row]
    changes: dict[str, Any]
    largest_batch: int | None
    context: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def parse_gpus(text: str, margin: float = MARGIN) -> Gpus:
    """GPUs as `4x24GiB`, or of several machines as `2x8x80GiB`: machines, GPUs of each, memory of a GPU.

    Raises:
        ValueError: it is neither, a memory that `parse_budget` refuses, or a margin outside [0, 1).
    """
    check_margin(margin)
    match = re.fullmatch(r"\s*(?:(\d{1,6})\s*x\s*)?(\d{1,6})\s*x\s*([^x]+)", text)
    counts = [int(match[1] or 1), int(match[2])] if match else [0]
    if match is None or min(counts) < 1 or math.prod(counts) > _MOST:
        raise ValueError(
            f"gpus = {text!r}: must be GPUs and the memory of each, as 4x24GiB, or machines before them, as 2x8x80GiB; "
            f"at most {_MOST:,} in all"
        )
    return Gpus(counts[0], counts[1], parse_budget(match[3], f"gpus = {text!r}: the memory of each"), margin)


def plan_gpus(predictor: Predictor, gpus: Gpus, *, batch: bool = True) -> ParallelPlan:
    """Find what several GPUs make of a recipe: its number of blocks where it fits, else the fewest that do.

    Args:
        predictor: of a recipe of blocks.
        gpus: that share the run.
        batch: whether to look for the largest batch, which takes a few more steps on fake tensors.

    Raises:
        ValueError: no blocks that train apart, no number of blocks that divides the GPUs, or what `Predictor` refuses.
    """
    recipe = predictor.recipe
    if recipe.method != "diffusionblocks":
        raise ValueError(f"method: {recipe.method} has no blocks to share among GPUs: set method to diffusionblocks")
    check_context(gpus.memory, predictor.context_bytes, "gpus: the memory of each")
    has_parts(Experiment(recipe))  # refuses those that do not train apart
    own = {"train.resident": "active"} | ({} if recipe.train.blocks is None else {"train.blocks": None})
    candidates = [_of_blocks(predictor, gpus, changes, many) for many, changes in _splits(recipe, gpus, own)]
    row, changes = next((each for each in candidates if each[0].fits), candidates[-1])
    largest = None
    if batch:
        alone = Predictor(with_changes(recipe, changes), predictor.num_examples, cache=predictor.cache)
        # Where a block is shared out, what a GPU need not hold of it is free for examples.
        there = predictor.forecast(with_changes(recipe, changes | {"train.batch_size": row.batch_per_gpu})).ledger.peak
        free = max(0, there - row.peak)
        fit = plan_with(alone, gpus.memory + free, vary="batch", margin=gpus.margin).batch
        largest = None if fit is None else int(fit.changes["train.batch_size"]) * row.mesh[1]
    if gpus.count > 1 or recipe.train.resident == "active":
        del changes["train.resident"]  # which a run in parts does not need
    rows = (row, *_end_to_end(predictor, gpus, row))
    return ParallelPlan(gpus, rows, changes, largest, predictor.context_bytes)


def _splits(recipe: Recipe, gpus: Gpus, own: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of blocks that share out the GPUs, with the changes: the recipe's own first, then ascending."""
    now = recipe.blocks.num_blocks
    others = [many for many in numbers_of_blocks(recipe) if many not in (1, now)]
    possible = [many for many in (now, *others) if many > 1 and (gpus.count <= many or gpus.count % many == 0)]
    if not possible:
        numbers = sorted({now, *others} - {1}) or [now]
        raise ValueError(
            f"gpus = {gpus.count}: as many GPUs as blocks, fewer, or a multiple are shared out evenly; the layers make "
            f"{', '.join(map(str, numbers))} blocks: give another number of GPUs"
        )
    for many in possible:
        changes = own if many == now else own | {"blocks.num_blocks": many, "blocks.layers": None}
        yield many, {name: value for name, value in changes.items() if name != "blocks.layers" or recipe.blocks.layers}


def _of_blocks(predictor: Predictor, gpus: Gpus, changes: dict[str, Any], many: int) -> tuple[Row, dict[str, Any]]:
    """Blocks on a mesh: each GPU trains one block at a time, alone or with the others of its row."""
    recipe = predictor.recipe
    mesh = min(many, gpus.count), max(1, gpus.count // many)
    share = math.ceil(recipe.train.batch_size / mesh[1])
    changed = with_changes(recipe, changes | {"train.batch_size": share})
    shard = mesh[1] > 1 and recipe.parallel.within_block == "shard"
    if shard:
        peak = _peak_shared_out(predictor, changed, mesh[1])
    else:
        gradients = max(bytes_of(unit.own) for unit in predictor.units(changed))
        copies = min(gradients, TOGETHER * 4) if mesh[1] > 1 else 0  # of the gradients that travel together
        peak = predictor.forecast(changed).ledger.peak + copies
    traffic_bytes = _traffic_bytes(predictor, changed, mesh[1], shard=shard)
    over = traffic_bytes if gpus.spans_machines(mesh[1]) else 0
    row = Row(
        "blocks",
        many,
        mesh,
        recipe.train.batch_size,
        share,
        peak,
        traffic_bytes,
        over,
        gpus.hold(peak, predictor.context_bytes),
    )
    return row, dict(changes)


def _end_to_end(predictor: Predictor, gpus: Gpus, blocks: Row) -> tuple[Row, Row]:
    """The whole model under DDP and FSDP2, with as many layer-updates of each GPU in a step."""
    share = max(1, math.ceil(predictor.recipe.train.batch_size / max(blocks.blocks, gpus.count)))
    whole = with_changes(_whole(predictor.recipe), {"train.batch_size": share, "train.resident": "all"})
    forecast, (unit,) = predictor.forecast(whole), predictor.units(whole)
    # DDP's buckets are there from the beginning.
    ddp = sum(forecast.persistent.values()) + bytes_of(unit.own) + _activations(forecast)

    def row(method: str, peak: int, *, shard: bool) -> Row:
        traffic_bytes = _traffic_bytes(predictor, whole, gpus.count, shard=shard)
        over = traffic_bytes if gpus.machines > 1 else 0
        return Row(
            method,
            1,
            (1, gpus.count),
            share * gpus.count,
            share,
            peak,
            traffic_bytes,
            over,
            gpus.hold(peak, predictor.context_bytes),
        )

    return (
        row("ddp", ddp, shard=False),
        row("fsdp2", _peak_shared_out(predictor, whole, gpus.count), shard=True),
    )


def bytes_sent(unit: Unit, config: TrainConfig, device: torch.device, ranks: int, *, shard: bool) -> int:
    """Bytes that each of several ranks sends in a step of a unit that they train together, by ring collectives.

    `2 (N - 1) / N` of the gradients for an all-reduce. Where FSDP2 shares the unit out, `(N - 1) / N` of the layers'
    weights twice, of stem and head once, and of the gradients, for each part of an accumulated batch.

    Args:
        unit: what they train.
        config: of its training.
        device: on which; it says in what layers are gathered.
        ranks: how many, N.
        shard: whether they share the unit out.
    """
    gradients = bytes_of(unit.own)
    if not shard:
        return _ring(2 * gradients, ranks)
    _, gathered, others = _layers_and_rest(unit, config, device)
    return _ring((2 * sum(gathered) + others + gradients) * config.accumulation, ranks)


def _traffic_bytes(predictor: Predictor, recipe: Recipe, ranks: int, *, shard: bool) -> int:
    """What `bytes_sent` says of a recipe's largest unit."""
    device = torch.device("cuda" if predictor.on_gpu else "cpu")
    return max(bytes_sent(unit, recipe.train, device, ranks, shard=shard) for unit in predictor.units(recipe))


def _peak_shared_out(predictor: Predictor, recipe: Recipe, ranks: int) -> int:
    """Peak of a GPU where FSDP2 shares each unit out over so many.

    Beside its rows a GPU has stem and head whole, and two layers: the one that computes, and the next. In the backward
    pass a layer's gradients are there, and the copy of them that is summed; at its end those of stem and head.
    """
    forecast, device = predictor.forecast(recipe), torch.device("cuda" if predictor.on_gpu else "cpu")
    rows = sum(forecast.persistent[kind] for kind in ("parameters", "optimizer", "ema"))
    there, gradients = 0, 0
    for unit in predictor.units(recipe):
        of_layers, gathered, others = _layers_and_rest(unit, recipe.train, device)
        layer = 3 * max(gathered, default=0) + max(of_layers, default=0)
        there, gradients = max(there, 2 * others + max(layer, others)), max(gradients, bytes_of(unit.own))
    whole_only = sum(forecast.persistent.values()) - rows
    return whole_only + math.ceil((rows + gradients) / ranks) + there + _activations(forecast)


def _layers_and_rest(unit: Unit, config: TrainConfig, device: torch.device) -> tuple[list[int], list[int], int]:
    """Of a unit that FSDP2 shares out: bytes of each layer, as they are gathered, and of stem and head."""
    lower = gathered_dtype(config, device)
    module: Any = unit.module
    of_layers, gathered = [], []
    for parts in module.layer_groups():
        parameters = [p for part in parts for p in part.parameters()]
        of_layers.append(bytes_of(parameters))
        gathered.append(sum(p.numel() * (lower or p.dtype).itemsize for p in parameters))
    return of_layers, gathered, bytes_of(module.parameters()) - sum(of_layers)


def _whole(recipe: Recipe) -> Recipe:
    """The end-to-end recipe of all layers."""
    alone = recipe.model_copy(update={"train": recipe.train.model_copy(update={"blocks": None})})
    return variants(alone)[0].recipe


def _activations(forecast: Forecast) -> int:
    return max(max(m.early.activations, m.late.activations) for m in forecast.moments.values())


def _ring(size: int, ranks: int) -> int:
    """Bytes that each of so many ranks sends, of collectives that move `size` bytes past each."""
    return size * (ranks - 1) // ranks
