"""Encoded pictures to pixels: the one place where a file's colours, depth, transparency and orientation are settled."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["BACKGROUND", "MODES", "center_crop", "crop_to", "decode_image", "nearest_size", "oversized_refused"]

BACKGROUND = (255, 255, 255)
"""The colour behind transparent pixels."""

MODES = {1: "L", 3: "RGB"}
"""Pillow's mode for a number of channels."""

#: Others are not tried: some of Pillow's readers start programs (EPS), and no data set stores pictures so.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
#: Where a file notes the orientation.
_NOTES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


@contextlib.contextmanager
def oversized_refused() -> Iterator[None]:
    """Within it, pictures too large for Pillow's limit are an error, not a warning and gigabytes."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode_image(encoded: bytes | None, where: str, channels: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a still picture to 8 bits, as it is meant to be seen.

    Orientation tags are applied. 16 bits become 8 by dropping the lower ones. Transparent pixels are laid on white.
    CMYK, YCbCr and palettes are converted as Pillow does; colour profiles are not applied.

    Args:
        encoded: the file's bytes: JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF.
        where: file and row, for messages.
        channels: 3 for RGB, 1 for grey.
        size: (width, height) that it must have; None takes any.

    Raises:
        ValueError: no bytes, what cannot be decoded, another size, an animation, or values of no known range (floating
            point, 32 bits). The message begins with `where`.
    """
    from PIL import Image, UnidentifiedImageError

    if encoded is None:
        raise ValueError(f"{where}: no image bytes; images stored as a path only are not read: embed them")
    try:
        with Image.open(BytesIO(encoded), formats=_FORMATS) as image:
            _check_size(image, size, turned=True)  # before its pixels take memory
            _check_frames(image)
            _check_mode(image, image.format)
            _check_transparent_level(image)
            image.load()
            picture = _upright(image)
            _check_size(picture, size)
            _check_mode(picture, image.format)  # again: some readers know the mode only now
            return _flat(picture, MODES[channels])
    except _Refusal as error:
        raise ValueError(f"{where}: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{where}: cannot decode the image ({len(encoded)} bytes): none of {', '.join(_FORMATS)}"
        ) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... as the format's decoder does.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: cannot decode the image ({len(encoded)} bytes): {reason}") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut out the middle, with the pixels that ADM and DiT get: halved by box
    averaging while it is at least twice too large, then bicubic.

    Args:
        image: in a mode that can be averaged, such as "RGB".
        size: height and width of the result, in pixels.
    """
    return crop_to(image, size, size)


def crop_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a picture, of a height and width, from the smallest of it that covers them: see `center_crop`."""
    from PIL import Image

    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = max(width / image.width, height / image.height)
    size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of which least of a picture is cut off; of equals the larger."""
    ratio = math.log(width / height)
    return min(sizes, key=lambda pair: (abs(math.log(pair[1] / pair[0]) - ratio), -pair[0] * pair[1]))


class _Refusal(Exception):
    """Why a picture that Pillow reads is not taken."""


def _check_size(image: Image.Image, size: tuple[int, int] | None, *, turned: bool = False) -> None:
    """`turned`: an orientation tag may yet exchange width and height."""
    if size is not None and image.size != size and not (turned and image.size == size[::-1]):
        raise _Refusal(
            f"image is {image.width}x{image.height}: must be {size[0]}x{size[1]}; set image_size, or resize the data"
        )


def _check_frames(image: Image.Image) -> None:
    # Of an MPO, as cameras write it, the first picture is meant; the others are its previews.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise _Refusal(f"image holds {frames} pictures (an animation or a stack): store the one that is meant")


def _check_mode(image: Image.Image, file_format: str | None) -> None:
    mode = image.mode
    if mode in _PLAIN:
        return
    if mode in _SIXTEEN or (mode == "I" and file_format in ("PNG", "PPM")):  # there "I" holds 16 bits
        if "transparency" in image.info:
            raise _Refusal(f"image has mode {mode!r} with a transparent level: store it with 8 bits")
    elif not image.has_transparency_data:
        raise _Refusal(f"image has mode {mode!r}, whose values have no known range: convert it to 8 bits")


def _check_transparent_level(image: Image.Image) -> None:
    # Pillow brings a PNG's pixels to 8 bits, and leaves the level that the file calls transparent as it is.
    if image.format != "PNG" or image.mode not in ("1", "L", "RGB") or "transparency" not in image.info:
        return
    if any(tile.args not in ("L", "RGB") for tile in getattr(image, "tile", ())):
        raise _Refusal("image has a transparent level, and not 8 bits: store it with 8 bits")


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    if any(note in image.info for note in _NOTES):
        return ImageOps.exif_transpose(image)
    return image


def _flat(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode in _SIXTEEN:
        # Pillow's own conversion makes everything above 255 white.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba)
    if image.mode not in ("1", "L", "P", "RGB"):
        image = image.convert("RGB")
    return image.convert(mode)
