"""What `--dry-run` prints: all that a run does before its first step, its memory and its time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..experiments.experiment import Experiment
    from ..experiments.recipe import Recipe
    from ..planning import Predictor

#: Steps of each unit before the clock starts, and timed ones, where nothing is compiled or captured first.
_PLAIN = (2, 6)
#: Seconds that the steps of a stage may take; slower ones are told by fewer.
_AT_MOST = 30.0


def dry_run(experiment: Experiment, folder: Path) -> None:
    """Do what `train` does before its first step; print the stages, and the memory of a step by kind."""
    from ..experiments.run import prepare
    from ..planning.plan_text import ledger_table, remarks

    prepare(experiment, folder)
    data = experiment.data("train")
    print(f"{experiment.recipe.name}: {len(data):,} training examples, on {experiment.device}; nothing is written")
    predictor = _predictor(experiment)
    _print(experiment, [_row(name, [stage], predictor) for name, stage in _stages(experiment)])
    if experiment.recipe.train.sample_every is not None:
        print(experiment.task.cost_of_pictures(experiment))
    if predictor is not None:
        print(ledger_table(predictor.recipe, predictor.forecast().ledger))
        for line in remarks(predictor):
            print(line)


def dry_comparison(experiment: Experiment, rows: Iterable[tuple[str, Experiment]]) -> None:
    """Print each row of a comparison that is checked: its iterations, memory and time."""
    stages = ((name, [stage for _, stage in _stages(row)], _predictor(row)) for name, row in rows)
    _print(experiment, [_row(*row) for row in stages])


def _print(experiment: Experiment, rows: list[dict[str, Any]]) -> None:
    from ..reports.tables import format_table

    print(format_table(rows))
    print(
        f"time: of the steps, by a few of each unit that were run on {experiment.device} now and thrown away; saving "
        "and evaluation come on top"
    )


def _stages(experiment: Experiment) -> list[tuple[str, Experiment]]:
    """The trainings of a run, in order."""
    from ..experiments.recipe_changes import fit_recipe, stages, trunk_recipe

    changed = {"fit": fit_recipe, "trunk": trunk_recipe}
    return [
        (key, experiment.derive(changed[key](experiment.recipe)) if key in changed else experiment)
        for key, _, _ in stages(experiment.recipe)
    ]


def _row(name: str, stages: list[Experiment], predictor: Predictor | None) -> dict[str, Any]:
    from ..experiments.baselines import seconds_a_step
    from ..reports.tables import format_bytes, format_duration
    from ..training import units_of

    iterations, seconds, peaks = 0, 0.0, []
    for stage in stages:
        train = stage.recipe.train
        units, _ = units_of(stage.outline, train.blocks)
        steps = train.unit_steps(len(stage.data("train"))) * len(units)
        timed = {} if train.compile or train.cuda_graph else dict(zip(("warm", "timed"), _PLAIN, strict=True))
        iterations, seconds = iterations + steps, seconds + steps * seconds_a_step(stage, at_most=_AT_MOST, **timed)
        peaks.append(None if predictor is None else predictor.forecast(_on(stage)).ledger.peak)
    peak = "not predicted" if None in peaks else format_bytes(max(peak for peak in peaks if peak is not None))
    time = format_duration(seconds)
    return {"row": name, "iterations": f"{iterations:,}", "peak of a step, predicted": peak, "time": time}


def _predictor(experiment: Experiment) -> Predictor | None:
    """Predicts for the device that would train; None of a recipe whose memory is not predicted."""
    from ..planning import Predictor
    from ..planning.predictor import why_not_predicted

    if experiment.recipe.train.teaching is not None or why_not_predicted(experiment.recipe) is not None:
        return None
    return Predictor(_on(experiment), len(experiment.data("train")))


def _on(experiment: Experiment) -> Recipe:
    """The recipe, with the device that it would run on."""
    return experiment.recipe.model_copy(update={"device": str(experiment.device)})
