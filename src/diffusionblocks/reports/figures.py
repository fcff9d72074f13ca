"""Figures: accuracy by steps, distance by calls, cross-entropy by noise level, the partition, and fitted levels."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import whole_file
from ..core.partition import Partition
from ..evaluation.accuracy import AccuracyRow
from ..evaluation.cross_entropy import LanguageRow
from ..evaluation.diagnostics import LevelRow
from ..noise import Monitor, NoiseProcess

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _axes(count: int) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * count, 4.2), dpi=120, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_partition(partition: Partition, noise: NoiseProcess, path: Path) -> None:
    """Write the partition over the density of the training levels as a PNG."""
    figure, (axes,) = _axes(1)
    partition_on_axes(axes, partition, noise)
    save_figure(figure, path)


def draw_run(
    rows: Sequence[AccuracyRow],
    baselines: Sequence[tuple[str, float]],
    partition: Partition,
    noise: NoiseProcess,
    path: Path,
) -> None:
    """Write a PNG: accuracy against steps, a line per rule and number of seeds, baselines as lines across; and the
    partition.

    Args:
        rows: accuracies of DiffusionBlocks.
        baselines: (label, accuracy) of end-to-end rows.
        partition, noise: of the converted model.
        path: the PNG.
    """
    figure, (left, right) = _axes(2)
    lines = sorted({(row.combine or "", row.seeds or 0) for row in rows})
    for index, (combine, seeds) in enumerate(lines):
        beside = 0.15 * (index - (len(lines) - 1) / 2)  # lines that coincide stay visible
        line = sorted((row for row in rows if (row.combine, row.seeds) == (combine, seeds)), key=lambda r: r.steps or 0)
        left.errorbar(
            [(row.steps or 0) + beside for row in line],
            [100 * row.accuracy for row in line],
            yerr=[100 * row.standard_error for row in line],
            marker="o",
            capsize=2,
            label=f"DiffusionBlocks, {combine}, {seeds} noise seed{'s' * (seeds > 1)}",
        )
    _draw_baselines(left, [(label, 100 * accuracy) for label, accuracy in baselines])
    left.set(xlabel="denoising steps", ylabel="test accuracy (%)", title="Accuracy against denoising steps")
    left.set_xticks(sorted({row.steps for row in rows if row.steps is not None}))
    left.margins(y=0.25)  # room for the legend
    left.legend(fontsize=8, framealpha=0.9, ncols=2, loc="lower center")
    partition_on_axes(right, partition, noise)
    save_figure(figure, path)


def _draw_baselines(axes: Any, values: Sequence[tuple[str, float]]) -> None:
    """Draw (label, value) as lines across, in greys that stay below white however many there are."""
    for index, (label, value) in enumerate(values):
        shade = f"{0.15 + 0.6 * index / len(values):.2f}"
        axes.axhline(value, linestyle=(0, (4, 1 + index)), color=shade, label=label)


def draw_distance_by_calls(rows: Mapping[str, Sequence[Mapping[str, Any]]], name: str, path: Path) -> None:
    """Write a PNG: distance by network calls, a point a setting, a line through the nearest so far, a star at the best.

    Args:
        rows: by the rows' names, what was measured of each setting: `calls` and `fd_train`.
        name: of the distance.
        path: the PNG.
    """
    figure, (axes,) = _axes(1)
    for index, (row, settings) in enumerate(rows.items()):
        points = sorted((setting["calls"], setting["fd_train"]) for setting in settings)
        lowest = list(itertools.accumulate((distance for _, distance in points), min))
        front = [(calls, low) for (calls, distance), low in zip(points, lowest, strict=True) if distance == low]
        colour = f"C{index}"
        axes.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.5)
        axes.plot(*zip(*front, strict=True), "-", color=colour, label=row)
        axes.plot(*front[-1], "*", color=colour, markersize=12)
    axes.set(xscale="log", yscale="log", xlabel="network calls per image", ylabel=f"{name}, train")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_fit(levels: Sequence[float], curves: Sequence[Sequence[float]], noise: NoiseProcess, path: Path) -> None:
    """Write a PNG: the mean cross-entropy that each round of a fit measured, and the density fitted to the last.

    Args:
        levels: where it was measured.
        curves: for each round, the cross-entropy at every level, in nats.
        noise: the fitted process.
        path: the PNG.
    """
    figure, (axes,) = _axes(1)
    for index, losses in enumerate(curves):
        shade = f"{0.75 * (1 - (index + 1) / len(curves)):.2f}"
        axes.plot(levels, losses, marker=".", color=shade, label=f"cross-entropy after round {index + 1}")
    beside = axes.twinx()
    grid = noise.even_levels(noise.level_min, noise.level_max, 400)
    beside.fill_between(grid.numpy(), noise.density(grid).numpy(), alpha=0.4, label="fitted density")
    beside.set(ylabel=f"training density per unit of {'log ' * noise.logarithmic}{noise.symbol}", ylim=(0, None))
    axes.set_zorder(beside.get_zorder() + 1)
    axes.patch.set_visible(False)
    if noise.logarithmic:
        axes.set_xscale("log")
    axes.set(
        xlabel=f"noise level {noise.symbol}",
        ylabel="cross-entropy (nats)",
        ylim=(0, None),
        title="Levels fitted to the cross-entropy",
    )
    handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8)
    save_figure(figure, path)


def draw_levels(
    row: LanguageRow, partition: Partition, path: Path, baselines: Sequence[tuple[str, float]] = ()
) -> None:
    """Write a PNG: cross-entropy over log sigma with its own and with another context, and the decodable share.

    Args:
        row: of DiffusionBlocks.
        partition: of the same model; its borders are marked.
        path: the PNG.
        baselines: (label, cross-entropy) of unconverted models, in nats per token.

    Raises:
        ValueError: the row of an unconverted model, which has no levels.
    """
    if not row.by_level:
        raise ValueError("the row has no levels: an unconverted model has none; give it as a baseline")
    figure, (axes,) = _axes(1)
    levels = [at.level for at in row.by_level]
    axes.plot(levels, [at.cross_entropy for at in row.by_level], marker="o", label="cross-entropy")
    axes.plot(levels, [at.scrambled for at in row.by_level], marker=".", label="with another sequence's context")
    _draw_baselines(axes, baselines)
    highest = [*(max(at.cross_entropy, at.scrambled) for at in row.by_level), *(loss for _, loss in baselines)]
    _mark_blocks(axes, partition, levels[-1], levels[0])
    beside = axes.twinx()
    beside.fill_between(levels, [at.decodable for at in row.by_level], color="0.5", alpha=0.2, label="decodable from z")
    beside.set(ylabel="share of tokens decodable from z", ylim=(0, 1.15))
    axes.set_zorder(beside.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.set_xscale("log")
    axes.set(
        xlabel="noise level sigma (dotted: borders of the blocks, numbered)",
        ylabel="cross-entropy (nats per token)",
        ylim=(0, 1.15 * max(highest)),  # room for the numbers
        title="Cross-entropy against noise level",
    )
    handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8, loc="center left")
    save_figure(figure, path)


def draw_label_levels(rows: Sequence[LevelRow], partition: Partition, noise: NoiseProcess, path: Path) -> None:
    """Write `label_levels_on_axes` as a PNG."""
    figure, (axes,) = _axes(1)
    label_levels_on_axes(axes, rows, partition, noise)
    save_figure(figure, path)


def label_levels_on_axes(axes: Axes, rows: Sequence[LevelRow], partition: Partition, noise: NoiseProcess) -> None:
    """Draw the cross-entropy of a classifier's blocks over the noise level, a colour for each block.

    Of context logits it is flat at the optimum; of the prediction from z as well it falls towards 0 with the level.

    Args:
        axes: to draw on.
        rows: of `accuracy_by_level`; what a block says at levels that it does not own is drawn thin.
        partition, noise: of the same model; the borders of the blocks are marked.
    """
    for block in range(partition.num_blocks):
        line = sorted((row for row in rows if row.block == block), key=lambda row: row.level)
        own = [row for row in line if row.own_level]
        color, name = f"C{block}", f"block {block}"
        contexts = {row.level: row.context_cross_entropy for row in line if row.context_cross_entropy is not None}
        if contexts:
            levels = [row.level for row in own]
            of_context = [contexts[level] for level in levels]
            axes.plot(levels, of_context, marker="o", color=color, label=f"{name}, context")
            axes.plot(list(contexts), list(contexts.values()), linewidth=0.8, alpha=0.7, color=color)
        from_z = [row.cross_entropy for row in own]
        axes.plot(
            [row.level for row in own], from_z, marker=".", linestyle="--", color=color, label=f"{name}, posterior"
        )
    lowest, highest = min(row.level for row in rows), max(row.level for row in rows)
    _mark_blocks(axes, partition, lowest, highest, logarithmic=noise.logarithmic)
    if noise.logarithmic:
        axes.set_xscale("log")
    losses = [max(row.cross_entropy, row.context_cross_entropy or 0.0) for row in rows]
    axes.set(
        xlabel=f"noise level {noise.symbol} (dotted: borders of blocks; thin: at others' levels)",
        ylabel="cross-entropy (nats)",
        ylim=(0, 1.15 * max(losses)),  # room for the numbers
        title="Cross-entropy of each block against noise level",
    )
    axes.legend(fontsize=8, loc="best", bbox_to_anchor=(0, 0, 1, 0.93))  # below the numbers


def _mark_blocks(axes: Axes, partition: Partition, lowest: float, highest: float, *, logarithmic: bool = True) -> None:
    """Mark the borders of the blocks, and number those that own levels between the lowest and the highest drawn."""
    for border in partition.boundaries[1:-1]:
        axes.axvline(border, color="black", linewidth=0.8, linestyle=":")
    for block, (high, low) in enumerate(itertools.pairwise(reversed(partition.boundaries))):
        low, high = max(low, lowest), min(high, highest)
        if low >= high:  # no level of the block's is read
            continue
        middle = (low * high) ** 0.5 if logarithmic else (low + high) / 2
        axes.text(middle, 0.98, str(block), transform=axes.get_xaxis_transform(), ha="center", va="top", size=8)


def partition_on_axes(axes: Axes, partition: Partition, noise: NoiseProcess) -> None:
    """Draw each block's share of the density of the training levels, and below it the interval it trains on."""

    def curve(low: float, high: float) -> tuple[Any, Any]:
        levels = noise.even_levels(low, high, 200)
        return levels.numpy(), noise.density(levels).numpy()

    axes.plot(*curve(noise.level_min, noise.level_max), color="black", linewidth=1)
    for block in range(partition.num_blocks):
        levels, density = curve(*partition.interval(block))
        label = f"block {block}: layers {_span(partition.layer_range(block))}"
        patch = axes.fill_between(levels, density, alpha=0.55, label=label)
        low, high = partition.training_interval(block)
        height = -0.012 * (1 + block)
        axes.plot([low, high], [height, height], linewidth=3, color=patch.get_facecolor()[0], solid_capstyle="butt")
    if noise.logarithmic:
        axes.set_xscale("log")
    axes.set(
        xlabel=f"noise level {noise.symbol} (bars below: trained on, with overlap)",
        ylabel=f"training density per unit of {'log ' * noise.logarithmic}{noise.symbol}",
        title="Noise partition",
    )
    bottom, top = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top])  # the bars have no density
    axes.set_ylim(bottom, top)
    axes.legend(fontsize=8, loc="upper left")


def _span(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def draw_monitor(
    monitor: Monitor, boundaries: Sequence[float], noise: NoiseProcess, path: Path, *, name: str, power: float
) -> None:
    """Write a PNG of a monitor over its time, to the power that the blocks share: their areas are equal.

    Args:
        monitor: what was measured.
        boundaries: B + 1 levels, ascending, of the blocks.
        noise: the process that they are of.
        path: the PNG.
        name: what the monitor is of, as `acceleration`.
        power: the exponent.
    """
    figure, (axes,) = _axes(1)
    heights = [value**power for value in monitor.values]
    axes.stairs(heights, monitor.times, color="black", linewidth=1)
    places = [_time_at(monitor, level) for level in boundaries]
    blocks = len(boundaries) - 1
    for block in range(blocks):
        low, high = places[blocks - 1 - block], places[blocks - block]
        inner = [time for time in monitor.times if low < time < high]
        edges = [low, *inner, high]
        steps = [heights[_interval_at(monitor, (a + b) / 2)] for a, b in itertools.pairwise(edges)]
        levels = f"{boundaries[blocks - 1 - block]:.3g} to {boundaries[blocks - block]:.3g}"
        axes.stairs(steps, edges, fill=True, alpha=0.55, label=f"block {block}: {noise.symbol} {levels}")
    of = f"{name}" if power == 1 else f"{name} to the power {power:g}"
    over = "quantile of the training levels" if name == "loss" else "time of the straight path (0: data, 1: noise)"
    axes.set(xlabel=over, ylabel=of, ylim=(0, None), title=f"Blocks of equal {name}")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _time_at(monitor: Monitor, level: float) -> float:
    """A monitor's time at a level, linear between neighbours; at its ends beyond them."""
    place = bisect.bisect_right(monitor.levels, level)
    if place in (0, len(monitor.levels)):
        return monitor.times[0 if place == 0 else -1]
    (low, high), (start, end) = monitor.levels[place - 1 : place + 1], monitor.times[place - 1 : place + 1]
    return start + (end - start) * (level - low) / (high - low)


def _interval_at(monitor: Monitor, time: float) -> int:
    return min(max(bisect.bisect_right(monitor.times, time) - 1, 0), len(monitor.values) - 1)
