"""Reading what runs left in their folders, finished or not, for a page: see `reports.page`."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.model import DiffusionBlocks
from ..core.partition import Partition
from ..core.saved_model import INDEX, SavedModel, read_saved
from ..evaluation.diagnostics import LevelRow
from ..noise import NoiseProcess
from ..reports import charts
from ..reports.page import RunReport, Score, TableReport
from ..training import units_of
from ..training.run_log import LOG
from .ablation import ROW, means_over_seeds
from .comparison import columns
from .experiment import Experiment
from .identity import in_current_terms
from .parts import is_in_parts
from .recipe import Recipe, parse_recipe
from .run import DRAWN_IN_TRAINING, PARTS, RESULT, SAMPLED_PICTURES, SAMPLED_TEXTS, TABLE
from .run_files import read_label_levels, read_log, read_result, read_row, read_table, read_values
from .shipped_recipes import RECIPE
from .tasks import TASKS

#: Where a run and its phases have logs.
_PHASES = {"fit": "fit", "trunk": "trunk", "run": "."}
#: Pictures and texts that a run shows; single images of `sample` are in its grid.
_PICTURES = ("fit/*.png", SAMPLED_PICTURES, "*.png")
_TEXTS = (SAMPLED_TEXTS,)
_MOST_FILES, _MOST_DRAWN = 12, 4


def read_runs(folders: Sequence[Path], *, wait: bool = False) -> tuple[list[RunReport], list[TableReport]]:
    """Read runs, and the runs and tables of comparisons and ablations.

    Args:
        folders: each of a run, a comparison or an ablation.
        wait: let a folder without a run stand for one that has not begun.

    Returns:
        (runs, tables); names of runs are unique.

    Raises:
        ValueError: a folder that holds no run, or a file of it that is damaged.
    """
    runs: list[RunReport] = []
    tables: list[TableReport] = []
    for folder in folders:
        below = [folder] if _is_run(folder) else _runs_below(folder)
        if not below and wait:
            runs.append(RunReport(_name(folder), folder))
            continue
        if not below:
            raise ValueError(
                f"{folder} holds no run: give a folder that train, compare or ablate wrote to with --out"
                + ("" if folder.is_dir() else "; it is no folder")
            )
        before = "" if len(folders) == 1 else f"{_name(folder)}/"
        names = [_name(run) if run == folder else before + run.relative_to(folder).as_posix() for run in below]
        ours = [read_run(run, name) for run, name in zip(below, names, strict=True)]
        if (values := read_table(folder)) is not None:
            tables.append(_table(folder, values, ours))
            ours = _with_memory(ours, values["rows"])
        elif ours and ours[0].folder != folder:  # its first row is not done yet
            tables.append(TableReport(_name(folder), [], "", [], {}, finished=False))
        runs += ours
    repeated = len({run.name for run in runs}) < len(runs)
    return [replace(run, name=run.folder.as_posix()) for run in runs] if repeated else runs, tables


def read_run(folder: Path, name: str) -> RunReport:
    """Read one run, finished or not.

    Args:
        folder: of the run.
        name: what the page calls it.

    Raises:
        ValueError: a file that is damaged; the message names it.
    """
    plain = _recipe_values(folder / RECIPE)
    result, row = read_result(folder), read_row(folder)
    logs = {phase: records for phase, place in _PHASES.items() if (records := read_log(folder / place))}
    if parts := _records_of_parts(folder):
        logs["run"] = parts
    _check_one_run(folder, result, logs)
    unit_steps, outlined = _outline(json.dumps(plain, sort_keys=True))
    of_some_blocks = (plain.get("train") or {}).get("blocks") is not None  # these are measured when they are merged
    # While a run trains anew, the model that is still there is an older run's.
    model = _saved_blocks(folder / "model") if result is not None or of_some_blocks else None
    partition, noise = outlined or (None, None)
    if model is not None:
        partition, noise = model.partition, model.blocks_config.noise
    memory = None if row is None else row.get("memory")
    return RunReport(
        name=name,
        folder=folder,
        recipe=plain,
        logs=logs,
        result=result,
        finished=result is not None or (of_some_blocks and (folder / "model").is_dir()),
        unit_steps=unit_steps,
        side_by_side=is_in_parts(folder),
        partition=partition,
        noise=noise,
        memory=None if memory is None else _kinds(memory),
        levels=[] if model is None else _label_levels(folder, model),
        pictures=_files(folder, _PICTURES),
        texts=_files(folder, _TEXTS),
    )


def _records_of_parts(folder: Path) -> list[dict[str, Any]]:
    """Records of parts that train apart, one part after another, as if one process had trained them in this order."""
    records: list[dict[str, Any]] = []
    for part in sorted((folder / PARTS).glob("*-*")):
        before = records[-1]["iteration"] if records else 0
        records += [{**record, "iteration": before + record["iteration"]} for record in read_log(part)]
    return records


def _recipe_values(path: Path) -> dict[str, Any]:
    """The recipe that a run left; empty: there is none."""
    plain = read_values(path) if path.is_file() else {}
    for section in ("model", "train", "evaluate"):
        if not isinstance(plain.get(section) or {}, dict):
            raise ValueError(f"{path} is damaged: {section} is no section of a recipe")
    return plain


def _iterations(records: Sequence[charts.Record]) -> int:
    """How many steps a log tells of; of those that were planned, early stopping leaves some out."""
    if any("since_best" in record for record in records):
        return sum({record["unit"]: int(record["step"]) for record in records}.values())
    return int(records[-1]["iteration"])


def _check_one_run(folder: Path, result: Mapping[str, Any] | None, logs: Mapping[str, Sequence[charts.Record]]) -> None:
    """Refuse a result whose iterations are not those of the logs, where all phases have one."""
    iterations = None if result is None else result.get("iterations")
    ends = sum(map(_iterations, logs.values()))
    whole = all(phase in logs for phase, place in _PHASES.items() if (folder / place).is_dir())
    if iterations is not None and (ends > iterations or (whole and ends < iterations)):
        raise ValueError(
            f"{folder} holds files of two runs: its logs end after {ends:,} iterations, and {RESULT} tells of "
            f"{iterations:,}"
        )


def _label_levels(folder: Path, model: SavedModel) -> list[tuple[str, list[LevelRow]]]:
    """Of each file that `evaluate --by-level --json` wrote here its name and rows."""
    ours = {RECIPE, RESULT, ROW, TABLE}
    paths = [path for path in _files(folder, ["*.json"]) if path.name not in ours]
    return [(path.name, rows) for path in paths if (rows := read_label_levels(path, model))]


def recipe_of(run: RunReport) -> Recipe:
    """The recipe that a run left. ValueError: there is none, or this version does not take it."""
    return _recipe_in_current_terms(dict(run.recipe), str(run.folder / RECIPE))


def _recipe_in_current_terms(values: dict[str, Any], where: str) -> Recipe:
    if not all(isinstance(values.get(section), dict) for section in ("model", "blocks", "data", "train")):
        raise ValueError(f"{where} is not a valid recipe: it lacks sections")
    return parse_recipe(in_current_terms(values), where)


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file() or (folder / LOG).is_file()


def _runs_below(folder: Path) -> list[Path]:
    """Runs of a comparison (a folder each) or an ablation (a folder each value and seed), the oldest first."""
    recipes = [path for pattern in (f"*/{RECIPE}", f"*/*/{RECIPE}") for path in folder.glob(pattern)]
    return [path.parent for path in sorted(recipes, key=lambda path: (path.stat().st_mtime, path))]


def _name(folder: Path) -> str:
    return folder.resolve().name or str(folder)


def _saved_blocks(folder: Path) -> SavedModel | None:
    """A saved model of blocks. ValueError: its index is damaged."""
    if not (folder / INDEX).is_file():
        return None
    with contextlib.suppress(FileNotFoundError):  # it is being replaced
        model = read_saved(folder)
        return model if model.blocks_config.noise is not None else None
    return None


@functools.lru_cache(maxsize=64)
def _outline(plain: str) -> tuple[tuple[int, int] | None, tuple[Partition, NoiseProcess] | None]:
    """Of a recipe: steps and number of the units, and partition and noise of the blocks, where they are known."""
    with contextlib.suppress(ValueError, OSError, ImportError):
        experiment = Experiment(_recipe_in_current_terms(json.loads(plain), RECIPE))
        recipe, model = experiment.recipe, experiment.outline
        units, _ = units_of(model, recipe.train.blocks)
        length = recipe.train.steps
        if length is None and (count := recipe.data.count_examples().count) is not None:
            length = recipe.train.unit_steps(count)
        steps = None if length is None else (length, len(units))
        if isinstance(model, DiffusionBlocks) and recipe.fit is None:  # else its levels are fitted first
            return steps, (model.partition, model.noise)
        return steps, None
    return None, None


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a run that match, without links that lead out of it; the newest of those drawn while it trained."""
    inside = folder.resolve()
    older = sorted(folder.glob(DRAWN_IN_TRAINING))[:-_MOST_DRAWN]
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path not in older]
    return [path for path in paths if path.is_file() and path.resolve().is_relative_to(inside)][:_MOST_FILES]


def _table(folder: Path, values: Mapping[str, Any], runs: Sequence[RunReport]) -> TableReport:
    """The rows as they were printed, one for each seed, and their means where there are several."""
    kinds = {str((run.recipe.get("evaluate") or {}).get("kind")) for run in runs}
    task = TASKS[kind] if len(kinds) == 1 and (kind := kinds.pop()) in TASKS else None
    name = "" if task is None else task.score
    rows: list[dict[str, Any]] = []
    scores: list[Score] = []
    by_key: dict[str, list[dict[str, Any]]] = {}
    several = len({row.get("seed") for row in values["rows"]}) > 1
    for row in values["rows"]:
        line = dict(_scalars(row)) if task is None else _of(folder, row, columns, task, row)
        label = row["key"] + (f", seed {row['seed']}" if several else "")
        line.pop("name", None)
        rows.append({"row": label, **line})
        by_key.setdefault(row["key"], []).append(row)
        scores.append(_score(folder, label, row, name, "standard_error"))
    means: list[dict[str, Any]] = []
    if several and task is not None:
        about, means = _of(folder, values["rows"][0], means_over_seeds, task, by_key, several=True)
        scores = [_score(folder, mean["key"], mean, name, "spread") for mean in about]
    return TableReport(_name(folder), rows, name, scores, values, values.get("finished", True), means)


def _of(folder: Path, row: Mapping[str, Any], function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a task makes of rows. ValueError: it cannot read them."""
    try:
        return function(*arguments, **options)
    except (KeyError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        about = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder / TABLE} is damaged, as in row {row['key']}: {about}") from None


def _score(folder: Path, label: str, row: Mapping[str, Any], name: str, error_name: str) -> Score:
    value, error = row.get(name), row.get(error_name)
    for number in (value, error):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(f"{folder / TABLE} is damaged: of row {label} a score is {number!r}, no number")
    return Score(label, value, error)


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in row.items() if not isinstance(value, dict | list))


def _with_memory(runs: Sequence[RunReport], rows: Sequence[Mapping[str, Any]]) -> list[RunReport]:
    """Runs with the memory that the row of their name measured; those of the table in its order, then the others."""
    memory = {row["key"]: _kinds(row["memory"]) for row in rows if "memory" in row}
    order = {row["key"]: place for place, row in enumerate(rows)}
    with_memory = [run if run.memory is not None else replace(run, memory=memory.get(run.folder.name)) for run in runs]
    return sorted(with_memory, key=lambda run: order.get(run.folder.name, len(order)))


def _kinds(step: Mapping[str, Any]) -> dict[str, int]:
    names = {"parameters": "parameters", "optimizer": "optimizer", "ema": "ema"}
    names["transient"] = "gradients, activations, batch"
    return {name: step[key] for key, name in names.items()}
