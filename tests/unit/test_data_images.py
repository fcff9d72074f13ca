"""Labelled images: the digits, parquet in the hub's schema (good and bad), and batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import vit_config, vit_recipe
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image

from diffusionblocks.data import (
    Augment,
    AugmentConfig,
    ImageBatches,
    ImageData,
    digits,
    evaluation_batches,
    image_classification,
    image_table,
)
from diffusionblocks.data import image_data as images_module
from diffusionblocks.data.latent_data import LatentData
from diffusionblocks.experiments.experiment import Experiment

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the `datasets` library from writing into the home folder and from drawing progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def pixels(rows: int, size: int = 4, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, size, size, channels), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def write(
    path: Path,
    encoded: Sequence[bytes | None],
    labels: Sequence[int | None],
    *,
    image: str = "img",
    label: str = "label",
    label_feature: Any = None,
    **extra: Sequence[Any],
) -> None:
    """Writes one parquet file with `datasets`: struct<bytes, path> and the hub's metadata."""
    features = {image: datasets.Image(), label: label_feature or datasets.ClassLabel(names=list(NAMES))}
    features |= {name: datasets.Value("int64") for name in extra}
    images = [None if data is None else {"bytes": data, "path": None} for data in encoded]
    columns = {image: images, label: list(labels), **extra}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good data set: two train shards of 4 and 3 rows, 2 test rows, 4x4 RGB."""
    root, array = tmp_path / "pets", pixels(9)
    write(root / "train-0.parquet", [png(a) for a in array[:4]], [0, 1, 2, 0])
    write(root / "train-1.parquet", [png(a) for a in array[4:7]], [1, 1, 2])
    write(root / "test.parquet", [png(a) for a in array[7:]], [2, 0])
    return root


def load(source: Path | str, **changes: Any) -> ImageData:
    arguments: dict[str, Any] = {"split": "train", "image_size": 4} | changes
    return image_classification(str(source), **arguments)


# --- digits -------------------------------------------------------------------------------------------------


def test_digits() -> None:
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1438, 359)
    for data in (train, test):
        assert data.image_shape == (1, 8, 8)
        assert data.num_classes == 10
        assert data.class_names[3] == "3"
        share = data.labels.bincount(minlength=10) / len(data)
        assert float((share - 0.1).abs().max()) < 0.01, "the split is stratified"
        assert (int(data.images.min()), int(data.images.max())) == (0, 255)
    assert torch.equal(test.images, digits("test").images)
    # Pins the split itself: results on it are compared across machines and versions.
    assert test.labels[:8].tolist() == [3, 7, 3, 9, 0, 8, 7, 0]


def test_digits_is_the_whole_data_set_scaled() -> None:
    from sklearn.datasets import load_digits

    parts = torch.cat([digits("train").images, digits("test").images]).flatten(1)
    whole = torch.from_numpy(np.rint(load_digits().data * 255 / 16)).to(torch.uint8)
    assert sorted(map(tuple, parts.tolist())) == sorted(map(tuple, whole.tolist()))


def test_digits_refuses_unknown_split() -> None:
    with pytest.raises(ValueError, match="split = 'valid': must be 'train' or 'test'"):
        digits("valid")


# --- ImageData ----------------------------------------------------------------------------------------------


def test_image_data_checks_itself() -> None:
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0])
    assert len(ImageData(images, labels, ("a", "b"))) == 3
    bad: list[tuple[tuple[torch.Tensor, torch.Tensor], str]] = [
        ((images.float(), labels), "images: torch.float32"),
        ((images[0], labels), "images: "),
        ((images[:0], labels[:0]), "N >= 1"),
        ((images, labels[:2]), r"labels: .*must be int64 \(3,\)"),
        ((images, labels.int()), "labels: torch.int32"),
        ((images, torch.tensor([0, 2, 0])), "row 1: label 2: must be from 0 to 1"),
        ((images, torch.tensor([0, 0, -1])), "row 2: label -1"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            ImageData(*arguments, ("a", "b"))


# --- parquet ------------------------------------------------------------------------------------------------


def test_loads_shards_in_order(folder: Path) -> None:
    train, test = load(folder), load(folder, split="test")
    want = torch.from_numpy(pixels(9)).permute(0, 3, 1, 2)
    assert torch.equal(train.images, want[:7])
    assert torch.equal(test.images, want[7:])
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 1, 2]
    assert test.labels.tolist() == [2, 0]
    assert train.class_names == NAMES
    assert train.image_shape == (3, 4, 4)
    assert train.images.is_contiguous()


def test_split_files_select_files(folder: Path) -> None:
    assert len(load(folder, split_files={"train": "train-1.*", "all": "*.parquet"})) == 3
    assert len(load(folder, split="all", split_files={"all": "*.parquet"})) == 9


def test_converts_colour(tmp_path: Path) -> None:
    grey = pixels(2, channels=1)
    write(tmp_path / "g" / "train.parquet", [png(a) for a in grey], [0, 1])
    as_grey, as_rgb = load(tmp_path / "g", channels=1), load(tmp_path / "g")
    assert torch.equal(as_grey.images, torch.from_numpy(grey).permute(0, 3, 1, 2))
    assert torch.equal(as_rgb.images, as_grey.images.expand(-1, 3, -1, -1))


def test_finds_hub_column_names(tmp_path: Path) -> None:
    rows = [png(a) for a in pixels(2)]
    write(tmp_path / "c" / "train.parquet", rows, [0, 1], label="fine_label", coarse_label=[5, 6])
    assert load(tmp_path / "c").labels.tolist() == [0, 1]
    write(tmp_path / "i" / "train.parquet", rows, [2, 1], image="image")
    assert load(tmp_path / "i").labels.tolist() == [2, 1]
    write(tmp_path / "x" / "train.parquet", rows, [2, 0], image="photo", label="kind")
    assert load(tmp_path / "x", image_column="photo", label_column="kind").labels.tolist() == [2, 0]


def test_plain_parquet_without_metadata(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    array = pixels(2)
    table = pa.table({"img": pa.array([{"bytes": png(a), "path": "x"} for a in array]), "label": [3, 0]})
    pq.write_table(table, tmp_path / "p" / "train.parquet")
    data = load(tmp_path / "p", num_classes=4)
    assert data.class_names == ("0", "1", "2", "3")
    assert data.labels.tolist() == [3, 0]
    assert torch.equal(data.images, torch.from_numpy(array).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="column 'label' has no class names; set num_classes"):
        load(tmp_path / "p")
    with pytest.raises(ValueError, match="row 0: label 3 in 'label': must be from 0 to 2"):
        load(tmp_path / "p", num_classes=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "a", "split_files": {"b": "*"}}, r"split = 'a': must be one of \['b'\], or be added to split_files"),
        ({"split_files": {"train": "../*"}}, r"split_files: train: '../\*': must be a pattern for files below"),
        ({"image_column": "picture"}, r"image_column = 'picture': must be one of \['img', 'label'\]"),
        ({"label_column": "class"}, r"label_column = 'class': must be one of \['img', 'label'\]"),
        ({"image_column": "label"}, "train-0.parquet: image column 'label' has type int64: must be struct<bytes"),
        ({"label_column": "img"}, "label column 'img' has type .*: must be integers or a ClassLabel"),
        ({"image_size": 8}, "row 0: image is 4x4: must be 8x8; set image_size"),
        ({"image_size": 0}, "image_size = 0: must be at least 1"),
        ({"channels": 4}, r"channels = 4: must be 1 \(grey\) or 3 \(RGB\)"),
        ({"num_classes": 5}, "num_classes = 5: column 'label' has 3 classes"),
        ({"num_classes": 0}, "num_classes = 0: must be at least 1"),
    ],
)
def test_refuses_bad_arguments(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, **changes)


def test_refuses_missing_sources(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"split 'train': no file in .* matches 'a\*'.*train-0.parquet"):
        load(folder, split_files={"train": "a*"})
    with pytest.raises(FileNotFoundError, match="no such folder; give a folder of parquet files, or a hub name"):
        load(folder / "nothing")
    with pytest.raises(FileNotFoundError, match="'cifar': no such folder"):
        load("cifar", split_files={"train": "*"})
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        load(folder / "test.parquet")


def good(rows: int = 3) -> list[bytes | None]:
    return [png(a) for a in pixels(rows)]


def png_of_width_5() -> bytes:
    return png(np.zeros((4, 5, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("encoded", "labels", "options", "message"),
    [
        (lambda: [], [], {}, "there are no rows in .*train.parquet"),
        (good, [0, 1, -1], {"label_feature": datasets.Value("int64")}, "row 2: label -1 in 'label'"),
        (good, [0, 3, 1], {"label_feature": datasets.Value("int64")}, "row 1: label 3 in 'label'"),
        (good, [0, -1, 1], {}, "row 1: label -1 in 'label'.*or drop rows without a label"),
        (good, [0, 1, None], {}, "row 2: no label in 'label'"),
        (good, [0, 1, 2], {"label_feature": datasets.Value("float32")}, "has type float32: must be integers"),
        (lambda: [*good(2), b"not an image"], [0, 1, 2], {}, r"row 2: cannot decode the image \(12 bytes\)"),
        (lambda: [png(pixels(1)[0])[:-30], *good(2)], [0, 1, 2], {}, "row 0: cannot decode the image"),
        (lambda: [*good(1), None, *good(1)], [0, 1, 2], {}, "row 1: no image bytes"),
        (lambda: [*good(1), png_of_width_5()], [0, 1], {}, "row 1: image is 5x4: must be 4x4"),
        (good, [0, 1, 2], {"image": "photo"}, r"none of \['img', 'image'\] in .*set image_column"),
        (good, [0, 1, 2], {"label": "kind"}, r"none of \['label', 'fine_label'\] in .*set label_column"),
        (good, [0, 1, 2], {"fine_label": [0, 0, 0]}, "more than one of .*set label_column"),
    ],
)
def test_refuses_bad_files(
    tmp_path: Path,
    encoded: Callable[[], list[bytes | None]],
    labels: list[int | None],
    options: dict[str, Any],
    message: str,
) -> None:
    write(tmp_path / "bad" / "train.parquet", encoded(), labels, **options)
    plain = isinstance(options.get("label_feature"), datasets.Value)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad", num_classes=3 if plain else None, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors*")), "nothing bad is cached"


def test_refuses_files_that_are_not_parquet(folder: Path) -> None:
    (folder / "train-2.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"train-2.parquet is not parquet, or is damaged"):
        load(folder)


# --- files of other metadata --------------------------------------------------------------------------------


def pets(path: Path, names: Sequence[str] | None, labels: Sequence[int], shades: Sequence[int]) -> None:
    """Each image is of one shade; `names` None stores plain integers."""
    rows = [png(np.full((4, 4, 3), shade, dtype=np.uint8)) for shade in shades]
    feature = datasets.Value("int64") if names is None else datasets.ClassLabel(names=list(names))
    write(path, rows, labels, label_feature=feature)


def named(data: ImageData) -> list[tuple[str, int]]:
    """Each row's class, by name, and shade."""
    return [(data.class_names[i], int(image[0, 0, 0])) for i, image in zip(data.labels, data.images, strict=True)]


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    pets(tmp_path / "train-0.parquet", ["cat", "dog", "eel"], [0, 1, 2], [1, 2, 3])
    pets(tmp_path / "train-1.parquet", ["eel", "cat", "dog"], [0, 1, 2, 0], [3, 1, 2, 3])
    pets(tmp_path / "test.parquet", ["dog", "eel", "cat"], [0, 1, 2], [2, 3, 1])
    train, test = load(tmp_path, cache_dir=tmp_path / "cache"), load(tmp_path, split="test")
    assert train.class_names == test.class_names == ("cat", "dog", "eel")
    assert named(train) == [("cat", 1), ("dog", 2), ("eel", 3), ("eel", 3), ("cat", 1), ("dog", 2), ("eel", 3)]
    assert named(test) == [("dog", 2), ("eel", 3), ("cat", 1)]
    assert load(tmp_path, split="test", reference_split=None).class_names == ("dog", "eel", "cat")
    # The train files alone change what the test split's cached labels are.
    first = load(tmp_path, split="test", cache_dir=tmp_path / "cache")
    pets(tmp_path / "train-0.parquet", ["eel", "dog", "cat"], [0], [3])
    second = load(tmp_path, split="test", cache_dir=tmp_path / "cache")
    assert (first.labels.tolist(), second.labels.tolist()) == ([1, 2, 0], [1, 0, 2])


@pytest.mark.parametrize("other", ["train-1.parquet", "test.parquet"])
def test_other_classes_are_refused(tmp_path: Path, other: str) -> None:
    split = other.split("-")[0].removesuffix(".parquet")
    pets(tmp_path / "train-0.parquet", ["cat", "dog"], [0, 1], [1, 2])
    pets(tmp_path / other, ["dog", "emu"], [0, 1], [2, 4])
    with pytest.raises(ValueError, match=rf"{other} and .*train-0.*different classes: .*\['emu'\], .*\['cat'\]"):
        load(tmp_path, split=split)
    pets(tmp_path / other, ["cat", "dog", "emu"], [0, 1], [1, 2])
    with pytest.raises(ValueError, match=r"only the first has \['emu'\], only the second \[\]"):
        load(tmp_path, split=split)
    pets(tmp_path / other, None, [0, 1], [1, 2])
    with pytest.raises(ValueError, match=rf"{other} has labels without class names, .*train-0.*\['cat', 'dog'\]"):
        load(tmp_path, split=split)


def test_numbers_as_names_say_no_more_than_numbers(tmp_path: Path) -> None:
    pets(tmp_path / "train.parquet", ["0", "1", "2"], [0, 1], [1, 2])
    pets(tmp_path / "test.parquet", None, [2, 1], [3, 2])
    assert named(load(tmp_path, split="test")) == [("2", 3), ("1", 2)]


def test_files_of_other_columns(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", good(1), [0])
    write(tmp_path / "train-1.parquet", good(2), [1, 2], more=[5, 6])  # what is not read may differ
    assert load(tmp_path).labels.tolist() == [0, 1, 2]
    write(tmp_path / "train-2.parquet", [], [])
    assert len(load(tmp_path)) == 3
    write(tmp_path / "train-2.parquet", good(1), [0], image="image")
    with pytest.raises(ValueError, match=r"train-2.parquet: no column 'img', which .*train-0.parquet has; it has"):
        load(tmp_path)
    write(tmp_path / "train-2.parquet", [*good(1), b"?"], [0, 0])
    with pytest.raises(ValueError, match=r"train-2.parquet, row 1: cannot decode"):
        load(tmp_path)
    write(tmp_path / "train-2.parquet", good(2), [1, 7], label_feature=datasets.Value("int16"))
    with pytest.raises(ValueError, match=r"train-2.parquet has labels without class names"):
        load(tmp_path)
    table = pq.read_table(tmp_path / "train-1.parquet")
    pq.write_table(table.set_column(1, "label", pa.array([0.0, 1.0])), tmp_path / "train-2.parquet")
    with pytest.raises(ValueError, match=r"train-2.parquet: label column 'label' has type float64: must be integers"):
        load(tmp_path)


def test_a_damaged_page_names_its_file(folder: Path) -> None:
    file = folder / "train-1.parquet"
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"train-1.parquet is damaged|train-1.parquet, row \d") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train.bak.parquet", "train (copy).parquet", "._train-0.parquet", "train-0.parquet~"])
def test_backups_are_not_read(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / "train-0.parquet").read_bytes())
    assert len(load(folder)) == 7
    if name.startswith("."):
        assert len(load(folder, split_files={"train": "*train-*.parquet"})) == 7


# --- cache --------------------------------------------------------------------------------------------------


def test_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = load(folder, cache_dir=cache)
    (file,) = cache.glob("images-*")
    assert file.suffix == ".safetensors", "no temporary file is left behind"

    decoded: list[str] = []
    real = images_module._decode

    def counting(*args: Any) -> ImageData:
        decoded.append("again")
        return real(*args)

    monkeypatch.setattr(images_module, "_decode", counting)
    second = load(folder, cache_dir=cache)
    assert not decoded
    assert second.class_names == first.class_names
    assert torch.equal(second.images, first.images)
    assert torch.equal(second.labels, first.labels)

    file.write_bytes(b"damaged")
    assert torch.equal(load(folder, cache_dir=cache).images, first.images)
    assert len(decoded) == 1
    # Another setting or a changed source file is another entry.
    assert load(folder, cache_dir=cache, channels=1).image_shape == (1, 4, 4)
    assert len(decoded) == 2
    write(folder / "train-1.parquet", good(1), [2])
    assert len(load(folder, cache_dir=cache)) == 5
    assert len(decoded) == 3


# --- hub ----------------------------------------------------------------------------------------------------


def test_hub_name_goes_to_load_dataset(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = datasets.load_dataset, []

    def hub(name: str, **options: Any) -> Any:
        calls.append((name, options))
        assert "trust_remote_code" not in options
        if options["split"] != "train":
            raise ValueError(f'Unknown split "{options["split"]}". Should be one of ["train"].')
        if name != "someone/pets":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return real("parquet", data_files=str(folder / "train-0.parquet"), split="train", **{"cache_dir": None})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_: None)
    data = load("someone/pets", cache_dir=tmp_path / "cache")
    assert len(data) == 4
    assert calls[0][0] == "someone/pets"
    monkeypatch.setattr(images_module, "_decode", None)
    assert torch.equal(load("someone/pets", cache_dir=tmp_path / "cache").images, data.images), "from the cache"
    with pytest.raises(ValueError, match=r"'someone/pets', split = 'val': Unknown split.*\[\"train\"\]"):
        load("someone/pets", split="val")
    with pytest.raises(FileNotFoundError, match=r"source = 'someone/absent': no local folder .* and the hub gave"):
        load("someone/absent")


def test_a_data_set_that_was_prepared_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library calls its folder by the name in lower case, and not all have a card."""

    def unreachable(*_: Any) -> None:
        raise OfflineModeIsEnabled

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: name)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        image_table._load_hub("someone/MyPets", "train", cache_dir=str(tmp_path))
    (tmp_path / "someone___my_pets").mkdir()
    assert image_table._load_hub("someone/MyPets", "train", cache_dir=str(tmp_path)) == "someone/MyPets"


# --- batches ------------------------------------------------------------------------------------------------

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def colour_data() -> ImageData:
    images = torch.from_numpy(pixels(11, size=6)).permute(0, 3, 1, 2).contiguous()
    return ImageData(images, torch.arange(11) % 3, NAMES)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return ((images.double() / 255 - mean) / std).float()


@pytest.mark.parametrize("placement", ["auto", "device", "host"])
def test_batches_gather_augment_and_normalise(colour_data: ImageData, placement: str) -> None:
    config = AugmentConfig(crop_padding=2, flip=True, randaugment_ops=2)
    make = ImageBatches(colour_data, mean=MEAN, std=STD, augment=config, device=CPU, placement=placement)
    assert make.num_examples == 11
    indices = torch.tensor([3, 10, 3, 0])
    batch = make(indices, torch.Generator().manual_seed(5))
    aug = Augment(config)
    want = aug.apply(colour_data.images[indices], aug.draw(4, "cpu", torch.Generator().manual_seed(5)))
    assert batch["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(batch["pixel_values"], normalised(want), atol=2e-6, rtol=0)
    assert batch["labels"].tolist() == colour_data.labels[indices].tolist()
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][2]), "draws are per image"


def test_host_rows_equal_device_rows(colour_data: ImageData) -> None:
    # The path of placement="host" on CUDA, less the page-locked memory.
    make = ImageBatches(colour_data, mean=MEAN, std=STD, augment=None, device=CPU)
    indices = torch.tensor([5, 0, 10])
    on_device = make(indices, None)
    make.on_device = False
    on_host = make(indices, None)
    assert all(torch.equal(on_device[key], on_host[key]) for key in ("pixel_values", "labels"))
    torch.testing.assert_close(on_device["pixel_values"], normalised(colour_data.images[indices]), atol=2e-6, rtol=0)


def test_evaluation_batches(colour_data: ImageData) -> None:
    batches = list(evaluation_batches(colour_data, mean=MEAN, std=STD, batch_size=4, device=CPU))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 3]
    got = torch.cat([batch["pixel_values"] for batch in batches])
    torch.testing.assert_close(got, normalised(colour_data.images), atol=2e-6, rtol=0)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), colour_data.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,)}, r"mean = \[0.5\]: must be 3 finite numbers"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean = .*must be 3 finite numbers"),
        ({"std": (0.5, 0.5)}, "std = .*must be 3 finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std = .*every value must be > 0"),
        ({"placement": "gpu"}, r"placement = 'gpu': must be one of \['auto', 'device', 'host'\]"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
    ],
)
def test_batches_refuse_bad_arguments(colour_data: ImageData, changes: dict[str, Any], message: str) -> None:
    common: dict[str, Any] = {"mean": MEAN, "std": STD, "device": CPU}
    if "batch_size" not in changes:
        with pytest.raises(ValueError, match=message):
            ImageBatches(colour_data, **(common | {"augment": None} | changes))
    if "placement" not in changes:
        with pytest.raises(ValueError, match=message):  # At the call, before the first batch.
            evaluation_batches(colour_data, **(common | {"batch_size": 4} | changes))


def test_augmentation_refuses_other_channel_counts() -> None:
    data = ImageData(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), torch.tensor([0]), ("a",))
    with pytest.raises(ValueError, match="images have 2 channels: must be 1 or 3"):
        ImageBatches(data, mean=(0, 0), std=(1, 1), augment=AugmentConfig(flip=True), device=CPU)


@pytest.mark.slow
def test_compiled_batches_equal_eager(colour_data: ImageData) -> None:
    torch.compiler.reset()
    make = ImageBatches(colour_data, mean=MEAN, std=STD, augment=AugmentConfig(2, True, 1), device=CPU)
    eager = make(torch.arange(8), torch.Generator().manual_seed(0))
    make.compile()
    compiled = make(torch.arange(8), torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled["pixel_values"], eager["pixel_values"], atol=2e-6, rtol=0)


# --- real data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_cifar(name: str, classes: int) -> None:
    root = os.environ.get("DIFFUSIONBLOCKS_DATA")
    if not root:
        pytest.skip("DIFFUSIONBLOCKS_DATA is not set (a folder that holds cifar10/ and cifar100/)")
    data = load(Path(root) / name, split="test", image_size=32, num_classes=classes)
    assert len(data) == 10_000
    assert data.image_shape == (3, 32, 32)
    assert data.labels.bincount().tolist() == [10_000 // classes] * classes
    # The statistics of CIFAR's colours, known well enough to notice swapped channels or a wrong scale.
    mean = data.images.double().mean((0, 2, 3)) / 255
    known = {"cifar10": (0.494, 0.485, 0.450), "cifar100": (0.509, 0.487, 0.442)}[name]
    torch.testing.assert_close(mean, torch.tensor(known, dtype=torch.float64), atol=0.01, rtol=0)


def test_a_part_of_sorted_images_has_all_classes() -> None:
    """Files often hold one class after the other: the first images would be of the first classes alone."""
    labels = torch.arange(4).repeat_interleave(25)
    images = ImageData(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), labels, ("a", "b", "c", "d"))
    halves = torch.arange(100, dtype=torch.float16).view(100, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    shards = tuple(halves.split(30))
    latents = LatentData(shards, shards, labels, images.class_names, "vae", 1.0)
    for data in (images, latents):
        part = data.part(60)
        assert part.labels.bincount().tolist() == [15, 15, 15, 15]
        assert data.part(100) is data.part(200) is data
    part = latents.part(60)
    assert torch.equal(part.mean[0][:, 0, 0, 0].long() // 25, part.labels), "rows and labels stay together"


def test_a_limit_of_sorted_test_images_measures_all_classes() -> None:
    """A classifier that always says 3 is right as often as 3 comes."""
    labels = torch.arange(10).repeat_interleave(6)
    data = ImageData(torch.zeros(60, 1, 8, 8, dtype=torch.uint8), labels, tuple("0123456789"))
    for limit, correct in ((10, 1), (None, 6)):
        changes = {"method": "end-to-end", "evaluate": {"limit": limit}}
        experiment = Experiment(vit_recipe(vit_config(1), {"train": {"steps": 1}}, changes), {"test": data})
        model: Any = experiment.build().eval()
        model.model.classifier.bias.data[3] = 100.0
        (row,) = experiment.task.measure(experiment, model)
        assert row.accuracy == pytest.approx(correct / (limit or 60))
