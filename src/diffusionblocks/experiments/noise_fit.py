"""Levels fitted to a task before its blocks train: a warm-up that measures where the cross-entropy rises.

One block's worth of layers is trained on all levels. After each round the mean cross-entropy of training examples is
measured on a grid of levels, and the next round draws its levels so that equal probability is equal rise, or equal loss
(`NoiseProcess.fit_to`). The last fit is what trunk and blocks then train on, frozen.

Every round has a trainer of its own, which resumes from the checkpoint that the round before left: compiled code and
CUDA graphs never hold levels of an older fit, and a fit that was killed goes on like one that was not. A round counts
as finished once its measurement is in `levels.json`; one that was killed goes on from its newest checkpoint, and ends
with the same levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from ..common.formats import read_json, write_json
from ..common.modules import evaluating
from ..common.seeds import keyed_generator
from ..config import BlocksConfig
from ..core.block import Block
from ..core.merging import difference
from ..core.model import DiffusionBlocks
from ..noise import NOISE_PROCESSES, NoiseProcess
from ..reports.figures import draw_fit
from ..training import BatchMaker
from ..training.checkpoint import checkpoints, read_values
from ..training.ranks import Group
from ..training.step import arithmetic
from ..training.train_config import RESUME_MAY_DIFFER, TrainConfig
from .experiment import Experiment
from .identity import describe_blocks, learned_from, of_every_level, renew
from .recipe import FitConfig, ModelConfig, Recipe, with_target
from .recipe_changes import fit_options, fit_recipe, with_noise

LEVELS = "levels.json"

_SECTIONS: Mapping[str, type[BaseModel]] = {
    "fit": FitConfig,
    "model": ModelConfig,
    "blocks": BlocksConfig,
    "train": TrainConfig,
}


@dataclass(frozen=True)
class Round:
    """What one round left.

    Attributes:
        iteration: steps of the fit at its end.
        losses: mean cross-entropy at each level of the grid, in nats.
        noise: the process fitted to them.
        train_seconds: of all rounds' training so far.
        measure_seconds: of this round's measurement.
    """

    iteration: int
    losses: tuple[float, ...]
    noise: NoiseProcess
    train_seconds: float
    measure_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Round:
        """The inverse of `to_dict`."""
        noise = NOISE_PROCESSES[values["noise"].get("kind", "edm")](**values["noise"])
        return cls(**values | {"losses": tuple(values["losses"]), "noise": noise})


@dataclass(frozen=True)
class Fit:
    """A finished fit.

    Attributes:
        levels: the grid at which losses were measured, ascending.
        rounds: in order; the last one's `noise` is the result.
    """

    levels: tuple[float, ...]
    rounds: tuple[Round, ...]

    @property
    def noise(self) -> NoiseProcess:
        """The fitted process."""
        return self.rounds[-1].noise

    @property
    def iterations(self) -> int:
        """Steps of one block's worth of layers."""
        return self.rounds[-1].iteration

    @property
    def seconds(self) -> float:
        """Training and measurement of all rounds."""
        return self.rounds[-1].train_seconds + sum(part.measure_seconds for part in self.rounds)


def fit_levels(experiment: Experiment, folder: Path, *, progress: bool = True, group: Group | None = None) -> Fit:
    """Fit levels to an experiment's task, or read back what a finished fit left.

    Leaves `folder`/levels.json, with all measured losses, and a figure of them, levels.png.

    Args:
        experiment: whose recipe has a `fit` section.
        folder: of the fit; an unfinished fit there is resumed.
        progress: show progress bars.
        group: ranks that do it together; the first of them writes the files.

    Raises:
        ValueError: the folder holds a fit with other settings, or checkpoints that are not of its rounds; or rounds
            without a step.
    """
    options, recipe = fit_options(experiment.recipe), fit_recipe(experiment.recipe)
    of_fit = experiment.derive(recipe)
    settings = _settings(options, recipe) | {"data": learned_from(experiment.describe())["data"]}
    grid, rounds = _read_rounds(folder / LEVELS, settings)
    while len(rounds) < options.rounds:
        now = recipe if not rounds else with_noise(recipe, rounds[-1].noise)
        trainer = of_fit.derive(now, same_run=True).trainer(folder, progress=progress, group=group, name="fit")
        model = trainer.model
        assert isinstance(model, DiffusionBlocks)
        grid = model.noise.fit_grid(options.grid)
        steps, start = len(trainer.schedule), rounds[-1].iteration if rounds else 0
        end = round(steps * (len(rounds) + 1) / options.rounds)
        _check_round(start, end, folder)
        trainer.train(until=end)
        start_time = perf_counter()
        losses = [0.0] * len(grid)
        with trainer.residency.whole(0) as block:
            if isinstance(block, Block):
                losses = mean_losses(
                    block,
                    trainer.stepper.batches,
                    grid,
                    examples=options.examples,
                    batch_size=options.batch_size or recipe.train.batch_size,
                    precision=recipe.train.precision,
                    seed=recipe.train.seed,
                )
        if group is not None:  # levels must be the same to the last bit
            losses = group.of_first(losses)
        noise = model.noise.fit_to(grid, losses, equal=options.equal, floor=options.floor)
        # What is read is resolved anew, for the partition that comes.
        noise = noise.with_coverage(getattr(recipe.blocks.noise, "coverage", None))
        seconds = perf_counter() - start_time
        rounds.append(Round(end, tuple(losses), noise, trainer.seconds, seconds))
        del trainer, model  # and their memory, before the next
        if group is not None and not group.leads:
            continue
        if len(rounds) == options.rounds:  # before the file says that the fit is finished
            draw_fit(grid, [part.losses for part in rounds], noise, folder / "levels.png")
        values = [part.to_dict() for part in rounds]
        write_json(folder / LEVELS, {"settings": settings, "levels": list(grid), "rounds": values})
    return Fit(tuple(grid), tuple(rounds))


def mean_losses(
    block: Block,
    batches: BatchMaker,
    levels: list[float],
    *,
    examples: int | Tensor,
    batch_size: int,
    precision: str,
    seed: int,
) -> list[float]:
    """Mean loss of a block at each level, without the level's weight, in evaluation mode.

    Examples, their augmentation and the noise's direction are the same at all levels, so that the losses differ by the
    levels alone.

    Args:
        block: on the device where the batches are made.
        batches: makes the training batches.
        levels: where to measure.
        examples: how many, drawn without repeats, all where there are fewer; or which, by their indices.
        batch_size: examples at a time.
        precision: of the training.
        seed: of the choice, the augmentation and the noise.
    """
    device = next(block.parameters()).device
    sums = torch.zeros(len(levels), dtype=torch.float64, device=device)
    count = 0
    every = examples if isinstance(examples, Tensor) else chosen_examples(batches.num_examples, examples, seed)
    for number, indices in enumerate(every.to(device).split(batch_size)):
        generator = keyed_generator(seed, 0, number, "fit noise", device)
        batch = batches(indices, generator)
        with torch.no_grad(), evaluating(block), arithmetic(device, precision):
            noise = block.draw_noise(batch, generator)
            for place, level in enumerate(levels):
                sums[place] += block.losses_at(batch, level, noise=noise).losses.double().sum()
        count += len(indices)
    return [total / count for total in sums.tolist()]


def chosen_examples(num_examples: int, examples: int, seed: int) -> Tensor:
    """Indices (n,) of examples to measure on, drawn without repeats; all where there are fewer."""
    generator = keyed_generator(seed, 0, 0, "fit examples")
    return torch.randperm(num_examples, generator=generator)[:examples]


# ---- what a fit leaves -------------------------------------------------------------------------------------


def _settings(options: FitConfig, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What the fitted levels depend on, beside the data."""
    train = recipe.train.model_dump(mode="json", exclude=set(RESUME_MAY_DIFFER))
    sections = {"fit": options, "model": recipe.model}
    descriptions = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return descriptions | {"blocks": describe_blocks(recipe), "train": train}


def _read_rounds(file: Path, settings: Mapping[str, dict[str, Any]]) -> tuple[list[float], list[Round]]:
    """The grid and the finished rounds in a file; none where there is no file."""
    if not file.is_file():
        return [], []
    values = read_json(file)
    before = with_target(values.get("settings", {}))
    before |= {section: renew(schema, before[section]) for section, schema in _SECTIONS.items() if section in before}
    coverage = (settings["blocks"]["noise"] or {}).get("coverage")
    first_version = "data" not in before  # it told every level: whoever goes on with it says so (`run.prepare`)
    if first_version:  # nor did it note the data
        before, settings = of_every_level(before), of_every_level({**settings, "data": {}})
    for section, now in settings.items():
        for field in now:
            result = before.get(section, {}).get(field)
            if difference(result, now[field]) is not None:  # a field that there was not yet counts as one of null
                raise ValueError(
                    f"{file} was fitted with {section}.{field} = {result}, this run has {now[field]}: set it back, "
                    "start anew with --restart, or choose another folder"
                )
    rounds = [Round.from_dict(part) for part in values["rounds"]]
    if first_version:
        rounds = [dataclasses.replace(part, noise=part.noise.with_coverage(coverage)) for part in rounds]
    return list(values["levels"]), rounds


def _check_round(start: int, end: int, folder: Path) -> None:
    """Refuse a newest checkpoint that is not of the coming round: its steps would have been on other levels."""
    if start == end:
        raise ValueError("a round of the fit would have no step: make the fit longer, or fit.rounds fewer")
    paths = checkpoints(folder / "checkpoints")
    at = int(read_values(paths[-1])["iteration"]) if paths else 0
    if not start <= at <= end:
        raise ValueError(
            f"{folder} has a checkpoint at iteration {at}, but {LEVELS} is for iterations {start} to {end}: they are "
            "not of one fit; start anew with --restart, or choose another folder"
        )
