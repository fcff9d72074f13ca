"""Boundaries measured on a run's trunk: of a partition by `loss`, `acceleration` or `energy`.

They are measured once, when the trunk has ended, with draws keyed by the run's seed. `trunk/boundaries.json` holds
them with the monitor that they share equally. Whoever resumes the run, or trains a block of it on another machine,
reads them there. They become those of the saved model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..common.formats import read_json, validate, write_json
from ..common.modules import evaluating
from ..common.seeds import keyed_generator
from ..core.model import DiffusionBlocks
from ..data.dataset import groups_of
from ..evaluation.trajectories import Acceleration, Denoise, energy
from ..noise import GaussianProcess, Monitor, NoiseProcess
from ..reports.figures import draw_monitor
from ..training import BatchMaker
from ..training.ranks import Group
from .experiment import Experiment
from .noise_fit import chosen_examples, mean_losses
from .recipe_changes import trunk_recipe, with_boundaries

BOUNDARIES = "boundaries.json"


class MeasuredBoundaries(BaseModel):
    """What `trunk/boundaries.json` holds.

    Attributes:
        partition: what was measured.
        power: the boundaries share the integral of the monitor to this power.
        boundaries: B + 1 levels, ascending.
        levels, times, values: of the `Monitor`.
        settings: of the recipe's `monitor`, as they were.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    partition: Literal["loss", "acceleration", "energy"]
    power: float
    boundaries: tuple[float, ...]
    levels: tuple[float, ...]
    times: tuple[float, ...]
    values: tuple[float, ...]
    settings: dict[str, Any]

    @property
    def between(self) -> tuple[float, ...]:
        """The B - 1 levels between the blocks: `blocks.boundaries`."""
        return self.boundaries[1:-1]

    @property
    def monitor(self) -> Monitor:
        """The monitor."""
        return Monitor(self.levels, self.times, self.values)


def place_boundaries(experiment: Experiment, folder: Path, *, group: Group | None = None) -> Experiment:
    """Measure the boundaries of a run on its trunk, below `folder`/trunk, or read back those that were measured.

    Args:
        experiment: on its fitted levels, where it fits them.
        folder: of the run, whose trunk has ended.
        group: ranks that do it together; the first of them measures.

    Returns:
        The experiment on these boundaries; as it is where its partition is not measured.

    Raises:
        ValueError: the folder has boundaries of other settings, or what was measured is not finite.
    """
    if not (experiment.of_method_blocks and experiment.recipe.blocks.measured_later):
        return experiment
    if group is not None and not group.leads:
        values = [0.0] * (experiment.recipe.blocks.num_blocks - 1)
    else:
        values = list((read_boundaries(experiment, folder) or _measure(experiment, folder)).between)
    if group is not None:  # the same to the last bit
        values = group.of_first(values)
    return experiment.derive(with_boundaries(experiment.recipe, values), same_run=True)


def read_boundaries(experiment: Experiment, folder: Path) -> MeasuredBoundaries | None:
    """What was measured on a run's trunk; None where it was not, yet.

    Raises:
        ValueError: the file is damaged, or of other settings.
    """
    file = folder / "trunk" / BOUNDARIES
    if not file.is_file():
        return None
    try:
        result = validate(read_json(file), MeasuredBoundaries, file)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and it is measured again") from None
    settings, blocks = experiment.recipe.monitor.model_dump(mode="json"), experiment.recipe.blocks
    before = (result.partition, len(result.boundaries) - 1, result.settings)
    if before != (blocks.partition, blocks.num_blocks, settings):
        raise ValueError(
            f"{file} has {before[1]} blocks by {before[0]} with monitor = {before[2]}, this run has "
            f"{blocks.num_blocks} by {blocks.partition} with {settings}: set it back, or delete the file, and it is "
            "measured again"
        )
    return result


def _measure(experiment: Experiment, folder: Path) -> MeasuredBoundaries:
    recipe = experiment.recipe
    of_trunk = experiment.derive(trunk_recipe(recipe))
    model = of_trunk.load(folder / "trunk" / "model")  # its averaged weights
    assert isinstance(model, DiffusionBlocks)
    power = recipe.monitor.power or _POWERS[recipe.blocks.partition]
    resolutions, measure = _resolutions(of_trunk, model), _MONITORS[recipe.blocks.partition]
    with evaluating(model):
        monitors = [measure(of_trunk, model, resolution) for resolution in resolutions]
    monitor = Monitor.together(monitors, [len(resolution.indices) for resolution in resolutions], power)
    boundaries = monitor.boundaries(recipe.blocks.num_blocks, model.noise, power)
    result = MeasuredBoundaries(
        partition=recipe.blocks.partition,  # type: ignore[arg-type]  # a measured one
        power=power,
        boundaries=boundaries,
        levels=monitor.levels,
        times=monitor.times,
        values=monitor.values,
        settings=recipe.monitor.model_dump(mode="json"),
    )
    draw_boundaries(result, model.noise, folder / "trunk" / "boundaries.png")
    write_json(folder / "trunk" / BOUNDARIES, result.model_dump(mode="json"))
    return result


def draw_boundaries(result: MeasuredBoundaries, noise: NoiseProcess, path: Path) -> None:
    """Write a PNG of a monitor, and of the boundaries that share it equally."""
    draw_monitor(result.monitor, result.boundaries, noise, path, name=result.partition, power=result.power)


# ---- monitors --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Resolution:
    """Chosen training examples of one size.

    Attributes:
        batches: makes the training batches.
        noise: the process at that size: where its shift follows the resolution, levels have another place on the path.
        indices: of the examples.
        before: how many examples of other sizes are measured before them.
    """

    batches: BatchMaker
    noise: NoiseProcess
    indices: Tensor
    before: int


def _resolutions(experiment: Experiment, model: DiffusionBlocks) -> list[_Resolution]:
    """The examples to measure on, size by size."""
    batches, noise, before = experiment.batches(), model.noise, 0
    every = chosen_examples(batches.num_examples, experiment.recipe.monitor.examples, experiment.recipe.train.seed)
    groups = groups_of(batches)
    resolutions = []
    for indices in [every] if groups is None else [every[groups[every] == one] for one in groups[every].unique()]:
        result = _Resolution(batches, noise, indices, before)
        if noise.path is not noise:
            shape = next(_batches(experiment, result))["pixel_values"].shape
            result = dataclasses.replace(result, noise=noise.for_tokens(model.target.tokens_of(shape)))
        resolutions.append(result)
        before += len(indices)
    return resolutions


def _batches(experiment: Experiment, resolution: _Resolution) -> Iterator[Mapping[str, Tensor]]:
    """Training batches of the examples of one size."""
    recipe, device = experiment.recipe, experiment.device
    size = recipe.monitor.batch_size or recipe.train.batch_size
    for number, indices in enumerate(resolution.indices.split(size), start=resolution.before):
        yield resolution.batches(indices.to(device), keyed_generator(recipe.train.seed, 0, number, "monitor", device))


def _loss(experiment: Experiment, model: DiffusionBlocks, resolution: _Resolution) -> Monitor:
    """The training loss, over the quantile: in it each block gets an equal share of the whole loss."""
    recipe, noise = experiment.recipe, model.noise
    count = recipe.monitor.levels
    edges, middles = (
        noise.icdf(torch.arange(first, 2 * count + 1, 2, dtype=torch.float64) / (2 * count)) for first in (0, 1)
    )
    losses = mean_losses(
        model.block(0),
        resolution.batches,
        middles.tolist(),
        examples=resolution.indices,
        batch_size=recipe.monitor.batch_size or recipe.train.batch_size,
        precision="float32",
        seed=recipe.train.seed,
    )
    weighted = model.block(0).weight != "none"
    weights = resolution.noise.training_weight(middles) if weighted else torch.ones_like(middles)
    values = (torch.tensor(losses, dtype=torch.float64) * weights).tolist()
    times = [step / count for step in range(count + 1)]
    return Monitor((noise.level_min, *edges[1:-1].tolist(), noise.level_max), tuple(times), tuple(values))


def _acceleration(experiment: Experiment, model: DiffusionBlocks, resolution: _Resolution) -> Monitor:
    """The norm of the acceleration along sampling trajectories, of the labels of training examples."""
    watch = Acceleration(_gaussian(resolution.noise))
    first = experiment.recipe.train.seed + resolution.before
    for batch in _batches(experiment, resolution):
        labels = batch.get("labels") if model.target.num_classes else None  # type: ignore[attr-defined]
        seeds = range(first, first + len(batch["pixel_values"]))
        options: dict[str, Any] = {}
        if model.target.conditions:  # type: ignore[attr-defined]
            options = {"inputs": model.block(0).inputs_of(batch), "sizes": batch["pixel_values"].shape[2:]}
        steps = experiment.recipe.monitor.levels
        model.sample(labels, seeds=seeds, steps=steps, solver="heun", callback=watch, **options)
        first = seeds.stop
    return watch.monitor()


def _energy(experiment: Experiment, model: DiffusionBlocks, resolution: _Resolution) -> Monitor:
    """The squared norm of the velocity's Jacobian at noised training examples."""
    noise = _gaussian(resolution.noise)
    levels = [level for level in noise.sampling_levels(experiment.recipe.monitor.levels)[::-1] if level > 0]
    generator = keyed_generator(experiment.recipe.train.seed, 0, resolution.before, "monitor energy", experiment.device)

    def examples() -> Iterator[tuple[Tensor, Denoise]]:
        for batch in _batches(experiment, resolution):
            inputs = {name: batch[name] for name in model.block(0).input_names}
            yield model.target.encode(batch), functools.partial(model.denoise, inputs)

    return energy(noise, examples(), levels, generator)


def _gaussian(noise: NoiseProcess) -> GaussianProcess:
    assert isinstance(noise, GaussianProcess), "images have no other"
    return noise


_MONITORS: dict[str, Callable[[Experiment, DiffusionBlocks, _Resolution], Monitor]] = {
    "loss": _loss,
    "acceleration": _acceleration,
    "energy": _energy,
}

#: The power of each where none is given: de Boor's of piecewise linear functions; of a loss the loss itself.
_POWERS = {"loss": 1.0, "acceleration": 0.5, "energy": 0.5}
