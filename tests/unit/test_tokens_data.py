"""`data.kind: tokens`: a recipe's corpus as tokens, its codec, its cache with several jobs at once, its bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import listing

from diffusionblocks.data import TextChunks
from diffusionblocks.data.image_config import DigitsConfig
from diffusionblocks.data.text_config import TokensConfig
from diffusionblocks.data.text_files import open_text
from diffusionblocks.data.token_text import END, corpus_tokenizer, encoded_split, split_files, train_tokenizer
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe

BOOKS = ["It was a dark night — “very” dark.\n\nThe rain fell.", "Émile's 2nd book 😀 is odd.", "The night fell."]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_text("\n\n\n".join(BOOKS * 20), encoding="utf-8")
    (folder / "test.txt").write_text("\n\n\n".join(BOOKS), encoding="utf-8")
    return folder


def recipe_of(**data: object) -> Recipe:
    """A recipe whose `data` section is `data`; its model is not looked at."""
    values = {"kind": "topics", "length": 8}
    recipe = parse_recipe(
        {
            "name": "tokens",
            "model": {"type": "MaskedTransformer"},
            "data": values,
            "train": {"steps": 1, "batch_size": 2, "lr": 1e-3},
            "evaluate": {"kind": "bits"},
            "device": "cpu",
        },
        "test",
    )
    return recipe.model_copy(update={"data": TokensConfig.model_validate({"kind": "tokens", "length": 8} | data)})


def options(corpus: Path, **more: object) -> dict[str, object]:
    cache = corpus.parent / "cache"
    return {"source": str(corpus), "separator": "\n\n\n", "vocab_size": 300, "cache": str(cache)} | more


def test_recipe_data_are_the_corpus(corpus: Path) -> None:
    recipe = recipe_of(**options(corpus))
    train, test, codec = recipe.data.load("train"), recipe.data.load("test"), recipe.data.codec()
    assert isinstance(train, TextChunks)
    assert isinstance(test, TextChunks)
    assert (train.num_classes, train.example_shape) == (300, (8,))
    assert codec.vocab_size == 300
    assert codec.decode(ids_of(test)) == "".join(book + END for book in BOOKS)
    assert codec.decode(ids_of(train)) == "".join(book + END for book in BOOKS * 20)
    batch = recipe.data.batches(train, torch.device("cpu"))(torch.arange(4), torch.Generator().manual_seed(0))
    whole = ids_of(train).unfold(0, 8, 1)
    assert all((whole == row).all(dim=1).any() for row in batch["input_ids"])


def ids_of(data: TextChunks) -> torch.Tensor:
    return torch.from_numpy(data.text.ids.numpy().astype("int64"))


def test_codec_loses_nothing(corpus: Path) -> None:
    codec = recipe_of(**options(corpus)).data.codec()
    for text in (*BOOKS, "unseen: 日本\x00", f"the letters {END} are letters", ""):
        ids = codec.encode(text)
        assert ids.dtype == torch.int64
        assert codec.decode(ids) == text
        assert codec.end not in ids.tolist()
    assert codec.decode(torch.tensor([codec.end])) == END
    for wrong in (torch.tensor([300]), torch.tensor([-1]), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"must be \(n,\), each from 0 to 299"):
            codec.decode(wrong)
    topics = parse_recipe(recipe_of().model_dump() | {"data": {"kind": "topics", "length": 8}}, "test")
    assert topics.data.codec().decode(topics.data.codec().encode("a b z")) == "a b z"
    assert topics.data.codec().end is None


def test_a_ready_tokenizer_needs_no_data(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus / "test.txt"], 280, tmp_path / "ready.json")
    recipe = recipe_of(**options(corpus, tokenizer=str(tmp_path / "ready.json")))
    assert recipe.data.load("train").num_classes == 280
    alone = recipe_of(tokenizer=str(tmp_path / "ready.json"))
    assert alone.data.codec().vocab_size == 280
    with pytest.raises(ValueError, match=r"data\.source is not set"):
        alone.data.load("train")


def test_the_cache_is_used_and_keeps_settings_apart(corpus: Path) -> None:
    cache = corpus.parent / "cache"
    recipe_of(**options(corpus)).data.load("train")
    times = {file.name: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(times) == 3  # tokenizer, ids, and what they are
    first = ids_of(recipe_of(**options(corpus)).data.load("train"))
    assert {file.name: file.stat().st_mtime_ns for file in cache.iterdir()} == times
    for more in ({"vocab_size": 280}, {"separator": None}, {"train_characters": 200}):
        assert not torch.equal(ids_of(recipe_of(**options(corpus, **more)).data.load("train")), first)
    assert torch.equal(ids_of(recipe_of(**options(corpus)).data.load("train")), first)
    (corpus / "train.txt").write_text("another text", encoding="utf-8")
    assert len(recipe_of(**options(corpus)).data.load("train").text) < 15


def test_the_tokenizer_reads_only_so_many_characters(corpus: Path, tmp_path: Path) -> None:
    (corpus / "train2.txt").write_text("zzzz zzzz " * 100, encoding="utf-8")
    files = split_files(corpus, "train")
    limit = len("\n\n\n".join(BOOKS * 20))
    part = train_tokenizer(files, 300, tmp_path / "part.json", limit=limit)
    first = train_tokenizer(files[:1], 300, tmp_path / "first.json")
    assert part.to_str() == first.to_str()
    assert train_tokenizer(files, 300, tmp_path / "more.json", limit=limit + 500).to_str() != first.to_str()
    assert train_tokenizer(files, 300, tmp_path / "all.json", limit=10**6).token_to_id("zzzz") is not None
    with pytest.raises(ValueError, match="limit = 0: must be at least 1"):
        train_tokenizer(files, 300, tmp_path / "none.json", limit=0)


def test_a_limit_encodes_no_more_than_it_uses(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = ids_of(recipe_of(**options(corpus)).data.load("train"))
    tokenizer = {"tokenizer": str(next((corpus.parent / "cache").glob("tokenizer-*.json")))}
    (corpus / "train2.txt").write_bytes(b"\xff no UTF-8")  # which nobody is to read
    capsys.readouterr()
    other = {**tokenizer, "cache": str(corpus.parent / "other")}
    for limit in (1, 50, 90):
        part = recipe_of(**options(corpus, train_limit=limit + 1, **other)).data.load("train")
        assert torch.equal(ids_of(part), whole[: limit + 1])
        assert f"encode train.txt: {len((corpus / 'train.txt').read_text()):,} characters" in capsys.readouterr().err
    sizes = sorted(file.stat().st_size for file in (corpus.parent / "other").glob("*.ids"))
    assert sizes == [2 * (limit + 1) for limit in (1, 50, 90)]
    with pytest.raises(ValueError, match=r"train2\.txt, line 1 is not UTF-8"):  # the positive control
        recipe_of(**options(corpus, train_limit=len(whole) + 1, **other)).data.load("train")
    with pytest.raises(ValueError, match=r"train2\.txt, line 1 is not UTF-8"):
        recipe_of(**options(corpus, **other)).data.load("train")
    (corpus / "train2.txt").unlink()
    before = listing(corpus.parent / "cache")
    part = recipe_of(**options(corpus, train_limit=50, **tokenizer)).data.load("train")
    assert torch.equal(ids_of(part), whole[:50])
    assert listing(corpus.parent / "cache") == before  # the whole was there


def test_of_the_test_text_no_more_is_encoded_than_is_used(corpus: Path) -> None:
    """An experiment of the same data that uses more reads more."""
    recipe = recipe_of(**options(corpus))
    whole = ids_of(recipe.data.load("test"))
    other = recipe_of(
        **options(
            corpus,
            tokenizer=str(next((corpus.parent / "cache").glob("tokenizer-*.json"))),
            cache=str(corpus.parent / "other"),
        )
    )
    (corpus / "test2.txt").write_bytes(b"\xff no UTF-8")  # which nobody is to read
    few, more, every = (
        Experiment(other.model_copy(update={"evaluate": other.evaluate.model_copy(update={"limit": limit})}))
        for limit in (2, 3, None)
    )
    assert ids_of(few.data("test")).tolist() == whole[:16].tolist()
    assert ids_of(few.derive(more.recipe).data("test")).tolist() == whole[:24].tolist()
    assert ids_of(few.data("test")).tolist() == whole[:24].tolist()  # which is there now
    with pytest.raises(ValueError, match=r"test2\.txt, line 1 is not UTF-8"):  # the positive control
        few.derive(every.recipe).data("test")


JOB = """
import sys
from pathlib import Path
from diffusionblocks.data.token_text import corpus_tokenizer, encoded_split
files, cache = [Path(sys.argv[1])], Path(sys.argv[2])
sys.stdin.readline()  # all start at once
for vocab_size in (300, 290, 280):
    data = encoded_split(files, corpus_tokenizer(files, vocab_size, cache), cache, "train", separator="\\n\\n\\n")
    print(vocab_size, len(data), int(data.ids.numpy().astype("int64").sum()))
"""


@pytest.mark.slow
def test_jobs_that_share_a_cache(corpus: Path) -> None:
    def start(cache: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", JOB, str(corpus / "train.txt"), str(corpus.parent / cache)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    jobs = [start("shared"), start("shared")]
    for job in jobs:
        assert job.stdin is not None
        job.stdin.write("\n")
        job.stdin.flush()
    printed = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    files, alone = [corpus / "train.txt"], corpus.parent / "alone"
    for line, vocab_size in zip(printed[0].splitlines(), (300, 290, 280), strict=True):
        tokenizer = corpus_tokenizer(files, vocab_size, alone)
        data = encoded_split(files, tokenizer, alone, "train", separator="\n\n\n")
        assert line == f"{vocab_size} {len(data)} {int(data.ids.numpy().astype('int64').sum())}"
    assert printed[0] == printed[1]
    # Of each size a tokenizer, ids and what they are, and nothing temporary.
    assert listing(corpus.parent / "shared") == listing(alone)
    assert len(listing(alone)) == 9


def test_bytes_on_the_device_of_tokens(corpus: Path) -> None:
    recipe = recipe_of(**options(corpus))
    assert recipe.data.example_bytes((8,), 300) == 8 * 2
    assert recipe.data.example_bytes((8,), 1 << 16) == 8 * 2
    assert recipe.data.example_bytes((8,), (1 << 16) + 1) == 8 * 4
    data = recipe.data.load("train")
    assert isinstance(data, TextChunks)
    assert data.text.ids.element_size() == 2
    assert recipe.data.count_examples().count is None  # counted only of data that are at hand without a cache


def test_refusals(corpus: Path) -> None:
    with pytest.raises(ValueError, match="validation error"):
        recipe_of(vocab_size=256)
    with pytest.raises(ValueError, match="validation error"):
        recipe_of(separator="")
    with pytest.raises(ValueError, match=r"train\.txt is a file: name a folder"):
        recipe_of(**options(corpus / "train.txt")).data.load("train")
    with pytest.raises(FileNotFoundError, match="none is missing: name a folder"):
        recipe_of(**options(corpus / "none")).data.load("train")
    with pytest.raises(FileNotFoundError, match="split 'dev': no file in"):
        recipe_of(**options(corpus, test_split="dev")).data.load("test")
    with pytest.raises(FileNotFoundError, match=r"split 'test': no file in .* matches 'dev\*\.txt'"):
        recipe_of(**options(corpus, split_files={"train": "*.txt", "test": "dev*.txt"})).data.load("test")
    with pytest.raises(ValueError, match=r"data\.kind: digits has no text"):
        recipe_of().model_copy(update={"data": DigitsConfig(kind="digits")}).data.codec()


def test_default_cache_is_named_after_the_corpus() -> None:
    assert TokensConfig(kind="tokens", length=8, folder="prose").cache_folder == Path("runs/tokens-prose")
    assert TokensConfig(kind="tokens", length=8, source="/data/books/").cache_folder == Path("runs/tokens-books")


def test_real_prose_round_trip(tmp_path: Path) -> None:
    root = os.environ.get("DIFFUSIONBLOCKS_DATA")
    if not root or not (folder := Path(root, "prose")).is_dir():
        pytest.skip("no folder prose: DIFFUSIONBLOCKS_DATA is not set, or does not hold it")
    tokenizer = corpus_tokenizer(split_files(folder, "train"), 8192, tmp_path, limit=2_000_000)
    files = split_files(folder, "valid")
    data = encoded_split(files, tokenizer, tmp_path, "valid", separator="\n\n\n")
    with open_text(files[0]) as stream:
        text = stream.read()
    ids = data.ids.numpy().astype("int64").tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(b + END for b in text.split("\n\n\n"))
    assert 3.5 < len(text) / len(ids) < 4.5  # characters a token
