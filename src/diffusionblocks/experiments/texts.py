"""Generated texts: files of a text model's samples, and infilling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..common.fields import MOST_SAMPLES, check_count
from ..common.files import check_writable, whole_file
from ..core.model import DiffusionBlocks
from ..data.character_text import SYMBOLS, decode, encode
from ..targets import TokenTarget
from .recipe import BitsConfig, Recipe
from .scores import precision

GAP = "_"
"""Stands for a character to be filled in."""


def write_texts(
    recipe: Recipe,
    model: DiffusionBlocks,
    folder: Path,
    *,
    count: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    grid: str | None = None,
    temperature: float | None = None,
    infill: str | None = None,
    progress: bool = False,
) -> Path:
    """Generate texts and write them to `folder`/samples.txt, one a line.

    Args:
        recipe: of a text model; says the precision, and the defaults of what follows.
        model: its blocks.
        folder: where the file goes.
        count: how many texts.
        seed: text i has seed `seed` + i.
        steps, grid, temperature: see `DiffusionBlocks.generate`.
        infill: a text whose gaps (`_`) are filled in. It is the start of a text of the model's length, of which the
            line has the part that it covers.
        progress: show a progress bar.

    Returns:
        The file.

    Raises:
        ValueError: no text model of the 27 characters, count < 1, or an infill with other characters, without a gap or
            longer than the model's texts.
    """
    options, target = recipe.evaluate, model.target
    if not isinstance(options, BitsConfig) or not isinstance(target, TokenTarget):
        raise ValueError(f"only text models make texts; {recipe.model.type} is none")
    if target.vocab_size != len(SYMBOLS):
        raise ValueError(
            f"only models of the {len(SYMBOLS)} characters make texts that can be read, not of {target.vocab_size} "
            "tokens; use DiffusionBlocks.generate"
        )
    count = options.samples if count is None else count
    check_count("count", count, MOST_SAMPLES)
    check_writable(folder, "the samples' folder")
    given = None if infill is None else _pattern(infill, target)
    length = target.length if infill is None else len(infill)
    first = options.seed if seed is None else seed
    lines: list[str] = []
    with precision(recipe, model):
        for seeds in _groups(range(first, first + count), options.batch_size):
            tokens = model.generate(
                seeds,
                steps=options.steps if steps is None else steps,
                grid=grid or options.grid,
                temperature=options.temperature if temperature is None else temperature,
                template=given,
                progress=progress,
            )
            lines += [decode(row[:length]) for row in tokens]
    path = folder / "samples.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    return path


def _pattern(infill: str, target: TokenTarget) -> Tensor:
    """The known tokens of a text of the model's length; what is not known is the mask."""
    if wrong := sorted(set(infill) - set(SYMBOLS + GAP)):
        raise ValueError(f"infill = {infill!r}: must be of letters a to z, spaces and gaps ({GAP}), has {wrong}")
    if GAP not in infill or len(infill) > target.length:
        raise ValueError(
            f"infill = {infill!r}: must have a gap ({GAP}) and at most {target.length} characters, has {len(infill)}"
        )
    tokens = torch.full((target.length,), target.mask_id)
    gaps = torch.tensor([character == GAP for character in infill])
    tokens[: len(infill)] = encode(infill.replace(GAP, " ")).long().masked_fill(gaps, target.mask_id)
    return tokens


def _groups(seeds: range, size: int) -> Iterator[range]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]
