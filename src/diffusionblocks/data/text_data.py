"""Text in memory or mapped from a file, as characters (here) or tokens (`tokenized.py`), and batches made from it.

Characters are text8's 27: a space and the letters a to z.
"""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import hashlib
import json
import lzma
import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from ..common.files import whole_file
from ..common.formats import read_json, write_json
from .split_files import TEXT_ENDINGS, files_of_split

__all__ = ["SYMBOLS", "TextData", "characters", "decode", "encode", "normalise", "open_text", "python_topics"]

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
"""The 27 characters, in the order of their ids."""

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LIGATURES = {"æ": "ae", "œ": "oe", "ß": "ss"}  # no decomposition separates these
_SPLITS = ("train", "valid", "test")
_DTYPES = (torch.uint8, torch.uint16, torch.uint32)
_OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_PIECE = 1 << 22  # characters read at once
_CACHE_FORMAT = 1  # Raise it when the content of a cache file changes: older files are then not found.


@dataclass(frozen=True)
class TextData:
    """One long text as ids, in ordinary memory or mapped from a file.

    Attributes:
        ids: uint8, uint16 or uint32, shape (N,), N >= 1, on the CPU, each from 0 to vocab_size - 1.
        vocab_size: number of different ids; 27 for characters.
        tokenizer: the bytes of the `tokenizer.json` whose ids these are, where that is known; None for characters.

    Raises:
        ValueError: a dtype, a shape or an id is not as above.
    """

    ids: Tensor
    vocab_size: int
    tokenizer: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.ids.dtype not in _DTYPES or self.ids.dim() != 1 or len(self.ids) == 0:
            raise ValueError(
                f"ids: {self.ids.dtype} {tuple(self.ids.shape)}: must be uint8, uint16 or uint32 (N,), N >= 1"
            )
        highest = int(self.ids.numpy().max())  # torch has no maximum of uint16
        if highest >= self.vocab_size:
            raise ValueError(f"ids: {highest} is among them: must be from 0 to {self.vocab_size - 1}")

    def __len__(self) -> int:
        return len(self.ids)


# ---- characters ------------------------------------------------------------------------------------------


class _Characters(dict[int, str]):
    """What each code point becomes: filled as text is met."""

    def __missing__(self, code: int) -> str:
        # Decomposed, an accented letter is the letter and its accents (category Mn), which are dropped.
        parts = unicodedata.normalize("NFKD", chr(code)).lower()
        self[code] = "".join(_letter(part) for part in parts if unicodedata.category(part) != "Mn")
        return self[code]


def _letter(lower: str) -> str:
    if lower in SYMBOLS:
        return lower
    return f" {_DIGITS[int(lower)]} " if lower in "0123456789" else _LIGATURES.get(lower, " ")


_CHARACTERS = _Characters()


def normalise(text: str) -> str:
    """Any text in the 27 symbols, by the recipe of text8 (Mahoney): `It's 1897.` gives `it s one eight nine seven `.

    Lower case; accents dropped and ligatures parted (where the original recipe makes a space); digits spelled out one
    by one; everything else a space; runs of spaces made one. Text in this form already is unchanged.
    """
    return re.sub("  +", " ", text.translate(_CHARACTERS))


_CODE_OF = np.full(256, 255, dtype=np.uint8)
_CODE_OF[np.frombuffer(SYMBOLS.encode(), dtype=np.uint8)] = np.arange(len(SYMBOLS))


def encode(text: str) -> Tensor:
    """Ids of a text in the 27 symbols, uint8, shape (len(text),).

    Raises:
        ValueError: another character; the message says where. `normalise` removes them.
    """
    ids = _CODE_OF[np.frombuffer(text.encode("ascii", errors="replace"), dtype=np.uint8)]
    if len(wrong := np.flatnonzero(ids == 255)):
        at = int(wrong[0])
        raise ValueError(
            f"character {text[at]!r} at {at}: must be a space or a letter a to z; normalise the text first"
        )
    return torch.from_numpy(ids)


def decode(ids: Tensor) -> str:
    """The text of ids (N,), any integer dtype; `_` for the mask (27).

    Raises:
        ValueError: an id below 0 or above 27, or ids of another shape.
    """
    codes = ids.cpu().numpy().astype(np.int64)
    if codes.ndim != 1 or not ((codes >= 0) & (codes <= len(SYMBOLS))).all():
        raise ValueError(f"ids: {tuple(ids.shape)}: must be (N,), each from 0 to {len(SYMBOLS)} (the mask)")
    return "".join((SYMBOLS + "_")[code] for code in codes)


def characters(
    source: str | Path,
    split: str = "train",
    *,
    split_files: Mapping[str, str] | None = None,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    cache_dir: Path | None = None,
) -> TextData:
    """A corpus of the 27 characters; text that is not in this form yet is normalised.

    Args:
        source: a text file, UTF-8, plain or packed (.xz, .gz, .bz2), which is split by `fractions`; or a folder with
            files for each split.
        split: of a file "train", "valid" or "test"; of a folder any name, or one in `split_files`.
        split_files: for a folder: for each split its files, as a glob relative to the folder, read in the order of
            their names; by default those named after the split, such as train.txt or train-1.txt.xz, without backups.
        fractions: of a single file: what share of its characters, from the start, is train, valid and test; they add
            up to 1. The default gives text8 its 90M, 5M and 5M.
        cache_dir: folder for the ids (one file a corpus, a byte a character), made if need be; they are then mapped,
            not read into memory. None reads the text anew each time.

    Returns:
        Ids of vocabulary 27.

    Raises:
        FileNotFoundError: no such file, or none for the split.
        ValueError: unknown split, fractions that do not add up, text that is not UTF-8, or a split without characters.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        ids = _corpus(files_of_split(source, split, split_files, endings=TEXT_ENDINGS), cache_dir)
    elif source.is_file():
        start, end = _part(split, fractions)
        whole = _corpus([source], cache_dir)
        ids = whole[round(start * len(whole)) : round(end * len(whole))]
    else:
        raise FileNotFoundError(f"{source} is missing: name a text file, or a folder with a file for each split")
    if not len(ids):
        raise ValueError(f"{source}, split {split!r}: no characters")
    return TextData(ids, len(SYMBOLS))


def python_topics(split: str) -> TextData:
    """The language reference that CPython carries (`pydoc_data.topics`) in the 27 characters; needs no download.

    Some 300,000 characters, whole topics in either split: a topic is for testing wherever that keeps the test split at
    a tenth or less. Topics repeat each other, so every paragraph is kept once. The text is that of the running Python.

    Args:
        split: "train" or "test".

    Returns:
        Ids of vocabulary 27.

    Raises:
        ValueError: unknown split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}: must be 'train' or 'test'")
    return TextData(encode("".join(_topics()[split])), len(SYMBOLS))


@functools.cache
def _topics() -> dict[str, list[str]]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: dict[str, list[str]] = {"train": [], "test": []}
    sizes = {"train": 0, "test": 0}
    for name in sorted(topics):
        paragraphs = dict.fromkeys(normalise(paragraph).strip() for paragraph in topics[name].split("\n\n"))
        new = [paragraph for paragraph in paragraphs if paragraph and paragraph not in seen]
        seen.update(new)
        text = "".join(f"{paragraph} " for paragraph in new)
        split = "test" if 10 * (sizes["test"] + len(text)) <= sum(sizes.values()) + len(text) else "train"
        parts[split].append(text)
        sizes[split] += len(text)
    return parts


# ---- files -----------------------------------------------------------------------------------------------


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
    """Changes when a source file (name, size, time of change) or a setting does."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([_CACHE_FORMAT, stats, list(settings)]).encode()).hexdigest()[:24]


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
    sidecar = path.with_name(f"{path.name}.json")
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


def _cached_count(path: Path, sidecar: Path, index: Mapping[str, object], size: int) -> int | None:
    """How many ids the file holds; None where it holds something else, or is not whole."""
    try:
        values = read_json(sidecar)
    except (FileNotFoundError, ValueError):
        return None
    count = values.pop("count", None)
    whole = type(count) is int and path.is_file() and path.stat().st_size == count * size
    return count if whole and values == index else None


def _part(split: str, fractions: Sequence[float]) -> tuple[float, float]:
    """Where a split starts and ends, as shares of the file."""
    if split not in _SPLITS:
        raise ValueError(f"split = {split!r}: must be one of {list(_SPLITS)}")
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-9):
        raise ValueError(f"fractions = {list(fractions)}: must be three numbers >= 0 that add up to 1")
    index = _SPLITS.index(split)
    return math.fsum(fractions[:index]), math.fsum(fractions[: index + 1])


def _corpus(files: Sequence[Path], cache_dir: Path | None) -> Tensor:
    """Ids of the files one after another, a space between them; uint8 (N,), possibly empty."""
    if cache_dir is None:
        return torch.cat([torch.zeros(0, dtype=torch.uint8), *_encoded(files)])
    source = fingerprint(files, [SYMBOLS])
    pieces = (ids.numpy() for ids in _encoded(files))
    return cached_ids(cache_dir / f"characters-{source}.u8", {"source": source}, pieces, np.dtype("u1"))


def _encoded(files: Iterable[Path]) -> Iterator[Tensor]:
    """Ids piece by piece, as `normalise` would give for the whole text."""
    after_space = False
    for number, path in enumerate(files):
        for piece in _pieces(path, " " if number else ""):
            text = normalise(piece)
            if after_space:
                text = text.removeprefix(" ")
            if text:
                after_space = text.endswith(" ")
                yield encode(text)


def _pieces(path: Path, before: str) -> Iterator[str]:
    yield before
    done = 0
    with open_text(path) as file:
        while piece := file.read(_PIECE):
            check_text(piece, path, done)
            done += len(piece)
            yield piece
