"""Text as characters: text8's 27, a space and the letters a to z; corpora of them from files and from CPython."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .split_files import TEXT_ENDINGS, files_of_split
from .text_data import TextData
from .text_files import cached_ids, check_text, fingerprint, open_text

__all__ = ["SYMBOLS", "characters", "decode", "encode", "normalise", "python_topics"]

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
"""The 27 characters, in the order of their ids."""

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_LIGATURES = {"æ": "ae", "œ": "oe", "ß": "ss"}  # no decomposition separates these

_SPLITS = ("train", "valid", "test")

_PIECE = 1 << 22  # characters read at once


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

    earlier: set[str] = set()
    parts: dict[str, list[str]] = {"train": [], "test": []}
    sizes = {"train": 0, "test": 0}
    for name in sorted(topics):
        paragraphs = dict.fromkeys(normalise(paragraph).strip() for paragraph in topics[name].split("\n\n"))
        new = [paragraph for paragraph in paragraphs if paragraph and paragraph not in earlier]
        earlier.update(new)
        text = "".join(f"{paragraph} " for paragraph in new)
        split = "test" if 10 * (sizes["test"] + len(text)) <= sum(sizes.values()) + len(text) else "train"
        parts[split].append(text)
        sizes[split] += len(text)
    return parts


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
        return torch.cat([torch.zeros(0, dtype=torch.uint8), *_encode_files(files)])
    source = fingerprint(files, [SYMBOLS])
    pieces = (ids.numpy() for ids in _encode_files(files))
    return cached_ids(cache_dir / f"characters-{source}.u8", {"source": source}, pieces, np.dtype("u1"))


def _encode_files(files: Iterable[Path]) -> Iterator[Tensor]:
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
    position = 0
    with open_text(path) as file:
        while piece := file.read(_PIECE):
            check_text(piece, path, position)
            position += len(piece)
            yield piece
