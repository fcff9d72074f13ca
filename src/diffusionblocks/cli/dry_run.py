"""What `--dry-run` prints: all that a run does before its first step, its memory and its time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..experiments.experiment import Experiment
    from ..experiments.recipe import Recipe
    from ..planning import Predictor

#: Seconds that the steps of a stage may take on a GPU, and those of all stages together on a CPU.
_ON_GPU, _ON_CPU = 30.0, 20.0


def dry_run(experiment: Experiment, folder: Path) -> None:
    """Do what `train` does before its first step; print the stages, and the memory of a step by kind."""
    from ..experiments.run import prepare
    from ..planning.plan_text import ledger_table, remarks

    prepare(experiment, folder)
    data = experiment.data("train")
    name, device = experiment.recipe.name, experiment.device
    print(f"{name}: {len(data):,} training examples, on {device}; nothing of the run is written")
    predictor = _predictor(experiment)
    stages = [(name, [stage], predictor) for name, stage in _stages(experiment)]
    _print_rows(experiment, stages)
    if experiment.recipe.train.sample_every is not None:
        print(experiment.task.cost_of_pictures(experiment))
    if predictor is not None:
        print(ledger_table(predictor.recipe, predictor.forecast().ledger))
        for line in remarks(predictor):
            print(line)


def dry_comparison(experiment: Experiment, rows: Iterable[tuple[str, Experiment]]) -> None:
    """Print each row of a comparison that is checked: its iterations, memory and time."""
    _print_rows(experiment, [(name, [stage for _, stage in _stages(row)], _predictor(row)) for name, row in rows])


def _print_rows(experiment: Experiment, rows: list[tuple[str, list[Experiment], Predictor | None]]) -> None:
    """Print a table of rows, each of which is a name, stages, and what predicts their memory."""
    from ..experiments.step_time import leaves_compilation_out
    from ..reports.tables import format_table

    stages = [stage for _, several, _ in rows for stage in several]
    # The first estimates take half of the time, steps that are timed after them the other half.
    at_most = _ON_CPU / 2 / len(stages) if experiment.device.type == "cpu" else _ON_GPU
    table, scaled = [], False
    for name, several, predictor in rows:
        row, about = _row(name, several, predictor, at_most)
        table.append(row)
        scaled = scaled or about
    print(format_table(table))
    how = f"time: of the steps, by a few of each unit that were run on {experiment.device} now and thrown away"
    if scaled:
        how += "; about: the steps had fewer examples, and their time is scaled by the examples"
    if any(leaves_compilation_out(stage) for stage in stages):
        how += "; none were compiled, which takes longer than a dry run"
    print(f"{how}; saving and evaluation come on top")


def _stages(experiment: Experiment) -> list[tuple[str, Experiment]]:
    """The trainings of a run, in order."""
    from ..experiments.recipe_changes import fit_recipe, stages, trunk_recipe

    changed = {"fit": fit_recipe, "trunk": trunk_recipe}
    return [
        (key, experiment.derive(changed[key](experiment.recipe)) if key in changed else experiment)
        for key, _, _ in stages(experiment.recipe)
    ]


def _row(
    name: str, stages: list[Experiment], predictor: Predictor | None, at_most: float
) -> tuple[dict[str, Any], bool]:
    """A row of the table, and whether its time is scaled from steps of fewer examples."""
    from ..experiments.step_time import estimated_step
    from ..reports.tables import format_bytes, format_duration
    from ..training import units_of

    iterations, seconds, scaled, peaks = 0, 0.0, False, []
    for stage in stages:
        train = stage.recipe.train
        units, _ = units_of(stage.outline, train.blocks)
        steps = train.unit_steps(len(stage.data("train"))) * len(units)
        step = estimated_step(stage, at_most)
        iterations, seconds, scaled = iterations + steps, seconds + steps * step.seconds, scaled or step.scaled
        peaks.append(None if predictor is None else predictor.forecast(_on(stage)).ledger.peak)
    peak = "not predicted" if None in peaks else format_bytes(max(peak for peak in peaks if peak is not None))
    time = f"about {format_duration(seconds)}" if scaled else format_duration(seconds)
    row = {"row": name, "iterations": f"{iterations:,}", "peak of a step, predicted": peak, "time": time}
    return row, scaled


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
