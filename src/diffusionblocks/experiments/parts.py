"""Parts of a run: its blocks, or the members of an ensemble, each trained as a run of its own, and joined at the end.

Part b is the run whose recipe says `train.blocks: [b]`, in a folder of its own below the whole run's, with its own
checkpoints, log and saved model. So who trains which part does not matter, nor where an older process stopped: a part
that has ended is never trained again, and an unfinished one goes on from its newest checkpoint.

    experiment = Experiment(load_recipe("recipes/vit/digits.yaml"))
    folder = Path("runs/digits")
    fitted, before = begin(experiment, folder)     # noise fit and trunk, which all parts start from
    for part in missing_parts(parts_of(fitted, folder)):
        part.train()                               # in any order, in any process that sees the folder
    finish(fitted, folder, before)                 # joined to runs/digits/model, and evaluated
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.files import folder_lock
from ..common.formats import read_json
from ..common.messages import Say, announce, announcer
from ..core.ensembles import merge_ensembles
from ..core.merging import merge
from ..reports.results import write_results
from ..training import Diverged, Trainer, units_of
from ..training.ranks import Group
from ..training.run_log import Logger
from .experiment import Experiment
from .recipe import Recipe
from .run import (
    PARTS,
    RESULT,
    Cost,
    blocks_trainer,
    check_resumes,
    conclude,
    has_trunk,
    prepare,
    read_trunk,
    save_blocks,
    train_fit_and_trunk,
    write_recipe,
)
from .tasks.task import RunResult

#: What the parts of a run are, by its method; the parts of other methods do not train apart.
_KINDS = {"diffusionblocks": "block", "ensemble": "member"}

#: Makes further receivers of the log of the run in a folder: each closes them at its end.
MakeLoggers = Callable[[Path], tuple[Logger, ...]]


def no_loggers(folder: Path) -> tuple[Logger, ...]:
    """No further receivers of a log."""
    return ()


class PartsMissing(Diverged):
    """Parts of a run diverged: the others were joined, and the model's index lists those that are there."""


@dataclass(frozen=True)
class Part:
    """A block, or a member of an ensemble, that trains by itself.

    Attributes:
        index: of the block or member.
        experiment: that of the part, on fitted levels where the run fits them.
        run: folder of the whole run.
    """

    index: int
    experiment: Experiment
    run: Path

    @property
    def name(self) -> str:
        """`block 0`, or `member 0` of an ensemble."""
        return f"{kind_of_part(self.experiment.recipe)} {self.index}"

    @property
    def folder(self) -> Path:
        """Where the part's run lies."""
        return self.run / PARTS / f"{kind_of_part(self.experiment.recipe)}-{self.index:02d}"

    @property
    def cost(self) -> Cost:
        """What training it took, once it is finished."""
        values = read_json(self.folder / RESULT)
        return Cost(float(values["train_seconds"]), int(values["iterations"]))

    def train(self, *, loggers: MakeLoggers = no_loggers, progress: bool = False, group: Group | None = None) -> None:
        """Train it to its end, from its newest checkpoint, and save it; nothing to do where it is finished.

        Args:
            loggers: makes further receivers of its log, of its folder.
            progress: show a progress bar.
            group: ranks that train it together; the first of them writes the files.

        Raises:
            Diverged: its loss, weights or state became NaN or infinite; its last good checkpoint is kept.
            Interrupted: after SIGINT or SIGTERM, when its state is saved.
            ValueError: another process trains it, or the trunk that it starts from has not ended.
        """
        if is_finished(self):
            return
        if group is not None and not group.leads:
            train_unit(self.experiment, self.run, self.folder, progress=False, group=group)
            return
        with folder_lock(self.folder):
            of_folder = loggers(self.folder)
            trainer = train_unit(self.experiment, self.run, self.folder, of_folder, progress=progress, group=group)
            save_blocks(self.experiment, self.folder, trainer)
            times = {"train_seconds": trainer.seconds, "iterations": trainer.steps_taken}
            write_results(self.folder / RESULT, [], None, **times)


def train_unit(
    experiment: Experiment,
    run: Path,
    folder: Path,
    loggers: tuple[Logger, ...] = (),
    *,
    progress: bool = False,
    group: Group | None = None,
) -> Trainer:
    """Train one unit to its end, from the run's trunk where it has one.

    Args:
        experiment: of the unit, on its fitted levels.
        run: folder of the whole run.
        folder: of the unit's own.
        loggers: further receivers of the log.
        progress: show a progress bar.
        group: ranks that train it together.
    """
    # Where a unit is shared out, no device need have room for a whole trunk with its optimizer state.
    of_trunk = experiment.on("cpu") if group is not None and group.shards else experiment
    trunk = read_trunk(of_trunk, run) if has_trunk(experiment) else None
    trainer = blocks_trainer(experiment, folder, trunk, loggers=loggers, progress=progress, group=group)
    del trunk  # and its memory
    trainer.train()
    return trainer


def has_parts(experiment: Experiment) -> bool:
    """Whether a run has several units that can train apart.

    Raises:
        ValueError: it has several that cannot; with the reason and the fix.
    """
    recipe = experiment.recipe
    units, shared = units_of(experiment.outline, recipe.train.blocks)
    if recipe.method == "end-to-end" or len(units) == 1:
        return False
    if recipe.method not in _KINDS:
        raise ValueError(
            f"method: {recipe.method} trains its {len(units)} units in one process, and this run is of several: train "
            f"it in one, without torchrun; of several processes are the methods {', '.join(_KINDS)} and end-to-end"
        )
    if shared:
        raise ValueError(
            "blocks.shared = joint: every step of a block moves parameters of all blocks, so blocks cannot train "
            "apart: set blocks.shared to replicated or frozen, or train it in one process, without torchrun"
        )
    if recipe.train.sample_every is not None:
        raise ValueError(
            f"train.sample_every = {recipe.train.sample_every} draws chains through all blocks, and blocks that train "
            "apart have no others: set train.sample_every to null, or train in one process, without torchrun"
        )
    return True


def units_in(experiment: Experiment) -> int:
    """How many units a run trains."""
    return len(units_of(experiment.outline, experiment.recipe.train.blocks)[0])


def parts_of(experiment: Experiment, folder: Path) -> list[Part]:
    """The parts that a run trains, in order; of `train.blocks` those alone.

    Args:
        experiment: on its fitted levels, where it fits them (`begin`).
        folder: of the run.
    """
    units, _ = units_of(experiment.outline, experiment.recipe.train.blocks)
    return [Part(unit.index, experiment.part(unit.index), folder) for unit in units]


def is_finished(part: Part) -> bool:
    """Whether a part is trained to its end and saved."""
    return (part.folder / RESULT).is_file() and (part.folder / "model").is_dir()


def missing_parts(parts: Sequence[Part]) -> list[Part]:
    """Those that are not finished."""
    return [part for part in parts if not is_finished(part)]


def is_in_parts(folder: Path) -> bool:
    """Whether a folder holds a run whose parts train apart, finished or not."""
    return (folder / PARTS).is_dir()


def check_parts(experiment: Experiment, folder: Path, *, resume: bool = True, measure: bool = True) -> None:
    """As `run.prepare`, for a run that trains in parts: each goes on only as what it was.

    Args:
        experiment, folder: of the run.
        resume: False deletes what the folder's run would resume from, its parts too.
        measure: whether the run will be evaluated.

    Raises:
        ValueError: what `run.prepare` refuses, an unfinished run of one process in the folder, or a part of another
            run.
    """
    has_parts(experiment)  # refuses what cannot train apart
    prepare(experiment, folder, resume=resume, measure=measure, in_parts=True)
    for part in parts_of(experiment, folder):
        check_resumes(part.folder, part.experiment.describe())


def begin(
    experiment: Experiment,
    folder: Path,
    *,
    say: Say = announce,
    progress: bool = False,
    group: Group | None = None,
) -> tuple[Experiment, Cost]:
    """Train what all parts start from, the noise fit and the trunk, or read back that they have ended.

    Args:
        experiment, folder: of the run.
        say: announces what begins.
        progress: show progress bars.
        group: ranks that do it together; the first of them writes the files.

    Returns:
        The experiment on its fitted levels, and what this took.
    """
    if group is None or group.leads:
        write_recipe(experiment.origin, folder)  # whoever looks at the run knows what is to come
    experiment, _, cost = train_fit_and_trunk(experiment, folder, say=say, progress=progress, group=group)
    return experiment, cost


def join(experiment: Experiment, folder: Path, parts: Sequence[Part]) -> None:
    """Make one model, `folder`/model, of the parts that are finished; its index lists them.

    Args:
        experiment: on its fitted levels, where it fits them.
        folder: of the run.
        parts: of the run, at least one of them finished.
    """
    folders = [part.folder for part in parts if is_finished(part)]
    join_models = merge_ensembles if kind_of_part(experiment.recipe) == "member" else merge
    join_models(folders, folder / "model", partial=True)
    experiment.note_results(folder / "model", [])  # the card, which is of all of them now


def finish(
    experiment: Experiment,
    folder: Path,
    before: Cost,
    *,
    reasons: Mapping[int, str] | None = None,
    measure: bool = True,
    say: Say = announce,
) -> RunResult:
    """Join the parts of a run to `folder`/model, evaluate it, and leave the run's result, as `run.train` does.

    Args:
        experiment: on its fitted levels, where it fits them.
        folder: of the run.
        before: what fit and trunk took.
        reasons: why a part is missing, by its index.
        measure: False only loads the model.
        say: announces what begins.

    Raises:
        PartsMissing: parts are not finished; the others are joined.
    """
    parts = parts_of(experiment, folder)
    complete, missing = [part for part in parts if is_finished(part)], missing_parts(parts)
    if complete:
        say(f"save: {folder / 'model'}")
        join(experiment, folder, parts)
    if missing:
        reasons = reasons or {}
        lines = [f"{part.name} is missing: {reasons.get(part.index, 'it was not trained')}" for part in missing]
        there = f"; {folder / 'model'} holds {', '.join(part.name for part in complete)}" if complete else ""
        raise PartsMissing(f"{'; '.join(lines)}{there}")
    seconds = before.seconds + sum(part.cost.seconds for part in parts)
    iterations = before.iterations + sum(part.cost.iterations for part in parts)
    return conclude(experiment, folder, seconds, iterations, measure=measure, say=say)


def train_in_parts(
    experiment: Experiment,
    folder: Path,
    *,
    loggers: MakeLoggers = no_loggers,
    resume: bool = True,
    progress: bool = True,
    measure: bool = True,
) -> RunResult:
    """Train the parts of a run one after another in this process, join and evaluate them: see `run.train`.

    Raises:
        PartsMissing: a part diverged; the others are trained and joined.
    """
    say = announcer(progress)
    with folder_lock(folder):
        check_parts(experiment, folder, resume=resume, measure=measure)
        experiment, before = begin(experiment, folder, say=say, progress=progress)
        reasons = train_each(missing_parts(parts_of(experiment, folder)), loggers=loggers, say=say, progress=progress)
        return finish(experiment, folder, before, reasons=reasons, measure=measure, say=say)


def train_each(
    parts: Sequence[Part],
    *,
    loggers: MakeLoggers = no_loggers,
    say: Say = announce,
    progress: bool = False,
    group: Group | None = None,
) -> dict[int, str]:
    """Train parts one after another; one that diverges stops alone.

    Args:
        parts: of a run.
        loggers: makes further receivers of a part's log, of its folder.
        say: announces what begins.
        progress: show progress bars.
        group: ranks that train each of them together.

    Returns:
        Why parts diverged, by their index.
    """
    reasons = {}
    for part in parts:
        say(f"train: {part.name}")
        try:
            part.train(loggers=loggers, progress=progress, group=group)
        except Diverged as error:
            reasons[part.index] = str(error)
            say(f"{part.name} stops, the others go on: {error}")
    return reasons


def kind_of_part(recipe: Recipe) -> str:
    """What a part of a run is: block or member."""
    return _KINDS[recipe.method]
