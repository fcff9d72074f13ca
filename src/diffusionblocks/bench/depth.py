"""`bench depth`: the deepest model that trains within a budget of memory, end to end and block by block.

The peak grows linearly with the number of layers, so two models that fit tell where the end is; the search tries there,
and is done when a depth fits and the next one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..reports.tables import format_bytes
from .methods import Spec
from .rows import ordered, prediction, rows_in, with_method, write_table
from .server import Measurer

#: Deepest model that is tried.
_DEEPEST = 4096

Trial = dict[str, Any]


def largest_depth(
    fits: Callable[[int], Trial], stride: int, budget: int, guess: int | None = None
) -> tuple[int, list[Trial]]:
    """The largest multiple of `stride` that fits, and all trials.

    Args:
        fits: tries a depth; the trial has `depth`, `fits`, and where it fits `peak_bytes`.
        stride: depths are multiples of it.
        budget: bytes.
        guess: where to try first.

    Returns:
        The depth, 0 if not even `stride` fits; and the trials in their order.
    """
    trials: list[Trial] = []
    fitting, failing = 0, _DEEPEST // stride * stride + stride
    while failing - fitting > stride:
        depth = _next(trials, fitting, failing, stride, budget, guess)
        trials.append(fits(depth))
        if trials[-1]["fits"]:
            fitting = depth
        else:
            failing = depth
    return fitting, trials


def _next(trials: list[Trial], fitting: int, failing: int, stride: int, budget: int, guess: int | None) -> int:
    points = sorted((t["depth"], t["peak_bytes"]) for t in trials if t["fits"])
    if len(trials) > 8:
        depth = (fitting + failing) // 2  # the peak is no line, then
    elif not trials:
        depth = 2 * stride if guess is None else guess
    elif len(points) > 1:
        depth = line_end(points[-2], points[-1], budget)
    elif points:  # through the origin, as if nothing but layers took memory: not too deep, then
        depth = line_end((0, 0), points[0], budget)
    else:
        depth = failing // 2
    return min(max(depth // stride * stride, fitting + stride), failing - stride)


def line_end(a: tuple[int, int], b: tuple[int, int], budget: int) -> int:
    """The depth at which the line through two (depth, bytes) reaches the budget; the deepest one, if it never does."""
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return _DEEPEST if slope <= 0 else min(_DEEPEST, int(b[0] + (budget - b[1]) / slope))


def depth(
    base: Spec, blocks: int, out: Path, limit: float, measurer: Measurer, *, predict: bool = True
) -> list[dict[str, Any]]:
    """Search end to end and with one block resident, each plainly and with all memory optimisations; write and return
    the rows.

    Args:
        base: model, device and budget.
        blocks: B; the depths of blocks are multiples of it.
        out: the JSON file, written after every search; searches that it has already are kept.
        limit: seconds for each trial.
        measurer: tries each.
        predict: begin where the planner says that the end is.
    """
    assert base.budget is not None
    specs = [
        with_method(base, f"{method}{suffix}", count, task="fits")
        for suffix in ("", "-all-optimisations")
        for method, count in (("end-to-end", 1), ("resident-active", blocks))
    ]
    rows = rows_in(out)
    for spec in specs:
        if spec.key in rows:
            print(f"{spec.key}: searched before", flush=True)
            continue
        rows[spec.key] = search(measurer, spec, limit, guess_of(spec) if predict else None)
        write_table(out, ordered(rows, specs), budget_bytes=base.budget)
    return [rows[spec.key] for spec in specs]


def search(measurer: Measurer, spec: Spec, limit: float, guess: int | None = None) -> dict[str, Any]:
    """The row of one method: `layers` of the deepest model within `spec.budget`, and the trials that found it."""
    assert spec.budget is not None
    about = {"key": spec.key, "model": spec.model, "method": spec.method, "blocks": spec.blocks, "task": "depth"}

    def fits(layers: int) -> Trial:
        answer = measurer.ask(with_method(spec, spec.method, spec.blocks, depth=layers), limit)
        if "error" in answer and answer["error"] != "out of memory":
            raise _NoAnswer(f"at {layers} layers: {answer['error']}")
        names = ("fits", "peak_bytes", "reserved_bytes", "host_bytes", "device", "detail", "process_seconds")
        trial = {"depth": layers, "fits": False} | {name: answer[name] for name in names if name in answer}
        size = format_bytes(trial["peak_bytes"]) if "peak_bytes" in trial else "out of memory"
        print(f"{spec.key}: {layers} layers {'fit' if trial['fits'] else 'do not fit'} ({size})", flush=True)
        return trial

    try:
        layers, trials = largest_depth(fits, spec.blocks, spec.budget, guess)
    except _NoAnswer as error:
        return about | {"guess": guess, "error": str(error)}
    device = next((trial["device"] for trial in trials if "device" in trial), None)
    return about | {"layers": layers, "guess": guess, "trials": trials} | ({"device": device} if device else {})


class _NoAnswer(RuntimeError):
    """A trial ended without an answer."""


def guess_of(spec: Spec) -> int | None:
    """Where the planner says the end is."""
    points = []
    for factor in (2, 4):
        layers = max(4, spec.blocks) * factor // spec.blocks * spec.blocks
        row = prediction(with_method(spec, spec.method, spec.blocks, depth=layers))
        if "predicted_bytes" not in row:
            return None
        points.append((layers, int(row["predicted_bytes"])))
    return line_end(points[0], points[1], spec.budget or 0)
