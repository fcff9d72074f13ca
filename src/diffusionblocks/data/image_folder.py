"""Folders of pictures, a folder for each class: read as they are, or packed into the files of data of kind `images`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from ..common.files import whole_folder
from .image_decoder import center_crop, decode_image, oversized_refused
from .image_table import UNLABELLED, ImageRow
from .video_files import VIDEO_ENDINGS

_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif"}

#: Of pictures that are not split yet, one of so many is for testing.
_TEST_SHARE = 10

#: What is written.
_FILES = re.compile(r"(train|test)\.parquet")

_TEST = ("test", "valid", "val", "validation")


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, in the order of the names; of none where the folder has no folders of pictures.

    Args:
        folder: with a folder for each class, or with `train` that has these.
    """
    root = folder / "train" if (folder / "train").is_dir() else folder
    return _pictures(root)


class PictureFolder:
    """The pictures of a split as labelled rows, read as they are asked for: what an `ImageTable` is of parquet files.

    Classes take turns, so the first rows are of all of them.

    Args:
        folder: with a folder for the split, which has one for each class; or with one for each class itself, where it
            has no folder `train`, for the split `train`.
        split: which split.
        endings: of the files' names: other files than pictures, for `files` alone.

    Attributes:
        class_names: names of the classes' folders, in order; a label is a place in it.
        rows: how many pictures.

    Raises:
        ValueError: no pictures for the split.
    """

    def __init__(self, folder: Path, split: str, endings: Collection[str] = _ENDINGS) -> None:
        root = folder / split
        if split == "train" and not root.is_dir():
            root = folder
        pictures = _pictures(root, endings) if root.is_dir() else {}
        if not pictures:
            raise ValueError(_nothing(folder, split, "CLASS/", endings))
        self.class_names = tuple(pictures)
        self.rows = sum(map(len, pictures.values()))
        self._pictures = pictures

    def check_labels(self) -> None:
        """Nothing to do: a picture's folder is its label."""

    def files(self) -> Iterator[tuple[Path, int, str]]:
        """Path and label of each, and no prompt."""
        for turn in itertools.zip_longest(*self._pictures.values()):
            for label, path in enumerate(turn):
                if path is not None:
                    yield path, label, ""

    def __iter__(self) -> Iterator[ImageRow]:
        """Rows, each with its file's bytes."""
        for path, label, _ in self.files():
            yield ImageRow(str(path), path.read_bytes(), label)


class CaptionedPictures:
    """The pictures of a split below a folder, each with its prompt in a text file of its name: what an `ImageTable` is.

    Args:
        folder: with pictures, in a folder named after the split or, for the split `train`, in itself.
        split: which split.
        endings: of the files' names: other files than pictures, for `files` alone.

    Attributes:
        class_names: one, for they have no labels.
        rows: how many pictures.

    Raises:
        ValueError: no pictures for the split, or a picture without a prompt, or with one that is not UTF-8.
    """

    class_names: tuple[str, ...] = (UNLABELLED,)

    def __init__(self, folder: Path, split: str, endings: Collection[str] = _ENDINGS) -> None:
        root = folder / split
        if split == "train" and not root.is_dir():
            root = folder
        self._pictures = _files_below(root, endings) if root.is_dir() else []
        if not self._pictures:
            raise ValueError(_nothing(folder, split, "", endings))
        for picture in self._pictures:  # before hours of work
            _prompt_of(picture)
        self.rows = len(self._pictures)

    def check_labels(self) -> None:
        """Nothing to do: there are none."""

    def files(self) -> Iterator[tuple[Path, int, str]]:
        """Path, label (0) and prompt of each."""
        for path in self._pictures:
            yield path, 0, _prompt_of(path)

    def __iter__(self) -> Iterator[ImageRow]:
        """Rows, each with its file's bytes."""
        for path, label, prompt in self.files():
            yield ImageRow(str(path), path.read_bytes(), label, prompt)


def _prompt_of(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    if not file.is_file():
        raise ValueError(
            f"{picture} has no prompt: write it into {file.name} beside it (an empty file is the empty prompt)"
        )
    try:
        return file.read_text(encoding="utf-8-sig").strip()  # the mark that some editors begin with is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}; write it anew") from None


def has_videos(folder: Path) -> bool:
    """Whether there are videos below a folder."""
    return any(path.suffix.lower() in VIDEO_ENDINGS for path in folder.rglob("*"))


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself, below no class."""
    return sorted(filter(_is_picture, folder.iterdir()))


def pack_images(folder: Path, out: Path, size: int) -> None:
    """Write train.parquet and test.parquet: pictures brought to one size, as PNG, with the names of their classes.

    The shorter side is resized and the middle cut out. Where the folder has no `test` (or `valid`, `val`, `validation`)
    beside `train`, every tenth picture of a class is for testing, at least one of each class.

    Args:
        folder: see `class_folders`.
        out: folder of the files; it appears when it is whole.
        size: height and width.

    Raises:
        ValueError: classes of one picture only, other classes for testing, or a picture that cannot be decoded.
    """
    train = class_folders(folder)
    names = list(train)
    held_out = next((folder / name for name in _TEST if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out is not None:
        test = _pictures(held_out)
        if not set(test) <= set(names):
            raise ValueError(f"{held_out} has the classes {sorted(set(test) - set(names))}, which train has not")
    else:
        few = [name for name, files in train.items() if len(files) < 2]
        if few:
            raise ValueError(f"class {few[0]!r} has one picture: one to train on and one to test on are needed")
        test = {name: files[::_TEST_SHARE] for name, files in train.items()}
        train = {name: [file for i, file in enumerate(files) if i % _TEST_SHARE] for name, files in train.items()}
    with whole_folder(out, _FILES) as temporary:
        for split, files_of in (("train", train), ("test", test)):
            _write(temporary / f"{split}.parquet", files_of, names, size)


def _pictures(root: Path, endings: Collection[str] = _ENDINGS) -> dict[str, list[Path]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {path.name: _files_below(path, endings) for path in folders}
    return {name: paths for name, paths in files.items() if paths}


def _files_below(root: Path, endings: Collection[str]) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in endings)


def _nothing(folder: Path, split: str, below: str, endings: Collection[str]) -> str:
    """What is said of a folder without files for a split."""
    if endings is _ENDINGS:
        videos = "; for its videos give frames" if folder.is_dir() and has_videos(folder) else ""
        return f"{folder} has no pictures in {split}/{below}, nor parquet files of the split {split!r}{videos}"
    return f"{folder} has no files in {split}/{below} that end in {', '.join(sorted(endings))}"


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS


def _write(file: Path, files_of: dict[str, list[Path]], names: list[str], size: int) -> None:
    import datasets

    def rows() -> Any:
        with oversized_refused():
            for name, files in files_of.items():
                label = names.index(name)
                for path in files:
                    picture = center_crop(decode_image(path.read_bytes(), str(path), 3), size)
                    buffer = BytesIO()
                    picture.save(buffer, "PNG")
                    yield {"bytes": buffer.getvalue(), "path": None}, label

    images, labels = zip(*rows(), strict=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features)
    table.to_parquet(str(file))
