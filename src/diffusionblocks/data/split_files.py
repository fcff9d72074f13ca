"""Which files of a folder are those of a split: by a recipe's pattern, or by the names that data sets have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.digests import json_digest

__all__ = ["IMAGE_ENDINGS", "PACKED", "TEXT_ENDINGS", "files_of_split", "source_digest"]

PACKED = (".xz", ".gz", ".bz2")
IMAGE_ENDINGS = (".parquet",)
TEXT_ENDINGS = (".txt", *(f".txt{packed}" for packed in PACKED))

#: Parts of a name that say that the file is a spare one.
_SPARE = {"bak", "backup", "copy", "old", "orig", "original", "part", "partial", "sav", "save", "swp", "temp", "tmp"}


def files_of_split(
    folder: Path, split: str, patterns: Mapping[str, str] | None = None, *, endings: Sequence[str]
) -> list[Path]:
    """The files of a split in a folder that is there, in the order of their names.

    Args:
        folder: where they are.
        split: name of the split.
        patterns: split name -> glob relative to the folder. None: files named `SPLIT` or `SPLIT` and a number or words
            after one of `-_.`, such as `train-00000-of-00002.parquet`; not backups (`train.bak.parquet`, `train
            (copy).parquet`, `train.txt~`).
        endings: of the default names.

    Returns:
        One path or more; never a hidden file that the pattern does not ask for.

    Raises:
        FileNotFoundError: no file for the split.
        ValueError: a split that `patterns` lacks, a pattern that leaves the folder, or a file that is there both plain
            and packed, which would be read twice.
    """
    if patterns is None:
        pattern = f"{split}*{endings[0]}"
        files = [path for path in folder.iterdir() if _is_default(path.name, split, endings)]
    elif split not in patterns:
        raise ValueError(f"split = {split!r}: must be one of {sorted(patterns)}, or be added to split_files")
    else:
        pattern = patterns[split]
        if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise ValueError(f"split_files: {split}: {pattern!r}: must be a pattern for files below {folder}")
        hidden = Path(pattern).name.startswith(".")
        files = [path for path in folder.glob(pattern) if hidden or not path.name.startswith(".")]
    files = sorted(path for path in files if path.is_file())
    if not files:
        present = sorted(path.name for path in folder.iterdir())[:20]
        raise FileNotFoundError(
            f"split {split!r}: no file in {folder} matches {pattern!r}; the folder holds {present}; set split_files"
        )
    _refuse_twins(files)
    return files


def _is_default(name: str, split: str, endings: Sequence[str]) -> bool:
    ending = max((ending for ending in endings if name.endswith(ending)), key=len, default=None)
    if ending is None or not name.startswith(split):
        return False
    rest = name[len(split) : -len(ending)]
    # A word right after the split's name is another name: "training", "tests".
    if not re.fullmatch(r"(?:[-_.0-9][-_.\w]*)?", rest):
        return False
    return _SPARE.isdisjoint(part for part in re.split(r"[-_.]", rest.lower()))


def _refuse_twins(files: Sequence[Path]) -> None:
    first: dict[Path, Path] = {}
    for path in files:
        plain = path.with_suffix("") if path.suffix in PACKED else path
        if plain in first:
            raise ValueError(
                f"{first[plain]} and {path.name} are one text, plain and packed, which would be read twice: "
                "remove one, or name the other in split_files"
            )
        first[plain] = path


def source_digest(version: int, files: Sequence[Path], settings: Sequence[object]) -> str:
    """A name for what is made of files: it changes when one of them (name, size, time of change) or a setting does.

    Args:
        version: of the format in which it is stored.
        files: the sources.
        settings: JSON values.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json_digest([version, stats, list(settings)])[:24]
