"""Text: the 27 characters, corpora from files and from CPython itself, batches of chunks."""

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seeded
from hypothesis import given
from hypothesis import strategies as st

from diffusionblocks.data import character_text as room
from diffusionblocks.data.character_text import SYMBOLS, characters, decode, encode, normalise, python_topics
from diffusionblocks.data.text_batches import TextBatches, evaluation_chunks
from diffusionblocks.data.text_data import TextData

CPU = torch.device("cpu")


def real(*parts: str) -> Path:
    """A file of the real corpora, below $DIFFUSIONBLOCKS_DATA."""
    folder = os.environ.get("DIFFUSIONBLOCKS_DATA")
    if not folder:
        pytest.skip("DIFFUSIONBLOCKS_DATA is not set: the real corpora are not here")
    path = Path(folder).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"$DIFFUSIONBLOCKS_DATA has no {'/'.join(parts)}")
    return path


def counting(n: int) -> TextData:
    """Ids that tell where they are."""
    return TextData((torch.arange(n, dtype=torch.int32) % 251).to(torch.uint8), 251)


# ---- the 27 characters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("It's 1897.", "it s one eight nine seven "),
        ("a  b\n\tc", "a b c"),
        ("Café, naïve Ångström", "cafe naive angstrom"),
        ("Æsop's œuvre; Straße", "aesop s oeuvre strasse"),
        ("x² ﬁn", "x two fin"),
        ("日本 é", " e"),
        (" leading", " leading"),
        ("", ""),
        ("--", " "),
    ],
)
def test_normalise(raw: str, expected: str) -> None:
    assert normalise(raw) == expected


@given(st.text())
def test_normalised_text_has_27_characters_and_is_unchanged(raw: str) -> None:
    text = normalise(raw)
    assert set(text) <= set(SYMBOLS)
    assert "  " not in text
    assert normalise(text) == text
    assert decode(encode(text)) == text


def test_ids() -> None:
    assert len(SYMBOLS) == 27
    assert encode(" az").tolist() == [0, 1, 26]
    assert decode(torch.tensor([1, 27, 2])) == "a_b"
    with pytest.raises(ValueError, match=r"character 'É' at 2.*normalise"):
        encode("abÉ")
    with pytest.raises(ValueError, match="from 0 to 27"):
        decode(torch.tensor([28]))


def test_text_data_refuses() -> None:
    with pytest.raises(ValueError, match="27 is among them: must be from 0 to 26"):
        TextData(torch.tensor([27], dtype=torch.uint8), 27)
    with pytest.raises(ValueError, match="must be uint8, uint16 or uint32"):
        TextData(torch.tensor([1]), 27)
    with pytest.raises(ValueError, match="N >= 1"):
        TextData(torch.zeros(0, dtype=torch.uint8), 27)


# ---- CPython's own text -----------------------------------------------------------------------------------


def test_python_topics() -> None:
    train, test = python_topics("train"), python_topics("test")
    assert train.vocab_size == test.vocab_size == 27
    assert len(train) > 150_000
    assert 0.05 < len(test) / (len(train) + len(test)) <= 0.1
    assert "the assert statement" in decode(train.ids)
    # Nothing of the test split is in the training split: whole sentences of it, evenly spaced.
    text, probes = decode(train.ids), decode(test.ids)
    found = sum(probes[start : start + 80] in text for start in range(0, len(probes) - 80, 200))
    assert found == 0
    with pytest.raises(ValueError, match="split = 'valid'"):
        python_topics("valid")


# ---- files ------------------------------------------------------------------------------------------------


def test_a_file_is_split_by_characters(tmp_path: Path) -> None:
    text = decode(python_topics("train").ids[:10_000])
    (tmp_path / "corpus").write_text(text)
    parts = [decode(characters(tmp_path / "corpus", split).ids) for split in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [9000, 500, 500]
    assert "".join(parts) == text
    half = characters(tmp_path / "corpus", "test", fractions=(0.5, 0.0, 0.5))
    assert decode(half.ids) == text[5000:]


def test_files_are_normalised_whatever_the_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = "Éa  b-- c12\r\n\n" * 20
    (tmp_path / "a.txt").write_text(raw, encoding="utf-8", newline="")
    for piece in (1, 2, 3, 7, 1 << 22):
        monkeypatch.setattr(room, "_PIECE", piece)
        assert decode(characters(tmp_path / "a.txt", fractions=(1, 0, 0)).ids) == normalise(raw)


def test_a_folder_has_files_for_each_split_plain_or_packed(tmp_path: Path) -> None:
    (tmp_path / "train-0.txt").write_text("One.")
    (tmp_path / "train-1.txt.xz").write_bytes(lzma.compress(b"Two"))
    (tmp_path / "valid.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "test.txt.bz2").write_bytes(bz2.compress(b"four"))
    found = {split: decode(characters(tmp_path, split).ids) for split in ("train", "valid", "test")}
    assert found == {"train": "one two", "valid": "three", "test": "four"}
    assert decode(characters(tmp_path, "all", split_files={"all": "*.gz"}).ids) == "three"


def test_cache_is_mapped_equal_and_renewed(tmp_path: Path) -> None:
    source, cache = tmp_path / "corpus.txt", tmp_path / "cache"
    source.write_text("abc " * 500)
    plain = characters(source, "valid")
    for _ in range(2):
        assert torch.equal(characters(source, "valid", cache_dir=cache).ids, plain.ids)
    (file,) = cache.glob("*.u8")
    assert file.stat().st_size == 2000
    # What is mapped is the file: written over, the text changes.
    file.write_bytes(bytes([5]) * 2000)
    assert set(decode(characters(source, "test", cache_dir=cache).ids)) == {"e"}
    # Cut off, it is another text: it is written anew.
    file.write_bytes(bytes(1000))
    assert torch.equal(characters(source, "valid", cache_dir=cache).ids, plain.ids)
    file.with_name(f"{file.name}.json").write_text("{")
    assert torch.equal(characters(source, "valid", cache_dir=cache).ids, plain.ids)
    source.write_text("xyz " * 400)
    assert set(decode(characters(source, cache_dir=cache).ids)) == set("xyz ")


def test_file_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is missing"):
        characters(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"split 'train': no file in .* matches 'train\*\.txt'"):
        characters(tmp_path)
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc\n" + b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt, line 2 is not UTF-8 text \(byte 0xff\)"):
        characters(file)
    with pytest.raises(ValueError, match=r"a\.txt, line 2 is not UTF-8 text \(byte 0xff\)"):
        characters(file, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written
    file.write_bytes("abc".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"a\.txt, character 1 is a NUL: no text in UTF-8"):
        characters(file)
    file.write_text("abc")
    with pytest.raises(ValueError, match="no characters"):
        characters(file, "valid")
    with pytest.raises(ValueError, match=r"split = 'dev': must be one of \['train', 'valid', 'test'\]"):
        characters(file, "dev")
    with pytest.raises(ValueError, match="add up to 1"):
        characters(file, fractions=(0.5, 0.5, 0.5))
    file.write_text("")
    with pytest.raises(ValueError, match="no characters"):
        characters(file, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("ending", "pack"), [("xz", lzma.compress), ("gz", gzip.compress), ("bz2", bz2.compress)])
def test_damaged_files_are_refused(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    file = tmp_path / f"bad.txt.{ending}"
    whole = pack(os.urandom(3000).hex().encode())
    for damaged in (b"abc", whole[:-40], whole[:100] + b"garbage" + whole[107:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"bad\.txt\.{ending} is damaged"):
            characters(file)
    file.write_bytes(whole)
    assert len(characters(file, fractions=(1, 0, 0))) > 5000


# ---- batches ----------------------------------------------------------------------------------------------


def test_chunks_are_stretches_of_the_text_that_start_anywhere() -> None:
    data = counting(1000)
    batches = TextBatches(data, 16, device=CPU)
    assert batches.num_examples == (1000 - 15) // 16
    generator = seeded()
    starts: set[int] = set()
    text = data.ids.long()
    for _ in range(200):
        chunks = batches(torch.arange(batches.num_examples), generator)["input_ids"]
        assert chunks.dtype == torch.int64
        assert chunks.shape == (batches.num_examples, 16)
        for i, chunk in enumerate(chunks):
            near = text[i * 16 : i * 16 + 31].unfold(0, 16, 1)
            shift = (near == chunk).all(1).nonzero()
            assert len(shift) == 1
            starts.add(i * 16 + int(shift))
    assert starts == set(range(batches.num_examples * 16))  # none left out


def test_the_last_example_stays_within_the_text() -> None:
    for n in range(7, 40):
        batches = TextBatches(counting(n), 4, device=CPU)
        last = torch.full((64,), batches.num_examples - 1)
        assert int(batches(last, seeded())["input_ids"].max()) <= n - 1


def test_batches_depend_on_indices_and_generator_alone() -> None:
    data = python_topics("test")
    indices = torch.tensor([5, 0, 9])
    kept = [TextBatches(data, 32, device=CPU, placement=place) for place in ("auto", "device", "host")]
    assert [one.on_device for one in kept] == [False, True, False]
    first, *others = [one(indices, seeded(1))["input_ids"] for one in kept]
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(first, kept[0](indices, seeded(2))["input_ids"])


def test_evaluation_chunks_are_the_text_once() -> None:
    data = counting(1003)
    batches = list(evaluation_chunks(data, 10, batch_size=32, device=CPU))
    assert [len(batch["input_ids"]) for batch in batches] == [32, 32, 32, 4]
    whole = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(whole.flatten(), data.ids[:1000].long())


@pytest.mark.parametrize(
    ("dtype", "highest"), [(torch.uint8, 255), (torch.uint16, 65_535), (torch.uint32, 4_294_967_295)]
)
def test_wide_ids_keep_their_upper_bit(dtype: torch.dtype, highest: int) -> None:
    ids = torch.from_numpy(np.array([0, highest, 1, highest - 1], dtype=str(dtype).removeprefix("torch.")))
    data = TextData(ids, highest + 1)
    (batch,) = evaluation_chunks(data, 4, batch_size=1, device=CPU)
    assert batch["input_ids"].tolist() == [[0, highest, 1, highest - 1]]
    shown = {
        int(x)
        for _ in range(40)
        for x in TextBatches(data, 2, device=CPU)(torch.tensor([0]), None)["input_ids"].flatten()
    }
    assert shown == {0, highest, 1}  # starts 0 and 1


def test_batch_refusals() -> None:
    with pytest.raises(ValueError, match="length = 6: must be from 1 to 5 for a text of 10 ids"):
        TextBatches(counting(10), 6, device=CPU)
    with pytest.raises(ValueError, match="length = 0"):
        TextBatches(counting(10), 0, device=CPU)
    with pytest.raises(ValueError, match="placement = 'gpu'"):
        TextBatches(counting(10), 2, device=CPU, placement="gpu")
    with pytest.raises(ValueError, match="length = 11: must be from 1 to 10"):
        evaluation_chunks(counting(10), 11, batch_size=1, device=CPU)
    with pytest.raises(ValueError, match="batch_size = 0"):
        evaluation_chunks(counting(10), 2, batch_size=0, device=CPU)


# ---- real corpora -----------------------------------------------------------------------------------------


def test_real_text8_like_splits(tmp_path: Path) -> None:
    """Format and size of the held-out splits; mapped from the cache they are the same."""
    folder = real("text8like")
    for split in ("valid", "test"):
        data = characters(folder, split, cache_dir=tmp_path)
        assert len(data) == 5_000_000
        assert torch.equal(data.ids, characters(folder, split).ids)
        (chunk, *_) = evaluation_chunks(data, 256, batch_size=4, device=CPU)
        text = decode(data.ids[:1024])
        assert "".join(decode(row) for row in chunk["input_ids"]) == text
        assert sum(len(b["input_ids"]) for b in evaluation_chunks(data, 256, batch_size=512, device=CPU)) == 19_531
        if split == "test":
            p = data.ids.bincount(minlength=27) / len(data)
            assert float(-(p * p.log2()).sum()) == pytest.approx(4.086, abs=1e-3)  # as its makers measured it


def test_normalise_makes_text8_like_of_prose() -> None:
    """The published recipe, from the text as printed: character for character what another program made of it."""
    with lzma.open(real("prose", "valid.txt.xz"), "rt", encoding="utf-8") as file:
        made = normalise(file.read()).strip()
    with lzma.open(real("text8like", "valid.txt.xz"), "rt", encoding="ascii") as file:
        assert made.startswith(file.read())
