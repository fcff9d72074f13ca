"""A tokenizer as a file, `tokenizer.json`: the libraries' own form, which lies beside the weights of a language model.

`transformers.PreTrainedTokenizerFast(tokenizer_file="FOLDER/tokenizer.json")` opens it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
"""Its name in a model's folder."""


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        FileNotFoundError, ValueError: it is missing, or no tokenizer; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name a tokenizer.json")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is no tokenizer.json: {error}") from None


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer of a saved model, where there is one: models of characters, images and labels have none."""
    path = folder / TOKENIZER
    return path if path.is_file() else None


def same_tokenizer(a: Path, b: Path) -> bool:
    """Whether two files hold one tokenizer, however each is laid out and whatever version of the library wrote it.

    Raises:
        FileNotFoundError, ValueError: see `read_tokenizer`.
    """
    if a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes():
        return True
    return bool(read_tokenizer(a).to_str() == read_tokenizer(b).to_str())


def same_ids(a: Path, b: Path) -> bool:
    """Whether two files give every token the same id, however they cut a text.

    Raises:
        FileNotFoundError, ValueError: see `read_tokenizer`.
    """
    return bool(read_tokenizer(a).get_vocab() == read_tokenizer(b).get_vocab())
