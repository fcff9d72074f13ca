"""Figures: accuracy against denoising steps, the partition over the density of noise levels, and how it was fitted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import whole_file
from ..core.partition import Partition
from ..evaluation.accuracy import AccuracyRow
from ..noise import NoiseProcess
from .tables import level_grid

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
    _draw_partition(axes, partition, noise)
    save_figure(figure, path)


def draw_run(
    rows: Sequence[AccuracyRow],
    baselines: Sequence[tuple[str, float]],
    partition: Partition,
    noise: NoiseProcess,
    path: Path,
) -> None:
    """Write a PNG: accuracy against steps, a line per number of seeds, baselines as lines across; and the partition.

    Args:
        rows: accuracies of DiffusionBlocks.
        baselines: (label, accuracy) of end-to-end rows.
        partition, noise: of the converted model.
        path: the PNG.
    """
    figure, (left, right) = _axes(2)
    averaged = sorted({row.seeds for row in rows if row.seeds is not None})
    for index, seeds in enumerate(averaged):
        beside = 0.15 * (index - (len(averaged) - 1) / 2)  # lines that coincide stay visible
        line = sorted((row for row in rows if row.seeds == seeds), key=lambda row: row.steps or 0)
        left.errorbar(
            [(row.steps or 0) + beside for row in line],
            [100 * row.accuracy for row in line],
            yerr=[100 * row.standard_error for row in line],
            marker="o",
            capsize=2,
            label=f"DiffusionBlocks, {seeds} noise seed{'s' * (seeds > 1)}",
        )
    for index, (label, accuracy) in enumerate(baselines):
        left.axhline(100 * accuracy, linestyle=(0, (4, 1 + index)), color=f"{0.15 + 0.25 * index}", label=label)
    left.set(xlabel="denoising steps", ylabel="test accuracy (%)", title="Accuracy against denoising steps")
    left.set_xticks(sorted({row.steps for row in rows if row.steps is not None}))
    left.margins(y=0.25)  # room for the legend
    left.legend(fontsize=8, framealpha=0.9, ncols=2, loc="lower center")
    _draw_partition(right, partition, noise)
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
    grid = level_grid(noise, noise.level_min, noise.level_max, 400)
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
        title="Levels fitted to the rise of the cross-entropy",
    )
    handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8)
    save_figure(figure, path)


def _draw_partition(axes: Axes, partition: Partition, noise: NoiseProcess) -> None:
    def curve(low: float, high: float) -> tuple[Any, Any]:
        levels = level_grid(noise, low, high, 200)
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
    axes.legend(fontsize=8, loc="upper left")


def _span(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
