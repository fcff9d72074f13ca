"""Text as tokens of a byte-level tokenizer: trained on files, and a corpus encoded once into a file that is mapped."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..files import read_json, renamed, write_json
from .text import TextData, fingerprint, mapped, open_text

__all__ = ["END", "encoded_corpus", "load_tokenizer", "train_tokenizer"]

END = "<|endoftext|>"
"""The special token after each document (GPT-2's name); id 0."""

_SMALLEST = 257  # every byte, and END
_BATCH = 16  # passages encoded at once
_PASSAGE = 1 << 16  # characters after which a passage ends at the next empty line


def train_tokenizer(files: Sequence[Path], vocab_size: int, path: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer (GPT-2's kind) and write it as `tokenizer.json`.

    It loses nothing: every text is decoded to itself.

    Args:
        files: UTF-8 text, plain or packed (.xz, .gz, .bz2).
        vocab_size: tokens, >= 257 (256 bytes and `END`). Where the text does not have as many, there are fewer.
        path: file to write, through a temporary name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no files, or vocab_size too small.
    """
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < _SMALLEST:
        raise ValueError(f"vocab_size = {vocab_size!r}: must be a whole number >= {_SMALLEST} (256 bytes and {END})")
    _check_files(files)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    passages = itertools.chain.from_iterable(_passages(_read(file)) for file in files)
    tokenizer.train_from_iterator(passages, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed(path) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        FileNotFoundError, ValueError: it is missing, is no tokenizer, or has no `END`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: make it with train_tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer.json: {error}") from None
    _end(tokenizer)
    return tokenizer


def encoded_corpus(
    files: Sequence[Path], tokenizer: Tokenizer, path: Path, *, separator: str | None = None
) -> TextData:
    """A corpus as tokens, encoded once: a later call with the same files and tokenizer only maps the file.

    `END` follows each document. Memory holds one file's text at a time, and no more than a group of passages as tokens.

    Args:
        files: UTF-8 text, plain or packed (.xz, .gz, .bz2).
        tokenizer: a tokenizer that has `END`.
        path: file of the raw little-endian ids, uint16, or uint32 for more than 65,536 tokens; beside it `PATH.json`
            says what it holds. Both are written under temporary names.
        separator: what stands between documents within a file, such as "\\n\\n\\n"; None: a file is a document.

    Returns:
        The ids, mapped.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no files, an empty separator, a tokenizer without `END`, text that is not UTF-8, or none at all.
    """
    _check_files(files)
    if separator == "":
        raise ValueError("separator is empty: must be text, or None for one document a file")
    _end(tokenizer)
    vocab_size = tokenizer.get_vocab_size()
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    signature = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    index = {
        "source": fingerprint(files, [signature, separator]),
        "dtype": dtype.name,
        "vocab_size": vocab_size,
    }
    sidecar = path.with_name(f"{path.name}.json")
    if not _is_there(path, sidecar, index, dtype):
        path.parent.mkdir(parents=True, exist_ok=True)
        sidecar.unlink(missing_ok=True)  # from here to the end the file is nobody's
        count = 0
        with renamed(path) as temporary, temporary.open("wb") as out:
            for ids in _ids(files, tokenizer, separator):
                count += len(ids)
                out.write(np.asarray(ids, dtype=dtype).tobytes())
            if not count:
                raise ValueError(f"no text in {[str(file) for file in files]}")
        write_json(sidecar, index | {"count": count})
    return TextData(mapped(path, dtype), vocab_size)


def _is_there(path: Path, sidecar: Path, index: dict[str, object], dtype: np.dtype[np.unsignedinteger]) -> bool:
    if not (path.is_file() and sidecar.is_file()):
        return False
    found = read_json(sidecar)
    count = found.pop("count", None)
    return found == index and isinstance(count, int) and path.stat().st_size == count * dtype.itemsize


def _ids(files: Sequence[Path], tokenizer: Tokenizer, separator: str | None) -> Iterator[list[int]]:
    end = _end(tokenizer)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, for the next line changes it
    tokenizer.encode_special_tokens = True  # where the text has the letters of END, they are letters
    for file in files:
        text = _read(file)
        for document in text.split(separator) if separator else [text]:
            if not document:
                continue
            for passages in _grouped(_passages(document)):
                for encoding in tokenizer.encode_batch(passages, add_special_tokens=False):
                    yield encoding.ids
            yield [end]


def _passages(text: str) -> Iterator[str]:
    """Cuts before empty lines, where no token reaches across: the tokens are those of the whole text."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + _PASSAGE)
        end = len(text) if cut < 0 else cut
        yield text[start:end]
        start = end


def _grouped(passages: Iterator[str]) -> Iterator[list[str]]:
    while group := list(itertools.islice(passages, _BATCH)):
        yield group


def _read(file: Path) -> str:
    with open_text(file) as stream:
        return stream.read()


def _check_files(files: Sequence[Path]) -> None:
    if not files:
        raise ValueError("files is empty: name at least one text file")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")


def _end(tokenizer: Tokenizer) -> int:
    end: int | None = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no token {END}, which ends a document; add it, or train one that has it")
    return end
