"""`bench depth`: the deepest models that train within budgets of memory, end to end and block by block.

The peak is affine in the number of layers. So the planner says where to try, what is measured there says where the end
is, and a trial there confirms it. Under `resident: active` a trial steps the first block, which is the largest, alone:
the others wait in host memory, whose bytes the planner counts, and which ends the search as the device's does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..experiments.experiment import Experiment
from ..planning.planner import MARGIN
from ..planning.predictor import Predictor
from ..reports.tables import format_bytes, format_table
from .bench_models import recipe_of
from .methods import METHODS, Spec
from .rows import ordered, prediction, rows_in, with_method, write_table
from .server import Measurer

#: Deepest model that is tried.
_DEEPEST = 4096
#: Share of a budget by which the line through two measured peaks must miss it, for a depth to be too deep untried.
_SURE = 0.002

Trial = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """Bytes by depth."""

    at_none: float
    slope: float

    @classmethod
    def through(cls, a: tuple[int, int], b: tuple[int, int]) -> Line:
        """The line through two (depth, bytes)."""
        slope = (b[1] - a[1]) / (b[0] - a[0])
        return cls(a[1] - slope * a[0], slope)

    def at(self, depth: int) -> float:
        """Bytes at a depth."""
        return self.at_none + self.slope * depth

    def end(self, budget: float) -> int:
        """The depth at which it reaches a budget; the deepest that is tried, if it never does."""
        return _DEEPEST if self.slope <= 0 else min(_DEEPEST, int((budget - self.at_none) / self.slope))


@dataclass(frozen=True)
class DepthPlan:
    """What the planner says of a method, by depth.

    Attributes:
        peak: on the device.
        host: of blocks that wait.
        parameters: of the network (a count, no bytes).
    """

    peak: Line
    host: Line
    parameters: Line


def largest_depth(
    fits: Callable[[int], Trial],
    stride: int,
    budget: int,
    guess: int | None = None,
    *,
    peaks: Sequence[tuple[int, int]] = (),
    slope: float | None = None,
    deepest: int = _DEEPEST,
) -> tuple[int, list[Trial]]:
    """The largest multiple of `stride` that fits, and all trials.

    Args:
        fits: tries a depth; the trial has `depth`, `fits`, and where it fits `peak_bytes`.
        stride: depths are multiples of it.
        budget: bytes.
        guess: where to try first.
        peaks: (depth, peak) of other trials.
        slope: bytes of a layer, until two peaks are measured.
        deepest: is not exceeded.

    Returns:
        The depth, 0 if not even `stride` fits; and the trials in their order.
    """
    trials: list[Trial] = []
    fitting, failing = 0, deepest // stride * stride + stride
    while failing - fitting > stride:
        points = sorted({*peaks, *((t["depth"], t["peak_bytes"]) for t in trials if t["fits"])})
        if fitting and len(points) > 1:
            line = Line.through(*points[-2:])
            if line.slope > 0 and line.at(fitting + stride) > budget * (1 + _SURE):
                break
        depth = _next(points, len(trials), fitting, failing, budget, guess if not trials else None, slope)
        depth = min(max(depth // stride * stride, fitting + stride), failing - stride)
        trials.append(fits(depth))
        if trials[-1]["fits"]:
            fitting = depth
        else:
            failing = depth
    return fitting, trials


def _next(
    points: list[tuple[int, int]],
    count: int,
    fitting: int,
    failing: int,
    budget: int,
    guess: int | None,
    slope: float | None,
) -> int:
    if count > 8:
        return (fitting + failing) // 2  # the peak is no line, then
    if len(points) > 1:
        return Line.through(*points[-2:]).end(budget)
    if points:  # without a slope through the origin, as if nothing but layers took memory: not too deep, then
        depth, peak = points[0]
        return Line(peak - slope * depth, slope).end(budget) if slope else Line.through((0, 0), points[0]).end(budget)
    if count:
        return failing // 2
    return guess if guess is not None else 2


def depth(
    bases: Sequence[Spec],
    methods: Sequence[str],
    budgets: Sequence[int],
    blocks: int,
    out: Path,
    limit: float,
    measurer: Measurer,
    *,
    host: int | None = None,
    predict: bool = True,
) -> list[dict[str, Any]]:
    """Search for every model, method and budget; write and return the rows.

    Args:
        bases: a specification for each model: that and the device.
        methods: names of methods.
        budgets: bytes of the device's memory; a smaller one's trials help with a larger one.
        blocks: B of methods with several blocks; their depths are multiples of it.
        out: the JSON file, written after every search; searches that it has already are kept.
        limit: seconds for each trial.
        measurer: tries each.
        host: bytes that waiting blocks may take; None: any. It takes the planner.
        predict: begin where the planner says that the end is.
    """
    rows = rows_in(out)
    specs: list[Spec] = []
    for base in bases:
        for method in methods:
            count = blocks if METHODS[method].kind == "blocks" else 1
            of_method = with_method(base, method, count, task="fits")
            plan: DepthPlan | None = None
            peaks: list[tuple[int, int]] = []
            for budget in sorted(budgets):
                spec = dataclasses.replace(of_method, budget=budget)
                specs.append(spec)
                if spec.key in rows:
                    print(f"{spec.key}: searched before", flush=True)
                    continue
                plan = plan or (plan_of(of_method) if predict else None)
                row = rows[spec.key] = search(measurer, spec, limit, plan, peaks, host)
                peaks += [(t["depth"], t["peak_bytes"]) for t in row.get("trials", ()) if t["fits"]]
                write_table(out, ordered(rows, specs))
    return [rows[spec.key] for spec in specs]


def search(
    measurer: Measurer,
    spec: Spec,
    limit: float,
    plan: DepthPlan | None = None,
    peaks: Sequence[tuple[int, int]] = (),
    host: int | None = None,
) -> dict[str, Any]:
    """The row of one method: `layers` of the deepest model within `spec.budget`, and the trials that say so.

    Args:
        measurer: tries each depth.
        spec: of the method, with a budget.
        limit: seconds for each trial.
        plan: what the planner says.
        peaks: (depth, peak) of trials of the method under other budgets.
        host: bytes that waiting blocks may take.
    """
    assert spec.budget is not None
    about = {"key": spec.key, "model": spec.model, "method": spec.method, "blocks": spec.blocks, "task": "depth"}
    guess = None if plan is None else plan.peak.end(spec.budget * (1 - MARGIN))
    deepest = _DEEPEST if plan is None or host is None else plan.host.end(host)
    about |= {"budget_bytes": spec.budget, "guess": guess}

    def fits(layers: int) -> Trial:
        answer = measurer.ask(with_method(spec, spec.method, spec.blocks, depth=layers), limit)
        if "error" in answer and answer["error"] != "out of memory":
            raise _NoAnswer(f"at {layers} layers: {answer['error']}")
        names = ("fits", "peak_bytes", "reserved_bytes", "device", "detail", "process_seconds")
        trial = {"depth": layers, "fits": False} | {name: answer[name] for name in names if name in answer}
        size = format_bytes(trial["peak_bytes"]) if "peak_bytes" in trial else "out of memory"
        print(f"{spec.key}: {layers} layers {'fit' if trial['fits'] else 'do not fit'} ({size})", flush=True)
        return trial

    slope = None if plan is None else plan.peak.slope
    try:
        layers, trials = largest_depth(fits, spec.blocks, spec.budget, guess, peaks=peaks, slope=slope, deepest=deepest)
    except _NoAnswer as error:
        return about | {"error": str(error)}
    row = about | {"layers": layers, "trials": trials}
    if plan is not None:
        row |= {"parameters": round(plan.parameters.at(layers)), "host_bytes": round(plan.host.at(layers))}
        row |= {"limited_by": "host" if layers + spec.blocks > deepest else "device"}
    device = next((trial["device"] for trial in trials if "device" in trial), None)
    return row | ({"device": device} if device else {})


def depth_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format searches as a text table."""
    lines = []
    for row in rows:
        parameters, host = row.get("parameters"), row.get("host_bytes")
        line = {"model": row["model"], "method": row["method"], "B": row["blocks"]}
        line |= {"budget": format_bytes(row["budget_bytes"]), "layers": row.get("layers", row.get("error"))}
        line["parameters"] = None if parameters is None else f"{parameters / 1e9:.2f} billion"
        lines.append(line | {"host": None if host is None else format_bytes(host), "by": row.get("limited_by")})
    return format_table(lines)


class _NoAnswer(RuntimeError):
    """A trial ended without an answer."""


def plan_of(spec: Spec) -> DepthPlan | None:
    """What the planner says of a method, from two depths; None where it knows nothing."""
    depths = [max(4, spec.blocks) * factor // spec.blocks * spec.blocks for factor in (2, 4)]
    of_depths = [with_method(spec, spec.method, spec.blocks, depth=layers) for layers in depths]
    predictions = [prediction(each) for each in of_depths]
    if any("predicted_bytes" not in each for each in predictions):
        return None
    peaks = [int(each["predicted_bytes"]) for each in predictions]
    recipes = [recipe_of(dataclasses.replace(each, task="row")) for each in of_depths]
    hosts = [Predictor(recipe).host_bytes().waiting for recipe in recipes]
    wholes = [Experiment(recipe_of(with_method(each, "end-to-end", 1, task="row"))).outline for each in of_depths]
    counts = [sum(p.numel() for p in whole.parameters()) for whole in wholes]
    lines = [Line.through((depths[0], a), (depths[1], b)) for a, b in (peaks, hosts, counts)]
    return DepthPlan(*lines)
