"""From a recipe to a trained, saved and evaluated model: what the command line and the benchmarks call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from ..common.files import check_replaceable, check_space, check_writable, delete_folder, folder_lock, free_space
from ..common.formats import read_json, write_json
from ..common.machine import check_memory
from ..core.branching import branch
from ..core.merging import difference
from ..core.model import DiffusionBlocks
from ..core.saving import MODEL_FILES
from ..families import check_attention, family_named
from ..training import RunDescription, Trainer, check_optimizer
from ..training.checkpoint import checkpoints, read_values
from ..training.run_log import LOG, Logger
from .identity import check_goes_on_from_first_version, check_same_run, describe_run, learned_from
from .noise_fit import LEVELS, Fit, fit_levels, with_noise
from .recipe import FitConfig, Recipe, TrunkConfig
from .scores import Row, Splits, check_evaluation, evaluate, evaluated_splits
from .sources import (
    check_data,
    config_of,
    device_of,
    load_data,
    load_model,
    make_batches,
    model_config,
    note_ends,
    outline_of,
    save_model,
    unfilled_model,
    with_saved_tokenizer,
)

#: A run leaves its recipe, overrides applied, under this name.
RECIPE = "recipe.json"

#: Marks a folder whose checkpoints are being deleted.
_RESTARTING = ".restarting"

_RESULT = "result.json"  # what a run measured, and how long it took


@dataclass(frozen=True)
class RunResult:
    """What a run left: the model, its measures, and what training took (a fit of its levels and a trunk included)."""

    model: nn.Module
    rows: list[Row]
    seconds: float
    iterations: int


def check_machine(recipe: Recipe, folder: Path) -> None:
    """Refuse what this machine's memory or disk cannot hold: a lower bound, of weights and what is kept for each.

    Raises:
        ValueError: not enough memory or disk, a folder that cannot be written into, or a model that cannot be built, or
            has no trunk or fit.
        ImportError: an optimizer whose package is not installed.
    """
    check_writable(folder, "the run's folder")
    check_optimizer(recipe.train)
    if recipe.method == "diffusionblocks":  # first: what blocks alone would take may not do for these
        if recipe.trunk is not None:
            trunk_recipe(recipe)
        if recipe.fit is not None:
            fit_recipe(recipe)
    outline, device = outline_of(recipe), device_of(recipe)
    blocks, trained = _blocks_of(recipe, outline)
    there = 1 if recipe.train.resident == "active" and device.type == "cuda" else trained
    copies = there / blocks * (2 + _state(recipe))
    check_memory(outline, copies, device, "set model.config or blocks to make it smaller")
    check_disk(recipe, folder, outline, free=free_space(folder))


def check_disk(recipe: Recipe, folder: Path, outline: nn.Module, *, free: int, num_examples: int | None = None) -> None:
    """Refuse a run whose model, checkpoints and snapshots the disk has no room for: a lower bound.

    Args:
        recipe: what to train.
        folder: of the run.
        outline: the recipe's model, on any device.
        free: bytes that are free there.
        num_examples: of the training data, which says how many steps `train.epochs` are; None: not known yet.

    Raises:
        ValueError: fewer bytes are free; with the settings that would fit.
    """
    train = recipe.train
    blocks, trained = _blocks_of(recipe, outline)
    weights = sum(p.numel() * p.element_size() for p in outline.parameters()) * trained / blocks
    steps = train.steps if num_examples is None else train.unit_steps(num_examples)
    iterations = None if steps is None else steps * trained
    saved = train.checkpoint_every is not None or train.checkpoint_seconds is not None
    snapshots = 0 if train.snapshot_every is None or iterations is None else iterations // train.snapshot_every
    # What a run that began has written is not free any more.
    snapshots = max(0, snapshots - len(list(folder.glob("snapshots/iteration-*"))))
    written = len(checkpoints(folder / "checkpoints"))

    def needed(keep: int, snapshots: int) -> int:
        new = keep + 1 if saved else 1  # one is written before an older one is removed
        new = max(1, min(new, iterations or new) - written)
        return int(weights * (1 + snapshots + new * (1 + _state(recipe))))

    fixes = ["make room", "name another folder with --out"]
    keep = train.keep_checkpoints
    for setting, enough in (
        ("--set train.keep_checkpoints=1", keep > 1 and needed(1, snapshots) <= free),
        ("--set train.snapshot_every=null", snapshots > 0 and needed(keep, 0) <= free),
    ):
        fixes += [setting] * enough
    check_space(folder, needed(keep, snapshots), free, ", or ".join(fixes))


def check_with_data(recipe: Recipe, folder: Path, splits: Splits) -> None:
    """Refuse before training what could only fail in it or after it: the one check of a run, once its data are read.

    Raises:
        ValueError: examples that the model does not take, an evaluation that cannot be done (`check_evaluation`), or
            more snapshots than the disk holds.
        ImportError: a package that the evaluation needs is not installed.
    """
    outline = outline_of(recipe)
    check_data(recipe, outline, splits["train"])
    check_evaluation(recipe, outline, splits)
    if recipe.train.snapshot_every is not None:  # only now it is known how many there will be
        check_disk(recipe, folder, outline, free=free_space(folder), num_examples=len(splits["train"]))


def _blocks_of(recipe: Recipe, outline: nn.Module) -> tuple[int, int]:
    """How many blocks the model has, and how many of them are trained."""
    blocks = outline.partition.num_blocks if isinstance(outline, DiffusionBlocks) else 1
    return blocks, blocks if recipe.train.blocks is None else len(recipe.train.blocks)


def _state(recipe: Recipe) -> float:
    """What is kept for each weight beside it and its gradient: the optimizer's averages, and the weights' own."""
    return (1 if recipe.train.keeps_average else 0) + (0.5 if recipe.train.optimizer == "adamw-8bit" else 2)


def make_trainer(
    recipe: Recipe,
    *,
    folder: Path | None,
    loggers: tuple[Logger, ...] = (),
    progress: bool = True,
    splits: Splits | None = None,
    model: nn.Module | None = None,
    described: Recipe | None = None,
) -> Trainer:
    """Model (default: the recipe's, fresh), data and trainer of a recipe, checked and on the device.

    Snapshots, where the recipe asks for them, go to `folder`/snapshots.

    Args:
        recipe: what to train.
        folder: of the run; None keeps nothing.
        loggers, progress: see `train`.
        splits: the recipe's data, where the caller has loaded them already.
        model: what to train, instead of the recipe's.
        described: the recipe that resumption is to compare, where it is another one.
    """
    device = device_of(recipe)
    data = splits["train"] if splits is not None else load_data(recipe, "train")
    fill = None
    if model is None:
        model, fill = unfilled_model(recipe)
    check_data(recipe, model, data)
    check_attention(config_of(model), "model.config.", device)
    note_ends(recipe, model)
    check_evaluation(recipe, model, splits or {})
    batches = make_batches(recipe, data, device)

    description = None
    if folder is not None:
        description = RunDescription(describe_run(described or recipe, data), check_same_run)

    def keep(model: nn.Module, iteration: int) -> None:
        if folder is not None and description is not None:
            place = folder / "snapshots" / f"iteration-{iteration:09d}"
            save_model(model, place, recipe.train.blocks, data=data, trained=learned_from(description.values))

    return Trainer(
        model,
        batches,
        recipe.train,
        device=device,
        fill=fill,
        folder=folder,
        loggers=loggers,
        progress=progress,
        snapshot=keep,
        description=description,
    )


def train(
    recipe: Recipe,
    folder: Path,
    *,
    loggers: tuple[Logger, ...] = (),
    resume: bool = True,
    progress: bool = True,
    splits: Splits | None = None,
    measure: bool = True,
) -> RunResult:
    """Train a recipe, save the model (with averaged weights, where kept) to `folder`/model, and evaluate it.

    Args:
        recipe: what to do; with a `fit`, the levels are fitted first, below `folder`/fit, and are those of the saved
            model; with a `trunk`, that is trained then, below `folder`/trunk, and branched.
        folder: of the run; an unfinished run there is resumed.
        loggers: further receivers of the log.
        resume: False starts anew.
        progress: show progress bars.
        splits: the recipe's data, where the caller has loaded them already.
        measure: whether to evaluate; else `rows` is empty.
    """
    with folder_lock(folder):
        return _train(recipe, folder, loggers, resume, progress, splits, measure)


def _train(
    recipe: Recipe,
    folder: Path,
    loggers: tuple[Logger, ...],
    resume: bool,
    progress: bool,
    splits: Splits | None,
    measure: bool,
) -> RunResult:
    of_blocks = recipe.method == "diffusionblocks"
    with_trunk = recipe.trunk is not None and of_blocks
    device_of(recipe)  # what can be refused at once is, before the data are read
    for place in (folder / "model", *([folder / "trunk" / "model"] if with_trunk else [])):
        check_replaceable(place, MODEL_FILES)
    for name in (RECIPE, _RESULT, LOG):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, where a file of the run belongs: move it away first")
    if (folder / _RESTARTING).exists():  # a restart that was killed on its way
        _forget(folder)
    if resume:
        _check_resumes(folder, describe_run(recipe, None))
    check_machine(recipe, folder)
    if splits is None:  # also those that are read after training: what is wrong with them is known now
        read = {"train", *(evaluated_splits(recipe) if measure else ())}
        splits = {split: load_data(recipe, split) for split in sorted(read, reverse=True)}
    check_with_data(recipe, folder, splits)  # before anything is deleted
    description = describe_run(recipe, splits["train"])
    if resume:
        _check_resumes(folder, description)
    else:
        _forget(folder)
    prepare = functools.partial(make_trainer, loggers=loggers, progress=progress, splits=splits, described=recipe)
    given, seconds, iterations = recipe, 0.0, 0
    if recipe.fit is not None and of_blocks:
        fit = _fitted(recipe, folder, progress, splits)
        seconds, iterations = fit.seconds, fit.iterations
        recipe = with_noise(recipe, fit.noise)
    if with_trunk:
        trunk = _trained_trunk(recipe, given, folder, progress, splits)
        seconds, iterations = seconds + trunk.seconds, iterations + trunk.iteration
        trainer = _branched_trainer(recipe, folder, trunk, prepare)
        del trunk  # and its memory, before the blocks train
    else:
        trainer = prepare(recipe, folder=folder)
        write_recipe(given, folder)
    trainer.train()
    seconds, iterations = seconds + trainer.seconds, iterations + trainer.iteration
    with trainer.averaged() as model:
        trained = learned_from(description)
        save_model(model, folder / "model", recipe.train.blocks, data=splits["train"], trained=trained)
    if recipe.train.blocks is not None:  # the others are trained elsewhere: there is nothing whole to measure yet
        return RunResult(trainer.model, [], seconds, iterations)
    # What is measured is what was saved; the trainer's memory is free by then.
    del trainer
    model = load_model(recipe, folder / "model")
    recipe = with_saved_tokenizer(recipe, folder / "model")
    started = perf_counter()
    rows = evaluate(recipe, model, splits) if measure else []
    evaluation_seconds = perf_counter() - started
    write_json(
        folder / _RESULT,
        {
            "rows": [row.to_dict() for row in rows],
            "train_seconds": seconds,
            "evaluation_seconds": evaluation_seconds,
            "iterations": iterations,
        },
    )
    return RunResult(model, rows, seconds, iterations)


def _fitted(recipe: Recipe, folder: Path, progress: bool, splits: Splits) -> Fit:
    """The fit of the recipe's levels at its end; one that has ended is only read back."""

    def prepare(of_round: Recipe, below: Path) -> Trainer:
        return make_trainer(of_round, folder=below, progress=progress, splits=splits, described=fit_recipe(recipe))

    if recipe.trunk is not None:
        trunk_recipe(recipe)  # refuses what cannot be a trunk before anything is trained
    data = learned_from(describe_run(recipe, splits["train"]))["data"]
    return fit_levels(fit_options(recipe), fit_recipe(recipe), folder / "fit", prepare, data=data)


def _trained_trunk(recipe: Recipe, given: Recipe, folder: Path, progress: bool, splits: Splits) -> Trainer:
    """The trunk at its end; one that has ended is only read back. `given` is what the run was asked for."""
    trunk = make_trainer(trunk_recipe(recipe), folder=folder / "trunk", progress=progress, splits=splits)
    write_recipe(given, folder)
    trunk.train()
    with trunk.averaged() as model:
        save_model(model, folder / "trunk" / "model", data=splits["train"])
    return trunk


def _branched_trainer(recipe: Recipe, folder: Path, trunk: Trainer, prepare: Callable[..., Trainer]) -> Trainer:
    """The blocks at the branch."""
    options = trunk_options(recipe)
    # Blocks must not see the trunk's draws of data and noise again.
    changes: dict[str, Any] = {"seed": recipe.train.seed + 1}
    if options.warmup == "none":
        changes |= {"warmup_steps": 0, "warmup_epochs": 0.0}
    after = with_train(recipe, **changes)
    trainer = prepare(after, folder=folder, model=branched(recipe, trunk))
    trainer.inherit(trunk, optimizer=options.optimizer == "copied", average=options.average == "copied")
    return trainer


def _phases(folder: Path) -> tuple[Path, ...]:
    """Where a run may have checkpoints."""
    return folder, folder / "trunk", folder / "fit"


def _forget(folder: Path) -> None:
    """Delete what a run would resume from. Killed on its way, the next run finishes it: no phase resumes without the
    others."""
    marker = folder / _RESTARTING
    marker.touch()
    for phase in _phases(folder):
        if (phase / "checkpoints").is_dir():
            delete_folder(phase / "checkpoints")
    (folder / "fit" / LEVELS).unlink(missing_ok=True)
    (folder / RECIPE).unlink(missing_ok=True)
    marker.unlink()


def _check_resumes(folder: Path, description: dict[str, Any]) -> None:
    """Refuse another run than the one whose blocks are in the folder, before anything is read or trained."""
    for phase in _phases(folder):
        saved = checkpoints(phase / "checkpoints")
        before = read_values(saved[-1]).get("run") if saved else None
        if saved and before is None and (folder / RECIPE).is_file():  # version 0.1.0 left the recipe alone
            check_goes_on_from_first_version(read_json(folder / RECIPE), description, saved[-1])
        elif before is not None and phase == folder:  # the other phases' are of recipes of their own
            check_same_run(before, description, saved[-1])


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Leave the recipe, overrides applied, beside the run's results."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECIPE, recipe.model_dump(mode="json"))


def trained_differently(folders: Sequence[Path]) -> list[str]:
    """Where the recipes of runs would not give the same blocks, which the saved models do not tell; a line a run.

    Args:
        folders: of runs, or their saved models; one without a recipe beside it is passed over.
    """
    paths = [place / RECIPE for folder in folders for place in (folder, folder.parent) if (place / RECIPE).is_file()]
    training = [learned_from(read_json(path)) for path in paths]
    lines = []
    for path, other in zip(paths[1:], training[1:], strict=True):
        if (found := difference(training[0], other)) is not None:
            name, first, second = found
            lines.append(f"blocks were trained differently: {name} is {first} in {paths[0]} and {second} in {path}")
    return lines


# ---- fit, trunk and branch ---------------------------------------------------------------------------------


def fit_options(recipe: Recipe) -> FitConfig:
    """The recipe's `fit` section, which it must have."""
    assert recipe.fit is not None
    return recipe.fit


def fit_recipe(recipe: Recipe) -> Recipe:
    """The recipe of what the levels are fitted to: one block of L/B layers on all levels, without averages.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    options = fit_options(recipe)
    length = {"steps": options.steps, "epochs": options.epochs}
    none = {"blocks": None, "ema_decay": None, "ema_half_life": None, "snapshot_every": None}
    return with_depth(recipe, layers_of_a_block(recipe)).model_copy(
        update={
            "fit": None,
            "trunk": None,
            "blocks": recipe.blocks.as_one_block(),
            "train": recipe.train.model_copy(update=length | none),
        }
    )


def trunk_options(recipe: Recipe) -> TrunkConfig:
    """The recipe's `trunk` section, which it must have."""
    assert recipe.trunk is not None
    return recipe.trunk


def trunk_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the trunk: one block of L/B layers on all levels.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    options = trunk_options(recipe)
    length = {"steps": options.steps, "epochs": options.epochs, "lr_schedule": options.lr_schedule}
    rate = {} if options.lr is None else {"lr": options.lr}
    return with_depth(recipe, layers_of_a_block(recipe)).model_copy(
        update={
            "trunk": None,
            "blocks": recipe.blocks.as_one_block(),
            "train": recipe.train.model_copy(update=length | rate | {"blocks": None}),
        }
    )


def branched(recipe: Recipe, trunk: Trainer) -> DiffusionBlocks:
    """The blocks of the recipe, copied from a trained trunk."""
    assert isinstance(trunk.model, DiffusionBlocks)
    blocks = recipe.blocks
    with trunk.averaged() if trunk_options(recipe).weights == "averaged" else contextlib.nullcontext():
        return branch(trunk.model, blocks.num_blocks, overlap=blocks.overlap, partition=blocks.partition)


def depth_of(recipe: Recipe) -> int:
    """Number of layers of the recipe's model.

    Raises:
        ValueError: the recipe does not say.
    """
    field = family_named(recipe.model.type).depth_field
    if recipe.model.pretrained is not None:  # its folder says it, not the recipe
        return int(getattr(model_config(recipe), field))
    if field not in recipe.model.config:
        raise ValueError(f"the recipe must give model.config.{field}, to make models of fewer layers")
    return int(recipe.model.config[field])


def layers_of_a_block(recipe: Recipe) -> int:
    """How many layers each block has, where all have as many: those of a trunk, or of the control of equal memory.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    depth, many = depth_of(recipe), recipe.blocks.num_blocks
    if depth % many:
        divisors = [n for n in range(1, depth + 1) if depth % n == 0]
        raise ValueError(
            f"a fit, a trunk, or a baseline of one block's layers, needs layers that divide: {depth} layers, {many} "
            f"blocks; set blocks.num_blocks to one of {divisors}"
        )
    return depth // many


def with_train(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values in its `train` section; they are not checked."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def with_depth(recipe: Recipe, layers: int) -> Recipe:
    """The recipe with another number of layers in its model.

    Raises:
        ValueError: the model is pretrained, and has another number.
    """
    if recipe.model.pretrained is not None:
        if (depth := depth_of(recipe)) != layers:
            raise ValueError(
                f"a trunk, a fit or a baseline of {layers} layers starts afresh, but {recipe.model.pretrained} has "
                f"{depth}: leave trunk and fit out, or train afresh, with all its sizes in model.config: --set "
                "model.pretrained=null"
            )
        return recipe
    config = recipe.model.config | {family_named(recipe.model.type).depth_field: layers}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})
