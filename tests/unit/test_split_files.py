"""Which files are a split's: names that data sets have, not backups, not the same text twice."""

from pathlib import Path

import pytest

from diffusionblocks.data.split_files import IMAGE_ENDINGS, TEXT_ENDINGS, files_of_split

TAKEN = ["train.txt", "train2.txt", "train-1.txt.xz", "train_00.txt.gz", "train.3.txt.bz2", "train-clean_wiki.txt"]
LEFT = [
    "train.bak.txt",
    "train.txt.bak",
    "train.txt~",
    "train.txt.swp",
    ".train.txt",
    "._train.txt",
    "train (copy).txt",
    "train - Copy.txt",
    "train-copy.txt",
    "train_OLD.txt",
    "train.txt.part",
    "train.orig.txt",
    "training.txt",
    "test.txt",
    "train.parquet",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in TAKEN + LEFT:
        (tmp_path / name).write_text("a")
    (tmp_path / "train-folder.txt").mkdir()
    return tmp_path


def test_default_names(folder: Path) -> None:
    taken = files_of_split(folder, "train", endings=TEXT_ENDINGS)
    assert [path.name for path in taken] == sorted(TAKEN)
    assert [path.name for path in files_of_split(folder, "train", endings=IMAGE_ENDINGS)] == ["train.parquet"]
    for name in ("train-00000-of-00002.parquet", "train.00001.parquet", "train0001.parquet"):
        (folder / name).write_text("a")
    assert len(files_of_split(folder, "train", endings=IMAGE_ENDINGS)) == 4


def test_patterns_are_the_users(folder: Path) -> None:
    assert [path.name for path in files_of_split(folder, "a", {"a": "*.bak.txt"}, endings=())] == ["train.bak.txt"]
    names = {path.name for path in files_of_split(folder, "a", {"a": "*.txt"}, endings=())}
    assert ".train.txt" not in names
    assert "train (copy).txt" in names
    assert [path.name for path in files_of_split(folder, "a", {"a": ".train.txt"}, endings=())] == [".train.txt"]


def test_refusals(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"split 'valid': no file in .* matches 'valid\*.txt'; .*'test.txt'"):
        files_of_split(folder, "valid", endings=TEXT_ENDINGS)
    with pytest.raises(ValueError, match=r"split = 'valid': must be one of \['train'\]"):
        files_of_split(folder, "valid", {"train": "*"}, endings=())
    for pattern in ("/etc/*", "../*", ""):
        with pytest.raises(ValueError, match="must be a pattern for files below"):
            files_of_split(folder, "train", {"train": pattern}, endings=())
    (folder / "train-1.txt").write_text("a")
    for patterns in (None, {"train": "train*.txt*"}):
        with pytest.raises(ValueError, match=r"train-1\.txt and train-1\.txt\.xz are one text, plain and packed"):
            files_of_split(folder, "train", patterns, endings=TEXT_ENDINGS)
