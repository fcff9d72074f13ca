"""Text as tokens of a byte-level tokenizer: trained on files, and a corpus encoded once into a file that is mapped."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ..common.files import whole_file
from ..common.formats import read_json
from ..common.messages import announcer
from ..common.processing_files import TOKENIZER_SETTINGS
from ..common.progress import Progress, begin_line, on_terminal
from ..common.tokenizer_file import read_tokenizer
from .document_pieces import document_ids, exact_tokenizer
from .split_files import TEXT_ENDINGS, files_of_split
from .text_data import TextData
from .text_files import cached_ids, check_text, fingerprint, is_cached, open_text

__all__ = [
    "END",
    "corpus_tokenizer",
    "corpus_tokenizer_path",
    "encoded_corpus",
    "encoded_split",
    "load_tokenizer",
    "split_files",
    "train_tokenizer",
]

END = "<|endoftext|>"
"""The special token after each document (GPT-2's name), where no other is named; id 0 of tokenizers trained here."""

_SMALLEST = 257  # every byte, and END
_PASSAGE = 1 << 16  # characters after which a passage ends at the next empty line
_FORMAT = 2  # Raise it when the ids of a text change: older files are then not found.
MAKES_END = "the tokenizer's model itself makes {} of its letters, so that they end a document; take them out"


def train_tokenizer(
    files: Sequence[Path], vocab_size: int, path: Path, *, limit: int | None = None, progress: bool = False
) -> Tokenizer:
    """Train a byte-level BPE tokenizer (GPT-2's kind) and write it as `tokenizer.json`.

    It loses nothing: every text is decoded to itself. The same text gives the same tokenizer.

    Args:
        files: UTF-8 text, plain or packed (.xz, .gz, .bz2).
        vocab_size: tokens, >= 257 (256 bytes and `END`). Where the text does not have as many, there are fewer.
        path: file to write, through a temporary name.
        limit: train on the first so many characters only, >= 1; None: on all.
        progress: show the library's progress bars; without a terminal a line.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no files, vocab_size or limit too small.
    """
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < _SMALLEST:
        raise ValueError(f"vocab_size = {vocab_size!r}: must be a whole number >= {_SMALLEST} (256 bytes and {END})")
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit!r}: must be at least 1, or None for all characters")
    _check_files(files)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bars = progress and on_terminal() and sys.stdout.isatty()  # elsewhere the bars leave empty lines
    announcer(progress and not bars)(begin_line(f"train a tokenizer, {path}", vocab_size, "tokens"))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=bars,
    )
    passages = itertools.chain.from_iterable(_passages(text) for text in _texts(files, limit))
    tokenizer.train_from_iterator(passages, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        tokenizer.save(str(temporary))
    return tokenizer


def load_tokenizer(path: Path, end: str = END) -> Tokenizer:
    """Read a `tokenizer.json`.

    Args:
        path: the file.
        end: the token that ends a document.

    Raises:
        FileNotFoundError, ValueError: it is missing, is no tokenizer, or has no such token.
    """
    tokenizer = read_tokenizer(path)
    end_of(tokenizer, end)
    return tokenizer


def chat_prompt(path: Path, question: str) -> torch.Tensor:
    """The prompt of a chat, by the chat template that lies beside a `tokenizer.json`, up to where the answer begins.

    transformers renders it, in a sandbox.

    Args:
        path: the file of the tokenizer.
        question: what the user says first.

    Returns:
        Ids, int64 (n,).

    Raises:
        ValueError: there is no template beside it, or one that cannot be rendered.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path.parent, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(
            f"--chat: no chat template lies beside {path} (chat_template.jinja, or in tokenizer_config.json): use "
            "--prompt alone, or put the template there"
        )
    messages = [{"role": "user", "content": question}]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise ValueError(
            f"the chat template beside {path} cannot be rendered: {' '.join(str(error).split())}"
        ) from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own
    return torch.tensor(ids, dtype=torch.int64)


def encoded_corpus(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    path: Path,
    *,
    separator: str | None = None,
    special_tokens: bool = False,
    start: str | None = None,
    end: str = END,
    limit: int | None = None,
    progress: bool = False,
) -> TextData:
    """A corpus as tokens, encoded once: a later call with the same files and tokenizer only maps the file.

    A document's ids are those that the tokenizer gives for all of it, without truncation and padding, between
    the tokens `start` and `end`.
    Memory holds one file's text at a time, and a million characters or so as tokens (see `document_pieces.py`).

    Args:
        files: UTF-8 text, plain or packed (.xz, .gz, .bz2).
        tokenizer: a tokenizer that has `start` and `end`.
        path: file of the raw little-endian ids, uint16, or uint32 for more than 65,536 tokens; beside it `PATH.json`
            says what it holds. Both are written under temporary names.
        separator: what stands between documents within a file, such as "\\n\\n\\n"; None: a file is a document.
        special_tokens: whether special tokens in the text, such as chat markers, are their ids; otherwise their letters
            are letters, as those of `end` always are.
        start: the token before each document; None: none.
        end: the token after each document.
        limit: only the first so many ids, >= 1; what comes after them is not encoded. None: all.
        progress: show a progress bar over the files' characters; without a terminal a line now and then.

    Returns:
        The ids, mapped.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no files, an empty separator, a tokenizer without these tokens, text that is not UTF-8 or holds a
            NUL, or none at all.
    """
    _check_files(files)
    if separator == "":
        raise ValueError("separator is empty: must be text, or None for one document a file")
    end_of(tokenizer, end)
    vocab_size = vocab_size_of(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    index = {
        "source": _fingerprint(files, tokenizer, separator, special_tokens, start, end, limit),
        "vocab_size": vocab_size,
    }
    documents = _first(_ids(files, tokenizer, separator, special_tokens, start, end, progress), limit)
    pieces = (np.asarray(ids) for ids in documents)
    return TextData(cached_ids(path, index, pieces, dtype), vocab_size)


def corpus_tokenizer(
    files: Sequence[Path], vocab_size: int, folder: Path, *, limit: int | None = None, progress: bool = False
) -> Tokenizer:
    """The tokenizer of a corpus: trained once, and kept in `folder` as `tokenizer-FINGERPRINT.json`.

    The name changes with the files (name, size, time of change), vocab_size and limit; so jobs that share a folder
    never find another's. Jobs that train it at once write the same.

    Args:
        files, vocab_size, limit, progress: see `train_tokenizer`.
        folder: made if need be.

    Raises:
        FileNotFoundError, ValueError: see `train_tokenizer`.
    """
    path = corpus_tokenizer_path(files, vocab_size, folder, limit=limit)
    if path.is_file():
        return load_tokenizer(path)
    return train_tokenizer(files, vocab_size, path, limit=limit, progress=progress)


def corpus_tokenizer_path(files: Sequence[Path], vocab_size: int, folder: Path, *, limit: int | None = None) -> Path:
    """Where `corpus_tokenizer` keeps the tokenizer of a corpus; it need not be there yet.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or there are none.
    """
    _check_files(files)
    return folder / f"tokenizer-{fingerprint(files, [END, vocab_size, limit])}.json"


def encoded_split(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    folder: Path,
    name: str,
    *,
    separator: str | None = None,
    special_tokens: bool = False,
    start: str | None = None,
    end: str = END,
    limit: int | None = None,
    progress: bool = False,
) -> TextData:
    """As `encoded_corpus`, kept in `folder` as `NAME-FINGERPRINT.ids`.

    The name changes with the files, the tokenizer, the separator, the special tokens and the limit; so jobs that share
    a folder never find another's. Where the whole split is there, its first ids are taken of it.
    Jobs that encode it at once write the same.
    """
    _check_files(files)

    def place(limit: int | None) -> Path:
        return folder / f"{name}-{_fingerprint(files, tokenizer, separator, special_tokens, start, end, limit)}.ids"

    options: dict[str, Any] = {"separator": separator, "special_tokens": special_tokens, "start": start, "end": end}
    if limit is not None and is_cached(place(None)):
        whole = encoded_corpus(files, tokenizer, place(None), progress=progress, **options)
        return dataclasses.replace(whole, ids=whole.ids[:limit])
    return encoded_corpus(files, tokenizer, place(limit), limit=limit, progress=progress, **options)


def split_files(source: Path, split: str, patterns: Mapping[str, str] | None = None) -> list[Path]:
    """The text files of a split, in the order of their names.

    Args:
        source: a folder.
        split: its name.
        patterns: split name -> glob relative to the folder; None: the files named after the split, such as train.txt or
            train-1.txt.xz, without backups.

    Raises:
        FileNotFoundError: no such folder, or no file for the split.
        ValueError: unknown split, or a file where a folder is needed.
    """
    source = source.expanduser()
    if source.is_file():
        raise ValueError(f"{source} is a file: name a folder that holds files for each split")
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is missing: name a folder that holds files for each split")
    return files_of_split(source, split, patterns, endings=TEXT_ENDINGS)


# ---- the parts -------------------------------------------------------------------------------------------


def _fingerprint(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    separator: str | None,
    special_tokens: bool,
    start: str | None,
    end: str,
    limit: int | None = None,
) -> str:
    content = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    tokens = [] if (start, end) == (None, END) else [start, end]  # what was encoded before they could be named is right
    first = [] if limit is None else [{"limit": limit}]
    return fingerprint(files, [_FORMAT, content, separator, special_tokens, *tokens, *first])


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """How many ids a tokenizer spans: one more than the highest id: a tokenizer may leave ids out."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def _ids(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    separator: str | None,
    special_tokens: bool,
    start_token: str | None,
    end_token: str,
    progress: bool,
) -> Iterator[list[int]]:
    end, empty = end_of(tokenizer, end_token), True
    start = start_of(tokenizer, start_token)
    tokenizer = exact_tokenizer(tokenizer, end_token, special_tokens=special_tokens)
    for file, text in zip(files, _texts(files), strict=True):
        with Progress(f"encode {file.name}", len(text), "characters", show=progress) as bar:
            for document in text.split(separator) if separator else [text]:
                if not document:
                    continue
                if start:
                    yield start
                for ids, length in document_ids(document, tokenizer):
                    if end in ids:
                        raise ValueError(f"{file}: {MAKES_END.format(end_token)}")
                    yield ids
                    bar.update(length)
                yield [end]
                empty = False
    if empty:
        raise ValueError(f"no text in {[str(file) for file in files]}")


def _first(pieces: Iterator[list[int]], limit: int | None) -> Iterator[list[int]]:
    """The first so many ids of some pieces; those behind them are never made. None: all."""
    left = math.inf if limit is None else limit
    for ids in pieces:
        yield ids if len(ids) <= left else ids[: int(left)]
        left -= len(ids)
        if left <= 0:
            return


def _passages(text: str) -> Iterator[str]:
    """Cuts before empty lines, to train on."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + _PASSAGE)
        end = len(text) if cut < 0 else cut
        yield text[start:end]
        start = end


def _texts(files: Sequence[Path], limit: int | None = None) -> Iterator[str]:
    """The text of each file; of all together no more than `limit` characters."""
    for file in files:
        with open_text(file) as stream:
            text = stream.read(-1 if limit is None else limit)
        check_text(text, file)
        yield text
        if limit is not None:
            limit -= len(text)
            if limit == 0:
                return


def _check_files(files: Sequence[Path]) -> None:
    if not files:
        raise ValueError("files is empty: name at least one text file")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")


def end_of(tokenizer: Tokenizer, token: str = END) -> int:
    """The id of the token that ends a document; ValueError where the tokenizer has none."""
    end: int | None = tokenizer.token_to_id(token)
    if end is None:
        raise ValueError(f"the tokenizer has no token {token}, which ends a document; name one of its own (data.end)")
    return end


def end_token(path: Path) -> str:
    """The token that ends a document in a `tokenizer.json`: `END`, or the eos_token of the settings beside it.

    Raises:
        FileNotFoundError, ValueError: no tokenizer, or one with neither.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer.token_to_id(END) is not None:
        return END
    settings = path.parent / TOKENIZER_SETTINGS[0]
    token = read_json(settings).get("eos_token") if settings.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token  # as older versions of the library wrote it
    if not isinstance(token, str) or tokenizer.token_to_id(token) is None:
        raise ValueError(
            f"{path} has no token {END}, and no {settings.name} beside it names an eos_token: name the token that ends "
            "a document, --set data.end=TOKEN"
        )
    return token


def start_token(path: Path) -> str | None:
    """The token that a `tokenizer.json` puts before every text by itself; None: none, or more than one.

    Raises:
        FileNotFoundError, ValueError: no tokenizer.
    """
    tokenizer = read_tokenizer(path)
    tokens, plain = (tokenizer.encode("a", add_special_tokens=special).tokens for special in (True, False))
    before = next((i for i in range(len(tokens)) if tokens[i : i + len(plain)] == plain), 0)
    return str(tokens[0]) if plain and before == 1 else None


def start_of(tokenizer: Tokenizer, token: str | None) -> list[int]:
    """The ids that stand before a document: one, or none. ValueError where the tokenizer has no such token."""
    if token is None:
        return []
    start: int | None = tokenizer.token_to_id(token)
    if start is None:
        raise ValueError(
            f"the tokenizer has no token {token}, which begins a document; name one of its own (data.start)"
        )
    return [start]
