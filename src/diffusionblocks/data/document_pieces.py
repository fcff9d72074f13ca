"""Long documents to tokens, piece by piece: cut only where the tokenizer gives the ids of the whole document."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

from tokenizers import Tokenizer

__all__ = ["copy_of", "document_ids", "exact_tokenizer"]

_PIECE = 1 << 16  # characters after which a piece ends at the next cut
_GROUP = 16  # pieces encoded at once
_AHEAD = 256  # characters after a cut that its check reads; no tokenizer is known to look further
_TRIES = 50  # runs of spaces that are tried for a cut
_MISSES = 3  # pieces without a cut, after which no more are looked for
_WRONG = 50  # cuts that the short look found and the piece did not, after which no more are looked for
_SPACES = re.compile(r"(?<=\S)\s{1,32}(?=\S)")


def exact_tokenizer(tokenizer: Tokenizer, letters: str, *, special_tokens: bool) -> Tokenizer:
    """A copy that encodes all of a text, and nothing but it: without truncation and padding.

    Args:
        tokenizer: any tokenizer, which stays as it is.
        letters: a special token whose letters in a text are always letters.
        special_tokens: whether other special tokens in a text are their ids; otherwise they are letters, too.

    Raises:
        ValueError: the tokenizer's ids cannot be kept without that token (see `special_tokens`).
    """
    copy = copy_of(tokenizer)
    if special_tokens:
        copy = _without(copy, letters)
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not special_tokens
    return copy


def copy_of(tokenizer: Tokenizer) -> Tokenizer:
    """A copy.

    Raises:
        ValueError: it cannot be written and read again, as one that was read from a damaged file.
    """
    return _parse(tokenizer.to_str())


def _parse(content: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizer cannot be written and read again: {' '.join(str(error).split())}") from None


def _without(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The tokenizer for which a token's letters stand for no token; other tokens keep their ids."""
    values = json.loads(tokenizer.to_str())
    extra = values["added_tokens"]
    if tokenizer.model.token_to_id(token) is not None:  # its id stays the model's
        values["added_tokens"] = [entry for entry in extra if entry["content"] != token]
    else:  # its id must stay taken, or those after it would move: by what no text holds
        for entry in extra:
            if entry["content"] == token:
                entry.update(content="\ufdd0" * 8, normalized=False)
    other = _parse(json.dumps(values))
    before, after = (
        {i: kind.content for i, kind in one.get_added_tokens_decoder().items()} for one in (tokenizer, other)
    )
    if any(after.get(i) != content for i, content in before.items() if content != token):
        raise ValueError(
            f"the tokenizer's other special tokens lose their ids without {token}: set special_tokens: false"
        )
    return other


def document_ids(text: str, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Ids of a document, piece by piece: together those that the tokenizer gives for the whole.

    A piece is encoded with what follows it, and its cut holds only where what follows, encoded alone, has the same
    ids. So prefixes, normalizers and pre-tokenizers that see across the cut are noticed. Where no cut holds (a text
    without spaces, say) the rest of the document is one piece.

    Args:
        text: the document.
        tokenizer: without truncation and padding, see `exact_tokenizer`.

    Returns:
        Iterator over ids and the number of characters done.
    """
    start = wrong = 0
    cuts = _cuts(text, tokenizer, _PIECE)
    while start < len(text):
        ends = list(itertools.islice(cuts, _GROUP))
        if len(ends) < _GROUP:
            ends.append(len(text))
        starts = [start, *ends[:-1]]
        ahead = [text[end : end + _AHEAD] for end in ends]
        pieces = [text[begin:end] + more for begin, end, more in zip(starts, ends, ahead, strict=True)]
        whole = tokenizer.encode_batch(pieces, add_special_tokens=False)
        after = tokenizer.encode_batch(ahead, add_special_tokens=False)
        for end, piece, more in zip(ends, whole, after, strict=True):
            ids = _before(piece.ids, more.ids)
            if ids is None:  # the short look that found the cut was wrong: on with places behind it
                wrong += 1
                cuts = _cuts(text, tokenizer, end + 1) if wrong < _WRONG else iter(())
                break
            yield ids, end - start
            start = end


def _before(ids: list[int], follow: list[int]) -> list[int] | None:
    """The ids before those that follow; None where others follow."""
    cut = len(ids) - len(follow)
    return ids[:cut] if ids[cut:] == follow else None


def _cuts(text: str, tokenizer: Tokenizer, at: int) -> Iterator[int]:
    """Where pieces may end, from `at` on and a piece apart, each found by a short look around it."""
    misses = 0
    while at < len(text) - _AHEAD and misses < _MISSES:
        cut = next((place for place in _places(text, at) if _holds(text, tokenizer, place)), None)
        if cut is not None:
            yield cut
        misses = 0 if cut is not None else misses + 1
        at = _PIECE + (at if cut is None else cut)


def _places(text: str, at: int) -> Iterator[int]:
    """Before the spaces that follow words, and behind single ones, for which a tokenizer's prefix may stand."""
    for match in itertools.islice(_SPACES.finditer(text, at), _TRIES):
        yield match.start()
        if match.group() == " ":
            yield match.end()


def _holds(text: str, tokenizer: Tokenizer, cut: int) -> bool:
    ahead = text[cut : cut + _AHEAD]
    around, after = tokenizer.encode_batch([text[max(0, cut - _AHEAD) : cut] + ahead, ahead], add_special_tokens=False)
    return bool(after.ids) and _before(around.ids, after.ids) is not None
