"""How far a run is, read off its folder from another process: a row for each phase, block or member."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..common.files import lock_holder
from ..reports.charts import Record
from ..reports.tables import format_bytes, format_duration, format_table
from ..training import units_of
from ..training.run_log import LOG
from .experiment import Experiment
from .parts import is_in_parts, missing_parts, parts_of
from .recipe import Recipe
from .recipe_changes import fit_recipe, trunk_recipe
from .run import PARTS, RESULT, TABLE, has_trunk
from .run_files import read_log
from .run_folder import read_runs, recipe_of

State = Literal["finished", "running", "stopped", "waiting"]


@dataclass(frozen=True)
class UnitStatus:
    """How far one unit of a run is.

    Attributes:
        unit: its name: `fit`, `trunk`, `block 0`, `member 0`, `end-to-end`.
        state: `finished`; `running` while a process trains it; `stopped` before its end; `waiting`, not begun.
        step, steps: done and in all; None: not known.
        loss: mean of the last records.
        seconds_left: of its training by its last speed; None unless it runs.
        seconds_since: the last sign of life; None: there was none.
        peak_bytes: most memory that its tensors took on its GPU; None on a CPU.
        device_bytes: memory in use on that GPU by the last record, as `nvidia-smi` counts it; None on a CPU.
        host, process: where it trains, or trained last.
    """

    unit: str
    state: State
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    seconds_since: float | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    host: str | None = None
    process: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        folder: of the run.
        units: in the order in which they train.
        process: who works in the folder; None: nobody.
        finished: whether it is trained, saved and evaluated.
    """

    folder: Path
    units: Sequence[UnitStatus]
    process: str | None
    finished: bool

    @property
    def running(self) -> bool:
        """Whether any process works on it."""
        return self.process is not None or any(unit.state == "running" for unit in self.units)

    @property
    def missing(self) -> list[str]:
        """Units that are not finished; `model and result` where only these are not there."""
        units = [unit.unit for unit in self.units if unit.state != "finished"]
        return units or ([] if self.finished else ["model and result"])

    @property
    def seconds_left(self) -> float | None:
        """Of the units that run now, by the slowest."""
        return max((unit.seconds_left for unit in self.units if unit.seconds_left is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "folder": str(self.folder),
            "finished": self.finished,
            "running": self.running,
            "process": self.process,
            "missing": self.missing,
            "seconds_left": self.seconds_left,
            "units": [dataclasses.asdict(unit) for unit in self.units],
        }


def read_status(folder: Path) -> RunStatus:
    """Read how far a run is; nothing is written.

    Args:
        folder: of a run of `train`, finished or not.

    Raises:
        ValueError: no run, a comparison or an ablation, or a file that is damaged.
    """
    reports, _ = read_runs([folder])
    if reports[0].folder != folder or (folder / TABLE).is_file():
        names = ", ".join(str(report.folder) for report in reports[:8])
        raise ValueError(f"{folder} holds a comparison or an ablation: give one of its runs: {names}")
    recipe = recipe_of(reports[0])
    experiment = Experiment(recipe)
    process = lock_holder(folder)
    phases = [*_phases(experiment, folder, process)]
    of_units = process if all(phase.state == "finished" for phase in phases) else None  # they wait for the phases
    units = [*phases, *_units(experiment, folder, of_units, finished=reports[0].finished)]
    return RunStatus(folder, units, process, reports[0].finished)


def status_table(status: RunStatus) -> str:
    """The units as a text table."""

    def duration(seconds: float | None) -> str | None:
        return None if seconds is None else format_duration(seconds)

    return format_table(
        [
            {
                "unit": unit.unit,
                "state": unit.state,
                "steps": f"{unit.step:,} / {'?' if unit.steps is None else f'{unit.steps:,}'}",
                "loss": None if unit.loss is None else f"{unit.loss:.4g}",
                "left": duration(unit.seconds_left),
                "last sign": None if unit.seconds_since is None else f"{duration(unit.seconds_since)} ago",
                "peak": None if unit.peak_bytes is None else format_bytes(unit.peak_bytes),
                "GPU": None if unit.device_bytes is None else format_bytes(unit.device_bytes),
                "host": unit.host,
            }
            for unit in status.units
        ]
    )


def _phases(experiment: Experiment, folder: Path, process: str | None) -> Iterator[UnitStatus]:
    """The fit and the trunk, which train before the blocks."""
    recipe = experiment.recipe
    changes: dict[str, Callable[[Recipe], Recipe]] = {}
    if recipe.fit is not None and experiment.of_method_blocks:
        changes["fit"] = fit_recipe
    if has_trunk(experiment):
        changes["trunk"] = trunk_recipe
    later = any((folder / name).exists() for name in (PARTS, LOG))
    for name, change in changes.items():
        complete = later or (name == "fit" and "trunk" in changes and (folder / "trunk").exists())
        phase = _status(
            name, read_log(folder / name), folder / name, _steps(change(recipe)), process, finished=complete
        )
        yield phase
        process = process if phase.state == "finished" else None  # the next waits for it


def _units(experiment: Experiment, folder: Path, process: str | None, *, finished: bool) -> Iterator[UnitStatus]:
    """The blocks, members, or the whole model."""
    recipe, steps = experiment.recipe, _steps(experiment.recipe)
    patience = None if recipe.train.early_stopping is None else recipe.train.early_stopping.patience
    if is_in_parts(folder):
        parts = parts_of(experiment, folder)
        missing = missing_parts(parts)
        for part in parts:
            records, holder = read_log(part.folder), lock_holder(part.folder)
            complete = part not in missing
            yield _status(part.name, records, part.folder, steps, holder, finished=complete, patience=patience)
        return
    units, _ = units_of(experiment.outline, recipe.train.blocks)
    records = read_log(folder)
    for unit in units:
        own = [record for record in records if record["unit"] == unit.name]
        status = _status(unit.name, own, folder, steps, process, finished=finished, patience=patience)
        if records and status.seconds_left is not None and steps is not None:  # all units train in turns
            left = (steps * len(units) - records[-1]["iteration"]) / records[-1]["iterations_per_second"]
            status = dataclasses.replace(status, seconds_left=left)
        yield status


def _status(
    unit: str,
    records: Sequence[Record],
    folder: Path,
    steps: int | None,
    process: str | None,
    *,
    finished: bool,
    patience: int | None = None,
) -> UnitStatus:
    """What the log of a unit says; with a patience it may have ended before its last step."""
    last: Record = records[-1] if records else {"step": 0}
    ended_early = patience is not None and last.get("since_best", 0) >= patience
    complete = finished or ended_early or (bool(records) and last["step"] == steps)
    state: State = "finished" if complete else "running" if process else "stopped" if records else "waiting"
    speed, left = last.get("iterations_per_second"), None
    if state == "running" and records and speed and steps is not None:
        left = max(0, steps - last["step"]) / speed
    return UnitStatus(
        unit,
        state,
        last["step"],
        steps,
        last.get("loss"),
        left,
        _seconds_since(folder),
        last.get("peak_bytes"),
        last.get("device_bytes"),
        last.get("host"),
        process,
    )


def _steps(recipe: Recipe) -> int | None:
    """Steps of each unit; None where the data that epochs are of are not counted cheaply."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    with contextlib.suppress(ValueError, OSError, ImportError):
        count = recipe.data.count_examples().count
        return None if count is None else recipe.train.unit_steps(count)
    return None


def _seconds_since(folder: Path) -> float | None:
    """How long ago a file of a run was written."""
    files = (folder / LOG, folder / RESULT, folder / "checkpoints", folder / "model", folder / ".lock")
    times = []
    for file in files:
        with contextlib.suppress(OSError):  # it goes meanwhile
            times.append(file.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if times else None
