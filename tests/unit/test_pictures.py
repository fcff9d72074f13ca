"""Pixels, grids and figures: exact where pixels are promised, readable and not empty where they are drawn."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import seeded
from PIL import Image
from torch import Tensor

from diffusionblocks import EDM, Partition
from diffusionblocks.data import ImageData, evaluation_batches
from diffusionblocks.data.image_batches import to_uint8
from diffusionblocks.reports import pictures
from diffusionblocks.reports.pictures import Chain, draw_chain, draw_routing, save_grid, save_png
from diffusionblocks.sampling import prior_of_seeds, sample_images

NOISE = EDM()
PARTITION = Partition.build(NOISE, num_layers=12, num_blocks=3)
MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.25, 0.3)


shown = functools.partial(to_uint8, mean=MEAN, std=STD)


def halved(channels: int) -> Callable[[Tensor], Tensor]:
    return functools.partial(to_uint8, mean=(0.5,) * channels, std=(0.5,) * channels)


def pixels(n: int = 4, channels: int = 3, height: int = 5, width: int = 7) -> Tensor:
    return torch.randint(0, 256, (n, channels, height, width), generator=seeded(), dtype=torch.uint8)


def read(path: Path) -> Tensor:
    """The PNG as uint8 (C, H, W)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        array = numpy.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


# ---- pixels -----------------------------------------------------------------------------------------------


def test_to_uint8_undoes_the_normalisation_of_every_pixel() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, -1, -1).contiguous()
    data = ImageData(images=every, labels=torch.zeros(2, dtype=torch.int64), class_names=("a", "b"))
    (batch,) = evaluation_batches(data, mean=MEAN, std=STD, batch_size=2, device=torch.device("cpu"))
    assert torch.equal(to_uint8(batch["pixel_values"], MEAN, STD), every)
    assert not torch.equal(to_uint8(batch["pixel_values"], MEAN[::-1], STD), every)  # each channel has its own


def test_to_uint8_rounds_and_clamps() -> None:
    x = torch.tensor([-9.0, -0.51 / 255, 0.49 / 255, 0.51 / 255, 99.6 / 255, 254.4 / 255, 254.6 / 255, 3.0, 1e30])
    made = to_uint8(x.reshape(1, 1, 1, -1), (0.0,), (1.0,))
    assert made.dtype == torch.uint8
    assert made.flatten().tolist() == [0, 0, 0, 1, 100, 254, 255, 255, 255]
    assert to_uint8(x.double().reshape(1, 1, 3, 3), (0.0,), (1.0,)).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel_and_leaves_no_other_file(tmp_path: Path, channels: int) -> None:
    (image,) = pixels(1, channels)
    path = tmp_path / "new" / "image.png"
    save_png(image, path)
    assert torch.equal(read(path), image)
    save_png(255 - image, path)  # an older file is replaced
    assert torch.equal(read(path), 255 - image)
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image,) = pixels(1)
    save_png(image, tmp_path / "image.png")

    def half(self: Image.Image, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_png(255 - image, tmp_path / "image.png")
    assert torch.equal(read(tmp_path / "image.png"), image)
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


# ---- grids ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("n", "columns", "scale", "gap"), [(5, 3, 1, 2), (4, 2, 3, 0), (6, 6, 2, 1), (3, 1, 1, 4)])
def test_grid_geometry(tmp_path: Path, channels: int, n: int, columns: int, scale: int, gap: int) -> None:
    images = pixels(n, channels)
    save_grid(images, tmp_path / "grid.png", columns, scale, gap)
    grid = read(tmp_path / "grid.png")
    rows, height, width = math.ceil(n / columns), 5 * scale, 7 * scale
    assert grid.shape == (channels, rows * height + (rows - 1) * gap, columns * width + (columns - 1) * gap)
    covered = torch.zeros(grid.shape[1:], dtype=torch.bool)
    for i in range(n):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        place = slice(top, top + height), slice(left, left + width)
        enlarged = torch.from_numpy(numpy.kron(images[i].numpy(), numpy.ones((1, scale, scale), dtype=numpy.uint8)))
        assert torch.equal(grid[:, *place], enlarged)
        covered[place] = True
    assert bool((grid[:, ~covered] == 255).all())
    assert int(covered.sum()) == n * height * width


def test_grid_of_fewer_images_than_columns_is_as_wide_as_they_are(tmp_path: Path) -> None:
    images = pixels(2)
    save_grid(images, tmp_path / "grid.png", columns=8)
    assert read(tmp_path / "grid.png").shape == (3, 5, 7 + 2 + 7)


# ---- refusals ---------------------------------------------------------------------------------------------

CLEAN = torch.zeros(2, 3, 4, 4)
NOWHERE = Path("never") / "written.png"


def chain_of(steps: int = 2, images: int = 2, size: int = 4) -> Chain:
    chain = Chain()
    for step, level in enumerate(NOISE.levels(steps)[:-1]):
        chain(step, level, torch.randn(images, 3, size, size), torch.zeros(images, 3, size, size))
    return chain


def drawn(chain: Chain, **kwargs: Any) -> None:
    draw_chain(chain, PARTITION, NOISE, NOWHERE, pixels=shown, **kwargs)


REFUSED: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: to_uint8(pixels(), MEAN, STD), ("floating", "uint8")),
    (lambda: to_uint8(CLEAN[0], MEAN, STD), ("(n, C, H, W)", "(3, 4, 4)")),
    (lambda: to_uint8(CLEAN, (0.5,), STD), ("mean = [0.5]", "3 finite", "one per channel")),
    (lambda: to_uint8(CLEAN, MEAN, (1.0, math.nan, 1.0)), ("std = [1.0, nan, 1.0]", "finite")),
    (lambda: to_uint8(CLEAN, MEAN, (1.0, 0.0, 1.0)), ("std = [1.0, 0.0, 1.0]", "> 0")),
    (lambda: to_uint8(CLEAN + math.nan, MEAN, STD), ("finite", "nan")),
    (lambda: to_uint8(CLEAN - math.inf, MEAN, STD), ("finite", "inf")),
    (lambda: save_png(CLEAN[0], NOWHERE), ("uint8", "float32", "to_uint8")),
    (lambda: save_png(pixels(), NOWHERE), ("(C, H, W)", "(4, 3, 5, 7)")),
    (lambda: save_png(pixels(1, 2)[0], NOWHERE), ("C = 1 or 3", "(2, 5, 7)")),
    (lambda: save_grid(CLEAN, NOWHERE, 2), ("uint8", "float32", "to_uint8")),
    (lambda: save_grid(pixels()[:0], NOWHERE, 2), ("n >= 1", "(0, 3, 5, 7)")),
    (lambda: save_grid(pixels(), NOWHERE, 0), ("columns", ">= 1", "0")),
    (lambda: save_grid(pixels(), NOWHERE, 2, scale=0), ("scale", ">= 1", "0")),
    (lambda: save_grid(pixels(), NOWHERE, 2, scale=1.5), ("scale", "whole number", "1.5")),  # type: ignore[arg-type]
    (lambda: save_grid(pixels(), NOWHERE, 2, gap=-1), ("gap", ">= 0", "-1")),
    (lambda: Chain(images=0), ("images", ">= 1", "0")),
    (lambda: drawn(Chain()), ("no step", "callback")),
    (lambda: drawn(chain_of(), show=("x",)), ("['x']", "z, denoised")),
    (lambda: drawn(chain_of(), show=()), ("[]", "z, denoised")),
    (lambda: drawn(chain_of(), names=["a"]), ("['a']", "must be 2")),
    (lambda: drawn(chain_of(), final=CLEAN[:1]), ("(2, 3, 4, 4)", "(1, 3, 4, 4)")),
    (lambda: draw_routing(PARTITION, NOISE, [80.0], NOWHERE), ("at least two", "[80.0]")),
    (lambda: draw_routing(PARTITION, NOISE, [90.0, 1.0], NOWHERE), ("90", "[0.002, 80]")),
    (lambda: draw_routing(PARTITION, NOISE, [80.0, 1.0], NOWHERE, solver="ddim"), ("'ddim'", "euler")),
]


@pytest.mark.parametrize(("act", "words"), REFUSED)
def test_refused_with_the_value_and_what_is_allowed(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        act()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"the message lacks {missing}: {error.value}"
    assert not NOWHERE.parent.exists()


# ---- figures ----------------------------------------------------------------------------------------------


def sampled(steps: int = 6, **kwargs: Any) -> tuple[Chain, Tensor]:
    """A chain that denoises towards a square, and what it ends with."""
    square = torch.zeros(3, 8, 8)
    square[:, 2:6, 2:6] = 1.0
    chain = Chain(**kwargs)
    final = sample_images(
        lambda z, level: square + (z - square) * 0.25 / (0.25 + level**2),
        prior_of_seeds(NOISE, (3, 8, 8), [0, 1, 2], "cpu"),
        NOISE.sampling_levels(steps),
        NOISE,
        callback=chain,
    )
    return chain, final


def test_a_chain_keeps_the_steps_and_images_it_is_told_to() -> None:
    whole, _ = sampled()
    assert whole.steps == [0, 1, 2, 3, 4, 5]
    assert whole.levels == NOISE.sampling_levels(6)[:-1]
    assert torch.equal(whole.z[0], prior_of_seeds(NOISE, (3, 8, 8), [0, 1, 2], "cpu"))
    part, _ = sampled(images=2, keep=(1, 4))
    assert part.steps == [1, 4]
    assert part.levels == [whole.levels[1], whole.levels[4]]
    for step, z, denoised in zip(part.steps, part.z, part.denoised, strict=True):
        assert torch.equal(z, whole.z[step][:2])
        assert torch.equal(denoised, whole.denoised[step][:2])


def test_a_chain_keeps_one_chain() -> None:
    chain, _ = sampled()
    with pytest.raises(ValueError, match="step 0 comes after step 5: a Chain keeps one"):
        chain(0, 80.0, chain.z[0], chain.z[0])


def holds(picture: Tensor, part: Tensor) -> bool:
    """Whether `part` (3, h, w) lies somewhere in `picture`, pixel by pixel."""
    _, height, width = part.shape
    windows = picture.unfold(1, height, 1).unfold(2, width, 1)
    corners = (windows[..., 0, 0] == part[:, None, None, 0, 0]).all(dim=0).nonzero().tolist()
    return any(torch.equal(windows[:, y, x], part) for y, x in corners)


def colour(rgb: Any) -> Tensor:
    from matplotlib.colors import to_rgb

    return torch.tensor([round(255 * value) for value in to_rgb(rgb)], dtype=torch.uint8)


def area(picture: Tensor, rgb: Any) -> int:
    return int((picture == colour(rgb)[:, None, None]).all(dim=0).sum())


def test_chain_figure_shows_every_image_pixel_by_pixel(tmp_path: Path) -> None:
    chain, final = sampled(images=2, keep=(0, 3, 5))
    path = tmp_path / "new" / "chain.png"
    draw_chain(
        chain,
        PARTITION,
        NOISE,
        path,
        pixels=halved(3),
        final=final[:2],
    )
    picture = read(path)[:3]
    for i in range(2):
        for denoised in [*chain.denoised, final]:
            cell = to_uint8(denoised[i : i + 1], (0.5,) * 3, (0.5,) * 3)[0]
            assert holds(picture, cell.repeat_interleave(10, 1).repeat_interleave(10, 2))
    assert not holds(picture, (255 - cell).repeat_interleave(10, 1).repeat_interleave(10, 2))
    assert [file.name for file in path.parent.iterdir()] == ["chain.png"]


def test_chain_figure_has_the_colours_of_the_blocks_that_worked(tmp_path: Path) -> None:
    chain, _ = sampled(images=1, keep=(0, 1, 5))
    assert [PARTITION.block_of(level) for level in chain.levels] == [0, 0, 2]
    for name in ("z", "denoised"):
        draw_chain(
            chain,
            PARTITION,
            NOISE,
            tmp_path / "c.png",
            pixels=halved(3),
            show=(name,),
        )
        areas = [area(read(tmp_path / "c.png")[:3], pictures._colour(block, 3)) for block in range(3)]
        assert areas[0] > 1.5 * areas[2] > 0  # two columns and one
        assert areas[1] == 0


def test_chain_figure_of_grey_images_and_of_one_of_the_rows(tmp_path: Path) -> None:
    chain = Chain()
    for step, level in enumerate((80.0, 0.3)):
        chain(step, level, torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4))
    sizes = []
    for show in (("z", "denoised"), ("denoised",)):
        path = tmp_path / f"{len(show)}.png"
        draw_chain(
            chain,
            PARTITION,
            NOISE,
            path,
            pixels=halved(1),
            show=show,
            names=["seed 5"],
        )
        sizes.append(read(path).shape)
    assert sizes[0][2] == sizes[1][2]
    assert sizes[0][1] - sizes[1][1] == 4 * 19 + 4  # one row of cells and a gap less


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_routing_figure_has_the_colours_of_its_blocks(tmp_path: Path, blocks: int) -> None:
    partition = Partition.build(NOISE, num_layers=12, num_blocks=blocks)
    path = tmp_path / "routing.png"
    draw_routing(partition, NOISE, NOISE.sampling_levels(24), path)
    picture = read(path)[:3]
    assert all(area(picture, pictures._colour(block, blocks)) > 50 for block in range(blocks))
    assert len({tuple(colour(pictures._colour(block, blocks)).tolist()) for block in range(blocks)}) == blocks
    assert [file.name for file in tmp_path.iterdir()] == ["routing.png"]


@pytest.mark.slow
def test_routing_figure_draws_the_corrections_of_heun(tmp_path: Path) -> None:
    levels = NOISE.sampling_levels(10)
    for solver in ("euler", "heun"):
        draw_routing(PARTITION, NOISE, levels, tmp_path / f"{solver}.png", solver=solver)
    assert not torch.equal(read(tmp_path / "euler.png"), read(tmp_path / "heun.png"))


@pytest.mark.slow
def test_a_block_that_does_not_work_has_no_mark(tmp_path: Path) -> None:
    """Block 1 keeps its colour in the legend alone."""
    draw_routing(PARTITION, NOISE, [80.0, 60.0, 40.0, 20.0, 0.01, 0.005, 0.0], tmp_path / "without.png")
    draw_routing(PARTITION, NOISE, [80.0, 60.0, 0.4, 0.3, 0.01, 0.005, 0.0], tmp_path / "with.png")
    without, with_ = (area(read(tmp_path / f"{name}.png")[:3], pictures._colour(1, 3)) for name in ("without", "with"))
    assert with_ > 1.5 * without
