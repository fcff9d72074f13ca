"""Charts of a page: inline SVG whose text and axes take the page's colour, so that they suit light and dark mode."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..common.messages import shorten
from ..core.partition import Partition
from ..evaluation.diagnostics import LevelRow
from ..noise import NoiseProcess
from .figures import label_levels_on_axes, partition_on_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]

#: Stands for the page's colour of text until the SVG is written.
_INK = "#010203"
_PALETTE = 10  # colours of matplotlib's default cycle
_MOST_POINTS = 400  # of a line
_LONGEST = 40  # characters of a name in a legend

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffusionblocks",  # the same chart gives the same text
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def loss_chart(records: Sequence[Record]) -> str:
    """SVG of the loss of every unit against its own steps, from the records of a log; "" where there are none."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        lines.setdefault(str(record["unit"]), []).append((record["step"], record["loss"]))
    if not lines:
        return ""
    ends = ((shorten(unit, _LONGEST), *points[-1]) for unit, points in lines.items())
    text = "; ".join(f"{unit} {loss:.4g} at step {step:,}" for unit, step, loss in ends)
    with _chart(len(lines), f"Training loss, at the end {text}") as (axes, svg):
        for unit, points in lines.items():
            every = max(1, -(-len(points) // _MOST_POINTS))
            thinned = [*points[:-1:every], points[-1]]
            x, y = zip(*thinned, strict=True)
            label = shorten(unit, _LONGEST).replace("$", r"\$")  # no formula
            axes.plot(x, y, label=label, marker="." if len(thinned) < 3 else None)
        losses = [loss for points in lines.values() for _, loss in points]
        if min(losses) > 0 and max(losses) > 30 * min(losses):
            axes.set_yscale("log")
        axes.set(xlabel="optimizer steps", ylabel="training loss")
        axes.legend(ncols=min(4, len(lines)), loc="upper right")
    return svg[0]


def partition_chart(partition: Partition, noise: NoiseProcess) -> str:
    """SVG of which block owns which levels, over the density that training draws them with."""
    with _chart(partition.num_blocks, f"Noise levels of {partition.num_blocks} blocks") as (axes, svg):
        partition_on_axes(axes, partition, noise)
        axes.set_title("")
    return svg[0]


def label_level_chart(rows: Sequence[LevelRow], partition: Partition, noise: NoiseProcess) -> str:
    """SVG of the cross-entropy of a classifier's blocks against the noise level, of rows of `accuracy_by_level`."""
    with _chart(partition.num_blocks, "Cross-entropy of each block against noise level") as (axes, svg):
        label_levels_on_axes(axes, rows, partition, noise)
        axes.set_title("")
    return svg[0]


def level_chart(levels: Sequence[Record]) -> str:
    """SVG of the cross-entropy against the noise level, each block's points in its colour; of rows of `by_level`."""
    blocks = sorted({int(row["block"]) for row in levels})
    with _chart(max(blocks) + 1, "Cross-entropy against noise level") as (axes, svg):
        for block in blocks:
            own = [row for row in levels if row["block"] == block]
            losses = [row["cross_entropy"] for row in own]
            axes.plot([row["level"] for row in own], losses, marker="o", color=f"C{block}", label=f"block {block}")
        if all(row["level"] > 0 for row in levels):
            axes.set_xscale("log")
        axes.set(xlabel="noise level", ylabel="cross-entropy (nats)", ylim=(0, None))
        axes.legend()
    return svg[0]


@contextmanager
def _chart(colours: int, label: str) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on, and a list that receives the SVG when the body ends; `label` is read to who cannot see it."""
    from matplotlib import colormaps, rc_context
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    style: dict[str, Any] = dict(_STYLE)
    if colours > _PALETTE:
        cycle = [to_hex(colormaps["turbo"](0.05 + 0.9 * i / (colours - 1))) for i in range(colours)]
        style["axes.prop_cycle"] = cycler(color=cycle)
    svg: list[str] = []
    with rc_context(style):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        yield figure.subplots(), svg
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # as wide as its place
    text = text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
    for ink in (_INK, "#000000"):  # black would not be seen in dark mode
        text = text.replace(ink, "currentColor")
    svg.append(text)
