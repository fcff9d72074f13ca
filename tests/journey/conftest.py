"""Small image files in the hub's schema, and a small trained diffusion model, for tests that go through a recipe."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from commands import DIGITS, TINY, sets
from PIL import Image

from diffusionblocks.cli import main
from diffusionblocks.data import digits
from diffusionblocks.evaluation.classifier import train_classifier


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[[int, int, str], Path]:
    """Makes a folder with train.parquet, valid.parquet and test.parquet of random images."""

    def make(size: int, num_classes: int, label_column: str) -> Path:
        rng = np.random.default_rng(0)
        folder = tmp_path / "images"
        folder.mkdir()
        for split, count in (("train", 16), ("valid", 8), ("test", 8)):
            encoded = []
            for _ in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
                encoded.append({"bytes": buffer.getvalue(), "path": None})
            features = datasets.Features(
                {
                    "img": datasets.Image(),
                    label_column: datasets.ClassLabel(names=[f"c{i}" for i in range(num_classes)]),
                }
            )
            labels = [i % num_classes for i in range(count)]
            data = datasets.Dataset.from_dict({"img": encoded, label_column: labels}, features=features)
            data.to_parquet(str(folder / f"{split}.parquet"))
        return folder

    return make


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of the digits, so that no test trains the one that the command line would."""
    folder = tmp_path_factory.mktemp("features") / "digits"
    train, test = digits("train"), digits("test")
    options: dict[str, Any] = {"mean": [0.3], "std": [0.4], "device": "cpu", "flip": False, "crop_padding": 1}
    train_classifier(train, test, dataset="digits", epochs=1, width=4, lr=1e-2, **options).save(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, features: Path) -> Path:
    """The folder of a trained run, with a trunk below it."""
    out = tmp_path_factory.mktemp("run")
    measured = sets(evaluate__features="classifier", evaluate__features_folder=features)
    assert main(["train", DIGITS, "--out", str(out), "--quiet", *TINY, *measured]) == 0
    return out
