"""Augmentation against Pillow, which torchvision's RandAugment calls for Pillow images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from diffusionblocks.data.augment import RANDAUGMENT_BINS, RANDAUGMENT_OPS, Augment, AugmentConfig

MAGNITUDES = (0, 3, 9, 21, 30)
GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIZES = ((3, 32, 32), (3, 7, 12), (1, 8, 8), (1, 1, 5), (3, 2, 2))


def make_images(n: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    """Noise, low-contrast noise, gradients and constant images in turn."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (n, c, h, w), generator=g)
    images = noise.clone()
    images[1::4] = noise[1::4] // 3 + 40
    images[2::4] = (torch.arange(h * w).view(h, w) * 255) // max(h * w - 1, 1)
    images[3::4] = noise[3::4, :, :1, :1]
    return images.to(torch.uint8)


def draws_for(aug: Augment, n: int, ops: list[str], sign: int = 1) -> Tensor:
    """Draws that leave crop and flip alone and give every image these operations, one per slot."""
    draws = torch.full((n, aug.num_draws), 0.5)
    draws[:, 2] = 0.75
    for slot, op in enumerate(ops):
        draws[:, 3 + 2 * slot] = (RANDAUGMENT_OPS.index(op) + 0.5) / len(RANDAUGMENT_OPS)
        draws[:, 4 + 2 * slot] = 0.75 if sign > 0 else 0.25
    return draws


def to_pil(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def from_pil(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)


def level(largest: float, magnitude: int) -> float:
    return float(torch.linspace(0.0, largest, RANDAUGMENT_BINS)[magnitude])


def pillow(op: str, image: Image.Image, magnitude: int, s: int) -> Image.Image:
    """One operation as torchvision's RandAugment hands it to Pillow, with its inverse affine matrices."""
    w, h = image.size
    shear, degrees, enhance = (
        s * level(0.3, magnitude),
        s * level(30.0, magnitude),
        1 + s * level(0.9, magnitude),
    )
    dx, dy = (s * int(level(150.0 / 331.0 * size, magnitude)) for size in (w, h))

    def affine(*matrix: float) -> Image.Image:
        return image.transform((w, h), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0)

    table: dict[str, Callable[[], Image.Image]] = {
        "Identity": lambda: image,
        "ShearX": lambda: affine(1, math.tan(math.atan(shear)), 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, math.tan(math.atan(shear)), 1, 0),
        "TranslateX": lambda: affine(1, 0, -dx, 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, -dy),
        "Rotate": lambda: image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=0),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(enhance),
        "Color": lambda: ImageEnhance.Color(image).enhance(enhance),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(enhance),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(enhance),
        "Posterize": lambda: ImageOps.posterize(image, 8 - round(magnitude / 7.5)),
        "Solarize": lambda: ImageOps.solarize(image, 255.0 - level(255.0, magnitude)),  # type: ignore[arg-type]
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
    }
    return table[op]()


def compare(op: str, magnitude: int, sign: int, images: Tensor) -> Tensor:
    """Absolute difference to Pillow, int64 (n, C, H, W)."""
    aug = Augment(AugmentConfig(randaugment_ops=1, randaugment_magnitude=magnitude))
    got = aug.apply(images, draws_for(aug, len(images), [op], sign))
    want = torch.stack([from_pil(pillow(op, to_pil(image), magnitude, sign)) for image in images])
    assert got.dtype == torch.uint8
    return (got.long() - want.long()).abs()


@pytest.mark.parametrize("op", ["Identity", *GEOMETRIC, "Posterize", "Solarize", "Equalize"])
def test_ops_equal_pillow_exactly(op: str) -> None:
    for shape in SIZES:
        images = make_images(8, *shape)
        for magnitude in MAGNITUDES:
            for sign in (1, -1):
                assert int(compare(op, magnitude, sign, images).max()) == 0, (shape, magnitude, sign)


@pytest.mark.parametrize("op", ["Brightness", "Color", "Contrast", "Sharpness", "AutoContrast"])
def test_ops_equal_pillow_up_to_its_rounding(op: str) -> None:
    # Pillow multiplies these in floating point and then truncates: where the exact product is (nearly) a
    # whole number, rounding decides between two levels. It hardly ever does at the default magnitude, 9.
    total = different = 0
    for shape in SIZES:
        images = make_images(8, *shape)
        for magnitude in range(0, RANDAUGMENT_BINS, 3):
            for sign in (1, -1):
                if op == "AutoContrast" and (magnitude, sign) != (9, 1):
                    continue
                difference = compare(op, magnitude, sign, images)
                assert int(difference.max()) <= 1, (shape, magnitude, sign)
                total, different = total + difference.numel(), different + int((difference > 0).sum())
                if magnitude in (0, 9) and op != "AutoContrast":
                    assert int((difference > 0).sum()) <= difference.numel() // 1000, (shape, magnitude, sign)
    assert different <= total * 0.01


def test_autocontrast_differs_from_pillow_only_at_whole_quotients() -> None:
    for low in range(0, 200, 13):
        for high in range(low + 1, 256, 9):
            ramp = torch.arange(low, high + 1, dtype=torch.uint8).view(1, 1, 1, -1)
            difference = compare("AutoContrast", 9, 1, ramp)
            quotient_is_whole = (ramp.long() - low) * 255 % (high - low) == 0
            assert int(difference.max()) <= 1
            assert not bool((difference > 0)[~quotient_is_whole].any())


def test_equalize_leaves_nearly_constant_images_alone() -> None:
    # 300 pixels of which 60 are not the largest value: Pillow's step is 60 // 255 = 0.
    image = torch.full((1, 1, 15, 20), 200, dtype=torch.uint8)
    image[0, 0, :3] = torch.arange(60).view(3, 20).to(torch.uint8)
    assert int(compare("Equalize", 9, 1, image).max()) == 0
    aug = Augment(AugmentConfig(randaugment_ops=1))
    assert torch.equal(aug.apply(image, draws_for(aug, 1, ["Equalize"])), image)


def test_equalize_clips_at_white() -> None:
    # The remainder of 509 / 255 (step 1) drives the table to 509: Pillow clips.
    image = torch.full((1, 1, 1, 510), 250, dtype=torch.uint8)
    image[0, 0, 0, :509] = (torch.arange(509) % 200).to(torch.uint8)
    assert int(compare("Equalize", 9, 1, image).max()) == 0


def test_magnitude_zero_is_the_identity_for_graded_ops() -> None:
    images = make_images(8, 3, 9, 11)
    images[images == 255] = 254  # Solarize at 0 has the threshold 255, and inverts 255 itself, as in torchvision.
    aug = Augment(AugmentConfig(randaugment_ops=1, randaugment_magnitude=0))
    for op in set(RANDAUGMENT_OPS) - {"AutoContrast", "Equalize"}:
        for sign in (1, -1):
            assert torch.equal(aug.apply(images, draws_for(aug, 8, [op], sign)), images), op


def test_no_augmentation_returns_the_images_themselves() -> None:
    aug, images = Augment(AugmentConfig()), make_images(4, 3, 8, 8)
    assert aug.apply(images, aug.draw(4, "cpu", None)) is images


def test_slots_run_one_after_the_other() -> None:
    images = make_images(4, 3, 16, 16)
    ops = ["Rotate", "Equalize", "TranslateX", "Solarize"]
    aug = Augment(AugmentConfig(randaugment_ops=4))
    one = Augment(AugmentConfig(randaugment_ops=1))
    want = images
    for op in ops:
        want = one.apply(want, draws_for(one, 4, [op], -1))
    assert torch.equal(aug.apply(images, draws_for(aug, 4, ops, -1)), want)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip(padding: int, flip: bool) -> None:
    images = make_images(64, 3, 6, 9)
    aug = Augment(AugmentConfig(crop_padding=padding, flip=flip))
    draws = aug.draw(64, "cpu", torch.Generator().manual_seed(1))
    got = aug.apply(images, draws)
    for image, row, result in zip(images, draws.tolist(), got, strict=True):
        padded = torch.nn.functional.pad(image, (padding,) * 4)
        top, left = (math.floor(u * (2 * padding + 1)) for u in row[:2])
        want = padded[:, top : top + 6, left : left + 9]
        assert torch.equal(result, want.flip(2) if flip and row[2] < 0.5 else want)


@pytest.mark.parametrize("op", RANDAUGMENT_OPS)
def test_first_slot_sees_the_cropped_and_flipped_image(op: str) -> None:
    # Crop, flip and the first slot's geometry share one gather; they have to act as if one after the other.
    both = Augment(AugmentConfig(crop_padding=3, flip=True, randaugment_ops=1, randaugment_magnitude=20))
    first = Augment(AugmentConfig(crop_padding=3, flip=True))
    second = Augment(AugmentConfig(randaugment_ops=1, randaugment_magnitude=20))
    images = make_images(32, 3, 10, 8)
    draws = draws_for(both, 32, [op])
    draws[:, :3] = first.draw(32, "cpu", torch.Generator().manual_seed(2))
    want = second.apply(first.apply(images, draws[:, :3]), draws)
    assert torch.equal(both.apply(images, draws), want)


def test_crop_offsets_and_flips_are_uniform() -> None:
    n, p = 9000, 1
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(n, 1, 3, 3)
    aug = Augment(AugmentConfig(crop_padding=p, flip=True))
    got = aug.apply(image, aug.draw(n, "cpu", torch.Generator().manual_seed(0)))
    # The centre pixel tells the offset up to the flip; flipped rows run backwards.
    centres = got[:, 0, 1, 1].long().bincount(minlength=10)[1:]
    assert bool((centres.float() - n / 9).abs().max() < 5 * math.sqrt(n / 9))
    row = got[:, 0, 1].long()
    flipped = ((row[:, 1] < row[:, 0]) & (row[:, 0] > 0)) | ((row[:, 2] < row[:, 1]) & (row[:, 2] > 0))
    assert abs(int(flipped.sum()) - n / 2) < 5 * math.sqrt(n / 4)


def test_operations_are_drawn_uniformly_and_signs_fairly() -> None:
    n = 28_000
    aug = Augment(AugmentConfig(randaugment_ops=2))
    draws = aug.draw(n, "cpu", torch.Generator().manual_seed(0))
    for slot in range(2):
        counts = (draws[:, 3 + 2 * slot] * 14).int().bincount(minlength=14)
        assert bool((counts.float() - n / 14).abs().max() < 5 * math.sqrt(n / 14))
        assert abs(int((draws[:, 4 + 2 * slot] < 0.5).sum()) - n / 2) < 5 * math.sqrt(n / 4)


def test_extreme_draws_stay_in_range() -> None:
    # 1 itself is not drawn, but a product that rounds up must not leave the tables.
    aug = Augment(AugmentConfig(crop_padding=2, flip=True, randaugment_ops=2))
    images = make_images(4, 3, 8, 8)
    for value in (0.0, 1.0 - 2**-24, 1.0):
        assert aug.apply(images, torch.full((4, aug.num_draws), value)).shape == images.shape


def test_draws_follow_the_generator() -> None:
    aug = Augment(AugmentConfig(crop_padding=4, flip=True, randaugment_ops=2))
    a, b, c = (aug.draw(16, "cpu", torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert a.dtype == torch.float32
    assert a.shape == (16, aug.num_draws) == (16, 7)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    images = make_images(16, 3, 8, 8)
    before = images.clone()
    assert torch.equal(aug.apply(images, a), aug.apply(images, b))
    assert torch.equal(images, before), "apply must not write to its input"


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 5),
    st.sampled_from([1, 3]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 30),
    st.integers(0, 99),
)
def test_each_image_is_augmented_alone(
    n: int, c: int, h: int, w: int, padding: int, flip: bool, ops: int, magnitude: int, seed: int
) -> None:
    aug = Augment(AugmentConfig(padding, flip, ops, magnitude))
    images = make_images(n, c, h, w, seed)
    draws = aug.draw(n, "cpu", torch.Generator().manual_seed(seed))
    got = aug.apply(images, draws)
    assert got.dtype == torch.uint8
    assert got.shape == images.shape
    for i in range(n):
        assert torch.equal(aug.apply(images[i : i + 1], draws[i : i + 1])[0], got[i])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(RANDAUGMENT_OPS),
    st.sampled_from([1, 3]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 30),
    st.sampled_from([1, -1]),
)
def test_any_size_agrees_with_pillow(op: str, c: int, h: int, w: int, magnitude: int, sign: int) -> None:
    assert int(compare(op, magnitude, sign, make_images(4, c, h, w)).max()) <= 1


@pytest.mark.slow
def test_traces_without_graph_breaks() -> None:
    torch.compiler.reset()
    aug = Augment(AugmentConfig(crop_padding=4, flip=True, randaugment_ops=2))
    images = make_images(8, 3, 8, 8)
    draws = aug.draw(8, "cpu", torch.Generator().manual_seed(0))
    # fullgraph=True raises at the first graph break.
    traced = torch.compile(aug.apply, fullgraph=True, backend="eager")
    assert torch.equal(traced(images, draws), aug.apply(images, draws))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    torch.compiler.reset()
    aug = Augment(AugmentConfig(crop_padding=4, flip=True, randaugment_ops=2))
    compiled = torch.compile(aug.apply, fullgraph=True)
    for n in (64, 48):
        images = make_images(n, 3, 32, 32)
        draws = aug.draw(n, "cpu", torch.Generator().manual_seed(n))
        assert torch.equal(compiled(images, draws), aug.apply(images, draws))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("crop_padding", -1, "from 0 to 16384"),
        ("crop_padding", 1.5, "from 0 to 16384"),
        ("crop_padding", True, "from 0 to 16384"),
        ("flip", 1, "true or false"),
        ("randaugment_ops", -2, "from 0 to 100"),
        ("randaugment_magnitude", 31, "0 to 30"),
        ("randaugment_magnitude", -1, "0 to 30"),
    ],
)
def test_config_names_field_value_and_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value}.*{allowed}"):
        AugmentConfig(**{field: value})  # type: ignore[arg-type]


def test_apply_refuses_wrong_arguments() -> None:
    aug = Augment(AugmentConfig(flip=True))
    images, draws = make_images(4, 3, 8, 8), aug.draw(4, "cpu", None)
    for wrong in (images.float(), images[0], images[:, :2]):
        with pytest.raises(ValueError, match=r"images: .*must be uint8"):
            aug.apply(wrong, draws)
    for wrong in (draws[:3], draws[:, :2], draws[0]):
        with pytest.raises(ValueError, match=r"draws: .*must be \(4, 3\)"):
            aug.apply(images, wrong)
