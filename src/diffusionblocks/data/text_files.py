"""Files of text, plain or packed, and files of the ids that were made of them once and are mapped then."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from ..common.files import whole_file
from ..common.formats import read_json, write_json
from .split_files import source_digest

__all__ = ["cached_ids", "check_text", "fingerprint", "is_cached", "open_text"]

_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}

_CACHE_FORMAT = 1  # Raise it when the content of a cache file changes: older files are then not found.


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a UTF-8 text file to read, plain or packed (.xz, .gz, .bz2); line ends are left as they are.

    Raises:
        ValueError: within the context, where the text is not UTF-8 or what is packed is damaged.
    """
    opener = _OPENERS.get(path.suffix, open)
    # Each packer has errors of its own for damage; gzip and bz2 also raise bare OSErrors.
    damage: tuple[type[Exception], ...] = (EOFError, lzma.LZMAError, zlib.error)
    if opener is not open:
        damage += (OSError,)
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    except UnicodeDecodeError as error:  # it counts from the last read
        byte = error.object[error.start]
        line = _line_that_is_not_utf8(path)
        raise ValueError(
            f"{path}, line {line} is not UTF-8 text (byte {byte:#04x}): convert the file to UTF-8"
        ) from None
    except damage as error:
        raise ValueError(f"{path} is damaged: {error}; pack it again") from None


def _line_that_is_not_utf8(path: Path) -> int:
    number = 1
    with contextlib.suppress(UnicodeDecodeError), _OPENERS.get(path.suffix, open)(path, "rb") as file:
        for line in file:
            cast(bytes, line).decode("utf-8")
            number += 1
    return number


def check_text(text: str, path: Path, first: int = 0) -> None:
    """Refuse what is no text though its bytes are UTF-8: UTF-16 and binary files hold NUL characters.

    Args:
        text: a part of the file.
        path: of the file.
        first: characters of the file before it.

    Raises:
        ValueError: it holds a NUL.
    """
    if (at := text.find("\0")) >= 0:
        raise ValueError(f"{path}, character {first + at} is a NUL: no text in UTF-8 (UTF-16, or binary?); convert it")


def fingerprint(files: Sequence[Path], settings: Sequence[object]) -> str:
    """The name of ids that are cached, see `source_digest`."""
    return source_digest(_CACHE_FORMAT, files, settings)


def cached_ids(
    path: Path, index: Mapping[str, object], pieces: Iterable[np.ndarray], dtype: np.dtype[np.unsignedinteger]
) -> Tensor:
    """Ids that are written to a file once, then mapped: pages are read when they are used, and never written back.

    Args:
        path: file of the raw little-endian ids; beside it `PATH.json` says what it holds. Both are written under
            temporary names.
        index: what it holds, as JSON values. A file of something else, or one that is cut off, is written anew.
        pieces: the ids, read only where they are to be written.
        dtype: of the ids.

    Returns:
        The ids, shape (N,), possibly none.
    """
    index = {**index, "dtype": dtype.name}
    sidecar = _sidecar(path)
    count = _cached_count(path, sidecar, index, dtype.itemsize)
    if count is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        sidecar.unlink(missing_ok=True)  # from here to the end the file is nobody's
        count = 0
        with whole_file(path) as temporary, temporary.open("wb") as file:
            for ids in pieces:
                count += len(ids)
                file.write(np.asarray(ids, dtype=dtype).tobytes())
        write_json(sidecar, {**index, "count": count})
    if count == 0:  # which cannot be mapped
        return torch.from_numpy(np.zeros(0, dtype=dtype))
    return torch.from_numpy(np.memmap(path, dtype=dtype, mode="c"))


def is_cached(path: Path) -> bool:
    """Whether ids were written to a file, and to its end."""
    return path.is_file() and _sidecar(path).is_file()


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _cached_count(path: Path, sidecar: Path, index: Mapping[str, object], size: int) -> int | None:
    """How many ids the file holds; None where it holds something else, or is not whole."""
    try:
        values = read_json(sidecar)
    except (FileNotFoundError, ValueError):
        return None
    count = values.pop("count", None)
    whole = type(count) is int and path.is_file() and path.stat().st_size == count * size
    return count if whole and values == index else None
