"""The image processor of a pretrained model: its library's own resizing and cropping, and its normalisation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.processing_files import IMAGE_PROCESSOR

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageProcessor", "processor_in"]

_PROBE = (48, 64)  # height and width of the picture on which a processor is tried
_TOLERANCE = 1e-3  # of normalised pixels; a step of 8 bits is several times as much


class ImageProcessor:
    """Resizes and crops pictures as a `preprocessor_config.json` says, by the class of transformers that it names.

    Args:
        file: the `preprocessor_config.json`.
        channels: of the pictures, 1 or 3.

    Attributes:
        file: as given.
        mean: of each channel, of pixels in [0, 1]: subtracted after resizing.
        std: of each channel, by which the pixels are divided then.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no image processor that transformers makes without torchvision, or one that does more to
            pixels than to resize, crop and normalise them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(self, file: Path, channels: int) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: name a {IMAGE_PROCESSOR}")
        if file.name != IMAGE_PROCESSOR:
            raise ValueError(f"{file}: an image processor is a file {IMAGE_PROCESSOR}, as transformers names it")
        from transformers import AutoImageProcessor

        self.file = file
        random = np.random.default_rng(0).integers(0, 256, (*_PROBE, channels), dtype=np.uint8)
        try:
            # Pillow's backend whatever is installed: its pixels are the same everywhere.
            self._library: Any = AutoImageProcessor.from_pretrained(file.parent, backend="pil", local_files_only=True)
            self.mean, self.std = _normalisation(self._library, channels)
            probe = _picture(random)
            resized, whole = self(probe), np.asarray(self._library(probe)["pixel_values"][0])
        except Exception as error:  # whatever the library makes of a file that is the user's
            raise ValueError(
                f"{file} is no image processor that can be used here: {' '.join(str(error).split())}; resize the data "
                "yourself, and set data.image_size, data.mean and data.std"
            ) from None
        mean, std = (np.asarray(values)[:, None, None] for values in (self.mean, self.std))
        ours = (resized / 255 - mean) / std
        if whole.shape != ours.shape or not np.allclose(ours, whole, atol=_TOLERANCE / min(self.std)):
            raise ValueError(
                f"{file}: this processor does more to pixels than to resize, crop and normalise them: set "
                "data.image_size, data.mean and data.std, and give data of that size"
            )

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """A picture, resized and cropped: uint8 (channels, height, width)."""
        values = np.asarray(self._library(picture, do_rescale=False, do_normalize=False)["pixel_values"][0])
        if values.dtype != np.uint8 or values.ndim != 3:
            raise ValueError(f"{self.file} makes {values.dtype} {values.shape} of a picture, not (C, H, W) of 8 bits")
        return values


def processor_in(folder: Path) -> Path | None:
    """The image processor's file in a model's folder, where there is one."""
    path = folder / IMAGE_PROCESSOR
    return path if path.is_file() else None


def _picture(pixels: np.ndarray) -> Image.Image:
    """A picture of uint8 (H, W, 1 or 3)."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _normalisation(library: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What a processor subtracts from pixels in [0, 1], and divides them by then."""
    scale = 255 * (library.rescale_factor if library.do_rescale else 1.0)

    def each(values: Any) -> list[float]:
        numbers = [float(value) for value in (values if isinstance(values, (list, tuple)) else [values])]
        numbers = numbers * channels if len(numbers) == 1 else numbers
        if len(numbers) != channels or not all(map(math.isfinite, numbers)):
            raise ValueError(f"it normalises {len(numbers)} channels, and the data have {channels}")
        return numbers

    mean = each(library.image_mean) if library.do_normalize else [0.0] * channels
    std = each(library.image_std) if library.do_normalize else [1.0] * channels
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)
