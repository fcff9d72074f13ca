"""The rows of `cifar10_dit.py`'s jobs as one file, and their curves: its command `gather`."""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

from diffusionblocks.common.files import whole_file
from diffusionblocks.common.formats import read_json
from diffusionblocks.reports.results import joint_header, write_results
from diffusionblocks.reports.tables import format_table

Row = dict[str, Any]

#: What tells one trained model from another, and one way to sample.
MODEL = ("name", "layers", "blocks", "branched", "epochs", "layer_updates", "share_of_trunk", "average")
SETTING = ("solver", "steps", "grid", "guidance", "guidance_interval", "churn", "churn_interval")

#: Equal in two rows that measure the same thing twice.
SAME = (*MODEL, *SETTING, "samples")

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
    """Join the jobs' files, and draw the curves."""
    parts = [read_json(path) for path in options.parts]
    rows: list[Row] = []
    more: dict[str, Any] = {}
    for part in parts:
        if part.get("study") == "speed":
            more["speed"] = {name: part[name] for name in ("command", "device", "commit", "ratios", "rows")}
        else:
            rows += [row | {"commit": part["commit"]} for row in part["rows"]]
    number_runs(rows)
    main_setting = [row for row in rows if row.get("study", "branching") == "branching"]
    main_setting.sort(key=_place)
    sampling = [row for row in rows if row not in main_setting]
    best = best_settings(rows)
    write_results(options.out, main_setting, joint_header(parts), sampling=sampling, best=best, **more)
    shown = ("name", "layers", "blocks", "branched", "average", "changes", "epochs", "run", "fd_train", "fd_test")
    print(format_table([{name: row.get(name) for name in shown} for row in main_setting]))
    setting = ("solver", "steps", "guidance_interval", "churn", "evaluations", "settings")
    print(format_table([{name: row.get(name) for name in (*shown[:5], *setting, *shown[-2:])} for row in best]))
    draw_curves(main_setting, options.figure)


def best_settings(rows: list[Row]) -> list[Row]:
    """Of each model that was sampled in several ways, the row nearest to the training images, and out of how many.

    Rows are compared with those of as many samples: a distance falls with their number.
    """
    of_model: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        key = [*(row.get(name) for name in MODEL), row.get("changes"), row["samples"]]
        of_model[json.dumps(key, sort_keys=True)].append(row)
    best = []
    for group in of_model.values():
        settings = len({json.dumps([row.get(name) or None for name in SETTING]) for row in group})
        if settings > 1:
            best.append(min(group, key=lambda row: row["fd_train"]) | {"settings": settings})
    return best


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
    """Frechet distance against layer-updates, a line a kind of training; earlier runs as hollow marks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    labels = [label_of(row) for row in rows]
    others = sorted({label for label in labels if label and label not in STYLES})
    styles = STYLES | dict.fromkeys(others, ("gray", "x", "--"))
    for label, (colour, marker, line) in styles.items():
        points = [row for row, its in zip(rows, labels, strict=True) if its == label]
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
    axes.set_xlabel("layer-updates (layers moved x steps); epochs of the 12-layer model")
    axes.set_xticks([*budgets], [f"{updates:,}\n{epochs}" for updates, epochs in budgets.items()])
    axes.set_yticks([1.5, 2, 3, 4, 6, 8, 12])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    title = "hollow: an earlier run of the same" if any("run" in row for row in rows) else None
    axes.legend(fontsize=8, title=title, title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
