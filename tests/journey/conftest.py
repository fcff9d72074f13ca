"""Small image files in the hub's schema, for tests that go through a recipe."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image


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
