"""The rows of `cifar10_dit.py`'s jobs as one file, and their curves: its command `gather`."""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.common.files import whole_file
from diffusionblocks.common.formats import read_json
from diffusionblocks.reports.image_tables import distances_by_calls
from diffusionblocks.reports.results import joint_header, write_results
from diffusionblocks.reports.tables import format_table

Row = dict[str, Any]

#: What tells one trained model from another, and one way to sample.
MODEL = (
    "name",
    "layers",
    "blocks",
    "branched",
    "epochs",
    "layer_updates",
    "share_of_trunk",
    "average",
    "patch",
    "seed",
)
SETTING = ("solver", "steps", "grid", "guidance", "guidance_interval", "churn", "churn_interval")

#: Equal in two rows that measure the same thing twice.
SAME = (*MODEL, *SETTING, "samples")

#: Of files without it: that of the rows of their time.
_PATCH = 4

#: Labels of the curves, with colour (that of one kind of training), marker and line.
STYLES = {
    "end to end, 12 layers": ("black", "o", "-"),
    "end to end, 4 layers": ("#0072b2", "o", "-"),
    "end to end, 4 layers, average restarted": ("#0072b2", "^", ":"),
    "B = 3 from scratch": ("#e69f00", "s", "--"),
    "B = 2 from scratch": ("#cc79a7", "s", "--"),
    "B = 3 branched, average copied": ("#009e73", "v", ":"),
    "B = 3 branched, average fresh": ("#009e73", "D", "-"),
}


def gather(options: argparse.Namespace) -> None:
    """Add the jobs' rows to the file of results, in place of those that measured the same, and draw the curves.

    Its rows are each model under the first setting, whose solver is called as `euler-50`, and under the model's own
    `best`. `sampling` has the settings that were tried, and the speed of `sampling_speed.py`.
    """
    earlier = read_json(options.out) if options.out.exists() else {}
    parts = [read_json(path) for path in options.parts]
    header = joint_header([*([earlier] if earlier else []), *parts])
    more = {name: value for name, value in earlier.items() if name not in (*header, "rows", "sampling")}
    rows: list[Row] = []
    sampling: list[Row] = []
    for part in parts:
        origin = {name: part[name] for name in ("command", "device", "commit")}
        if part.get("study") == "speed":
            more["speed"] = origin | {name: part[name] for name in ("ratios", "rows")}
        elif part.get("study") == "sampling speed":
            sampling += [row | {"study": part["study"]} | origin for row in part["rows"]]
        else:
            for row in part["rows"]:
                is_result = row.get("study", "branching") in ("branching", "best")
                (rows if is_result else sampling).append(row | {"commit": part["commit"]})
    rows = _replaced(earlier.get("rows", []), [with_solver(row) for row in rows], (*MODEL, "changes", "solver"))
    rows.sort(key=_place)
    number_runs(rows)
    sampling = _replaced(earlier.get("sampling", []), sampling, (*SAME, "changes", "study", "way"))
    write_results(options.out, rows, header, sampling=sampling, **more)
    shown = ("name", "blocks", "average", "changes", "patch", "epochs", "seed", "solver", "best_solver", "calls")
    print(format_table([{name: row.get(name) for name in (*shown, "run", "fd_train", "fd_test")} for row in rows]))
    tried: dict[str, list[Row]] = collections.defaultdict(list)
    for row in sampling:
        if row.get("study") == "sampling" and "seed" in row:
            tried[f"{row['name']}, {row['blocks']} blocks, patch {row['patch']}, seed {row['seed']}"].append(row)
    print(format_table(distances_by_calls(tried)))
    patches = sorted({row.get("patch", _PATCH) for row in rows})
    for patch in patches:
        of_patch = [row for row in rows if row.get("patch", _PATCH) == patch and row["solver"] != "best"]
        name = options.figure.stem + f"_patch{patch}" * (patch != patches[-1])
        draw_curves(of_patch, options.figure.with_stem(name))


def with_solver(row: Row) -> Row:
    """A measured row under the name of its solver: `best`, or such as `euler-50`."""
    solver = f"{row['solver']}-{row['steps']}"
    if row.get("study") != "best":
        return row | {"solver": solver}
    return row | {"solver": "best", "best_solver": solver}


def _replaced(earlier: list[Row], rows: list[Row], names: Sequence[str]) -> list[Row]:
    """Earlier rows without those that are measured anew, by what tells them apart, and the new ones."""

    def key(row: Row) -> str:
        return json.dumps([row.get(name) for name in names], sort_keys=True)

    anew = {key(row) for row in rows}
    return [row for row in earlier if key(row) not in anew] + rows


def number_runs(rows: list[Row]) -> None:
    """Give `run`, from 1 in the order of the rows, to those that were measured more than once."""
    same: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        # What is the default in one run may be a change in another: the average is compared by its own field.
        changes = {name: value for name, value in row.get("changes", {}).items() if name != "average"}
        same[json.dumps([*(row.get(name) or None for name in SAME), changes], sort_keys=True)].append(row)
    for found in same.values():
        for run, row in enumerate(found if len(found) > 1 else [], start=1):
            row["run"] = run


def _place(row: Row) -> tuple[Any, ...]:
    ordered = ("name", "branched", "layers", "blocks")
    return (*(row[name] for name in ordered), row.get("average", ""), row["layer_updates"], row.get("run", 1))


def label_of(row: Row) -> str | None:
    """The curve a row belongs to; None for a branch with changes, which is a single point and not drawn."""
    changes = row.get("changes", {})
    if row["blocks"] == 1:
        return f"end to end, {row['layers']} layers" + (", average restarted" if changes else "")
    if not row["branched"]:
        return f"B = {row['blocks']} from scratch"
    if row.get("study") and set(changes) != {"average"}:
        return None
    return f"B = {row['blocks']} branched, average {row['average']}"


def draw_curves(rows: list[Row], path: Path) -> None:
    """Frechet distance against layer-updates, a line a kind of training; other runs and seeds as hollow marks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7.6, 5.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    labels = [label_of(row) for row in rows]
    others = sorted({label for label in labels if label and label not in STYLES})
    styles = STYLES | dict.fromkeys(others, ("gray", "x", "--"))
    for label, (colour, marker, line) in styles.items():
        points = [row for row, its in zip(rows, labels, strict=True) if its == label]
        points.sort(key=lambda row: row["layer_updates"])  # files of other times call them otherwise
        last = {row["layer_updates"]: row for row in points}
        first = [row for row in points if row is not last[row["layer_updates"]]]
        for chosen, filled in (([*last.values()], True), (first, False)):
            axes.plot(
                [row["layer_updates"] for row in chosen],
                [row["fd_train"] for row in chosen],
                color=colour,
                marker=marker,
                markersize=5 if filled else 9,
                markerfacecolor=colour if filled else "none",
                linestyle=line if filled else "none",
                label=label if filled and chosen else None,
            )
    deepest = max(row["layers"] for row in rows)  # whose epochs the budgets count
    budgets = {row["layer_updates"]: row["epochs"] for row in rows if row["layers"] == deepest}
    axes.set(xscale="log", yscale="log", ylabel="Frechet distance (train)")
    axes.set_xlabel(f"layer-updates (layers moved x steps); epochs of the {deepest}-layer model")
    axes.set_xticks([*budgets], [f"{updates:,}\n{epochs}" for updates, epochs in budgets.items()])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    title = (
        "hollow: another run of the same"
        if len(rows) > len({(its, row["layer_updates"]) for row, its in zip(rows, labels, strict=True)})
        else None
    )
    axes.legend(fontsize=8, title=title, title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
