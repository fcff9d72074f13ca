"""Pictures: generated images as PNGs and grids, denoising chains, and which block works at which step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..common.files import whole_file
from ..core.partition import Partition
from ..noise import GaussianProcess
from ..sampling import network_calls
from .figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, whose colours differ for colour-blind eyes too; its black and yellow are left out.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = "osD^vP"  # blocks differ in shape too
_DPI = 100
_READABLE = 96  # pixels of the PNG
_FRAMES = 6  # of a film strip


# ---- files ------------------------------------------------------------------------------------------------


def save_png(image: Tensor, path: Path) -> None:
    """Write one image as a PNG.

    Args:
        image: uint8, shape (C, H, W), C = 1 (grey) or 3 (RGB).
        path: the PNG; its folder is made.

    Raises:
        ValueError: another shape or dtype.
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"image must be uint8, (C, H, W) with C = 1 or 3; got {image.dtype}, {tuple(image.shape)}: "
            "to_uint8 makes pixels of normalised images"
        )
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 1, gap: int = 2) -> None:
    """Write images side by side as one PNG, row by row from the top left, without a border.

    Args:
        images: uint8, shape (n, C, H, W), C = 1 or 3, n >= 1.
        path: the PNG; its folder is made.
        columns: images in a row, >= 1; fewer images make one shorter row. Places left over are white.
        scale: every pixel becomes scale x scale pixels, >= 1.
        gap: width of the white lines between images, in pixels of the PNG, >= 0.

    Raises:
        ValueError: another shape or dtype, or a number out of its range.
    """
    save_png(tile(images, columns, scale, gap), path)


def save_pairs(images: Tensor, decoded: Tensor, path: Path, columns: int = 8) -> None:
    """Write images and their reconstructions as one PNG: each row of images has that of its reconstructions below it.

    Args:
        images, decoded: uint8 (n, C, H, W), of one shape, n >= 1.
        path: the PNG; its folder is made.
        columns: images in a row, >= 1.
    """
    columns = min(columns, len(images))
    missing = -len(images) % columns
    if missing:  # a last row that is not full, or the pairs would not be below each other
        white = torch.full_like(images[:1], 255).expand(missing, -1, -1, -1)
        images, decoded = torch.cat([images, white]), torch.cat([decoded, white])
    rows = [row for pair in zip(images.split(columns), decoded.split(columns), strict=True) for row in pair]
    save_grid(torch.cat(rows), path, columns, scale=readable_scale(images))


def film_strips(pictures: Tensor) -> Tensor:
    """Images as they are; of each video (n, C, F, H, W) a few frames, evenly spread, side by side: (n, C, H, W')."""
    if pictures.dim() != 5:
        return pictures
    frames = pictures.shape[2]
    numbers = torch.linspace(0, frames - 1, min(frames, _FRAMES)).round().long()
    return pictures[:, :, numbers].permute(0, 1, 3, 2, 4).flatten(3)


def readable_scale(images: Tensor) -> int:
    """By what whole number pictures (..., H, W) are to be enlarged, so that things in them can be made out."""
    return max(1, math.ceil(_READABLE / images.shape[-1]))


def tile(images: Tensor, columns: int, scale: int, gap: int) -> Tensor:
    """The picture of `save_grid`, uint8 (C, rows * (H * scale + gap) - gap, columns * (W * scale + gap) - gap)."""
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) < 1:
        raise ValueError(
            f"images must be uint8, (n, C, H, W), n >= 1; got {images.dtype}, {tuple(images.shape)}: "
            "to_uint8 makes pixels of normalised images"
        )
    for name, value, least in (("columns", columns, 1), ("scale", scale, 1), ("gap", gap, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    images = images.cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    n, channels, height, width = images.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    picture = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture


# ---- chains -----------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """A solver's callback that keeps one chain, on the CPU: `sample_images(..., callback=chain)`.

    Args:
        images: keep the first so many images, >= 1; default all.
        keep: keep these steps alone; default all.

    Attributes:
        steps: the steps that were kept, ascending.
        levels: the level of each.
        z, denoised: of each, float32, shape (images, C, H, W).
    """

    images: int | None = None
    keep: Collection[int] | None = None
    steps: list[int] = field(default_factory=list, init=False)
    levels: list[float] = field(default_factory=list, init=False)
    z: list[Tensor] = field(default_factory=list, init=False)
    denoised: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 1:
            raise ValueError(f"images must be >= 1 or None, got {self.images}")

    def __call__(self, step: int, level: float, z: Tensor, denoised: Tensor) -> None:
        """Keep a step.

        Raises:
            ValueError: the step is not after the one kept last.
        """
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step {step} comes after step {self.steps[-1]}: a Chain keeps one chain, make a new one")
        if self.keep is None or step in self.keep:
            self.steps.append(step)
            self.levels.append(level)
            self.z.append(z[: self.images].detach().float().cpu())
            self.denoised.append(denoised[: self.images].detach().float().cpu())


def draw_chain(
    chain: Chain,
    partition: Partition,
    noise: GaussianProcess,
    path: Path,
    *,
    pixels: Callable[[Tensor], Tensor],
    show: Sequence[str] = ("z", "denoised"),
    names: Sequence[str] | None = None,
    final: Tensor | None = None,
) -> None:
    """Write a PNG of a few chains: a row a chain, a column a step, titled with its level and the block that owns it.

    z is shown at the contrast of clean images, divided by sqrt(alpha^2 + (sigma / sigma_data)^2).

    Args:
        chain: the steps that were kept, one at least; every image in it is drawn.
        partition: which block owns which level; its blocks give the colours.
        noise: the noise process.
        path: the PNG; its folder is made.
        pixels: makes uint8 images (n, 1 or 3, H, W) of what the model sees, (n, C, h, w): `ImagesSection.to_pixels`.
        show: `z`, `denoised` (D) or both, a row each.
        names: one a chain, such as "seed 3", left of its rows; default "chain 0", "chain 1", ...
        final: what the chain ended with, (images, C, H, W); drawn as a last column.

    Raises:
        ValueError: an empty chain; show, names or final not as above.
    """
    if not chain.steps:
        raise ValueError("chain holds no step: pass it as the callback of sample_images first")
    if not show or len(set(show)) != len(show) or not set(show) <= {"z", "denoised"}:
        raise ValueError(f"show = {list(show)}: must name z, denoised or both, once")
    shape = chain.z[0].shape
    names = [f"chain {i}" for i in range(shape[0])] if names is None else names
    if len(names) != shape[0]:
        raise ValueError(f"names = {list(names)}: must be {shape[0]}, one for each image in the chain")
    if final is not None and final.shape != shape:
        raise ValueError(f"final must have the shape of the chain's images, {tuple(shape)}; got {tuple(final.shape)}")

    from matplotlib.figure import Figure

    columns: dict[str, list[Tensor]] = {"z": [], "denoised": []}
    for level, z, denoised in zip(chain.levels, chain.z, chain.denoised, strict=True):
        alpha, sigma = noise.alpha_sigma(level)
        columns["z"].append(pixels(z / math.hypot(alpha, sigma / noise.sigma_data)))
        columns["denoised"].append(pixels(denoised))
    if final is not None:
        last = pixels(final.detach())
        columns["z"].append(last)
        columns["denoised"].append(torch.full_like(last, 255) if "z" in show else last)

    size = columns["z"][0].shape
    scale, gap, apart = max(1, math.ceil(76 / size[3])), 4, 14  # wide enough for a title, in pixels of the PNG
    cell_height, cell_width = size[2] * scale, size[3] * scale
    count = len(columns["z"])
    groups = [
        tile(torch.stack([column[i] for kind in show for column in columns[kind]]), count, scale, gap)
        for i in range(shape[0])
    ]
    channels, group_height, width = groups[0].shape
    spacer = torch.full((channels, apart, width), 255, dtype=torch.uint8)
    picture = torch.cat([part for group in groups for part in (group, spacer)][:-1], dim=1)
    height = picture.shape[1]

    left, right, top, bottom = 96, 10, 66, 10
    whole = (left + width + right, top + height + bottom)
    figure = Figure(figsize=(whole[0] / _DPI, whole[1] / _DPI), dpi=_DPI)
    # Two axes in pixels of the PNG: all of it, for titles, and the images, whose pixels are drawn as they are.
    paper: Axes = figure.add_axes((0, 0, 1, 1), xlim=(0, whole[0]), ylim=(whole[1], 0))
    paper.axis("off")
    axes = figure.add_axes((left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]))
    axes.axis("off")
    axes.imshow(picture.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="none", aspect="auto")

    title = functools.partial(paper.text, ha="center", va="center", fontsize=8)
    blocks = [partition.block_of(level) for level in chain.levels]
    for column, (step, level) in enumerate(zip(chain.steps, chain.levels, strict=True)):
        middle = left + column * (cell_width + gap) + cell_width / 2
        title(middle, 12, f"step {step}")
        title(middle, 29, f"{_symbol(noise)} = {level:.3g}")
    # One bar over all neighbouring columns of a block.
    for block, group in itertools.groupby(range(len(blocks)), key=lambda column: blocks[column]):
        own = list(group)
        start = left + own[0] * (cell_width + gap)
        length = len(own) * (cell_width + gap) - gap
        paper.barh(48, length, left=start, height=17, color=_colour(block, partition.num_blocks))
        title(start + length / 2, 48.5, f"block {block}", fontweight="bold", color=_ink(block, partition.num_blocks))
    if final is not None:
        middle = left + (count - 1) * (cell_width + gap) + cell_width / 2
        title(middle, 48.5, "result", fontweight="bold")
    for i, name in enumerate(names):
        start = top + i * (group_height + apart)
        paper.text(8, start + group_height / 2, name, ha="left", va="center", fontsize=8, rotation=90)
        for row, kind in enumerate(show):
            text = "z (scaled)" if kind == "z" else "denoised"
            middle = start + row * (cell_height + gap) + cell_height / 2
            paper.text(left - 6, middle, text, ha="right", va="center", fontsize=8)
    save_figure(figure, path)


def _symbol(noise: GaussianProcess) -> str:
    return "$\\sigma$" if noise.symbol == "sigma" else noise.symbol


# ---- routing ----------------------------------------------------------------------------------------------


def draw_routing(
    partition: Partition,
    noise: GaussianProcess,
    levels: Sequence[float],
    path: Path,
    *,
    solver: str = "euler",
    churn: float = 0.0,
    churn_interval: tuple[float, float] | None = None,
) -> None:
    """Write a PNG of a chain's network calls: step across, level up, coloured by the block that each call runs.

    Args:
        partition: which block owns which level.
        noise: the noise process.
        levels: as the solver gets them, descending; every one but the last starts a step.
        path: the PNG; its folder is made.
        solver: a name in `SOLVERS`; calls that correct a step, as those of `heun`, are drawn as open marks.
        churn: its amount, see `Churn`; it raises levels.
        churn_interval: see there.

    Raises:
        ValueError: fewer than two levels, a level that no block owns, or an unknown solver.
    """
    if len(levels) < 2:
        raise ValueError(f"levels must be at least two, descending; got {list(levels)}")
    steps = len(levels) - 1
    calls = network_calls(solver, levels, noise, churn=churn, churn_interval=churn_interval)
    owners = [partition.block_of(level) for _, level, _ in calls]

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.8, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for block in range(partition.num_blocks):
        colour, marker = _colour(block, partition.num_blocks), _MARKERS[block % len(_MARKERS)]
        axes.axhspan(*partition.interval(block), color=colour, alpha=0.10, linewidth=0)
        own = [call for call, owner in zip(calls, owners, strict=True) if owner == block]
        label = f"block {block}: {_layers(partition.layer_range(block))}, {_plural(len(own), 'call')}"
        style: dict[str, Any] = {"linestyle": "none", "marker": marker, "markersize": 6, "color": colour}
        starts = [(step, level) for step, level, starts in own if starts]
        axes.plot([x for x, _ in starts], [y for _, y in starts], label=label, zorder=3, **style)
        corrections = [(step, level) for step, level, starts in own if not starts]
        if corrections:
            x, y = zip(*corrections, strict=True)
            axes.plot(x, y, zorder=2, **(style | {"markersize": 10, "markerfacecolor": "none"}))
    if noise.logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(noise.level_min / 1.6, noise.level_max * 1.6)
    axes.set_xlim(-0.5, steps - 0.5)
    labelled = math.inf
    for boundary in reversed(partition.boundaries):
        axes.axhline(boundary, color="0.35", linewidth=0.8, linestyle="--", zorder=1)
        if boundary < 0.68 * labelled or boundary == partition.boundaries[0]:  # else the numbers would overlap
            axes.annotate(
                f"{boundary:.3g}",
                (1.0, boundary),
                (4, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color="0.35",
            )
            labelled = boundary
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"{solver}: {_plural(steps, 'step')}, {_plural(len(calls), 'network call')}"
    if len(calls) > steps:
        title += " (open marks correct a step)"
    axes.set(xlabel="solver step", ylabel=f"noise level {_symbol(noise)}", title=title)
    figure.legend(fontsize=8, loc="outside right center", frameon=False)
    save_figure(figure, path)


def _layers(layers: range) -> str:
    return f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _colour(block: int, num_blocks: int) -> Any:
    """The colour of a block: of the palette, or, where that has too few, of a map from dark to light."""
    if num_blocks <= len(_PALETTE):
        return _PALETTE[block]
    from matplotlib import colormaps

    return colormaps["cividis"](block / (num_blocks - 1))


def _ink(block: int, num_blocks: int) -> str:
    """Black or white, whichever reads better on the block's colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(_colour(block, num_blocks))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
