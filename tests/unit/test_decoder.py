"""Encoded pictures to pixels: depth, transparency, orientation, colour spaces; right, or refused with the row."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusionblocks.data import image_classification
from diffusionblocks.data.image_decoder import BACKGROUND, decode_image, oversized_refused
from diffusionblocks.data.image_table import ImageRow


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def levels(data: bytes, channels: int = 1) -> np.ndarray:
    return np.asarray(decode_image(data, "here", channels))


def colours(height: int = 4, width: int = 6, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_keep_the_upper_eight(kind: str) -> None:
    values = (np.arange(64).reshape(8, 8) * 1000 + 300).astype(np.uint16)
    data = encoded(Image.fromarray(values), kind)
    assert np.array_equal(levels(data), values >> 8)
    assert np.array_equal(levels(data, 3), np.repeat((values >> 8)[..., None], 3, axis=2))


def test_transparent_pixels_show_the_background() -> None:
    def drawn(hidden: tuple[int, int, int]) -> Image.Image:
        array = np.zeros((4, 4, 4), np.uint8)
        array[..., :3] = hidden
        array[1, 1] = (200, 60, 30, 255)
        return Image.fromarray(array)

    for hidden in ((0, 0, 0), (240, 30, 10)):
        picture = drawn(hidden)
        palette = picture.quantize(2)
        assert palette.has_transparency_data
        for data in (encoded(picture), encoded(picture, "WEBP", lossless=True), encoded(palette)):
            pixels = levels(data, 3)
            assert tuple(pixels[0, 0]) == BACKGROUND
            assert tuple(pixels[1, 1]) == (200, 60, 30)
    # Half transparent: half of either.
    half = Image.new("RGBA", (2, 2), (100, 0, 0, 128))
    assert np.abs(levels(encoded(half), 3)[0, 0].astype(int) - (177, 127, 127)).max() <= 1
    # A black drawing on nothing is no empty picture.
    grey = np.zeros((4, 4, 2), np.uint8)
    grey[1:3, 1:3, 1] = 255
    assert set(levels(encoded(Image.fromarray(grey, "LA"))).flatten().tolist()) == {0, 255}
    # Opaque pixels stay as they are, whatever the mode.
    array = colours(channels=4)
    array[..., 3] = 255
    assert np.array_equal(levels(encoded(Image.fromarray(array)), 3), array[..., :3])
    assert np.array_equal(levels(encoded(Image.fromarray(array[..., [0, 3]], "LA"))), array[..., 0])


@pytest.mark.parametrize(("mode", "clear"), [("L", 7), ("RGB", (7, 8, 9)), ("P", 1)])
def test_a_transparent_colour_shows_the_background(mode: str, clear: Any) -> None:
    picture = Image.new(mode, (2, 1), 0)
    if mode == "P":
        picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((0, 0), clear)
    pixels = levels(encoded(picture, transparency=clear), 3)
    assert tuple(pixels[0, 0]) == BACKGROUND
    assert tuple(pixels[0, 1]) != BACKGROUND


def grey_png(bits: int, clear: int | None) -> bytes:
    """One row of four grey pixels 0, 1, 0, 1 of 2 or 4 bits, one of the levels transparent: Pillow writes no such."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    pixels = {2: b"\x11", 4: b"\x01\x01"}[bits]
    transparent = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    return (
        b"\x89PNG\r\n\x1a\n" + head + transparent + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_a_transparent_level_of_other_bits_is_refused(bits: int) -> None:
    """Pillow compares it with pixels that it has brought to 8 bits: other pixels would become clear, or none."""
    assert levels(grey_png(bits, None)).tolist() == [[0, 255 // (2**bits - 1)] * 2]
    with pytest.raises(ValueError, match="here: image has a transparent level, and not 8 bits"):
        levels(grey_png(bits, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    # Quarters of one colour each survive lossy formats: top left, top right, bottom left, bottom right.
    corners = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8)
    stored = Image.fromarray(corners.repeat(16, 0).repeat(24, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    pixels = levels(encoded(stored, kind, exif=exif, **options), 3).astype(int)
    turns = {  # what EXIF says the first row and column of the stored picture are
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.transpose(1, 0, 2),
        6: np.rot90(corners, -1),
        7: corners.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(corners),
    }
    height, width = pixels.shape[:2]
    assert (height, width) == ((48, 32) if orientation > 4 else (32, 48))
    seen = pixels[[height // 4, 3 * height // 4]][:, [width // 4, 3 * width // 4]]
    assert np.abs(seen - turns[orientation]).max() < 40


def test_other_modes_are_converted_as_pillow_does() -> None:
    picture = Image.fromarray(colours(8, 8))
    for mode, kind in [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "TIFF"), ("P", "PNG"), ("1", "PNG"), ("L", "PNG")]:
        data = encoded(picture.quantize(16) if mode == "P" else picture.convert(mode), kind)
        with Image.open(BytesIO(data)) as opened:
            expected = np.asarray(opened.convert("RGB"))
        assert np.array_equal(levels(data, 3), expected), mode
        assert np.array_equal(levels(data, 1), np.asarray(Image.fromarray(expected).convert("L"))), mode
    assert set(levels(encoded(Image.fromarray(np.eye(4) > 0))).flatten().tolist()) == {0, 255}


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(colours(seed=seed)) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (animation("GIF"), "row 3: image holds 3 pictures .*store the one that is meant"),
        (animation("WEBP"), "row 3: image holds 3 pictures"),
        (animation("PNG"), "row 3: image holds 3 pictures"),
        (animation("TIFF"), "row 3: image holds 3 pictures"),
        (encoded(Image.fromarray(np.ones((4, 6), np.float32)), "TIFF"), "row 3: image has mode 'F', whose values"),
        (encoded(Image.fromarray(np.ones((4, 6), np.int32)), "TIFF"), "row 3: image has mode 'I', whose values"),
        (encoded(Image.fromarray(colours()))[:-30], "row 3: cannot decode"),
        (encoded(Image.fromarray(colours()), "EPS"), "row 3: cannot decode the image .*: none of JPEG, PNG"),
        (b"", r"row 3: cannot decode the image \(0 bytes\)"),
        (None, "row 3: no image bytes"),
    ],
)
def test_refused_with_the_row(data: bytes | None, message: str) -> None:
    for channels in (1, 3):
        with pytest.raises(ValueError, match=message) as caught:
            decode_image(data, "row 3", channels)
        assert "\n" not in str(caught.value)


def test_oversized_pictures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    for side in (5, 7):  # a little too large is a warning of Pillow's, twice too large an error
        data = encoded(Image.new("L", (side, side)))
        with oversized_refused(), pytest.raises(ValueError, match=r"row 0: cannot .*exceeds limit of [24]0 pixels"):
            decode_image(data, "row 0", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="image is 7x7: must be 4x4"):
        decode_image(encoded(Image.new("L", (7, 7))), "row 0", 1, (4, 4))


def test_both_readers_see_the_same(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    square = Image.fromarray(colours(8, 8, 4, seed=1))
    rows = [
        encoded(Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16))),
        encoded(square),
        encoded(square.convert("RGB"), exif=exif),
        encoded(square.convert("CMYK"), "TIFF"),
    ]
    table = {"image": [{"bytes": row, "path": None} for row in rows], "label": [0] * len(rows)}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    data = image_classification(str(tmp_path), image_size=8, num_classes=1)
    for row, pixels in zip(rows, data.images, strict=True):
        assert np.array_equal(ImageRow("", row, 0).pixels([(8, 8)]).numpy(), pixels.numpy())
    with pytest.raises(ValueError, match="x: image is 300x2: must be at most 100 times as long as wide"):
        ImageRow("x", encoded(Image.new("L", (300, 2))), 0).pixels([(8, 8)])
