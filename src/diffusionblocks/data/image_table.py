"""Labelled, still encoded images in the schema of the Hugging Face hub: parquet files of a folder, or a hub data set.

Metadata belong to a file: columns and class names are read from each one. Labels are put into one order of names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .image_decoder import crop_to, decode_image, nearest_size
from .split_files import IMAGE_ENDINGS, files_of_split

__all__ = ["UNLABELLED", "ClassNames", "ImageRow", "ImageTable", "open_table", "rows_of_split"]

#: The class of images that have a prompt, and no label.
UNLABELLED = "image"

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")
_PROMPT_COLUMNS = ("text", "caption", "prompt")
_READ = 1024  # rows read at once
_ELONGATED = 100


@dataclass(frozen=True)
class ClassNames:
    """The class names of a file.

    Attributes:
        names: in the order of its labels; None where the labels are plain integers.
        where: the file, or the hub's split.
    """

    names: tuple[str, ...] | None
    where: str

    def labels_from(self, other: ClassNames) -> np.ndarray | None:
        """What each label of another file is here: int64 (number of classes,); None where nothing changes.

        Raises:
            ValueError: the files have other classes, or only one of them has names. The message names both.
        """
        if other.names == self.names or (_digits(other.names) and _digits(self.names)):
            return None
        if self.names is None or other.names is None:
            rich, plain = (self, other) if other.names is None else (other, self)
            raise ValueError(
                f"{plain.where} has labels without class names, {rich.where} has the names {_some(rich.names)}: "
                "which label is which class cannot be told; store both with the same names (datasets.ClassLabel)"
            )
        for names in (self, other):
            if len(set(names.names or ())) < len(names.names or ()):
                raise ValueError(f"{names.where}: a class name is there twice: {_some(names.names)}; make them differ")
        if set(other.names) != set(self.names):
            more = [name for name in other.names if name not in self.names]
            less = [name for name in self.names if name not in other.names]
            raise ValueError(
                f"{other.where} and {self.where} have different classes: only the first has {_some(more)}, only the "
                f"second {_some(less)}; store both with the same class names"
            )
        place = {name: label for label, name in enumerate(self.names)}
        return np.asarray([place[name] for name in other.names], dtype=np.int64)


def _digits(names: Sequence[str] | None) -> bool:
    """Whether names say no more than the labels themselves."""
    return names is None or list(names) == [str(label) for label in range(len(names))]


def _some(names: Sequence[str] | None) -> str:
    names = list(names or ())
    return f"{names[:5]}" if len(names) <= 5 else f"{names[:5]} and {len(names) - 5} more"


class ImageRow(NamedTuple):
    """One image with its label.

    Attributes:
        where: file (or hub split) and row, for messages.
        encoded: the image's bytes, None where there are none.
        label: in the table's order of class names.
        prompt: a text that says what is to be seen; "" where there is none.
    """

    where: str
    encoded: bytes | None
    label: int
    prompt: str = ""

    def pixels(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Decode the image, and bring it to the size that is nearest in its proportions.

        Args:
            sizes: heights and widths.

        Returns:
            uint8 (3, height, width).

        Raises:
            ValueError: it cannot be decoded, or is too elongated.
        """
        image = decode_image(self.encoded, self.where, 3)
        longer, shorter = max(image.size), min(image.size)
        if longer > _ELONGATED * shorter:  # its shorter side resized, it could fill the memory
            raise ValueError(
                f"{self.where}: image is {image.width}x{image.height}: must be at most {_ELONGATED} times as long as "
                "wide"
            )
        size = nearest_size(image.height, image.width, sizes)
        return torch.from_numpy(np.array(crop_to(image, *size))).permute(2, 0, 1)


@dataclass(frozen=True)
class _Part:
    """A file, or a hub split: where it is, its declared columns, its rows, and how to read some columns of it."""

    where: str
    features: Any  # datasets.Features
    rows: int | None
    read: Callable[[list[str]], Iterator[Any]]  # tables or record batches of pyarrow


class ImageTable:
    """The rows of a split, in the order of its files, read as they are asked for.

    Attributes:
        class_names: one name per class, in the order of the labels.
        rows: how many; None where a hub data set does not say.
        files: of a folder, or of a hub data set on this disk; empty while it is streamed.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        files: Sequence[Path],
        *,
        image_column: str | None,
        label_column: str | None,
        num_classes: int | None,
        reference: ClassNames | None,
        prompts: bool = False,
        prompt_column: str | None = None,
    ) -> None:
        counts = [part.rows for part in parts]
        self.rows = None if None in counts else sum(count for count in counts if count is not None)
        self.files = list(files)
        if self.rows == 0:
            raise ValueError(f"there are no rows in {[part.where for part in parts]}")
        self._prompt = _pick_column("prompt", prompt_column, _PROMPT_COLUMNS, parts[0]) if prompts else None
        unlabelled = prompts and label_column is None and not set(_LABEL_COLUMNS) & set(parts[0].features)
        self._image, self._label = _columns(parts, image_column, label_column, labelled=not unlabelled)
        self._parts: list[tuple[_Part, np.ndarray | None]] = [(part, None) for part in parts]
        self.class_names: tuple[str, ...] = (UNLABELLED,)
        if self._label is None:
            return
        own = [ClassNames(_names(part, self._label), part.where) for part in parts]
        order = reference or own[0]
        self._parts = [(part, order.labels_from(names)) for part, names in zip(parts, own, strict=True)]
        self.class_names = _numbered(order, self._label, num_classes)

    def check_labels(self) -> None:
        """Look at the labels alone, which takes a moment where images take hours; a streamed table is not looked at.

        Raises:
            ValueError: a label is missing or out of range.
        """
        if self.rows is not None and self.files and self._label is not None:
            for part, order in self._parts:
                for _ in self._labels(part, order, [self._label]):
                    pass

    def __iter__(self) -> Iterator[ImageRow]:
        """Rows; ValueError where a label is missing or out of range, or a file is damaged."""
        for part, order in self._parts:
            columns = [name for name in (self._image, self._label, self._prompt) if name is not None]
            for first, labels, batch in self._labels(part, order, columns):
                images = _image_bytes(batch.column(self._image), part.where, self._image)
                prompts = [""] * len(labels)
                if self._prompt is not None:
                    prompts = _prompts(batch.column(self._prompt), part.where, first, self._prompt)
                for offset, (encoded, label, prompt) in enumerate(zip(images, labels, prompts, strict=True)):
                    yield ImageRow(f"{part.where}, row {first + offset}", encoded, label, prompt)

    def _labels(
        self, part: _Part, order: np.ndarray | None, columns: list[str]
    ) -> Iterator[tuple[int, list[int], Any]]:
        """The first row of a batch, its labels, and the batch."""
        first = 0
        for batch in part.read(columns):
            if self._label is None:
                yield first, [0] * len(batch.column(columns[0])), batch
                first += len(batch.column(columns[0]))
                continue
            labels = _checked_labels(batch.column(self._label), part.where, first, self._label, len(self.class_names))
            yield first, (labels if order is None else order[labels]).tolist(), batch
            first += len(labels)


def open_table(
    source: str,
    split: str,
    *,
    split_files: Mapping[str, str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    reference_split: str | None = None,
    streaming: bool = False,
    cache: str | None = None,
    prompts: bool = False,
    prompt_column: str | None = None,
) -> ImageTable:
    """Open a split of labelled images; of parquet files only the headers are read.

    Args:
        source: a local folder, or a name on the hub.
        split: which split.
        split_files: for a folder: split name -> glob; None takes the files named after the split.
        image_column: column with the images; None takes "img" or "image", whichever exists.
        label_column: column with the integer labels; None takes "label" or "fine_label", whichever exists.
        num_classes: number of classes, needed where the labels have no names, checked otherwise.
        reference_split: split of the folder whose first file gives the order of the class names, where it has files.
            The splits of a hub data set share one declaration, which is trusted.
        streaming: of a hub data set, whether to read rows as they are asked for instead of downloading all first.
        cache: folder for what is downloaded from the hub.
        prompts: whether rows have prompts; then they need no labels.
        prompt_column: column with them; None takes "text", "caption" or "prompt", whichever exists.

    Raises:
        FileNotFoundError: no such folder or hub data set, or no file for the split.
        ValueError: files of different columns or classes, a wrong column, no rows, or a file that is not parquet.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes = {num_classes!r}: must be at least 1, or None to take it from the file")
    folder = _local_folder(source, split_files)
    reference: ClassNames | None = None
    if folder is None:
        parts, files = _hub_part(source, split, streaming, cache)
    else:
        files = files_of_split(folder, split, split_files, endings=IMAGE_ENDINGS)
        parts = [_file_part(file) for file in files]
        if reference_split not in (None, split) and not prompts:
            reference = _reference(folder, str(reference_split), split_files, image_column, label_column)
    return ImageTable(
        parts,
        files,
        image_column=image_column,
        label_column=label_column,
        num_classes=num_classes,
        reference=reference,
        prompts=prompts,
        prompt_column=prompt_column,
    )


def rows_of_split(source: str, split_files: Mapping[str, str] | None, split: str) -> int | None:
    """Examples of a split by its files' headers, or None where the source is a name on the hub.

    Raises:
        FileNotFoundError, ValueError: as `open_table` for source and split; a file is not parquet.
    """
    folder = _local_folder(source, split_files)
    if folder is None:
        return None
    files = files_of_split(folder, split, split_files, endings=IMAGE_ENDINGS)
    return sum(int(_opened(file).metadata.num_rows) for file in files)


# ---- files and hub ---------------------------------------------------------------------------------------


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


def _opened(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not parquet, or is damaged: {_line(error)}") from None


def _file_part(file: Path) -> _Part:
    import datasets
    import pyarrow

    opened = _opened(file)
    try:
        features = datasets.Features.from_arrow_schema(opened.schema_arrow)
    except Exception as error:  # Whatever the library raises for metadata that it does not know.
        raise ValueError(f"{file}: cannot read the declared columns: {_line(error)}") from None

    def read(columns: list[str]) -> Iterator[Any]:
        try:
            yield from opened.iter_batches(batch_size=_READ, columns=columns)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} is damaged: {_line(error)}") from None

    return _Part(str(file), features, opened.metadata.num_rows, read)


def _hub_part(name: str, split: str, streaming: bool, cache: str | None) -> tuple[list[_Part], list[Path]]:
    where = f"{name} (split {split!r})"
    table = _load_hub(name, split, streaming=True) if streaming else _load_hub(name, split, cache_dir=cache)
    if table.features is None:
        raise ValueError(f"{where}: its columns are not declared; download it as parquet files and give their folder")

    def read(columns: list[str]) -> Iterator[Any]:
        yield from table.select_columns(columns).with_format("arrow").iter(batch_size=_READ)

    if streaming:
        split_info = (table.info.splits or {}).get(split)
        return [_Part(where, table.features, None if split_info is None else split_info.num_examples, read)], []
    files = [Path(entry["filename"]) for entry in table.cache_files]
    return [_Part(where, table.features, len(table), read)], files


def _load_hub(name: str, split: str, **options: Any) -> Any:
    """A split of a data set on the hub, as `datasets.load_dataset` gives it with these options."""
    import datasets

    try:
        _check_hub(name, options.get("cache_dir"))
        return datasets.load_dataset(name, split=split, **options)
    except ValueError as error:  # An unknown split or configuration: the message lists those there are.
        raise ValueError(f"source = {name!r}, split = {split!r}: {_line(error)}") from error
    except Exception as error:  # Not found, no network, no access: all are the hub's own kinds of error.
        raise FileNotFoundError(
            f"source = {name!r}: no local folder of that name, and the hub gave no such data set ({_line(error)}); "
            "check the name, or download its parquet files and give their folder"
        ) from error


def _check_hub(name: str, cache: str | None) -> None:
    """Ask the hub once for a data set that the cache does not have: `load_dataset` asks for half a minute.

    Raises:
        ConnectionError: the hub cannot be reached.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import HfApi, try_to_load_from_cache

    from ..core.hub import HubErrors

    *owner, own = name.split("/")
    prepared = Path(cache or datasets.config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(own)]))
    try:
        if prepared.is_dir() or isinstance(try_to_load_from_cache(name, "README.md", repo_type="dataset"), str):
            return
        with HubErrors(name).told():
            HfApi().dataset_info(name)
    except ConnectionError:
        raise
    except (OSError, ValueError):  # which `load_dataset` tells in the words of data sets
        pass


def _reference(
    folder: Path,
    split: str,
    split_files: Mapping[str, str] | None,
    image_column: str | None,
    label_column: str | None,
) -> ClassNames | None:
    """Class names of the split's first file; None where the folder has no such split."""
    try:
        files = files_of_split(folder, split, split_files, endings=IMAGE_ENDINGS)
    except (FileNotFoundError, ValueError):
        return None
    part = _file_part(files[0])
    _, label = _columns([part], image_column, label_column)
    assert label is not None, "the images have labels"
    return ClassNames(_names(part, label), part.where)


def _line(error: BaseException) -> str:
    """A library's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- columns ---------------------------------------------------------------------------------------------


def _columns(
    parts: Sequence[_Part], image: str | None, label: str | None, *, labelled: bool = True
) -> tuple[str, str | None]:
    """The columns of images and labels, which all parts have."""
    import datasets

    first = parts[0]
    image = _pick_column("image", image, _IMAGE_COLUMNS, first)
    label = _pick_column("label", label, _LABEL_COLUMNS, first) if labelled else None
    for part in parts:
        for column in (image, label):
            if column is not None and column not in part.features:
                raise ValueError(
                    f"{part.where}: no column {column!r}, which {first.where} has; it has {list(part.features)}"
                )
        kind = part.features[image]
        binary = isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)
        if not binary and _type(kind) not in ("binary", "large_binary", "binary_view"):
            raise ValueError(
                f"{part.where}: image column {image!r} has type {_type(kind)}: must be struct<bytes, path>, or binary"
            )
    return image, label


def _pick_column(kind: str, name: str | None, candidates: tuple[str, ...], part: _Part) -> str:
    columns = list(part.features)
    if name is not None:
        if name not in columns:
            raise ValueError(f"{part.where}: {kind}_column = {name!r}: must be one of {columns}")
        return name
    present = [name for name in candidates if name in columns]
    if len(present) != 1:
        why = "none" if not present else "more than one"
        raise ValueError(f"{part.where}: {why} of {list(candidates)} in the columns {columns}; set {kind}_column")
    return present[0]


def _type(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def _names(part: _Part, column: str) -> tuple[str, ...] | None:
    """The column's class names; None for plain integers."""
    import datasets

    feature = part.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if not _type(feature).startswith(("int", "uint")):
        raise ValueError(
            f"{part.where}: label column {column!r} has type {_type(feature)}: must be integers or a ClassLabel"
        )
    return None


def _numbered(order: ClassNames, column: str, num_classes: int | None) -> tuple[str, ...]:
    if order.names is not None:
        if num_classes is not None and num_classes != len(order.names):
            raise ValueError(
                f"{order.where}: num_classes = {num_classes}: column {column!r} has {len(order.names)} classes"
            )
        return order.names
    if num_classes is None:
        raise ValueError(f"{order.where}: label column {column!r} has no class names; set num_classes")
    return tuple(str(label) for label in range(num_classes))


def _checked_labels(array: Any, where: str, first: int, column: str, count: int) -> np.ndarray:
    """int64, each from 0 to count - 1."""
    import pyarrow

    if not pyarrow.types.is_integer(array.type):
        raise ValueError(f"{where}: label column {column!r} has type {array.type}: must be integers or a ClassLabel")
    rule = f"must be from 0 to {count - 1} ({count} classes)"
    fix = f"{rule}; set num_classes or label_column, or drop rows without a label"
    if array.null_count:
        row = int(np.flatnonzero(np.asarray(array.is_null()))[0])
        raise ValueError(f"{where}, row {first + row}: no label in {column!r}: {fix}")
    values = np.asarray(array)
    bad = np.flatnonzero((values < 0) | (values >= count))
    if len(bad):
        raise ValueError(f"{where}, row {first + bad[0]}: label {values[bad[0]]} in {column!r}: {fix}")
    return values.astype(np.int64)


def _prompts(array: Any, where: str, first: int, column: str) -> list[str]:
    """The prompts of a column; where there are several of an image, the first."""
    values = array.to_pylist()
    texts = [value[0] if isinstance(value, list) and value else value for value in values]
    for offset, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{where}, row {first + offset}: {column} is {text!r}: must be a text; set prompt_column")
    return texts


def _image_bytes(array: Any, where: str, column: str) -> Iterator[bytes | None]:
    """The still encoded images of a column, one by one."""
    import pyarrow as pa
    import pyarrow.compute

    if pa.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
        array = pyarrow.compute.struct_field(array, "bytes")  # which knows that a row can be null as a whole
    kind = array.type
    if not any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        raise ValueError(f"{where}: image column {column!r} has type {kind}: must be struct<bytes, path>, or binary")
    for value in array:
        yield value.as_py()
