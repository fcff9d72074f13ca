"""Pictures of a diffusion model's samples: files, a grid, a chain over its steps, and which block makes which step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..common.fields import MOST_SAMPLES, check_count
from ..common.files import check_writable
from ..common.machine import host_memory
from ..core.model import DiffusionBlocks
from ..data.data_config import PixelsConfig
from ..evaluation.sample_quality import Setting, generated
from ..noise import GaussianProcess
from ..reports.pictures import Chain, draw_chain, draw_routing, save_grid, save_png
from ..targets import ImageTarget, check_labels
from .recipe import Recipe, SamplesConfig
from .scores import precision, settings_of
from .sources import pixels_of

_CHAINS, _COLUMNS = 3, 8  # what the picture of chains shows


def draw_samples(
    recipe: Recipe,
    model: DiffusionBlocks,
    folder: Path,
    *,
    count: int | None = None,
    labels: Sequence[int] | None = None,
    setting: Setting | None = None,
    seed: int | None = None,
    files: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Sample images and draw them.

    Args:
        recipe: of a diffusion model; says how samples become pixels, the precision, and the defaults of what follows.
        model: its blocks.
        folder: where `grid.png`, `chain.png`, `routing.png` (and `images/`) go.
        count: how many images; default one a label, or the recipe's `grid_images`.
        labels: the images' labels, repeated in turn up to `count`; default all classes in turn.
        setting: how to sample; default the first of the recipe.
        seed: image i has seed `seed` + i; default the recipe's.
        files: also write every image to `images/SEED-LABEL.png`.
        progress: show a progress bar.

    Returns:
        The pictures written.

    Raises:
        ValueError: no diffusion model, a count < 1 or of more images than memory holds, a label out of range, a folder
            that cannot be written into, or see `DiffusionBlocks.sample`.
    """
    options, target = recipe.evaluate, model.target
    if not isinstance(options, SamplesConfig) or not isinstance(target, ImageTarget):
        raise ValueError(f"only diffusion models of images make pictures, and {recipe.model.type} is none")
    assert isinstance(model.noise, GaussianProcess)
    count = count if count is not None else len(labels) if labels is not None else options.grid_images
    check_count("count", count, MOST_SAMPLES)
    if count * math.prod(target.shape) > host_memory():
        raise ValueError(
            f"count = {count:,} images of {'x'.join(map(str, target.shape))} are {count * math.prod(target.shape):,} "
            "bytes, more than this machine's memory: draw fewer at a time, each time with another seed"
        )
    if labels is not None and not target.num_classes:
        raise ValueError(f"this {model.model_class} is unconditional and takes no labels; leave them out")
    if labels is not None:  # all of them, not only those of the first batch
        check_labels(
            torch.tensor(list(labels)), len(labels), target.num_classes, null_class=target.null_class is not None
        )
    check_writable(folder, "the samples' folder")
    setting = setting or settings_of(options)[0]
    target.check_guidance(setting.guidance)
    first = options.seed if seed is None else seed
    turns = list(labels) if labels is not None else list(range(target.num_classes))
    pixels = pixels_of(recipe, model.device)
    keep = sorted({round(i * (setting.steps - 1) / (_COLUMNS - 1)) for i in range(_COLUMNS)})
    chain = Chain(images=_CHAINS, keep=keep)

    images: list[Tensor] = []
    batches = generated(
        model,
        count,
        setting,
        batch_size=options.batch_size,
        seed=first,
        labels=labels,
        callback=chain,
        progress=progress,
    )
    with precision(recipe, model):
        for batch in batches:
            if not images:
                final = batch[:_CHAINS].cpu()
            images.append(pixels(batch).cpu())
    drawn = torch.cat(images)

    columns = len(turns) if 2 <= len(turns) <= 20 else math.ceil(math.sqrt(count))
    grid, routing, steps = folder / "grid.png", folder / "routing.png", folder / "chain.png"
    scale = max(1, 48 // drawn.shape[-1])
    save_grid(drawn, grid, columns, scale=scale)
    levels = model.noise.sampling_levels(setting.steps, setting.grid)
    draw_routing(model.partition, model.noise, levels, routing, solver=setting.solver)
    written = [grid, routing]
    if isinstance(recipe.data, PixelsConfig):  # a chain of latents would have to be decoded step by step
        names = [f"seed {first + i}" for i in range(len(final))]
        draw_chain(
            chain,
            model.partition,
            model.noise,
            steps,
            mean=recipe.data.mean,
            std=recipe.data.std,
            names=names,
            final=final,
        )
        written.append(steps)
    if files:
        for i, image in enumerate(drawn):
            label = f"-{turns[i % len(turns)]:04d}" if turns else ""
            save_png(image, folder / "images" / f"{first + i:06d}{label}.png")
        written.append(folder / "images")
    return written
