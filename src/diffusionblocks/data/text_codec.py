"""Text to ids and back: what a prompt is made of, and how generated ids are read."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .character_text import SYMBOLS, decode, encode
from .document_pieces import copy_of, exact_tokenizer
from .token_text import END, MAKES_END, end_of, start_of, vocab_size_of

__all__ = ["CharacterCodec", "TextCodec", "TokenCodec"]


class TextCodec(Protocol):
    """Text to ids and back; `decode(encode(text)) == text`.

    Attributes:
        vocab_size: number of different ids.
        end: the id that ends a document and can stand before a text's first token; None where there is none.
    """

    vocab_size: int
    end: int | None

    def library_tokenizer(self) -> Any:
        """A tokenizer of transformers with these ids; None where there is none."""

    def encode(self, text: str) -> Tensor:
        """Ids, int64, shape (n,); ValueError where the text cannot be encoded."""

    def decode(self, ids: Tensor) -> str:
        """The text of ids (n,), any integer dtype; ValueError for an id that is none."""


class CharacterCodec:
    """The 27 characters."""

    def __init__(self) -> None:
        self.vocab_size = len(SYMBOLS)
        self.end: int | None = None

    def library_tokenizer(self) -> Any:
        """None: characters have no tokenizer."""
        return None

    def encode(self, text: str) -> Tensor:
        """Ids, int64, shape (n,); ValueError for a character that is not among the 27."""
        return encode(text).long()

    def decode(self, ids: Tensor) -> str:
        """The text of ids (n,); `_` for the mask."""
        return decode(ids)


class TokenCodec:
    """The tokens of a tokenizer.

    Special tokens in a text, such as chat markers, are their ids; the letters of `end` are letters.

    Args:
        tokenizer: it is copied, without truncation and padding.
        start: the token before a document, which `encode` puts there and `decode` leaves out; None: none.
        end: the token that ends a document.

    Raises:
        ValueError: the tokenizer has no such tokens.
    """

    def __init__(self, tokenizer: Tokenizer, start: str | None = None, end: str = END) -> None:
        self.end: int | None = end_of(tokenizer, end)
        self._start, self._end_token = start_of(tokenizer, start), end
        self.vocab_size: int = vocab_size_of(tokenizer)
        self._encoder = exact_tokenizer(tokenizer, end, special_tokens=True)
        self._decoder = copy_of(tokenizer)

    def library_tokenizer(self) -> Any:
        """A tokenizer of transformers with these ids."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=copy_of(self._decoder))

    def encode(self, text: str) -> Tensor:
        """Ids, int64, shape (n,); ValueError where the tokenizer's model itself makes `end` of its letters."""
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        if self.end in ids:
            raise ValueError(f"{text[:80]!r}: {MAKES_END.format(self._end_token)}")
        return torch.tensor([*self._start, *ids], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """The text of ids (n,), with the letters of `end` where a document ends; bytes that are no UTF-8 become �.

        Raises:
            ValueError: an id that is none, such as a mask's, or ids of another shape.
        """
        values = ids.tolist()
        if ids.dim() != 1 or not all(0 <= value < self.vocab_size for value in values):
            raise ValueError(f"ids: {tuple(ids.shape)}: must be (n,), each from 0 to {self.vocab_size - 1}")
        texts = [value for value in values if value not in self._start]
        return str(self._decoder.decode(texts, skip_special_tokens=False))
