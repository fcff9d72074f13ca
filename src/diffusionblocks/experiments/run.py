"""Runs: from an experiment to a trained, saved and evaluated model, in stages that can be called apart.

Whole, or stage by stage, each of which resumes what is unfinished in the folder:

    experiment = Experiment(load_recipe("recipes/vit/digits.yaml"))
    folder = Path("runs/digits")
    train(experiment, folder)

    prepare(experiment, folder)
    experiment, fit = fit_noise(experiment, folder)
    trunk = train_trunk(experiment, folder) if experiment.recipe.trunk else None
    experiment = place_boundaries(experiment, folder)
    trainer = train_blocks(experiment, folder, trunk)
    save_blocks(experiment, folder, trainer)
    model, rows, seconds = evaluate_saved(experiment, folder)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from ..common.files import check_replaceable, delete_folder, folder_lock
from ..common.formats import read_json, write_json
from ..common.messages import Say, announce, announcer
from ..core.branching import branch
from ..core.merging import difference
from ..core.model import DiffusionBlocks
from ..core.saved_model import MODEL_FILES
from ..evaluation.work import digest_of
from ..reports.results import write_results
from ..training import Trainer
from ..training.checkpoint import checkpoints, read_values
from ..training.ranks import Group
from ..training.run_log import LOG, Logger
from .boundaries import BOUNDARIES, place_boundaries
from .experiment import Experiment
from .identity import (
    check_goes_on_from_first_version,
    check_same_run,
    data_identity,
    describe_blocks,
    describe_run,
    in_current_terms,
    learned_from,
)
from .noise_fit import LEVELS, Fit, fit_levels
from .preflight import check_machine, check_with_data
from .recipe import Recipe
from .recipe_changes import after_branch, stages, trunk_options, trunk_recipe, with_noise
from .shipped_recipes import RECIPE
from .tasks.task import Row, RunResult

#: Marks a folder whose checkpoints are being deleted.
_RESTARTING = ".restarting"
#: What `sample` writes by default: pictures and texts of the run's model.
SAMPLED_PICTURES, SAMPLED_TEXTS = "samples/*.png", "samples/*.txt"
#: Those that were drawn while it trained.
DRAWN_IN_TRAINING = "samples/step-*.png"

#: What a run measured, and how long it took; it is there when the run has ended.
RESULT = "result.json"

#: Where the parts of a run lie that train apart, each as a run of its own: see `parts`.
PARTS = "blocks"

#: The rows of a comparison or an ablation, and whether they are all there (`finished`).
TABLE = "table.json"


@dataclass(frozen=True)
class Cost:
    """What training took.

    Attributes:
        seconds: of one device.
        iterations: steps of one unit.
    """

    seconds: float = 0.0
    iterations: int = 0


def train(
    experiment: Experiment,
    folder: Path,
    *,
    loggers: tuple[Logger, ...] = (),
    resume: bool = True,
    progress: bool = True,
    measure: bool = True,
) -> RunResult:
    """Train an experiment, save the model (with averaged weights, where kept) to `folder`/model, and evaluate it.

    Args:
        experiment: what to do; with a `fit`, the levels are fitted first, below `folder`/fit, and are those of the
            saved model; with a `trunk`, that is trained then, below `folder`/trunk, and branched.
        folder: of the run; an unfinished run there is resumed.
        loggers: further receivers of the log.
        resume: False starts anew.
        progress: announce the phases, and show progress bars.
        measure: whether to evaluate; else `rows` is empty.
    """
    say = announcer(progress)
    with folder_lock(folder):
        prepare(experiment, folder, resume=resume, measure=measure)
        phases = {key: (name, length) for key, name, length in stages(experiment.recipe)}
        experiment, trunk, before = train_fit_and_trunk(experiment, folder, say=say, progress=progress)
        trainer = blocks_trainer(experiment, folder, trunk, loggers=loggers, progress=progress)
        del trunk  # and its memory, before the blocks train
        say(f"train: {' '.join(phases['train'])}, {len(trainer.schedule):,} iterations in all")
        trainer.train()
        seconds, iterations = before.seconds + trainer.seconds, before.iterations + trainer.steps_taken
        say(f"save: {folder / 'model'}")
        save_blocks(experiment, folder, trainer)
        some = None if experiment.recipe.train.blocks is None else trainer.model
        # What is measured is what was saved; the trainer's memory is free by then.
        del trainer
        result = conclude(experiment, folder, seconds, iterations, measure=measure, say=say)
        return result if some is None else replace(result, model=some)


# ---- stages ----------------------------------------------------------------------------------------------------


def prepare(
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool = True,
    measure: bool = True,
    in_parts: bool = False,
) -> None:
    """Refuse what can be refused before any work, and read the data; see that the folder's run is this one.

    Args:
        experiment, folder: of the run.
        resume: False deletes the checkpoints of the folder's run, once all else is checked.
        measure: whether the run will be evaluated; then test data are read and checked too.
        in_parts: whether the units train apart, each as a run of its own (`parts`).

    Raises:
        ValueError, ImportError: what `check_machine` and `check_with_data` refuse, or another run in the folder.
    """
    experiment.device  # noqa: B018 - what can be refused at once is, before the data are read
    places = [folder / "model", *([folder / "trunk" / "model"] if has_trunk(experiment) else [])]
    for place in places:
        check_replaceable(place, MODEL_FILES)
    for name in (RECIPE, RESULT, LOG):
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, where a file of the run belongs: move it away first")
    if (folder / _RESTARTING).exists():  # a restart that was killed on its way
        forget(folder)
    if resume:
        _check_way(folder, in_parts=in_parts)
        check_resumes(folder, describe_run(experiment.recipe, None))
    check_machine(experiment, folder, units_at_once=1 if in_parts else None)
    if not experiment.splits:  # also those that are read after training: what is wrong with them is known now
        splits = {*experiment.training_splits, *(experiment.evaluation_splits if measure else ())}
        for split in sorted(splits, key=("train", "valid", "test").index):
            experiment.data(split)
    check_with_data(experiment, folder)  # before anything is deleted
    if resume:
        check_resumes(folder, experiment.describe())
    else:
        forget(folder)


def fit_noise(
    experiment: Experiment, folder: Path, *, progress: bool = True, group: Group | None = None
) -> tuple[Experiment, Fit | None]:
    """Fit the noise levels, below `folder`/fit; a fit that has ended is only read back.

    Args:
        experiment, folder: of the run.
        progress: show progress bars.
        group: ranks that do it together.

    Returns:
        The experiment on the fitted levels, and the fit; without a `fit` the experiment as it is, and None.
    """
    recipe = experiment.recipe
    if recipe.fit is None or not experiment.of_method_blocks:
        return experiment, None
    if recipe.trunk is not None:
        trunk_recipe(recipe)  # refuses what cannot be a trunk before anything is trained
    fit = fit_levels(experiment, folder / "fit", progress=progress, group=group)
    return experiment.derive(with_noise(recipe, fit.noise), same_run=True), fit


def train_trunk(experiment: Experiment, folder: Path, *, progress: bool = True, group: Group | None = None) -> Trainer:
    """Train the trunk, below `folder`/trunk, and save it; one that has ended is only read back.

    Args:
        experiment: on its fitted levels, where it fits them.
        folder: of the run.
        progress: show progress bars.
        group: ranks that train it together.

    Raises:
        ValueError: the recipe has no trunk, or a fit that was not done.
    """
    if not has_trunk(experiment):
        raise ValueError(f"{experiment.recipe.name} trains no trunk: the recipe has no such section for its method")
    _check_fitted(experiment)
    of_trunk = experiment.derive(trunk_recipe(experiment.recipe))
    trunk = of_trunk.trainer(folder / "trunk", progress=progress, group=group, name="trunk")
    if group is not None and not group.leads:
        trunk.train()
        return trunk
    write_recipe(experiment.origin, folder)
    trunk.train()
    with trunk.averaged() as model:
        of_trunk.save(model, folder / "trunk" / "model")
    return trunk


def train_fit_and_trunk(
    experiment: Experiment,
    folder: Path,
    *,
    say: Say = announce,
    progress: bool = True,
    group: Group | None = None,
) -> tuple[Experiment, Trainer | None, Cost]:
    """Fit the noise levels and train the trunk, where the run has them, or read back that they have ended.

    Args:
        experiment, folder: of the run.
        say: announces what begins.
        progress: show progress bars.
        group: ranks that do it together; the first of them writes the files.

    Returns:
        The experiment on its fitted levels and measured boundaries, the trunk's trainer, and what this took.
    """
    lengths = {key: length for key, _, length in stages(experiment.recipe)}
    if "fit" in lengths:
        say(f"fit: {lengths['fit']}")
    experiment, fit = fit_noise(experiment, folder, progress=progress, group=group)
    cost = Cost() if fit is None else Cost(fit.seconds, fit.iterations)
    if not has_trunk(experiment):
        return experiment, None, cost
    say(f"trunk: {lengths['trunk']}")
    trunk = train_trunk(experiment, folder, progress=progress, group=group)
    if experiment.recipe.blocks.measured_later:
        say(f"boundaries: equal shares of {experiment.recipe.blocks.partition}, measured on the trunk")
        experiment = place_boundaries(experiment, folder, group=group)
    return experiment, trunk, Cost(cost.seconds + trunk.seconds, cost.iterations + trunk.iteration)


def read_trunk(experiment: Experiment, folder: Path) -> Trainer:
    """Read back a trunk that has ended, as `train_trunk` left it; nothing is written.

    Args:
        experiment: on its fitted levels, where it fits them.
        folder: of the run.

    Raises:
        ValueError: it has not ended yet.
    """
    trunk = experiment.derive(trunk_recipe(experiment.recipe)).trainer(folder / "trunk", progress=False)
    older = checkpoints(folder / "trunk" / "checkpoints")
    if older:
        trunk.load_checkpoint(older[-1])
    if trunk.iteration < len(trunk.schedule):
        raise ValueError(f"{folder / 'trunk'} holds no trunk that has ended: train it first (train_trunk)")
    return trunk


def blocks_trainer(
    experiment: Experiment,
    folder: Path,
    trunk: Trainer | None = None,
    *,
    loggers: tuple[Logger, ...] = (),
    progress: bool = True,
    group: Group | None = None,
) -> Trainer:
    """Make the trainer of the blocks: fresh ones, copies of a trunk, or where an unfinished run left them.

    Args:
        experiment: on its fitted levels, where it fits them.
        folder: of the run.
        trunk: at its end.
        loggers: further receivers of the log.
        progress: show progress bars.
        group: ranks that train the one unit together.

    Raises:
        ValueError: a fit or a trunk of the recipe was not done.
    """
    _check_fitted(experiment)
    if experiment.of_method_blocks and experiment.recipe.blocks.measured_later:
        raise ValueError(f"{experiment.recipe.name} measures its boundaries first: give the one of place_boundaries")
    if trunk is None and has_trunk(experiment):
        raise ValueError(f"{experiment.recipe.name} branches its blocks from a trunk: give the one of train_trunk")
    if trunk is None:
        trainer = experiment.trainer(folder, loggers=loggers, progress=progress, group=group)
        if group is None or group.leads:
            write_recipe(experiment.origin, folder)
        return trainer
    options = trunk_options(experiment.recipe)
    after = experiment.derive(after_branch(experiment.recipe), same_run=True)
    blocks = branch_trunk(experiment.recipe, trunk)
    trainer = after.trainer(folder, model=blocks, loggers=loggers, progress=progress, group=group)
    trainer.inherit(trunk, optimizer=options.optimizer == "copied", average=options.average == "copied")
    return trainer


def train_blocks(
    experiment: Experiment,
    folder: Path,
    trunk: Trainer | None = None,
    *,
    loggers: tuple[Logger, ...] = (),
    progress: bool = True,
) -> Trainer:
    """Train the blocks to their end: see `blocks_trainer`."""
    trainer = blocks_trainer(experiment, folder, trunk, loggers=loggers, progress=progress)
    trainer.train()
    return trainer


def save_blocks(experiment: Experiment, folder: Path, trainer: Trainer) -> None:
    """Save what was trained to `folder`/model, with averaged weights where they are kept."""
    with trainer.averaged() as model:
        experiment.save(model, folder / "model", provenance=learned_from(experiment.describe()))


def evaluate_saved(experiment: Experiment, folder: Path, *, measure: bool = True) -> tuple[nn.Module, list[Row], float]:
    """Load `folder`/model and measure it.

    Args:
        experiment, folder: of the run.
        measure: False only loads it.

    Returns:
        The model, its measures, and the seconds that they took.
    """
    model = experiment.load(folder / "model")
    experiment = experiment.with_processing_of(folder / "model")
    if measure:
        check_same_files(experiment, model, folder / "model", experiment.evaluation_splits)
    start = perf_counter()
    rows = list(experiment.task.measure(experiment, model)) if measure else []
    return model, rows, perf_counter() - start


def check_same_files(experiment: Experiment, model: nn.Module, path: Path, splits: Sequence[str] = ()) -> None:
    """Refuse ranks that would measure another model, or on other data, than the first one.

    Args:
        experiment: whose evaluation is the work of these ranks.
        model: loaded from `path`.
        path: names it in the message.
        splits: of the data that are used.

    Raises:
        ValueError: this rank has others.
    """
    if experiment.work.size > 1:
        data = [data_identity(experiment.data(split)) for split in splits]
        experiment.work.check_same(f"{digest_of(model)} {data}", f"weights in {path}, or other data,")


def conclude(
    experiment: Experiment,
    folder: Path,
    seconds: float,
    iterations: int,
    *,
    measure: bool = True,
    say: Say = announce,
) -> RunResult:
    """Measure the model that was saved to `folder`/model, and leave the run's result.

    A run of some blocks (`train.blocks`) has nothing whole to measure: the result's model is an outline here.

    Args:
        experiment, folder: of the run.
        seconds, iterations: of its training.
        measure: False only loads the model.
        say: announces what begins.
    """
    if experiment.recipe.train.blocks is not None:  # the others are trained elsewhere
        write_results(folder / RESULT, [], None, train_seconds=seconds, iterations=iterations)
        return RunResult(experiment.outline, [], seconds, iterations)
    if measure:
        say(f"evaluate: {experiment.recipe.evaluate.kind}")
    model, rows, evaluation_seconds = evaluate_saved(experiment, folder, measure=measure)
    times = {"train_seconds": seconds, "evaluation_seconds": evaluation_seconds, "iterations": iterations}
    write_results(folder / RESULT, [row.to_dict() for row in rows], None, **times)
    if rows:
        summary = experiment.task.summary(rows)
        score = summary.get(experiment.task.score)
        experiment.note_results(folder / "model", [experiment.task.columns(summary)], score)
    return RunResult(model, rows, seconds, iterations)


def train_before_blocks(experiment: Experiment, folder: Path, *, resume: bool = True, progress: bool = True) -> None:
    """Train only the noise fit and the trunk, which the blocks start from; a run in `folder` goes on from there.

    Args:
        experiment, folder: of the run.
        resume: False starts anew.
        progress: announce the phases, and show progress bars.

    Raises:
        ValueError: the recipe has neither, or what `prepare` refuses.
    """
    if all(key == "train" for key, *_ in stages(experiment.recipe)):
        raise ValueError(
            f"{experiment.recipe.name} has neither a noise fit nor a trunk: train it without --before-blocks"
        )
    say = announcer(progress)
    with folder_lock(folder):
        prepare(experiment, folder, resume=resume, measure=False)
        write_recipe(experiment.origin, folder)
        train_fit_and_trunk(experiment, folder, say=say, progress=progress)


def branch_trunk(recipe: Recipe, trunk: Trainer) -> DiffusionBlocks:
    """The blocks of the recipe, copied from a trained trunk."""
    assert isinstance(trunk.model, DiffusionBlocks)
    blocks = recipe.blocks
    with trunk.averaged() if trunk_options(recipe).weights == "averaged" else contextlib.nullcontext():
        names = ("boundaries", "layers", "overlap", "partition", "split", "vocabulary")
        changes = {name: getattr(blocks, name) for name in names}
        if blocks.target is not None and blocks.target.reads_trunk:
            changes["context"] = "trunk"
        return branch(trunk.model, blocks.num_blocks, **changes)


def untrained(experiment: Experiment) -> Trainer:
    """Make the trainer of fresh blocks, to look at its steps; the trunk that they attend to has learned nothing."""
    target = experiment.recipe.blocks.target
    if not (has_trunk(experiment) and target is not None and target.reads_trunk):
        return experiment.trainer(progress=False)
    trunk = experiment.derive(trunk_recipe(experiment.recipe)).trainer(progress=False)
    blocks = branch_trunk(experiment.recipe, trunk)
    return experiment.derive(after_branch(experiment.recipe), same_run=True).trainer(model=blocks, progress=False)


def _check_fitted(experiment: Experiment) -> None:
    """Refuse levels that are not fitted yet: blocks would train on others, and nobody would see it."""
    if experiment.recipe.fit is not None and experiment.of_method_blocks:
        raise ValueError(f"{experiment.recipe.name} fits its noise levels first: give the experiment of fit_noise")


def has_trunk(experiment: Experiment) -> bool:
    """Whether the run trains a trunk first."""
    return experiment.recipe.trunk is not None and experiment.of_method_blocks


# ---- the folder of a run ---------------------------------------------------------------------------------------


def _phases(folder: Path) -> tuple[Path, ...]:
    """Where a run may have checkpoints."""
    return folder, folder / "trunk", folder / "fit"


def forget(folder: Path) -> None:
    """Delete what a run would resume from, if there is any, and samples of its model.

    Killed on its way, the next run finishes it: no phase resumes without the others.
    """
    if not folder.is_dir():
        return
    marker = folder / _RESTARTING
    marker.touch()
    for phase in _phases(folder):
        if (phase / "checkpoints").is_dir():
            delete_folder(phase / "checkpoints")
    (folder / "fit" / LEVELS).unlink(missing_ok=True)
    (folder / "trunk" / BOUNDARIES).unlink(missing_ok=True)
    if (folder / PARTS).is_dir():
        delete_folder(folder / PARTS)
    for phase in _phases(folder):  # of the older model
        for sample in (*phase.glob(SAMPLED_PICTURES), *phase.glob(SAMPLED_TEXTS)):
            sample.unlink()
    for name in (RECIPE, RESULT):
        (folder / name).unlink(missing_ok=True)
    marker.unlink()


def _check_way(folder: Path, *, in_parts: bool) -> None:
    """Refuse a run that began the other way: in parts, or all units in one trainer."""
    if in_parts and checkpoints(folder / "checkpoints"):
        raise ValueError(
            f"{folder} holds a run that trains all blocks in one process: go on with it without torchrun, start anew "
            "with --restart, or choose another folder"
        )
    if not in_parts and (folder / PARTS).is_dir():
        raise ValueError(
            f"{folder} holds a run whose blocks train apart, in {folder / PARTS}: go on with it by "
            "experiments.parallel.train, start anew with --restart, or choose another folder"
        )


def check_resumes(folder: Path, description: dict[str, Any]) -> None:
    """Refuse another run than the one whose blocks are in the folder, before anything is read or trained."""
    for phase in _phases(folder):
        paths = checkpoints(phase / "checkpoints")
        before = read_values(paths[-1]).get("run") if paths else None
        if paths and before is None and (folder / RECIPE).is_file():  # version 0.1.0 left the recipe alone
            check_goes_on_from_first_version(read_json(folder / RECIPE), description, paths[-1])
        elif before is not None and phase == folder:  # the other phases' are of recipes of their own
            check_same_run(before, description, paths[-1])


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Leave the recipe, overrides applied and the target written out, beside the run's results."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECIPE, recipe.model_dump(mode="json") | {"blocks": describe_blocks(recipe)})


def trained_differently(folders: Sequence[Path]) -> list[str]:
    """Where the recipes of runs would not give the same blocks, which the saved models do not tell; a line a run.

    Args:
        folders: of runs, or their saved models; one without a recipe beside it is passed over.
    """
    paths = [place / RECIPE for folder in folders for place in (folder, folder.parent) if (place / RECIPE).is_file()]
    training = [learned_from(in_current_terms(read_json(path))) for path in paths]
    lines = []
    for path, other in zip(paths[1:], training[1:], strict=True):
        if (first_difference := difference(training[0], other)) is not None:
            name, first, second = first_difference
            lines.append(f"blocks were trained differently: {name} is {first} in {paths[0]} and {second} in {path}")
    return lines
