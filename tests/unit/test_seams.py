"""Any tokenizer's ids: of long documents in pieces, without truncation and padding, with special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from diffusionblocks.data import TokenCodec
from diffusionblocks.data import document_pieces as seams
from diffusionblocks.data.document_pieces import document_ids, exact_tokenizer
from diffusionblocks.data.token_text import END, encoded_corpus, load_tokenizer, train_tokenizer

_TEXT = (
    "The quick brown fox, 12345 dogs -- isn't it?  Well...\n\nÉmile's “cafe\u0301” (no.\t42)\r\n\r\n   the end   \n\n\n"
    "user says: hello world 你好。 alpha beta gamma\n\nthe fox the dog 😀 the quick\n"
) * 10
_GPT4 = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_SPECIAL = [END, "<unk>"]


def bpe(pre: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _TEXT.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=500, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def unigram(pre: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer or normalizers.NFKC()
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    tokenizer.train_from_iterator(
        _TEXT.splitlines(keepends=True),
        trainers.UnigramTrainer(vocab_size=150, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False),
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        [_TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False)
    )
    return tokenizer


def old_llama() -> Tokenizer:
    """The whole text is one word; a normalizer puts a space before it."""
    tokenizer = bpe(pre_tokenizers.Metaspace(prepend_scheme="never"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    return tokenizer


_split = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(_GPT4, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte level with a prefix": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte level after NFC": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()),
    "byte level after Strip": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Strip()),
    "GPT-4's split": lambda: bpe(_split),
    "Metaspace, first": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "Metaspace, always": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "Metaspace, never": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="never")),
    "Llama 2's": old_llama,
    "Unigram": lambda: unigram(pre_tokenizers.Metaspace()),
    "Unigram, one word": lambda: unigram(pre_tokenizers.Metaspace(split=False)),
    "WordPiece": word_piece,
    "words": lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)])),
}
_WORDS = ["the", " the", " quick", "fox", "isn't", " 12345", "7", ".", "...", " — ", ",", "(", "aaaa", "x" * 50]
_SPACES = [" ", "  ", "   ", " " * 40, "\n", "\n\n", "\r\n", "\t", " \n\n", "\u00a0", "\u3000"]
_ODD = ["e\u0301", "\u0301", " \u0301", "é", "ﬁ", "你好", "。", "😀", "👩\u200d🚀"]
_MARKS = [END, "<unk>", " <unk> ", "<|im_start|>", "<tool call>"]
FRAGMENTS = st.sampled_from([*_WORDS, *_SPACES, *_ODD, *_MARKS])


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    made = {name: make() for name, make in KINDS.items()}
    for tokenizer in made.values():
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.add_tokens(["<tool call>"])
    return made


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "_PIECE", 40)
    monkeypatch.setattr(seams, "_AHEAD", 100)


def ids_of(text: str, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Ids piece by piece, and the number of pieces."""
    pieces = list(document_ids(text, tokenizer))
    assert sum(length for _, length in pieces) == len(text)
    return [i for ids, _ in pieces for i in ids], len(pieces)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_pieces")
def test_pieces_have_the_ids_of_the_whole(kind: str, special: bool, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = exact_tokenizer(tokenizers[kind], END, special_tokens=special)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(FRAGMENTS, min_size=1, max_size=300).map("".join))
    @example(_TEXT)
    @example(("x" * 40 + "   \n\n") * 30)
    @example(("alpha beta " * 3 + "\n\n") * 30)
    @example("a" * 1000)
    @example(" " * 500 + "a" + " " * 500)
    def check(text: str) -> None:
        ids, _ = ids_of(text, tokenizer)
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids

    check()
    # It is cut at all: what is compared is not the whole with itself.
    assert ids_of(_TEXT, tokenizer)[1] > 5


def test_a_tokenizer_that_counts_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cuts hold where the count does: a short look around them is not enough."""
    monkeypatch.setattr(seams, "_PIECE", 40)
    monkeypatch.setattr(seams, "_AHEAD", 100)
    tokenizer = exact_tokenizer(bpe(pre_tokenizers.FixedLength(7)), END, special_tokens=False)
    for text in (_TEXT, _TEXT[3:], "ab cd e " * 200):
        assert ids_of(text, tokenizer)[0] == tokenizer.encode(text).ids


def test_truncation_and_padding_are_off(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(_TEXT)
    tokenizer = train_tokenizer([tmp_path / "train.txt"], 300, tmp_path / "plain.json")
    plain = encoded_corpus([tmp_path / "train.txt"], tokenizer, tmp_path / "plain.ids").ids.tolist()
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=4096, pad_id=0, pad_token=END)
    tokenizer.save(str(tmp_path / "other.json"))
    other = load_tokenizer(tmp_path / "other.json")
    assert encoded_corpus([tmp_path / "train.txt"], other, tmp_path / "other.ids").ids.tolist() == plain
    codec = TokenCodec(other)
    assert codec.encode(_TEXT).tolist() == plain[:-1]
    assert codec.decode(codec.encode(_TEXT)) == _TEXT
    assert other.truncation is not None, "the given one stays as it is"


@pytest.mark.parametrize("end_in_model", [True, False])
def test_special_tokens(tmp_path: Path, end_in_model: bool) -> None:
    if end_in_model:
        (tmp_path / "train.txt").write_text(_TEXT)
        tokenizer = train_tokenizer([tmp_path / "train.txt"], 300, tmp_path / "t.json")
    else:  # as in Qwen's: the marks' ids come after the model's, and END's is among them
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            [_TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        )
        tokenizer.add_special_tokens([END])
        assert tokenizer.token_to_id(END) == 300
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    start, stop, end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>", END))
    chat = "<|im_start|>user says: hello<|im_end|>\n"
    (tmp_path / "chat.txt").write_text(f"{chat}{END} fox")

    codec = TokenCodec(tokenizer)
    assert codec.encode(chat).tolist() == tokenizer.encode(chat).ids
    assert {start, stop} < set(codec.encode(chat).tolist())
    letters = codec.encode(f"{chat}{END} fox")
    assert end not in letters.tolist()
    assert codec.decode(letters) == f"{chat}{END} fox"

    def corpus(special_tokens: bool) -> list[int]:
        path = tmp_path / f"{special_tokens}.ids"
        ids: list[int] = encoded_corpus(
            [tmp_path / "chat.txt"], tokenizer, path, special_tokens=special_tokens
        ).ids.tolist()
        return ids

    assert corpus(True) == [*letters.tolist(), end]
    assert {start, stop}.isdisjoint(corpus(False))
    assert corpus(False)[-1] == end
    assert codec.decode(encoded_corpus([tmp_path / "chat.txt"], tokenizer, tmp_path / "False.ids").ids[:-1].long()) == (
        f"{chat}{END} fox"
    )


def test_a_tokenizer_whose_tokens_share_an_id_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(_TEXT)
    train_tokenizer([tmp_path / "train.txt"], 300, tmp_path / "t.json")
    values = json.loads((tmp_path / "t.json").read_text())
    merged = "".join(values["model"]["merges"][0])
    values["model"]["vocab"][merged] = values["model"]["vocab"][
        "a"
    ]  # the library reads it, and writes only one of them
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"no tokenizer\.json|cannot be written and read again"):
        TokenCodec(load_tokenizer(tmp_path / "t.json"))


def test_a_model_that_makes_end_itself_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({END: 0, "<unk>": 1, "fox": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "a.txt").write_text(f"fox {END} fox")
    with pytest.raises(ValueError, match=r"a\.txt: the tokenizer's model itself makes <\|endoftext\|> of its letters"):
        encoded_corpus([tmp_path / "a.txt"], tokenizer, tmp_path / "ids")
    with pytest.raises(ValueError, match="itself makes"):
        TokenCodec(tokenizer).encode(f"fox {END}")
