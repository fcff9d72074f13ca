"""Figures: accuracy against denoising steps, and the partition over the density of noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import renamed
from ..noise import EDM
from ..partition import Partition
from .accuracy import AccuracyRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _axes(count: int) -> tuple[Any, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * count, 4.2), dpi=120, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_partition(partition: Partition, noise: EDM, path: Path) -> None:
    """Write the partition over the density of log sigma as a PNG."""
    figure, (axes,) = _axes(1)
    _draw_partition(axes, partition, noise)
    save_figure(figure, path)


def draw_run(
    rows: Sequence[AccuracyRow],
    controls: Sequence[tuple[str, float]],
    partition: Partition,
    noise: EDM,
    path: Path,
) -> None:
    """Write a PNG: accuracy against steps, a line a number of seeds, controls as levels; and the partition.

    Args:
        rows: accuracies of DiffusionBlocks.
        controls: (label, accuracy) of end-to-end rows.
        partition, noise: of the converted model.
        path: the PNG.
    """
    figure, (left, right) = _axes(2)
    averaged = sorted({row.seeds for row in rows if row.seeds is not None})
    for index, seeds in enumerate(averaged):
        beside = 0.15 * (index - (len(averaged) - 1) / 2)  # lines that coincide stay visible
        chosen = sorted((row for row in rows if row.seeds == seeds), key=lambda row: row.steps or 0)
        left.errorbar(
            [(row.steps or 0) + beside for row in chosen],
            [100 * row.accuracy for row in chosen],
            yerr=[100 * row.standard_error for row in chosen],
            marker="o",
            capsize=2,
            label=f"DiffusionBlocks, {seeds} noise seed{'s' * (seeds > 1)}",
        )
    for index, (label, accuracy) in enumerate(controls):
        left.axhline(100 * accuracy, linestyle=(0, (4, 1 + index)), color=f"{0.15 + 0.25 * index}", label=label)
    left.set(xlabel="denoising steps", ylabel="test accuracy (%)", title="Accuracy against denoising steps")
    left.set_xticks(sorted({row.steps for row in rows if row.steps is not None}))
    left.margins(y=0.25)  # room for the legend
    left.legend(fontsize=8, framealpha=0.9, ncols=2, loc="lower center")
    _draw_partition(right, partition, noise)
    save_figure(figure, path)


def _draw_partition(axes: Axes, partition: Partition, noise: EDM) -> None:
    def curve(low: float, high: float) -> tuple[Any, Any]:
        sigma = torch.logspace(
            torch.tensor(low).log10().item(), torch.tensor(high).log10().item(), 200, dtype=torch.float64
        )
        return sigma.numpy(), noise.density(sigma).numpy()

    axes.plot(*curve(noise.level_min, noise.level_max), color="black", linewidth=1)
    for block in range(partition.num_blocks):
        sigma, density = curve(*partition.interval(block))
        label = f"block {block}: layers {_span(partition.layer_range(block))}"
        patch = axes.fill_between(sigma, density, alpha=0.55, label=label)
        low, high = partition.training_interval(block)
        height = -0.012 * (1 + block)
        axes.plot([low, high], [height, height], linewidth=3, color=patch.get_facecolor()[0], solid_capstyle="butt")
    axes.set_xscale("log")
    axes.set(
        xlabel="noise level sigma (bars below: trained on, with overlap)",
        ylabel="training density per unit of log sigma",
        title="Noise partition",
    )
    axes.legend(fontsize=8, loc="upper left")


def _span(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
