"""Labelled images in memory: scikit-learn's digits, image-classification parquet in the schema of the Hugging
Face hub. `batches.py` makes batches of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..files import write_tensors

if TYPE_CHECKING:
    import datasets

__all__ = ["ImageData", "digits", "image_classification"]

_DEFAULT_FILES = {"train": "train*.parquet", "test": "test*.parquet"}
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")
_CACHE_FORMAT = 1  # Raise it when the content of a cache file changes: older files are then not found.
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageData:
    """Labelled images of one size, in ordinary memory.

    Attributes:
        images: uint8 (N, C, H, W), N >= 1.
        labels: int64 (N,), each from 0 to num_classes - 1.
        class_names: one name per class, in the order of the labels.

    Raises:
        ValueError: a dtype, a shape or a label is not as above.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or len(self.images) == 0:
            raise ValueError(
                f"images: {self.images.dtype} {tuple(self.images.shape)}: must be uint8 (N, C, H, W), N >= 1"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels: {self.labels.dtype} {tuple(self.labels.shape)}: must be int64 ({len(self.images)},)"
            )
        bad = (self.labels < 0) | (self.labels >= len(self.class_names))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"row {row}: label {int(self.labels[row])}: must be from 0 to {len(self.class_names) - 1} "
                f"({len(self.class_names)} classes); rows without a label must be dropped first"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, also of those that have no image here."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def example_shape(self) -> tuple[int, int, int]:
        """`image_shape`: of every example."""
        return self.image_shape

    def __len__(self) -> int:
        return len(self.images)


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


def image_classification(
    source: str,
    split_files: Mapping[str, str] | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: int = 32,
    channels: int = 3,
    num_classes: int | None = None,
    cache_dir: Path | None = None,
) -> ImageData:
    """Loads image classification data stored as parquet in the schema of the Hugging Face hub.

    Nothing is resized: every image must be image_size x image_size pixels already.

    Args:
        source: a local folder, or the name of a data set on the hub such as "uoft-cs/cifar100". A name with a
            leading "/", "." or "~", with more than one "/", or given with `split_files`, is always a folder.
        split_files: for a folder: for each split the parquet files, as a glob relative to the folder; by
            default {"train": "train*.parquet", "test": "test*.parquet"}.
        split: which split to load.
        image_column: column with the images; by default "img" or "image", whichever exists.
        label_column: column with the integer labels; by default "label" or "fine_label", whichever exists.
        image_size: height and width that every image must have.
        channels: 3 converts the images to RGB, 1 to grey.
        num_classes: number of classes; needed when the label column is plain integers without class names,
            checked against the file otherwise.
        cache_dir: folder for the decoded images (one .safetensors file per split) and for the files that the
            `datasets` library writes; made if need be. None decodes anew each time.

    Returns:
        Images uint8 (N, channels, image_size, image_size) in the order of the files.

    Raises:
        FileNotFoundError: no such folder, no file for the split, or the hub data set cannot be had.
        ValueError: unknown split, wrong column, an image that cannot be decoded or has another size, a label
            out of range, no rows, or an argument outside its range. The message names value and fix.
    """
    if channels not in _MODES:
        raise ValueError(f"channels = {channels!r}: must be 1 (grey) or 3 (RGB)")
    if image_size < 1:
        raise ValueError(f"image_size = {image_size!r}: must be at least 1")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes = {num_classes!r}: must be at least 1, or None to take it from the file")

    folder = _local_folder(source, split_files)
    settings = [split, image_column, label_column, image_size, channels, num_classes]
    hf_cache = None if cache_dir is None else str(cache_dir / "datasets")
    table: datasets.Dataset | None = None
    if folder is not None:
        files = _split_files(folder, split_files or _DEFAULT_FILES, split)
    else:
        # Only the loaded data set knows which files a name on the hub stands for.
        table = _load_hub(source, split, cache_dir=hf_cache)
        files = [Path(entry["filename"]) for entry in table.cache_files]

    cached: Path | None = None
    if cache_dir is not None and files:
        cached = cache_dir / f"images-{_fingerprint(files, settings)}.safetensors"
        data = _read_cache(cached)
        if data is not None:
            return data
    if table is None:
        table = _load_files(files, split, hf_cache)
    where = f"{source} (split {split!r})"
    data = _decode(table, where, image_column, label_column, image_size, channels, num_classes)
    if cached is not None:
        _write_cache(cached, data)
    return data


def _local_folder(source: str, split_files: Mapping[str, str] | None) -> Path | None:
    """The folder that `source` names, or None if it is a name on the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    looks_local = source.startswith((".", "/", "~", os.sep)) or source.count("/") > 1 or folder.exists()
    if looks_local or split_files is not None:
        kind = "is a file, not a folder" if folder.exists() else "no such folder"
        raise FileNotFoundError(
            f"source = {source!r}: {kind}; give a folder of parquet files, or a hub name such as "
            "'uoft-cs/cifar100' (without split_files)"
        )
    return None


def _split_files(folder: Path, patterns: Mapping[str, str], split: str) -> list[Path]:
    if split not in patterns:
        raise ValueError(f"split = {split!r}: must be one of {sorted(patterns)}, or be added to split_files")
    files = sorted(path for path in folder.glob(patterns[split]) if path.is_file())
    if not files:
        present = sorted(path.name for path in folder.iterdir())[:20]
        raise FileNotFoundError(
            f"split {split!r}: no file in {folder} matches {patterns[split]!r}; the folder holds {present}; "
            "change the pattern in split_files"
        )
    return files


def rows_of_split(source: str, split_files: Mapping[str, str] | None, split: str) -> int | None:
    """Examples of a split by its files' headers, or None where the source is a name on the hub.

    Raises:
        FileNotFoundError, ValueError: as `image_classification` for source and split; a file is not parquet.
    """
    folder = _local_folder(source, split_files)
    return None if folder is None else _rows(_split_files(folder, split_files or _DEFAULT_FILES, split))


def _rows(files: list[Path]) -> int:
    import pyarrow
    import pyarrow.parquet

    rows = 0
    for file in files:
        try:
            rows += pyarrow.parquet.read_metadata(file).num_rows
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file} is not parquet: {error}") from error
    return rows


def _load_files(files: list[Path], split: str, cache: str | None) -> datasets.Dataset:
    import datasets

    names = [str(path) for path in files]
    try:
        if _rows(files):  # `datasets` refuses no rows with an error of its own; it also reserves some split names.
            return datasets.load_dataset("parquet", data_files=names, split="train", cache_dir=cache)
    except Exception as error:  # `datasets` wraps the reader's errors in its own, one per reason.
        reason = error.__cause__ or error
        raise ValueError(f"cannot read {names} as parquet files of one schema: {reason}") from error
    raise ValueError(f"split {split!r}: there are no rows in {names}")


def _load_hub(name: str, split: str, **options: Any) -> Any:
    """A split of a data set on the hub, as `datasets.load_dataset` gives it with these options."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split, **options)
    except ValueError as error:  # An unknown split or configuration: the message lists those there are.
        raise ValueError(f"source = {name!r}, split = {split!r}: {error}") from error
    except Exception as error:  # Not found, no network, no access: all are the hub's own kinds of error.
        raise FileNotFoundError(
            f"source = {name!r}: no local folder of that name, and the hub gave no such data set ({error}); "
            "check the name, or download its parquet files and give their folder"
        ) from error


def _pick_column(kind: str, asked: str | None, candidates: tuple[str, ...], columns: list[str], where: str) -> str:
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{where}: {kind}_column = {asked!r}: must be one of {columns}")
        return asked
    found = [name for name in candidates if name in columns]
    if len(found) != 1:
        why = "none" if not found else "more than one"
        raise ValueError(f"{where}: {why} of {list(candidates)} in the columns {columns}; set {kind}_column")
    return found[0]


def _decode(
    table: datasets.Dataset,
    where: str,
    image_column: str | None,
    label_column: str | None,
    size: int,
    channels: int,
    num_classes: int | None,
) -> ImageData:
    """Turns the two columns of the table into arrays; raises ValueError for whatever is wrong with them."""
    columns = list(table.column_names)
    image_column = _pick_column("image", image_column, _IMAGE_COLUMNS, columns, where)
    label_column = _pick_column("label", label_column, _LABEL_COLUMNS, columns, where)
    if len(table) == 0:
        raise ValueError(f"{where}: the split has no rows")
    class_names = _class_names(table.features[label_column], label_column, num_classes, where)
    labels = _labels(table, label_column, len(class_names), where)

    images = np.empty((len(table), size, size, channels), dtype=np.uint8)
    for row, encoded in enumerate(_encoded_images(table, image_column, where)):
        images[row] = _decode_one(encoded, f"{where}, row {row}", size, channels)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageData(tensor, torch.from_numpy(labels), class_names)


def _class_names(feature: Any, column: str, num_classes: int | None, where: str) -> tuple[str, ...]:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        if num_classes is not None and num_classes != len(names):
            raise ValueError(f"{where}: num_classes = {num_classes}: column {column!r} has {len(names)} classes")
        return names
    dtype = str(getattr(feature, "dtype", type(feature).__name__))
    if not dtype.startswith(("int", "uint")):
        raise ValueError(f"{where}: label column {column!r} has type {dtype}: must be integers or a ClassLabel")
    if num_classes is None:
        raise ValueError(f"{where}: label column {column!r} has no class names; set num_classes")
    return tuple(str(label) for label in range(num_classes))


def _labels(table: datasets.Dataset, column: str, count: int, where: str) -> np.ndarray:
    array = table.data.column(column)
    if array.null_count:
        row = next(i for i, value in enumerate(array) if not value.is_valid)
        raise ValueError(f"{where}, row {row}: no label in {column!r}: must be from 0 to {count - 1}")
    labels = np.asarray(array.to_numpy(), dtype=np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= count))
    if len(bad):
        raise ValueError(
            f"{where}, row {bad[0]}: label {labels[bad[0]]} in {column!r}: must be from 0 to {count - 1} "
            f"({count} classes); set num_classes or label_column, or drop rows without a label"
        )
    return labels.copy()  # The array may be a read-only view of the file.


def _encoded_images(table: datasets.Dataset, column: str, where: str) -> Iterator[bytes | None]:
    """The still encoded images, one by one, so that only one chunk is in memory beside the result."""
    import pyarrow as pa
    import pyarrow.compute

    data = table.data.column(column)
    nested = pa.types.is_struct(data.type) and data.type.get_field_index("bytes") >= 0
    if not nested and not pa.types.is_binary(data.type) and not pa.types.is_large_binary(data.type):
        raise ValueError(f"{where}: image column {column!r} has type {data.type}: must be struct<bytes, path>")
    for chunk in data.chunks:
        # Not StructArray.field: it forgets that a row can be null as a whole.
        for value in pyarrow.compute.struct_field(chunk, "bytes") if nested else chunk:
            yield value.as_py()


def _decode_one(encoded: bytes | None, where: str, size: int, channels: int) -> np.ndarray:
    """uint8 (size, size, channels)."""
    from PIL import Image

    if encoded is None:
        raise ValueError(f"{where}: no image bytes; images stored as a path only are not read: embed them")
    try:
        with Image.open(BytesIO(encoded)) as image:
            width, height = image.size
            pixels = np.asarray(image.convert(_MODES[channels])) if (width, height) == (size, size) else None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... as the format's decoder does.
        raise ValueError(f"{where}: cannot decode the image ({len(encoded)} bytes): {error}") from error
    if pixels is None:
        raise ValueError(
            f"{where}: image is {width}x{height}: must be {size}x{size}; set image_size, or resize the data"
        )
    return pixels.reshape(size, size, channels)


def _fingerprint(files: Sequence[Path], settings: Sequence[object]) -> str:
    """Changes when a source file (name, size, time of change) or a setting does."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([_CACHE_FORMAT, stats, list(settings)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


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
