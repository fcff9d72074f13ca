"""`init` writes a recipe for the user's own data, which inspects and trains as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import sets
from PIL import Image

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.data.image_decoder import decode_image
from diffusionblocks.data.image_table import open_table
from diffusionblocks.experiments.recipe import load_recipe

FEW = sets(device="cpu", train__epochs="null", train__steps=2, train__batch_size=4)
OF = {
    "vit": sets(model__config__hidden_size=16),
    "dit": sets(model__config__hidden_size=16, evaluate__samples=2, evaluate__steps="[2]"),
    "masked": sets(model__config__hidden_size=16, evaluate__samples=2, evaluate__steps=4, evaluate__limit=4),
    "llama": sets(model__config__hidden_size=16, evaluate__samples=2, evaluate__limit=4, evaluate__new_tokens=4),
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of two classes, of several sizes and formats."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number, ending in enumerate(("jpg", "png", "webp", "png")):
            pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.{ending}")
    return tmp_path / "photos"


def check_trains(name: str, model: str) -> None:
    """What `init` wrote inspects as it is, has a comment on what is to be known, and trains."""
    text = Path(f"{name}.yaml").read_text()
    assert text.count("#") > 6
    assert main(["inspect", f"{name}.yaml"]) == 0
    assert main(["train", f"{name}.yaml", "--quiet", *FEW, *OF[model]]) == 0
    assert Path("runs", name, "model", "diffusionblocks.json").is_file()


@pytest.mark.parametrize("model", ["vit", "dit"])
def test_a_folder_of_pictures(
    model: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "pets", "photos", "--model", model, "--size", "16"]) == 0
    tables = [open_table("pets-images", split) for split in ("train", "test")]
    assert [table.rows for table in tables] == [6, 2]
    assert tables[0].class_names == ("cat", "dog")
    assert load_recipe("pets.yaml").data.image_size == 16  # type: ignore[union-attr]
    check_trains("pets", model)
    if model == "vit":
        config = json.loads(Path("runs/pets/model/config.json").read_text())
        assert config["id2label"] == {"0": "cat", "1": "dog"}
        check_predicts(Path("runs/pets"), capsys)
        check_each_picture_has_one_answer(Path("runs/pets"))
    else:
        assert main(["predict", "runs/pets", "photos/cat"]) == 2
        assert "predict is for classifiers; DiT generates images: use sample" in capsys.readouterr().err


def check_predicts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures as they are in the user's folder get the probabilities that the model gives what it was trained on."""
    capsys.readouterr()
    assert main(["predict", str(run), "photos/cat", "photos/dog/0.jpg", "--top", "1", "--json", "classes.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    rows = json.loads(Path("classes.json").read_text())["pictures"]
    table = open_table("pets-images", "train")
    pixels = decode_image(next(iter(table)).encoded, "", 3)
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255 * 2 - 1
    blocks = db.load(run / "model")
    generators = blocks.example_generators({"pixel_values": image})
    expected = blocks.predict(image, generator=generators).probabilities[0].tolist()
    # The first training picture is the second of the folder: the first is for testing.
    assert [rows[1]["probabilities"][name] for name in ("cat", "dog")] == pytest.approx(expected, abs=1e-4)
    assert lines[1].startswith("photos/cat/1.png: " + max(rows[1]["probabilities"], key=rows[1]["probabilities"].get))
    for arguments, message in {
        ("photos",): "photos has no pictures in it",
        ("none.png",): "no picture none.png",
        ("pets.yaml",): "pets.yaml: cannot decode",
        ("photos/cat", "--top", "0"): "--top 0: must be at least 1",
    }.items():
        assert main(["predict", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err


def check_each_picture_has_one_answer(run: Path) -> None:
    """A picture's probabilities are the same alone and in company, in any order and size of batch."""
    blocks = db.load(run / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in blocks.parameters():  # conditioning starts at zero, and noise would hardly matter
            parameter += 0.3 * torch.randn_like(parameter)
    blocks.save_pretrained("stirred")

    def predict(*files: str, batch_size: int = 3) -> dict[str, float]:
        size = f"evaluate.batch_size={batch_size}"
        assert main(["predict", str(run), *files, "--model", "stirred", "--json", "each.json", "--set", size]) == 0
        rows = json.loads(Path("each.json").read_text())["pictures"]
        return {row["file"]: row["probabilities"]["cat"] for row in rows}

    a, b, c = "photos/cat/0.jpg", "photos/cat/1.png", "photos/dog/0.jpg"
    expected = predict(a, b, c)
    for files in ((a,), (b,), (c,), (a, b), (c, a), (c, b, a)):
        assert predict(*files) == pytest.approx({file: expected[file] for file in files}, abs=1e-6)
    assert predict(a, b, c, batch_size=1) == pytest.approx(expected, abs=1e-6)
    pixels = torch.zeros(1, 3, 16, 16)
    by_seed = [blocks.predict(pixels, generator=torch.Generator().manual_seed(seed)).probabilities for seed in (0, 1)]
    assert (by_seed[0] - by_seed[1]).abs().max() > 1e-4  # noise matters


def test_pictures_that_are_split_already(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    photos.rename(tmp_path / "data" / "train")
    test = tmp_path / "data" / "val" / "dog"
    test.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(test / "a.png")
    assert main(["init", "pets", "data", "--size", "8"]) == 0
    assert [open_table("pets-images", split).rows for split in ("train", "test")] == [8, 1]
    assert [row.label for row in open_table("pets-images", "test", reference_split="train")] == [1]


def test_parquet_files(
    image_folder: Callable[[int, int, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = image_folder(24, 3, "label")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine", str(folder)]) == 0
    recipe = load_recipe("mine.yaml")
    assert recipe.model.config["image_size"] == 24
    assert recipe.model.config["num_labels"] == 3
    assert recipe.train.batch_size == 16  # all that there are
    check_trains("mine", "vit")


@pytest.mark.parametrize("model", ["masked", "llama"])
def test_a_text(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "it's.txt").write_text("The quick brown fox, 7 times, jumps over the lazy dog. " * 100)
    assert main(["init", "book", "it's.txt", "--model", model]) == 0
    check_trains("book", model)


def test_nothing_is_overwritten_or_guessed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").touch()
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.jpg").touch()
    for arguments, message in (
        (["mine", "photos"], "mine.yaml exists, and is not overwritten"),
        (["pets", "nowhere"], "nowhere is missing"),
        (["pets", "empty"], "empty holds neither parquet files"),
        (["pets", "loose"], "loose holds pictures, but neither parquet files"),
        (["pets", "a.pdf"], "a text is one of *.txt"),
        (["pets", "photos", "--model", "llama"], "choose vit or dit"),
        (["pets", "photos", "--size", "30"], "--size 30: must be a multiple of 4"),
        (["../pets", "photos"], "name '../pets'"),
    ):
        assert main(["init", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "name: mine"
    assert not list(tmp_path.glob("pets*"))
