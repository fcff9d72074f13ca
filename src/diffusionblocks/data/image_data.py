"""Labelled images in memory: scikit-learn's digits, image-classification parquet in the schema of the Hugging
Face hub. `batches.py` makes batches of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..common.formats import write_tensors
from ..common.processing_files import IMAGE_PROCESSOR
from .dataset import LabelledImages, evenly_spread
from .image_decoder import MODES, decode_image, oversized_refused
from .image_processor import ImageProcessor
from .image_table import ImageTable, open_table
from .split_files import source_digest

__all__ = ["ImageData", "digits", "image_classification", "resized"]

_CACHE_FORMAT = 2  # Raise it when the content of a cache file changes: older files are then not found.


@dataclass(frozen=True)
class ImageData(LabelledImages):
    """Labelled images of one size, in ordinary memory.

    Attributes:
        images: uint8 (N, C, H, W), N >= 1.
        labels: int64 (N,), each from 0 to num_classes - 1.
        class_names: one name per class, in the order of the labels.
        processor: content of the `preprocessor_config.json` by which the images were made, where there is one.

    Raises:
        ValueError: a dtype, a shape or a label is not as above.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    processor: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or len(self.images) == 0:
            raise ValueError(
                f"images: {self.images.dtype} {tuple(self.images.shape)}: must be uint8 (N, C, H, W), N >= 1"
            )
        self._check_labels(len(self.images))

    @property
    @override
    def processing(self) -> Mapping[str, bytes]:
        return {} if self.processor is None else {IMAGE_PROCESSOR: self.processor}

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.images.shape
        return c, h, w

    @override
    def tensors(self) -> list[Tensor]:
        return [self.labels, self.images]

    @override
    def part(self, count: int) -> Self:
        if count >= len(self):
            return self
        rows = evenly_spread(len(self), count)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])


def digits(split: str) -> ImageData:
    """The 8x8 grey digits that come with scikit-learn (1,797 images, 10 classes); needs no download.

    The split is fixed: 80 % of each class for training, 20 % for testing, the same on every machine.

    Args:
        split: "train" (1,438 images) or "test" (359 images).

    Returns:
        Images uint8 (N, 1, 8, 8), the original levels 0..16 scaled to 0..255.

    Raises:
        ValueError: unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}: must be 'train' or 'test'")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    random = np.random.RandomState(0)  # The legacy generator: its stream never changes between NumPy versions.
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        rows = random.permutation(np.flatnonzero(labels == digit))
        test[rows[: round(len(rows) / 5)]] = True
    keep = test if split == "test" else ~test
    levels = np.rint(np.asarray(bunch.images)[keep] * (255 / 16)).astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    return ImageData(torch.from_numpy(levels)[:, None], torch.from_numpy(labels[keep]), names)


def resized(data: ImageData, processor: ImageProcessor) -> ImageData:
    """Images as a processor resizes and crops them."""
    from PIL import Image

    pictures = (
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)) for pixels in data.images.numpy()
    )
    return dataclasses.replace(data, images=torch.from_numpy(np.stack([processor(picture) for picture in pictures])))


def image_classification(
    source: str,
    split_files: Mapping[str, str] | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int | None = 32,
    channels: int = 3,
    num_classes: int | None = None,
    cache_dir: Path | None = None,
    *,
    reference_split: str | None = "train",
    processor: ImageProcessor | None = None,
) -> ImageData:
    """Load image classification data stored as parquet in the schema of the Hugging Face hub.

    Without a processor nothing is resized: every image must be image_size x image_size pixels already. What becomes of
    transparency, 16 bits, orientation tags and other colour spaces is said in `image_decoder.py`. Files, and split and
    reference, may list their classes in different orders: labels are matched by name.

    Args:
        source: a local folder, or the name of a data set on the hub such as "uoft-cs/cifar100". A name with a
            leading "/", "." or "~", with more than one "/", or given with `split_files`, is always a folder.
        split_files: for a folder: for each split the parquet files, as a glob relative to the folder; by default those
            named after the split, such as "train-00000-of-00002.parquet", without backups and hidden files.
        split: which split to load.
        image_column: column with the images; by default "img" or "image", whichever exists.
        label_column: column with the integer labels; by default "label" or "fine_label", whichever exists.
        image_size: height and width that every image must have; None: as the processor makes them.
        channels: 3 converts the images to RGB, 1 to grey.
        num_classes: number of classes; needed when the label column is plain integers without class names,
            checked against the file otherwise.
        cache_dir: folder for the decoded images (one .safetensors file per split) and for the files that the
            `datasets` library writes for the hub's; made if need be. None decodes anew each time.
        reference_split: of a folder: the split that says which label is which class, where it is there; None: this one.

        processor: resizes and crops the images; None where they have their size.

    Returns:
        Images uint8 (N, channels, height, width) in the order of the files.

    Raises:
        FileNotFoundError: no such folder, no file for the split, or the hub data set cannot be had.
        ValueError: unknown split, wrong column, files of other classes, an image that cannot be decoded or has
            another size, a label out of range, no rows, or an argument outside its range. The message names file and
            row, value and fix.
    """
    if channels not in MODES:
        raise ValueError(f"channels = {channels!r}: must be 1 (grey) or 3 (RGB)")
    if processor is None and (image_size is None or image_size < 1):
        raise ValueError(f"image_size = {image_size!r}: must be at least 1")
    table = open_table(
        source,
        split,
        split_files=split_files,
        image_column=image_column,
        label_column=label_column,
        num_classes=num_classes,
        reference_split=reference_split,
        cache=None if cache_dir is None else str(cache_dir / "datasets"),
    )
    cached: Path | None = None
    if cache_dir is not None and table.files:
        settings = [split, image_column, label_column, image_size, channels, num_classes, table.class_names]
        settings += [] if processor is None else [processor.file.read_text()]
        cached = cache_dir / f"images-{source_digest(_CACHE_FORMAT, table.files, settings)}.safetensors"
        data = _read_cache(cached)
        if data is not None:
            return data
    data = _decode(table, processor or image_size, channels)
    if cached is not None:
        _write_cache(cached, data)
    return data


def _decode(table: ImageTable, size: int | ImageProcessor | None, channels: int) -> ImageData:
    """All images of a table that knows its number of rows, which have a size, or are brought to one."""
    assert table.rows is not None
    table.check_labels()
    images: np.ndarray | None = None
    labels = np.empty(table.rows, dtype=np.int64)
    with oversized_refused():
        for number, row in enumerate(table):
            picture = decode_image(row.encoded, row.where, channels, (size, size) if isinstance(size, int) else None)
            pixels = size(picture) if isinstance(size, ImageProcessor) else _channels_first(np.asarray(picture))
            if images is None:
                images = np.empty((table.rows, *pixels.shape), dtype=np.uint8)
            if pixels.shape != images.shape[1:]:
                raise ValueError(
                    f"{row.where}: the image processor makes {pixels.shape} of this image, and {images.shape[1:]} of "
                    "those before it: blocks take images of one size; give square images, or a processor that crops"
                )
            images[number] = pixels
            labels[number] = row.label
    assert images is not None
    return ImageData(torch.from_numpy(images), torch.from_numpy(labels), table.class_names)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) as (C, H, W)."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _read_cache(path: Path) -> ImageData | None:
    """The cached data, or None if there is none or it is damaged (it is then made again)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = tuple(json.loads(file.metadata()["class_names"]))
            return ImageData(file.get_tensor("images"), file.get_tensor("labels"), names)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write_cache(path: Path, data: ImageData) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"class_names": json.dumps(data.class_names)}
    write_tensors(path, {"images": data.images, "labels": data.labels}, metadata)
