"""A figure of an autoregressive model: cross-entropy against noise level, with and without its context."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from ..core.partition import Partition
from ..evaluation.cross_entropy import LanguageRow
from .figures import save_figure


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
    from matplotlib.figure import Figure

    if not row.by_level:
        raise ValueError("the row has no levels: an unconverted model has none; give it as a baseline")
    figure = Figure(figsize=(6.2, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    levels = [at.level for at in row.by_level]
    axes.plot(levels, [at.cross_entropy for at in row.by_level], marker="o", label="cross-entropy")
    axes.plot(levels, [at.scrambled for at in row.by_level], marker=".", label="with another sequence's context")
    for index, (label, loss) in enumerate(baselines):
        axes.axhline(loss, linestyle=(0, (4, 1 + index)), color=f"{0.15 + 0.25 * index}", label=label)
    highest = [*(max(at.cross_entropy, at.scrambled) for at in row.by_level), *(loss for _, loss in baselines)]
    for border in partition.boundaries[1:-1]:
        axes.axvline(border, color="black", linewidth=0.8, linestyle=":")
    for block, (high, low) in enumerate(itertools.pairwise(reversed(partition.boundaries))):
        low, high = max(low, levels[-1]), min(high, levels[0])
        if low >= high:  # no level of the block's is read
            continue
        middle = (low * high) ** 0.5
        axes.text(middle, 0.98, str(block), transform=axes.get_xaxis_transform(), ha="center", va="top", size=8)
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
