"""Training by whoever there is: one process, or the ranks that torchrun started, which share the parts of a run.

Ranks are a mesh of (block, data). With no more ranks than parts each rank trains parts of its own, one after another,
and no step waits for another rank. With more, the ranks of a row train one part together. What comes before the parts,
noise fit and trunk, and a run of one unit, are trained by all ranks together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..common.files import folder_lock, lock_text
from ..common.messages import Say, announcer
from ..evaluation.work import ALONE, SharedWork
from ..training import Diverged, units_of
from ..training.ranks import Group, Place, Ranks
from ..training.run_log import ProgressLines
from ..training.trainer import check_group, check_unit
from . import run
from .comparison import Comparison, forget_graphs
from .experiment import Experiment
from .parts import (
    MakeLoggers,
    begin,
    check_parts,
    finish,
    has_parts,
    is_finished,
    is_in_parts,
    kind_of_part,
    missing_parts,
    no_loggers,
    parts_of,
    train_each,
    train_in_parts,
    train_unit,
    units_in,
)
from .recipe import Recipe
from .recipe_changes import fit_recipe, stages, trunk_recipe
from .run import Cost, conclude, evaluate_saved, prepare, save_blocks
from .tasks.task import RunResult

#: Seconds in which what another machine wrote to a shared disk is seen on this one.
_DELAY = 60.0


def train(
    experiment: Experiment,
    folder: Path,
    *,
    loggers: MakeLoggers = no_loggers,
    resume: bool = True,
    progress: bool = True,
    measure: bool = True,
) -> RunResult | None:
    """Train, save and evaluate an experiment: see `run.train`. Ranks of torchrun share the work.

    Checkpoints are of one block each, so a run that some ranks began goes on with other ones, or in one process.

    Args:
        experiment, folder: of the run.
        loggers: makes further receivers of a log, of the folder of the run, or of a part of it.
        resume: False starts anew.
        progress: announce the phases, and show progress.
        measure: whether to evaluate.

    Returns:
        What the run left; None on ranks but the first.

    Raises:
        RankLost: another rank died.
        StoppedWithOthers: another rank failed.
        ValueError: what `run.train` refuses, or what several ranks cannot train; with the reason and the fix.
    """
    place = Place.from_environment()
    options = {"resume": resume, "progress": progress, "measure": measure}
    if place is not None and place.world > 1:
        ranks = Ranks(place, experiment.recipe.parallel.timeout)
        with ranks.failing_together(), _told_once(ranks):
            return _train_over_ranks(ranks, experiment, folder, loggers=loggers, **options)
    if resume and is_in_parts(folder):
        return train_in_parts(experiment, folder, loggers=loggers, **options)
    return run.train(experiment, folder, loggers=loggers(folder), **options)


def compare(
    experiment: Experiment,
    folder: Path,
    *,
    rows: Sequence[str] | None = None,
    equal: Literal["updates", "seconds"] = "updates",
    resume: bool = True,
    progress: bool = True,
) -> str | None:
    """Train and evaluate every row of a comparison; leave its table and figures. Ranks of torchrun share the work.

    All rows are trained by the same ranks. Their seconds are those of all devices, added up.

    Args:
        experiment, folder, equal, resume, progress: see `Comparison`.
        rows: keys of the rows to run, see `Comparison.checked_rows`.

    Returns:
        The printed table; None on ranks but the first.

    Raises:
        RankLost: another rank died.
        StoppedWithOthers: another rank failed.
        ValueError: what `Comparison.checked_rows` refuses, or rows that several ranks cannot train.
    """
    place = Place.from_environment()
    comparison = Comparison(experiment, folder, equal, resume, progress, train)
    if place is None or place.world == 1:
        selection = comparison.checked_rows(rows)
        comparison.begin(selection)
        return comparison.run(selection)
    ranks = Ranks(place, experiment.recipe.parallel.timeout)
    train_row = functools.partial(_train_row, ranks)
    comparison = dataclasses.replace(comparison, resume=resume or place.restarts > 0, train=train_row)
    with ranks.failing_together(), _told_once(ranks):
        if not ranks.leads:
            ranks.wait_for("rows", 0)
        selection = comparison.checked_rows(rows)
        if ranks.leads:
            if equal == "seconds":
                raise ValueError(
                    f"--equal seconds compares by the clock of one process, and this run is of {place.world} ranks: "
                    "compare equal updates, or start it without torchrun"
                )
            for variant in selection:
                _check_together(experiment.derive(variant.recipe), place.world)
            comparison.begin(selection)
            ranks.tell("rows")
            return comparison.run(selection)
        for variant in selection:
            forget_graphs(variant)
            train_row(experiment.derive(variant.recipe), folder / variant.key, progress=progress)
        return None


def _train_row(ranks: Ranks, row: Experiment, folder: Path, /, *, progress: bool) -> RunResult | None:
    """Train and evaluate a row of a comparison, which goes on where its folder is."""
    return _train_over_ranks(ranks.below(folder.name), row, folder, progress=progress)


@contextlib.contextmanager
def all_ranks(experiment: Experiment) -> Iterator[Experiment]:
    """Let the ranks that torchrun started measure a trained model, or sample from it, together.

    Args:
        experiment: of the model.

    Yields:
        The experiment as this rank has it, on its device, with its share of the work; in one process as it is.

    Raises:
        RankLost: another rank died.
        StoppedWithOthers: another rank failed.
        ValueError: a task that is the work of one process.
    """
    place = Place.from_environment()
    if place is None or place.world == 1:
        yield experiment
        return
    ranks = Ranks(place, experiment.recipe.parallel.timeout)
    with ranks.failing_together():
        task = experiment.task
        if not task.shares_work and ranks.leads:
            raise ValueError(f"evaluate.kind: {task.kind} is the work of one process: start it without torchrun")
        experiment, work = _of_rank(experiment, ranks)
        with work.ending():
            yield experiment


def _of_rank(experiment: Experiment, ranks: Ranks) -> tuple[Experiment, SharedWork]:
    """The experiment on the device of a rank, with its share of evaluation."""
    experiment = experiment.on(ranks.device(experiment.recipe.device))
    if experiment.device.type == "cuda":
        torch.cuda.set_device(experiment.device)  # streams and collectives are of this one
    work = SharedWork(ranks, experiment.device)
    return experiment.shared(work), work


def _train_over_ranks(
    ranks: Ranks,
    experiment: Experiment,
    folder: Path,
    *,
    loggers: MakeLoggers = no_loggers,
    resume: bool = True,
    progress: bool = True,
    measure: bool = True,
) -> RunResult | None:
    place = ranks.place
    resume = resume or place.restarts > 0  # else each restart would throw away what it is to go on with
    say = announcer(progress and ranks.leads)
    with contextlib.ExitStack() as stack:
        if not ranks.leads:  # what is wrong with the run is told once, by the first
            _check_shared(folder, ranks.wait_for("begin", 0))
        experiment, work = _of_rank(experiment, ranks)
        stack.enter_context(work.ending())
        apart, rows = has_parts(experiment), _side_by_side(experiment, place.world)
        shard, before_parts = _shards(experiment.recipe), _recipes_before_parts(experiment.recipe)
        if ranks.leads:
            _check_together(experiment, place.world)
            stack.enter_context(folder_lock(folder))
            (check_parts if apart else prepare)(experiment, folder, resume=resume, measure=measure)
            ranks.tell("begin", lock_text(folder))
        everyone = ranks.groups(experiment.device, 1, shard=shard) if before_parts or not apart else None
        say(f"ranks: {place.world}, {rows} of whose groups train side by side" if apart else f"ranks: {place.world}")
        experiment, before = begin(experiment, folder, say=say, progress=progress and ranks.leads, group=everyone)
        receivers = functools.partial(_receivers, experiment, loggers, progress)
        if not apart:
            return _train_whole(ranks, experiment, folder, before, everyone, receivers, measure=measure, say=say)
        parts = {part.index: part for part in parts_of(experiment, folder)}
        if ranks.leads:
            ranks.tell("parts", json.dumps([part.index for part in missing_parts([*parts.values()])]))
        order = json.loads(ranks.wait_for("parts", 0))
        group = ranks.groups(experiment.device, rows, shard=shard)
        size = place.world // rows
        row, leads_row = place.rank // size, place.rank % size == 0
        for index in order[row::rows]:
            say_of_row = announcer(progress and leads_row)
            reasons = train_each([parts[index]], loggers=receivers, say=say_of_row, group=group)
            if leads_row:
                ranks.tell(f"part {index}", reasons.get(index, ""))
        if not ranks.leads:
            _measure_with_first(experiment, folder)
            return None
        reasons = {}
        for number, index in enumerate(order):
            if reason := ranks.wait_for(f"part {index}", number % rows * size):
                reasons[index] = reason
            else:
                _wait_until(functools.partial(is_finished, parts[index]))
        result = finish(_for_measuring(experiment), folder, before, reasons=reasons, measure=measure, say=say)
        of_parts = size * (result.seconds - before.seconds)
        return dataclasses.replace(result, device_seconds=place.world * before.seconds + of_parts)


def _shards(recipe: Recipe) -> bool:
    return recipe.parallel.within_block == "shard"


def _side_by_side(experiment: Experiment, world: int) -> int:
    """How many parts of a run so many ranks train side by side; 1 where it has none."""
    if not has_parts(experiment):
        return 1
    return mesh_rows(world, units_in(experiment), kind_of_part(experiment.recipe))


def _recipes_before_parts(recipe: Recipe) -> list[Recipe]:
    """The recipes of noise fit and trunk, which all ranks train together."""
    recipes = {"fit": fit_recipe, "trunk": trunk_recipe}
    return [recipes[key](recipe) for key, *_ in stages(recipe) if key in recipes]


def _check_together(experiment: Experiment, world: int) -> None:
    """Refuse what so many ranks cannot train together, before any of it is trained."""
    recipe, size = experiment.recipe, world // _side_by_side(experiment, world)
    together = [(before, world) for before in _recipes_before_parts(recipe)]
    for part, ranks in [*together, *([(recipe, size)] if size > 1 else [])]:
        check_group(part.train, ranks, shard=_shards(recipe))
        for unit in units_of(experiment.derive(part).outline, part.train.blocks)[0]:
            check_unit(unit, ranks)


def _for_measuring(experiment: Experiment) -> Experiment:
    """The experiment as the first rank measures it: with the others, or alone."""
    return experiment if experiment.task.shares_work else experiment.shared(ALONE)


def _measure_with_first(experiment: Experiment, folder: Path) -> None:
    """Do a share of the evaluation, once the first rank has joined the model and begins."""
    if experiment.work.joins():
        evaluate_saved(experiment, folder)


def _train_whole(
    ranks: Ranks,
    experiment: Experiment,
    folder: Path,
    before: Cost,
    group: Group | None,
    loggers: MakeLoggers,
    *,
    measure: bool,
    say: Say,
) -> RunResult | None:
    """Train a run of one unit by all ranks together."""
    say("train: all ranks together")
    if not ranks.leads:
        ranks.wait_for("parts", 0)
        train_unit(experiment, folder, folder, group=group)
        _measure_with_first(experiment, folder)
        return None
    ranks.tell("parts")  # a trunk is there by now
    trainer = train_unit(experiment, folder, folder, loggers(folder), group=group)
    seconds, iterations = before.seconds + trainer.seconds, before.iterations + trainer.steps_taken
    say(f"save: {folder / 'model'}")
    save_blocks(experiment, folder, trainer)
    del trainer
    result = conclude(_for_measuring(experiment), folder, seconds, iterations, measure=measure, say=say)
    return dataclasses.replace(result, device_seconds=ranks.place.world * seconds)


@contextlib.contextmanager
def _told_once(ranks: Ranks) -> Iterator[None]:
    """Let what diverges in the hands of all ranks be told by the first."""
    try:
        yield
    except Diverged as error:
        error.quiet = not ranks.leads
        raise


def mesh_rows(world: int, parts: int, kind: str) -> int:
    """How many parts train side by side: as many as there are ranks, or each by as many ranks as there are for it.

    Args:
        world: number of ranks.
        parts: number of parts.
        kind: what a part is, for messages: block or member.

    Raises:
        ValueError: more ranks than parts, and the parts do not divide them.
    """
    if world <= parts:
        return world
    if world % parts:
        fitting = [parts, (world // parts + 1) * parts] if world < 2 * parts else [world // parts * parts]
        raise ValueError(
            f"{world} ranks for {parts} {kind}s: with more ranks than {kind}s each needs as many as the others: start "
            f"{' or '.join(map(str, fitting))} ranks (--nproc-per-node)"
        )
    return parts


def _receivers(experiment: Experiment, loggers: MakeLoggers, progress: bool, folder: Path) -> tuple[Any, ...]:
    steps = experiment.recipe.train.unit_steps(len(experiment.data("train")))
    return (*loggers(folder), *([ProgressLines(steps)] if progress else []))


def _check_shared(folder: Path, text: str) -> None:
    """Refuse a folder that is not the one that the first rank locked: machines must share the disk that it is on."""
    if not _wait_until(lambda: lock_text(folder) == text):
        raise ValueError(
            f"{folder} is not the folder of the first rank ({text}): machines that train one run share its disk; name "
            "a folder that all see, or train blocks apart with train.blocks and join them with diffusionblocks merge"
        )


def _wait_until(condition: Callable[[], bool]) -> bool:
    """Wait for what another machine wrote to be seen here; whether it is."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > _DELAY:
            return False
        time.sleep(0.2)
    return True
