"""Draw docs/figures/concept.svg: how layers become blocks, what each learns, and how they sample together.

Run `python docs/figures/concept.py`. The boundaries drawn are those of EDM's distribution with three blocks.
"""

import itertools
import math
from pathlib import Path
from statistics import NormalDist

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

COLORS = ("#3b6fb6", "#c9772b", "#4a8f5b")  # blocks 0, 1 and 2; white text is legible on each
INK, GREY = "#222222", "#8a8a8a"
P_MEAN, P_STD, SIGMA_MIN, SIGMA_MAX = -1.2, 1.2, 0.002, 80.0
TITLE, TEXT, SMALL = 13, 10.5, 9


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = TEXT) -> None:
    """Draw a filled box with white text."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="white"))
    axes.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", fontsize=size)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """Draw an arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=color, linewidth=1.2))


def canvas(axes: Axes, title: str, width: float, height: float) -> None:
    """Prepare a panel without axes, whose units are boxes."""
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    axes.set_title(title, fontsize=TITLE, loc="left", color=INK, fontweight="bold")


def split(axes: Axes) -> None:
    """Draw twelve layers beside the three blocks of four that they become."""
    canvas(axes, "1  Split: consecutive layers become blocks", 8, 8.2)
    axes.text(1.4, 7.75, "ordinary network", ha="center", fontsize=TEXT, color=INK)
    axes.text(5.7, 7.75, "three independent denoisers", ha="center", fontsize=TEXT, color=INK)
    box(axes, 0.5, 6.9, 1.8, 0.5, "head", GREY, SMALL)
    box(axes, 0.5, 0.1, 1.8, 0.5, "stem", GREY, SMALL)
    for layer in range(12):
        box(axes, 0.5, 0.72 + layer * 0.51, 1.8, 0.45, f"layer {layer}", COLORS[layer // 4], SMALL)
    for block in range(3):
        y = 0.72 + block * 2.04
        arrow(axes, (2.45, y + 1.0), (3.35, y + 1.0), COLORS[block])
        box(axes, 3.45, y + 0.1, 0.9, 1.75, "stem", GREY, SMALL)
        layers = f"block {block}\nlayers {4 * block} to {4 * block + 3}"
        box(axes, 4.42, y + 0.1, 2.5, 1.75, layers, COLORS[block])
        box(axes, 6.99, y + 0.1, 0.9, 1.75, "head", GREY, SMALL)


def intervals(axes: Axes) -> None:
    """Draw the training distribution of noise levels, cut into intervals of equal probability."""
    normal = NormalDist(P_MEAN, P_STD)
    lowest, highest = normal.cdf(math.log(SIGMA_MIN)), normal.cdf(math.log(SIGMA_MAX))
    borders = [math.exp(normal.inv_cdf(lowest + third / 3 * (highest - lowest))) for third in range(4)]
    log = np.linspace(-5.5, 3.2, 600)
    density = np.exp(-((log - P_MEAN) ** 2) / (2 * P_STD**2))
    for block, (low, high) in enumerate(itertools.pairwise(borders)):
        block = 2 - block
        inside = (log >= np.log(low)) & (log <= np.log(high))
        axes.fill_between(log[inside], density[inside], color=COLORS[block])
    for border in borders[1:3]:
        axes.axvline(np.log(border), color="white", linewidth=2)
    for block, x in enumerate((0.0, -1.2, -2.4)):
        axes.text(x, 0.2, f"block {block}", color="white", ha="center", fontsize=TEXT)
    axes.set_title(
        "2  Divide: an interval of noise levels each", fontsize=TITLE, loc="left", color=INK, fontweight="bold"
    )
    ticks = [0.01, borders[1], borders[2], 10]
    axes.set_xticks(np.log(ticks), [f"{tick:.2g}" for tick in ticks])
    axes.set_yticks([])
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("noise level sigma (log scale)", fontsize=TEXT)
    axes.text(-5.4, 1.03, "training distribution of EDM:\na third of the draws a block", fontsize=SMALL, va="top")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def training(axes: Axes) -> None:
    """Draw the training step of one block."""
    canvas(axes, "3  Train: each block alone, in any order", 12, 5)
    box(axes, 0.1, 3.1, 1.9, 0.9, "target y", INK)
    box(axes, 0.1, 1.0, 1.9, 0.9, "input x", INK)
    axes.text(3.1, 4.2, "z = y + sigma * eps", ha="center", fontsize=SMALL, color=INK)
    axes.text(3.25, 3.35, "sigma from the\nblock's interval", ha="center", va="top", fontsize=SMALL, color=COLORS[1])
    arrow(axes, (2.05, 3.55), (4.6, 3.55))
    arrow(axes, (2.05, 1.45), (4.6, 1.45))
    box(axes, 4.65, 0.8, 3.1, 3.5, "block 1\nstem, layers\n4 to 7, head", COLORS[1])
    arrow(axes, (7.8, 2.55), (8.4, 2.55))
    box(axes, 8.45, 2.1, 1.4, 0.9, "D(z, x)", COLORS[1])
    arrow(axes, (9.9, 2.55), (10.5, 2.55))
    axes.text(10.6, 2.55, "loss\nagainst y", va="center", fontsize=TEXT, color=INK)
    axes.text(6.2, 0.3, "in memory: weights, gradients, optimizer state and activations of these layers only",
              ha="center", fontsize=SMALL, color=INK)  # fmt: skip


def sampling(axes: Axes) -> None:
    """Draw a sampling chain from the highest noise to the lowest."""
    canvas(axes, "4  Sample: from high noise to low", 12, 5)
    steps = ((0, "80"), (0, "1.5"), (1, "0.3"), (2, "0.1"))
    axes.text(0.45, 2.55, "z\n(noise)", ha="center", va="center", fontsize=TEXT, color=INK)
    for place, (block, sigma) in enumerate(steps):
        x = 1.3 + place * 2.5
        arrow(axes, (x - 0.3 - 0.5 * (place > 0), 2.55), (x + 0.1, 2.55))
        box(axes, x + 0.15, 1.7, 1.5, 1.7, f"block {block}", COLORS[block])
        axes.text(x + 0.9, 3.75, f"sigma = {sigma}", ha="center", fontsize=SMALL, color=COLORS[block])
    arrow(axes, (10.5, 2.55), (11.05, 2.55))
    axes.text(11.5, 2.55, "y", ha="center", va="center", fontsize=TITLE, color=INK)
    axes.text(6, 0.85, "x is given to every step; each step runs the layers of one block: 1/3 of the network",
              ha="center", fontsize=SMALL, color=INK)  # fmt: skip


def main() -> None:
    """Write concept.svg beside this file."""
    plt.rcParams.update({"svg.hashsalt": "concept", "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), facecolor="white", height_ratios=(1.5, 1))
    split(axes[0, 0])
    intervals(axes[0, 1])
    training(axes[1, 0])
    sampling(axes[1, 1])
    figure.tight_layout(h_pad=2.5, w_pad=2)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
