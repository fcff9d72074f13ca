"""Figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reports.figures import save_figure

_COLOURS = {
    "parameters": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer": "#55a868",
    "activations": "#c8c8c8",
    "other": "#937860",  # no averages here: buffers, data, workspace of matrix products
}


def draw_memory(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: the peak of each row as a bar of its kinds, a panel a model; a row with an error says so.

    Args:
        rows: of `bench memory`.
        path: the PNG.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    counts = [sum(row["model"] == model for row in rows) for model in models]
    height = 1.1 + sum(0.8 + 0.19 * count for count in counts)
    figure = Figure(figsize=(8.4, height), dpi=100, layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=[4 + count for count in counts])[:, 0]
    largest = max((row.get("peak_bytes", 0) for row in rows), default=0)
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    for axes, model in zip(panels, models, strict=True):
        _draw_model(axes, [row for row in rows if row["model"] == model], unit, name)
        axes.set_title(_title(model, rows), fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(_COLOURS), fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_depth(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: the deepest model by budget, a panel a model, a line a method.

    Args:
        rows: of `bench depth`.
        path: the PNG.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if "layers" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.2 * max(1, len(models)), 3.4), dpi=100, layout="constrained")
    panels = figure.subplots(1, max(1, len(models)), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=False):
        of_model = [row for row in rows if row["model"] == model]
        for method in dict.fromkeys(row["method"] for row in of_model):
            points = sorted(
                (r["budget_bytes"] / 2**30, r["layers"], r["blocks"]) for r in of_model if r["method"] == method
            )
            blocks = f", B = {points[0][2]}" if points[0][2] > 1 else ""
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], "o-", label=f"{method}{blocks}", markersize=4)
            for x, y, _ in points:
                axes.annotate(str(y), (x, y), textcoords="offset points", xytext=(0, 5), ha="center", fontsize=7)
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("memory of the GPU's allocator, GiB", fontsize=8)
        axes.set_ylabel("layers of the deepest model that trains", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _draw_model(axes: Any, rows: list[dict[str, Any]], unit: int, name: str) -> None:
    labels = [_label(row) for row in rows]
    left = [0.0] * len(rows)
    for kind, colour in _COLOURS.items():
        widths = [_bytes(row.get("bytes", {}), kind) / unit for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=kind, height=0.78)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    predicted = [(i, row["predicted_bytes"] / unit) for i, row in enumerate(rows) if row.get("predicted_bytes")]
    if predicted:
        axes.plot([x for _, x in predicted], [i for i, _ in predicted], "|", color="black", markersize=8)
    edge = max([*left, *(x for _, x in predicted), 1e-9])
    for i, row in enumerate(rows):
        text = f"{row['peak_bytes'] / unit:.1f}" if "bytes" in row else str(row.get("error"))[:60]
        axes.text(left[i] + 0.012 * edge, i, text, va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * edge)
    axes.tick_params(axis="x", labelsize=7)
    marks = "; marks: predicted" if predicted else ""
    axes.set_xlabel(f"peak memory of a training step, {name} by kind{marks}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _bytes(kinds: dict[str, int], kind: str) -> int:
    if kind == "other":
        return sum(value for name, value in kinds.items() if name not in _COLOURS)
    return max(0, kinds.get(kind, 0))


def _label(row: dict[str, Any]) -> str:
    if row["blocks"] == 1:
        return str(row["method"])
    if row["method"] == "end-to-end-short":
        return f"end-to-end, {row['layers']} layers" if "layers" in row else f"end-to-end-short, B = {row['blocks']}"
    return f"B = {row['blocks']}, {row['method']}"


def _title(model: str, rows: Sequence[dict[str, Any]]) -> str:
    first = next((row for row in rows if row["model"] == model and "bytes" in row), None)
    if first is None:
        return model
    return f"{model}{' (toy size)' if first['tiny'] else ''}, batch {first['batch_size']}, {first['device']}"
