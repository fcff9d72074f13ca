"""Tokens: a byte-level tokenizer that loses nothing, and corpora encoded once into a mapped file."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionblocks.data.token_text import END, encoded_corpus, load_tokenizer, train_tokenizer

PROSE = (
    "It was a dark night.\n\nThe rain — “heavy rain” — fell on 1,000 roofs.\n\n\n"
    "Émile's 2nd book 😀 <|endoftext|> is odd.\n"
)


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE * 30, encoding="utf-8")
    return path


def test_tokenizer_is_byte_level_and_comes_back(tmp_path: Path, prose: Path) -> None:
    trained = train_tokenizer([prose], 300, tmp_path / "t" / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "t" / "tokenizer.json")
    assert [file.name for file in (tmp_path / "t").iterdir()] == ["tokenizer.json"]
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id(END) == 0
    for text in (PROSE.replace(END, ""), "unseen: 日本\x00\t", ""):
        ids = tokenizer.encode(text).ids
        assert ids == trained.encode(text).ids
        assert tokenizer.decode(ids) == text


def test_corpus_is_decoded_to_its_documents(tmp_path: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer([prose], 300, tmp_path / "tokenizer.json")
    whole = encoded_corpus([prose], tokenizer, tmp_path / "whole", separator="\n\n\n").ids.numpy().tolist()
    monkeypatch.setattr("diffusionblocks.data.document_pieces._PIECE", 10)
    monkeypatch.setattr("diffusionblocks.data.document_pieces._AHEAD", 40)
    data = encoded_corpus([prose], tokenizer, tmp_path / "cut", separator="\n\n\n")
    ids = data.ids.numpy().tolist()
    assert data.ids.dtype == torch.uint16
    assert data.vocab_size == 300
    assert ids == whole  # cutting it into passages changes no token
    ends = [i for i, token in enumerate(ids) if token == 0]
    documents = [tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *ends[:-1]], ends, strict=True)]
    assert documents == (PROSE * 30).split("\n\n\n")  # the letters of END in the text are letters
    assert ends[-1] == len(ids) - 1


def test_corpus_is_encoded_once(tmp_path: Path, prose: Path) -> None:
    tokenizer = train_tokenizer([prose], 300, tmp_path / "tokenizer.json")
    path = tmp_path / "out" / "prose.ids"
    first = encoded_corpus([prose], tokenizer, path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["prose.ids", "prose.ids.json"]
    written = path.stat().st_mtime_ns
    again = encoded_corpus([prose], load_tokenizer(tmp_path / "tokenizer.json"), path)
    assert path.stat().st_mtime_ns == written
    assert np.array_equal(first.ids.numpy(), again.ids.numpy())
    # Another tokenizer, a cut file, another text: encoded anew.
    other = encoded_corpus([prose], train_tokenizer([prose], 280, tmp_path / "other.json"), path)
    assert other.vocab_size == 280
    assert len(other) > len(first)
    full = path.read_bytes()
    path.write_bytes(full[:-2])
    assert len(encoded_corpus([prose], load_tokenizer(tmp_path / "other.json"), path)) == len(other)
    prose.write_text("new", encoding="utf-8")
    assert len(encoded_corpus([prose], tokenizer, path)) < 5


def test_many_tokens_take_four_bytes(tmp_path: Path, prose: Path) -> None:
    tokenizer = train_tokenizer([prose], 300, tmp_path / "tokenizer.json")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(70_000)])
    prose.write_text("It was <extra69999>", encoding="utf-8")
    data = encoded_corpus([prose], tokenizer, tmp_path / "ids")
    assert data.ids.dtype == torch.uint32
    assert 300 + 69_999 in data.ids.numpy().tolist()


def test_token_refusals(tmp_path: Path, prose: Path) -> None:
    target = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"vocab_size = 256: must be a whole number >= 257"):
        train_tokenizer([prose], 256, target)
    with pytest.raises(ValueError, match="files is empty"):
        train_tokenizer([], 300, target)
    with pytest.raises(FileNotFoundError, match=r"none\.txt is missing"):
        train_tokenizer([tmp_path / "none.txt"], 300, target)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_tokenizer(target)
    target.write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        load_tokenizer(target)
    tokenizer = train_tokenizer([prose], 300, target)
    with pytest.raises(ValueError, match="separator is empty"):
        encoded_corpus([prose], tokenizer, tmp_path / "ids", separator="")
    prose.write_bytes("a b".encode("utf-16-le"))
    for read in (
        lambda: encoded_corpus([prose], tokenizer, tmp_path / "ids"),
        lambda: train_tokenizer([prose], 300, target),
    ):
        with pytest.raises(ValueError, match=r"prose\.txt, character 1 is a NUL"):
            read()
    prose.write_bytes(b"a\nb\xe4\n")
    with pytest.raises(ValueError, match=r"prose\.txt, line 2 is not UTF-8 text \(byte 0xe4\): convert"):
        encoded_corpus([prose], tokenizer, tmp_path / "ids")
    prose.write_text("")
    with pytest.raises(ValueError, match="no text in"):
        encoded_corpus([prose], tokenizer, tmp_path / "ids")
    assert not (tmp_path / "ids").exists()


def test_real_prose_is_tokenized(tmp_path: Path) -> None:
    folder = os.environ.get("DIFFUSIONBLOCKS_DATA")
    if not folder or not (path := Path(folder, "wikitext2", "valid.txt")).is_file():
        pytest.skip("no wikitext2/valid.txt: DIFFUSIONBLOCKS_DATA is not set, or does not hold it")
    tokenizer = train_tokenizer([path], 2000, tmp_path / "tokenizer.json")
    data = encoded_corpus([path], tokenizer, tmp_path / "ids")
    text = path.read_bytes().decode()
    assert tokenizer.decode(data.ids.numpy()[:-1].tolist()) == text
    assert 2.5 < len(text) / len(data) < 5  # characters a token
