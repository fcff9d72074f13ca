"""Boundaries between neighbouring blocks: samples with each of them moved, and how much they change."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..evaluation.boundary_distances import BoundaryRow, MovedRow
from ..noise import NoiseProcess
from .figures import save_figure
from .pictures import readable_scale, tile


def draw_boundary_moves(
    distances: Sequence[BoundaryRow], views: Sequence[tuple[MovedRow, Tensor]], noise: NoiseProcess, path: Path
) -> None:
    """Write a PNG: for each boundary a row of pictures for each place of it, and beside them how much they change.

    Args:
        distances: of `boundary_distances`, for the titles.
        views: rows of `moved_boundaries`, each with its pictures uint8 (n, 1 or 3, H, W).
        noise: the noise process.
        path: the PNG; its folder is made.
    """
    from matplotlib.figure import Figure

    groups = [list(group) for _, group in itertools.groupby(views, key=lambda pair: pair[0].boundary)]
    scale = readable_scale(views[0][1])
    pictures = [tile(torch.cat([images for _, images in group]), len(group[0][1]), scale, 4) for group in groups]
    heights = [picture.shape[1] for picture in pictures]
    figure = Figure(figsize=(5.5 + pictures[0].shape[2] / 100, sum(heights) / 100 + 1.1 * len(groups)), dpi=100)
    figure.set_layout_engine("constrained")
    widths = [max(pictures[0].shape[2] / 100, 2.0), 3.5]
    all_axes = figure.subplots(len(groups), 2, squeeze=False, width_ratios=widths, height_ratios=heights)
    for (images, changes), group, picture in zip(all_axes, groups, pictures, strict=True):
        rows = [row for row, _ in group]
        own = next(row for row in distances if row.level == rows[0].boundary)
        images.imshow(picture.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="none")
        height = (picture.shape[1] + 4) / len(rows)
        names = [f"{100 * row.share:+g} %, {row.level:.3g}" for row in rows]
        images.set_yticks([(i + 0.5) * height for i in range(len(rows))], names, fontsize=8)
        images.set_xticks([])
        images.spines[:].set_visible(False)
        images.set_title(
            f"blocks {own.above} | {own.below} at {noise.symbol} = {own.level:.3g}: velocities differ by "
            f"{100 * own.velocity:.2g} %, D by {100 * own.denoised:.2g} %",
            fontsize=9,
            loc="left",
        )
        moves = [100 * row.share for row in rows]
        changes.plot(moves, [100 * row.change for row in rows], "o-")
        for move, row in zip(moves, rows, strict=True):
            changes.annotate(
                f"{row.calls}", (move, 100 * row.change), (0, 5), textcoords="offset points", ha="center", fontsize=8
            )
        changes.set(xlabel="boundary moved by (%)", ylabel="change of the images (%)")
        changes.set_title("numbers: calls that change block", fontsize=8)
        changes.margins(y=0.2)
        changes.grid(alpha=0.3)
    save_figure(figure, path)
