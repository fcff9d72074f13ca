"""The page of runs: one HTML file, without scripts and without anything fetched, that holds all that runs left."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ..common.files import whole_file
from ..common.formats import leaves
from ..core.partition import Partition
from ..evaluation.accuracy import is_vote
from ..evaluation.diagnostics import LevelRow
from ..noise import NoiseProcess
from . import charts
from .image_tables import distances_by_calls
from .tables import format_bytes, format_duration

_ABBREVIATIONS = ("nll", "ece", "fd", "fid", "bpc")

#: Entries of a file of results that say how it was made.
_HEADER = ("command", "device", "torch", "commit")
_MOST_PICTURE_BYTES = 4 * 2**20
_MOST_TEXT = 6000  # characters of a file of texts


@dataclass(frozen=True)
class RunReport:
    """What a run left, as it is shown.

    Attributes:
        name: of the run, unique on the page.
        recipe: JSON values.
        logs: records of `log.jsonl`, by phase: `fit`, `trunk`, `run`.
        result: the file of its result; None until the run has ended.
        finished: whether it has ended.
        unit_steps: steps of each unit of the phase `run`, and how many units there are; None where that is not known.
        side_by_side: whether these units train apart, several at a time.
        partition, noise: of its blocks; None of models without blocks, or where they are not known yet.
        memory: bytes of a training step by kind; they add up to its peak.
        memory_source: `measured` or `predicted`.
        levels: (name of a file, what it says of each block by noise level), of classifiers.
        pictures, texts: files of samples and figures.
        folder: what the names of the files are relative to.
    """

    name: str
    folder: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, Sequence[charts.Record]] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    finished: bool = False
    unit_steps: tuple[int, int] | None = None
    side_by_side: bool = False
    partition: Partition | None = None
    noise: NoiseProcess | None = None
    memory: Mapping[str, int] | None = None
    memory_source: str = "measured"
    levels: Sequence[tuple[str, Sequence[LevelRow]]] = ()
    pictures: Sequence[Path] = ()
    texts: Sequence[Path] = ()


@dataclass(frozen=True)
class Score:
    """The score of a row, with its standard error, or deviation over seeds, where that is known; None: it has none."""

    row: str
    value: float | None
    error: float | None = None

    @property
    def low(self) -> float:
        """One error below."""
        return (self.value or 0.0) - (self.error or 0.0)

    @property
    def high(self) -> float:
        """One error above."""
        return (self.value or 0.0) + (self.error or 0.0)


@dataclass(frozen=True)
class TableReport:
    """The table of a comparison or an ablation.

    Attributes:
        name: of its folder.
        rows: as they are printed.
        score: what the task's score is called; "" for none.
        scores: of each row, or of each mean.
        values: JSON values of the file: how it was made.
        finished: whether all rows are there.
        means: over several seeds, as they are printed.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    score: str
    scores: Sequence[Score]
    values: Mapping[str, Any]
    finished: bool
    means: Sequence[Mapping[str, Any]] = ()


def write_page(
    path: Path, runs: Sequence[RunReport], tables: Sequence[TableReport] = (), *, refresh: int | None = None
) -> None:
    """Write the page of runs, whole or not at all; its folder is made.

    Args:
        path: the HTML file.
        runs: in the order in which they are shown.
        tables: of comparisons and ablations.
        refresh: seconds after which a browser reads the file again; None: never.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("diffusionblocks", "reports"),
        autoescape=True,  # whatever runs are called, and whatever they wrote, is text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "bytes": format_bytes, "duration": format_duration}
    first = next((run for run in runs if run.partition is not None), runs[0] if runs else None)
    with_result = [run for run in runs if run.result is not None]
    text = environment.get_template("page.html").render(
        runs=[{"open": run is first or not run.finished, **_run_values(run)} for run in runs],
        tables=[_table_values(table) for table in tables],
        results=_results(with_result, tables),
        votes=_votes(with_result) if tables else [],
        calls=_calls(with_result) if tables else [],
        memory=_memory(runs),
        times=[_times(run) for run in runs if run.logs],
        differences=recipe_differences(runs),
        environments=_environments(runs, tables),
        finished=all_ended(runs, tables),
        refresh=refresh,
        now=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # half a character, as JSON can hold it


def all_ended(runs: Sequence[RunReport], tables: Sequence[TableReport]) -> bool:
    """Whether all runs, and all rows of tables, are there."""
    return all(run.finished for run in runs) and all(table.finished for table in tables)


def recipe_differences(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Fields, dotted, in which the recipes of runs differ, with each run's value; what a recipe lacks is None."""
    flat = [dict(leaves(run.recipe)) for run in runs]
    names = dict.fromkeys(name for values in flat for name in values)
    rows = ({"field": name, "values": [values.get(name) for values in flat]} for name in names)
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


# ---- parts of the page -----------------------------------------------------------------------------------------


def _run_values(run: RunReport) -> dict[str, Any]:
    """What the page shows of one run."""
    levels = [row["by_level"] for row in _rows(run) if row.get("by_level")]
    logs = [(phase, charts.loss_chart(records)) for phase, records in run.logs.items()]
    return {
        "name": run.name,
        "class": run.recipe.get("model", {}).get("type"),
        "method": run.recipe.get("method"),
        "state": _state(run),
        "finished": run.finished,
        "progress": _progress(run),
        "losses": [(phase, svg) for phase, svg in logs if svg],
        "partition": None if run.partition is None or run.noise is None else _partition(run.partition, run.noise),
        "levels": charts.level_chart(levels[0]) if levels else "",
        "label_levels": [_label_levels(run, name, rows) for name, rows in run.levels],
        "pictures": [picture for path in run.pictures if (picture := _picture(path, run.folder))],
        "texts": [_text(path, run.folder) for path in run.texts],
        "recipe": yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True),
    }


def _label_levels(run: RunReport, name: str, rows: Sequence[LevelRow]) -> dict[str, Any]:
    """A file of `evaluate --by-level`: its chart, where the blocks are known, and its rows."""
    has_blocks = run.partition is not None and run.noise is not None
    return {
        "name": name,
        "chart": charts.label_level_chart(rows, run.partition, run.noise) if has_blocks else "",  # type: ignore[arg-type]
        "rows": [{_heading(key): value for key, value in row.to_dict().items()} for row in rows],
    }


def _state(run: RunReport) -> str:
    if run.finished:
        return "ended"
    progress = _progress(run)
    if progress and all(part["share"] >= 1 for part in progress):
        return "trained, not evaluated yet"
    return "training" if run.logs.get("run") else "begun"


def _progress(run: RunReport) -> list[dict[str, Any]]:
    """How far each unit is, where the length of its training is known."""
    if run.unit_steps is None:
        return []
    steps, count = run.unit_steps
    last = {str(record["unit"]): record for record in run.logs.get("run", ())}
    units = [
        {"unit": unit, "step": record["step"], "steps": steps, "share": min(1.0, record["step"] / steps)}
        for unit, record in sorted(last.items())
    ]
    return units + [{"unit": "not begun", "step": 0, "steps": steps, "share": 0.0}] * max(0, count - len(units))


def _partition(partition: Partition, noise: NoiseProcess) -> dict[str, Any]:
    rows = []
    for block in range(partition.num_blocks):
        layers = partition.layer_range(block)
        rows.append(
            {
                "block": block,
                "layers": f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0]),
                f"owns {noise.symbol}": "{:.4g} - {:.4g}".format(*partition.interval(block)),
                "trains on": "{:.4g} - {:.4g}".format(*partition.training_interval(block)),
                "probability": f"{noise.share(partition.interval(block)):.3f}",
            }
        )
    return {"chart": charts.partition_chart(partition, noise), "rows": rows}


def _rows(run: RunReport) -> list[Mapping[str, Any]]:
    return list(run.result.get("rows", ())) if run.result is not None else []


def _results(runs: Sequence[RunReport], tables: Sequence[TableReport]) -> list[dict[str, Any]]:
    """Rows of runs that no table has, one table for each kind of row, of single values: what is `by_level` is drawn."""
    if tables:
        return []
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for run in runs:
        for row in _rows(run):
            values = {name: value for name, value in row.items() if not isinstance(value, (list, tuple, dict))}
            line = {_heading(name): _number(value) for name, value in values.items()}
            kinds.setdefault(tuple(line), []).append({"run": run.name, **line})
    return [{"rows": rows} for rows in kinds.values()]


def _votes(runs: Sequence[RunReport]) -> list[dict[str, Any]]:
    """What the blocks of each run say by each rule, of which a table shows one."""
    return [{"run": run.name, **row} for run in runs for row in _rows(run) if is_vote(row)]


def _calls(runs: Sequence[RunReport]) -> list[dict[str, str]]:
    """Distance against network calls, where images of a run were sampled with several settings."""
    rows = {run.name: [row for row in _rows(run) if row.get("fd_train") is not None] for run in runs}
    return distances_by_calls({name: settings for name, settings in rows.items() if settings})


def _table_values(table: TableReport) -> dict[str, Any]:
    """What the page shows of a table: its rows, and marks of their scores."""
    marks = [score for score in table.scores if score.value is not None]
    lowest = min((score.low for score in marks), default=0.0)
    highest = max((score.high for score in marks), default=0.0)
    if all(score.low == score.high for score in marks):  # without an uncertainty: bars from zero
        lowest = min(0.0, lowest)
    span = highest - lowest or 1.0
    return {
        "name": table.name,
        "rows": table.rows,
        "means": table.means,
        "marks": [
            {
                "label": score.row,
                "text": _number(score.value),
                "place": (score.value - lowest) / span,
                "low": (score.low - lowest) / span,
                "width": (score.high - score.low) / span,
            }
            for score in marks
            if score.value is not None
        ],
        "score": _heading(table.score),
        "ends": [_number(lowest), _number(highest)],
        "finished": table.finished,
    }


def _memory(runs: Sequence[RunReport]) -> dict[str, Any] | None:
    """Bars of bytes by kind, all on one scale."""
    with_memory = [run for run in runs if run.memory]
    if not with_memory:
        return None
    kinds = dict.fromkeys(kind for run in with_memory for kind, value in (run.memory or {}).items() if value)
    highest = max(sum((run.memory or {}).values()) for run in with_memory)
    bars = []
    for run in with_memory:
        values = run.memory or {}
        parts = [(index, kind, values.get(kind, 0)) for index, kind in enumerate(kinds)]
        peak = sum(values.values())
        records = [record for phase in run.logs.values() for record in phase]
        device = max((record.get("device_bytes") or 0 for record in records), default=0)
        bars.append(
            {"run": run.name, "parts": parts, "peak": peak, "scale": highest, "source": run.memory_source}
            | {"device": device}
        )
    return {"kinds": list(kinds), "bars": bars}


def _times(run: RunReport) -> dict[str, Any]:
    """Iterations and seconds; of a run that has not ended, how long it will train by its last speed."""
    records = [record for phase in run.logs.values() for record in phase]
    result = run.result or {}
    speed = records[-1].get("iterations_per_second") if records else None
    ends = [phase[-1]["iteration"] for phase in run.logs.values() if phase]
    return {
        "run": run.name,
        "iterations": result.get("iterations", sum(ends)),
        "speed": speed,
        "training": result.get("train_seconds"),
        "evaluation": result.get("evaluation_seconds"),
        "left": _seconds_left(run),
    }


def _seconds_left(run: RunReport) -> float | None:
    """How long a run that has not ended will train by its last speed.

    Of units that train side by side: as long as the slowest that has begun, or as all that is left takes at the speed
    of these together.
    """
    records = run.logs.get("run")
    if run.finished or run.unit_steps is None or not records:
        return None
    steps, count = run.unit_steps
    if not run.side_by_side:
        speed = records[-1].get("iterations_per_second")
        return float(max(0, steps * count - records[-1]["iteration"]) / speed) if speed else None
    newest = {record["unit"]: record for record in records}
    left = {unit: max(0, steps - record["step"]) for unit, record in newest.items()}
    speeds = {unit: newest[unit].get("iterations_per_second") for unit, missing in left.items() if missing}
    waiting = max(0, count - len(newest)) * steps
    if not any(speeds.values()):
        return None if waiting or any(left.values()) else 0.0
    slowest = max(left[unit] / speed for unit, speed in speeds.items() if speed)
    together = (sum(left.values()) + waiting) / sum(speed for speed in speeds.values() if speed)
    return float(max(slowest, together))


def _environments(runs: Sequence[RunReport], tables: Sequence[TableReport]) -> list[dict[str, Any]]:
    """Command, device, version of torch and commit, each once, with the runs that they made."""
    sources = [(table.name, table.values) for table in tables] + [(run.name, run.result or {}) for run in runs]
    grouped: dict[tuple[Any, ...], list[str]] = {}
    for name, values in sources:
        header = tuple(values.get(part) for part in _HEADER)
        if any(header):
            grouped.setdefault(header, []).append(name)
    return [{"runs": names, **dict(zip(_HEADER, header, strict=True))} for header, names in grouped.items()]


def _picture(path: Path, folder: Path) -> dict[str, Any] | None:
    """A PNG as a data URI; None of a file that is no picture, or a very large one."""
    if path.stat().st_size > _MOST_PICTURE_BYTES:
        return None
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"name": path.relative_to(folder).as_posix(), "source": source, "width": width, "height": height}


def _text(path: Path, folder: Path) -> dict[str, str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MOST_TEXT + 1)
    more = f"\n... more in {path.name}" if len(text) > _MOST_TEXT else ""
    return {"name": path.relative_to(folder).as_posix(), "text": text[:_MOST_TEXT] + more}


def _heading(key: str) -> str:
    """A key of a row as the head of a column."""
    return " ".join(word.upper() if word in _ABBREVIATIONS else word for word in key.split("_"))


def _number(value: Any) -> str:
    """A value of a table as text; None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_number(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_number(part) for part in value)
    return str(value)
