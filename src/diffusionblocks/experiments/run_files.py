"""What the files of a run hold, checked as they are read: a page shows no number of a damaged file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from ..common.fields import MOST_LAYERS
from ..common.finite import not_finite_entry
from ..common.formats import read_json, validate
from ..core.partition import Partition
from ..core.saved_model import SavedModel
from ..evaluation.accuracy import AccuracyRow, is_vote
from ..evaluation.cross_entropy import Level
from ..evaluation.diagnostics import LevelRow
from ..training.run_log import LOG
from .ablation import ROW
from .run import RESULT, TABLE

#: Nested lists and objects in a file of a run; deeper ones are of no run.
_DEEPEST = 16
_MOST = 2**62
_LARGEST = 3.5e38  # of float32

Count = Annotated[int, Field(ge=0, le=_MOST)]
Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]


class _Strict(BaseModel):
    """Types as they stand there: text is no number. What a schema does not name is allowed."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Record(_Strict):
    """A line of a log."""

    iteration: Count
    unit: Annotated[str, Field(min_length=1)]
    step: Count
    loss: Number
    iterations_per_second: Number | None = None


class _Header(_Strict):
    """How results were made; older files lack it."""

    command: str | None = None
    device: str | None = None
    torch: str | None = None
    commit: str | None = None


class _Sampled(_Strict):
    """A row of generated images: what a page shows of it."""

    calls: Count
    samples: Count
    features: str | None
    fd_train: Number | None
    fd_test: Number | None
    fd_real: Number | None = None
    fd_train_infinity: Number | None = None
    images_per_second: Annotated[Number, Field(ge=0)]


class _Result(_Header):
    """The file of a run's result."""

    rows: list[dict[str, Any]]
    iterations: Count | None = None
    train_seconds: Annotated[Number, Field(ge=0)] | None = None
    evaluation_seconds: Annotated[Number, Field(ge=0)] | None = None

    @field_validator("rows")
    @classmethod
    def _known_kinds(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            if is_vote(row):
                _as(AccuracyRow, row, "vote")
            if row.get("fd_train") is not None:  # generated images
                _as(_Sampled, row, "setting of a sampler")
            for level in _as(list[Level], row.get("by_level") or [], "by_level"):
                if not 0 <= level.block < MOST_LAYERS:
                    raise ValueError(f"by_level has block {level.block}")
        return rows


class _Memory(_Strict):
    """Bytes of a training step by kind."""

    parameters: Count
    optimizer: Count
    ema: Count
    transient: Count
    peak: Count

    @model_validator(mode="after")
    def _adds_up(self) -> _Memory:
        if self.peak != (total := self.parameters + self.optimizer + self.ema + self.transient):
            raise ValueError(f"peak is {self.peak}, and its kinds add up to {total}")
        return self


class _Row(_Strict):
    """A row of a table: what those of all tasks have."""

    key: Annotated[str, Field(min_length=1)]
    name: str
    layers: Count
    blocks: Count
    has_trunk: bool = Field(alias="branched")
    has_fit: bool = Field(alias="fitted")
    iterations: Count
    parameters_trained: Count
    peak_memory_bytes: Count
    seconds: Annotated[Number, Field(ge=0)]
    seed: Count | None = None
    memory: _Memory | None = None

    @model_validator(mode="after")
    def _has_one_peak(self) -> _Row:
        if self.memory is not None and self.memory.peak != self.peak_memory_bytes:
            raise ValueError(f"peak_memory_bytes is {self.peak_memory_bytes}, and memory.peak {self.memory.peak}")
        return self


class _Table(_Header):
    """The file of a comparison's or an ablation's table."""

    rows: list[_Row]
    finished: bool = True

    @field_validator("rows")
    @classmethod
    def _each_once(cls, rows: list[_Row]) -> list[_Row]:
        names = [(row.key, row.seed) for row in rows]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"row {twice[0]} is there twice")
        return rows


class _FinishedRow(_Strict):
    """The file of a row of an ablation."""

    row: _Row


_Values = TypeVar("_Values")


def _as(schema: type[_Values], values: Any, name: str) -> _Values:
    """JSON values as what a function measured. ValueError: they are not; it names the field."""
    try:
        return TypeAdapter(schema).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, (name, *first['loc'])))}: {first['msg']}") from None


def read_values(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run: finite numbers, nested as far as a run nests them. ValueError: it is another."""
    values = read_json(path)
    if _depth(values) > _DEEPEST:
        raise ValueError(f"{path} is damaged: values are nested deeper than any run nests them")
    if (entry := not_finite_entry(values)) is not None:
        raise ValueError(f"{path} is damaged: {entry[0]} is {entry[1]}")
    return values


def read_result(folder: Path) -> dict[str, Any] | None:
    """What a run measured; None: it has not ended. ValueError: the file is damaged."""
    return _read(folder / RESULT, _Result)


def read_table(folder: Path) -> dict[str, Any] | None:
    """The rows of a comparison or an ablation; None: there are none yet. ValueError: the file is damaged."""
    return _read(folder / TABLE, _Table)


def read_row(folder: Path) -> dict[str, Any] | None:
    """The row of an ablation that this run is; None: it is none. ValueError: the file is damaged."""
    values = _read(folder / ROW, _FinishedRow)
    return None if values is None else values["row"]


def _read(path: Path, schema: type[BaseModel]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    values = read_values(path)
    validate(values, schema, f"{path} is damaged")
    return values


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Records of a log, oldest first; a last line that is being written is left out.

    Raises:
        ValueError: a line that no run wrote, or lines in another order; the message names the line.
    """
    path = folder / LOG
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    steps: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not _is_json(line):  # cut off, or nothing
            break
        where = f"{path} is damaged: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} is not JSON") from None
        values = validate(record, _Record, where)
        if records and values.iteration < records[-1]["iteration"]:
            raise ValueError(f"{where} has iteration {values.iteration}, after {records[-1]['iteration']}")
        if values.step <= steps.get(values.unit, -1):
            raise ValueError(f"{where} has step {values.step} of {values.unit}, after {steps[values.unit]}")
        steps[values.unit] = values.step
        records.append(record)
    return records


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_label_levels(path: Path, model: SavedModel | None) -> list[LevelRow]:
    """What `evaluate --by-level --json` wrote of a classifier's blocks; empty: the file holds no levels.

    Args:
        path: the file.
        model: that the run saved; where it is known, the levels must be of it, each of the block that owns it.

    Raises:
        ValueError: the file is damaged, or of other blocks.
    """
    values = read_values(path)
    if "by_level" not in values:
        return []
    of_levels, of_model = (
        values.get("model"),
        None if model is None else model.index.get("sha256"),
    )  # older ones lack it
    if model is not None and None not in (of_levels, of_model) and of_levels != of_model:
        raise ValueError(
            f"{path} is of another model than {model.folder}: measure this one (diffusionblocks evaluate RUN "
            f"--by-level --json {path}), or move the file away"
        )
    try:
        rows = _as(list[LevelRow], values["by_level"], "by_level")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for row in rows:
        if model is not None and not _is_of(row, model.partition):
            raise ValueError(f"{path} is of other blocks than the run's: block {row.block} at level {row.level:g}")
    return rows


def _is_of(row: LevelRow, partition: Partition) -> bool:
    try:
        owner = partition.block_of(row.level)
    except ValueError:  # no block owns it
        return False
    return 0 <= row.block < partition.num_blocks and (owner == row.block) == row.own_level


def _depth(values: Any) -> int:
    """How deep JSON values are nested, level by level: the deepest would exhaust the stack."""
    level, depth = [values], 0
    while level and depth <= _DEEPEST:
        level = [inner for value in level for inner in _inside(value)]
        depth += 1
    return depth


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
