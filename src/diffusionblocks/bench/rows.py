"""Tables of measurements: rows are measured one after the other, each in its process, and written as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.formats import read_json
from ..reports.results import joint_header, results_header, write_results
from ..reports.tables import format_bytes, format_table
from .bench_models import examples_of, recipe_of
from .methods import FORMER_NAMES, METHODS, Spec, current_name
from .server import Measurer


def check_device(device: str) -> None:
    """Refuse a benchmark on a GPU where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "the benchmarks measure a CUDA GPU, and torch sees none; to try them at toy size, add --device cpu --tiny"
        )


def shard(rows: Sequence[Spec], text: str) -> list[Spec]:
    """Every n-th row from the i-th on, given as `i/n`: several machines or GPUs share the work.

    Raises:
        ValueError: not of that form.
    """
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 0 <= int(first) < int(count)):
        raise ValueError(f"--shard wants i/n with 0 <= i < n, for example 0/2; got {text!r}")
    return list(rows)[int(first) :: int(count)]


def measure_all(specs: Sequence[Spec], out: Path, limit: float, measurer: Measurer) -> list[dict[str, Any]]:
    """Measure every specification that `out` does not hold yet, and write it after each.

    Args:
        specs: what to measure; their order is that of the rows.
        out: the JSON file. Rows that an earlier run left there without an error are kept.
        limit: seconds for each.
        measurer: measures each.

    Returns:
        The rows of `specs`, and others that the file had.
    """
    rows = rows_in(out)
    before = set(rows)
    for number, spec in enumerate(specs, start=1):
        if spec.key in before:
            print(f"[{number}/{len(specs)}] {spec.key}: measured before", flush=True)
            continue
        about = {"key": spec.key, "model": spec.model, "method": spec.method, "blocks": spec.blocks}
        answer = measurer.ask(spec, limit)
        rows[spec.key] = about | {"task": spec.task} | answer | {"spec": spec.to_dict()}
        print(f"[{number}/{len(specs)}] {spec.key}: {summary(answer)}", flush=True)
        write_table(out, ordered(rows, specs))
    write_table(out, ordered(rows, specs))
    return ordered(rows, specs)


def rows_in(out: Path) -> dict[str, dict[str, Any]]:
    """The rows without an error that an earlier run left in its file, by their keys."""
    if not out.exists():
        return {}
    rows = (in_current_terms(row) for row in read_json(out)["rows"])
    return {row["key"]: row for row in rows if "error" not in row}


def in_current_terms(row: dict[str, Any]) -> dict[str, Any]:
    """A row under today's names, where an older version wrote it: methods, tasks, and fields."""
    key = row["key"].replace("task=dwell", "task=switching")
    for former, name in FORMER_NAMES.items():
        key = key.replace(former, name)
    row = row | {"key": key, "method": current_name(row["method"])}
    if row.get("task") == "dwell":
        row["task"] = "switching"
    if "dwell" in row:
        row["steps_per_switch"] = row.pop("dwell")
    if "dwells" in row:
        entries = row.pop("dwells")
        row["switching"] = [{"steps_per_switch": e["dwell"], "step_ms": e["step_ms"]} for e in entries]
    if "spec" in row:
        row["spec"] = Spec.from_dict(row["spec"]).to_dict()
    return row


def ordered(rows: dict[str, dict[str, Any]], specs: Sequence[Spec]) -> list[dict[str, Any]]:
    """The rows of the specifications, as far as they are there, and then the others."""
    first = [spec.key for spec in specs if spec.key in rows]
    return [rows[key] for key in [*first, *(key for key in rows if key not in set(first))]]


def summary(answer: dict[str, Any]) -> str:
    """A measurement in a few words."""
    if "error" in answer:
        return str(answer["error"])
    parts = []
    if "peak_bytes" in answer:
        parts.append(f"peak {format_bytes(answer['peak_bytes'])}")
    for name in ("step_ms", "trainer_ms", "bare_ms"):
        if name in answer:
            parts.append(f"{name.removesuffix('_ms')} {answer[name]['median']:.2f} ms")
    if "captured_error" in answer:
        parts.append(f"captured: {answer['captured_error'].splitlines()[0]}")
    return ", ".join(parts)


def with_predictions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what the planner says of them now, which takes no GPU."""
    return [row | prediction(Spec.from_dict(row["spec"])) for row in rows]


def prediction(spec: Spec) -> dict[str, Any]:
    """What the planner says the row needs; nothing for alternatives, whose optimizers it does not know."""
    if METHODS[spec.method].kind == "alternative" or spec.task not in ("row", "fits"):
        return {}
    try:
        from ..planning import predict  # brings torch's compiler, whose inner parts change

        recipe = recipe_of(spec)
        ledger = predict(recipe, num_examples=examples_of(recipe))
    except Exception as error:  # what was measured must not be lost to its prediction
        return {"prediction_error": f"{type(error).__name__}: {error}"}
    return {"predicted_bytes": ledger.peak, "predicted": ledger.to_dict()}


def write_table(out: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write rows with the command, device and commit that made them; does not touch the GPU."""
    devices = sorted({row["device"] for row in rows if "device" in row})
    write_results(out, rows, results_header(", ".join(devices)), **more)


def gather(parts: Sequence[Path], out: Path, *, predict: bool = False) -> list[dict[str, Any]]:
    """Join the files of shards; of a row that several have, one without an error.

    Args:
        parts: the files.
        out: the joined file.
        predict: put the planner's predictions beside the rows (again).
    """
    files = [read_json(path) for path in parts]
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for row in map(in_current_terms, file["rows"]):
            if row["key"] not in rows or "error" in rows[row["key"]]:
                rows[row["key"]] = row
    models = list(dict.fromkeys(row["model"] for row in rows.values()))
    methods = list(METHODS)
    # As one run would have had them: by model, then B, then method.
    whole = sorted(rows.values(), key=lambda r: (models.index(r["model"]), r["blocks"], methods.index(r["method"])))
    if predict:
        whole = with_predictions(whole)
    write_results(out, whole, joint_header(files))
    return whole


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of memory and speed as a text table."""
    lines = []
    for row in rows:
        whole = "error" not in row
        cell = {"model": row["model"], "method": row["method"], "B": row["blocks"]}
        cell |= {"layers": row.get("layers"), "peak": format_bytes(row["peak_bytes"]) if whole else row["error"][:40]}
        predicted = row.get("predicted_bytes")
        cell["predicted"] = None if predicted is None else format_bytes(predicted)
        cell["host"] = format_bytes(row["host_bytes"]) if whole else None
        bus = row.get("bus_bytes_per_step")
        cell["bus a step"] = None if bus is None else format_bytes(round(bus))
        cell["step ms"] = f"{row['step_ms']['median']:.2f}" if whole else None
        captured = row.get("captured_ms")
        cell["captured ms"] = f"{captured['median']:.2f}" if captured else "failed" if "captured_error" in row else None
        cell["switch ms"] = f"{row['switch_ms']:.1f}" if whole and row["switch_ms"] is not None else None
        cell["samples/s"] = f"{row['samples_per_second']:.0f}" if whole else None
        cell["of all layers"] = f"{row['epoch_samples_per_second']:.0f}" if whole else None
        lines.append(cell)
    return format_table(lines) if lines else "no rows"


def with_method(spec: Spec, method: str, blocks: int, **changes: Any) -> Spec:
    """The same measurement of another method."""
    return dataclasses.replace(spec, method=method, blocks=blocks, **changes)
