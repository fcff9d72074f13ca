"""Latents: the tool that makes them from images and a real autoencoder, the files, and batches drawn from them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusionblocks.cli.commands import main
from diffusionblocks.data import LatentBatches, LatentData, autoencoder, latent_folder
from diffusionblocks.data import encode as tool
from diffusionblocks.data.image_config import LatentsConfig
from diffusionblocks.data.latent_data import LatentScale
from diffusionblocks.data.latent_shards import decoded_by, write_shards
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.models.tiny_autoencoder import TinyAutoencoder

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "eel")
SHAPE = (4, 2, 3)


@pytest.fixture(autouse=True)
def private_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the `datasets` library from writing into the home folder and from drawing progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def posterior(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    mean = torch.randn((rows, *SHAPE), generator=random).half()
    std = torch.rand((rows, *SHAPE), generator=random).half()
    return mean, std, torch.arange(rows) % len(NAMES)


def in_memory(rows: int = 10, shards: int = 1) -> LatentData:
    mean, std, labels = posterior(rows)
    return LatentData(mean.tensor_split(shards), std.tensor_split(shards), labels, NAMES, "vae", 0.5)


def cut(tensors: tuple[torch.Tensor, ...], size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)


OPTIONS: dict[str, Any] = {"shard_rows": 4, "class_names": NAMES, "vae": "some/vae", "scale": LatentScale(0.25)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """10 rows in shards of 4, 4 and 2."""
    assert write_shards(tmp_path / "latents", "train", cut(posterior(10), 3), **OPTIONS) == 10
    return tmp_path / "latents"


# --- files --------------------------------------------------------------------------------------------------


def test_shards_hold_what_was_written(folder: Path) -> None:
    names = ["train-00000.safetensors", "train-00001.safetensors", "train-00002.safetensors", "train.json"]
    assert sorted(path.name for path in folder.iterdir()) == names, "no temporary name is left behind"
    data = latent_folder(folder)
    mean, std, labels = posterior(10)
    assert [len(shard) for shard in data.mean] == [4, 4, 2]
    assert torch.equal(torch.cat(data.mean), mean)
    assert torch.equal(torch.cat(data.std), std)
    assert torch.equal(data.labels, labels)
    assert (len(data), data.image_shape, data.num_classes, data.class_names) == (10, SHAPE, 3, NAMES)
    assert (data.vae, data.scaling_factor) == ("some/vae", 0.25)


def test_rows_of_any_order_and_shard(folder: Path) -> None:
    data = latent_folder(folder)
    mean, std, _ = posterior(10)
    random = torch.Generator().manual_seed(0)
    orders = [torch.randint(10, (n,), generator=random) for n in (1, 5, 40)]
    for indices in [torch.tensor([9, 0, 4, 3, 4, 9]), torch.arange(10), torch.tensor([], dtype=torch.int64), *orders]:
        assert torch.equal(data.rows("mean", indices), mean[indices])
        assert torch.equal(data.rows("std", indices), std[indices])
    for indices in (torch.tensor([0, 10]), torch.tensor([3, -1])):
        with pytest.raises(IndexError, match="must be 0 to 9"):
            data.rows("mean", indices)


def test_shards_are_mapped_not_read(folder: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    data = latent_folder(folder)
    assert sum("train-00001.safetensors" in line for line in maps.read_text().splitlines()) >= 1
    first, last = (data.mean[1].untyped_storage().data_ptr() + i for i in (0, data.mean[1].nbytes - 1))
    lines = [line.split() for line in maps.read_text().splitlines() if "train-00001" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    assert any(low <= first and last < high for low, high in ranges), "a shard's tensor is a view of its file"


def test_a_split_that_another_process_wrote_meanwhile_stays(tmp_path: Path) -> None:
    def rows() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        yield posterior(3, seed=1)
        write_shards(tmp_path, "train", [posterior(4, seed=2)], **OPTIONS)

    with pytest.raises(FileExistsError, match=r"holds train.json: split 'train' exists; set overwrite"):
        write_shards(tmp_path, "train", rows(), **OPTIONS)
    assert torch.equal(torch.cat(latent_folder(tmp_path).mean), posterior(4, seed=2)[0])


def test_other_splits_and_overwriting(folder: Path) -> None:
    write_shards(folder, "test", [posterior(3, seed=1)], **OPTIONS)
    with pytest.raises(FileExistsError, match=r"holds train.json: split 'train' exists; set overwrite"):
        write_shards(folder, "train", [posterior(3)], **OPTIONS)
    write_shards(folder, "train", [posterior(5, seed=2)], **OPTIONS, overwrite=True)
    assert torch.equal(torch.cat(latent_folder(folder).mean), posterior(5, seed=2)[0])
    assert torch.equal(torch.cat(latent_folder(folder, "test").mean), posterior(3, seed=1)[0])
    assert not (folder / "train-00002.safetensors").exists(), "the old split was longer"
    (folder / "train.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds train-00000\.safetensors"):
        write_shards(folder, "train", [posterior(3)], **OPTIONS)


def test_a_failing_source_leaves_nothing_and_keeps_the_old(folder: Path) -> None:
    def failing() -> Iterator[tuple[torch.Tensor, ...]]:
        yield posterior(9, seed=3)
        raise RuntimeError("no more")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for split, overwrite in (("valid", False), ("train", True)):
        with pytest.raises(RuntimeError, match="no more"):
            write_shards(folder, split, failing(), **OPTIONS, overwrite=overwrite)  # type: ignore[arg-type]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


MEAN, STD, LABELS = posterior(2)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "split 'train': there are no rows to write"),
        ([(MEAN, STD, LABELS)], {"shard_rows": 0}, "shard_rows = 0: must be at least 1"),
        ([(MEAN, STD, LABELS)], {"scale": LatentScale(1, 0, (0.0,), (1.0,))}, "latents_mean has 1 values: must be 4"),
        ([(MEAN, STD, LABELS)], {"class_names": ()}, "class_names is empty"),
        ([(MEAN, STD, LABELS)], {"class_names": NAMES[:1]}, "row 1: label 1: must be from 0 to 0"),
        ([(MEAN, STD, LABELS), (MEAN, STD, LABELS - 1)], {}, "row 2: label -1: must be from 0 to 2"),
        ([(MEAN, STD[:1], LABELS)], {}, r"from row 0 on: mean torch.float16 \(2, 4, 2, 3\), std .*\(1, 4, 2, 3\)"),
        ([(MEAN.long(), STD, LABELS)], {}, "mean torch.int64 .*must be floating"),
        ([(MEAN, STD, LABELS[:1])], {}, r"labels torch.int64 \(1,\): must be int64 \(2,\)"),
        ([(MEAN, STD, LABELS.int())], {}, r"labels torch.int32 \(2,\): must be int64"),
        ([(MEAN.float() * 1e6, STD, LABELS)], {}, "must be finite in float16"),
        ([(MEAN, -STD, LABELS)], {}, "std >= 0"),
        (
            [(MEAN, STD, LABELS), (MEAN[:, :3], STD[:, :3], LABELS)],
            {},
            "row 2 on: latents of 3 channels: must be 4",
        ),
    ],
)
def test_refuses_to_write(tmp_path: Path, rows: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "out", "train", rows, **(OPTIONS | changes))
    assert not list((tmp_path / "out").glob("*"))


def test_refuses_split_names_that_are_paths(folder: Path) -> None:
    for split in ("../train", "train-1", "", "a*"):
        with pytest.raises(ValueError, match="must be letters, digits"):
            latent_folder(folder, split)
        with pytest.raises(ValueError, match="must be letters, digits"):
            write_shards(folder, split, [posterior(2)], **OPTIONS)


def changed_index(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "train.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return change


def changed_shard(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "train-00001.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(change(tensors), file)

    return apply


def cut_off(count: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "train-00001.safetensors"
        file.write_bytes(file.read_bytes()[:count])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed_index(format=2), r"train.json: format: .*\(got 2\); encode the split again"),
        (changed_index(shape=[4, 2]), "train.json: shape"),
        (changed_index(rows=[]), "train.json: rows"),
        (changed_index(rows=[4, 0, 6]), r"train.json: rows.1: .*\(got 0\)"),
        (changed_index(vae=None), "train.json: vae: Field required"),
        (changed_index(scaling_factor=-1), "train.json: scaling_factor"),
        (changed_index(more=1), "train.json: more: Extra inputs"),
        (changed_index(num_classes=4), "num_classes = 4, but 3 class names"),
        (
            changed_index(num_classes=2, class_names=["a", "b"]),
            "00000.safetensors, row 2: label 2: must be from 0 to 1",
        ),
        (changed_index(rows=[4, 3, 2]), r"00001.safetensors holds .*\[4, 4, 2, 3\].*must be .*\[3, 4, 2, 3\]"),
        (changed_index(shape=[4, 3, 2]), r"00000.safetensors holds .*must be .*\[4, 4, 3, 2\]"),
        (lambda folder: (folder / "train.json").write_text("{"), "train.json is not JSON"),
        (changed_shard(lambda t: t | {"mean": t["mean"][:3]}), "00001.safetensors holds"),
        (changed_shard(lambda t: t | {"std": t["std"].float()}), "00001.safetensors holds .*'F32'"),
        (changed_shard(lambda t: t | {"labels": t["labels"] + 1}), "00001.safetensors, row 1: label 3: must be"),
        (changed_shard(lambda t: {"mean": t["mean"], "labels": t["labels"]}), "00001.safetensors holds"),
        (cut_off(500), "00001.safetensors is damaged or cut off"),
        (cut_off(40), "00001.safetensors is damaged or cut off"),
        (cut_off(0), "00001.safetensors is damaged or cut off"),
    ],
)
def test_refuses_damaged_folders(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        latent_folder(folder)


def test_refuses_missing_files(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing: no such folder of latents; make it with"):
        latent_folder(folder / "nothing")
    with pytest.raises(FileNotFoundError, match=r"valid.json is missing; the folder holds the splits \['train'\]"):
        latent_folder(folder, "valid")
    (folder / "train-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00002.safetensors is missing, but the index names it"):
        latent_folder(folder)


def test_latent_data_checks_itself() -> None:
    mean, std, labels = posterior(3)
    good: dict[str, Any] = {"mean": (mean,), "std": (std,), "labels": labels, "class_names": NAMES}
    assert len(LatentData(**good, vae="", scaling_factor=1.0)) == 3
    bad: list[tuple[dict[str, Any], str]] = [
        ({"mean": ()}, "mean: 0 shards, std: 1"),
        ({"mean": (mean, mean)}, "mean: 2 shards, std: 1"),
        ({"mean": (mean.float(),)}, "shard 0, mean: torch.float32"),
        ({"std": (std[:2],)}, "shard 0, std: "),
        ({"mean": (mean, mean[:, :3]), "std": (std, std[:, :3])}, "shard 1, mean: "),
        ({"mean": (mean[:0],), "std": (std[:0],)}, "n >= 1"),
        ({"labels": labels[:2]}, r"labels: .*must be int64 \(3,\)"),
        ({"labels": labels + 1}, "row 2: label 3: must be from 0 to 2"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            LatentData(**(good | changes), vae="", scaling_factor=1.0)


# --- splits and shards that disagree -------------------------------------------------------------------------


def test_labels_of_splits_are_matched_by_name(folder: Path) -> None:
    write_shards(folder, "test", [posterior(3)], **(OPTIONS | {"class_names": ("eel", "cat", "dog")}))
    data = latent_folder(folder, "test")
    assert data.class_names == NAMES
    assert [data.class_names[label] for label in data.labels] == ["eel", "cat", "dog"]
    assert latent_folder(folder, "test", reference_split=None).class_names == ("eel", "cat", "dog")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("cat", "dog", "emu")}, r"test.json and .*train.json have different classes.*'emu'.*'eel'"),
        ({"vae": "other"}, r"test.json is of the autoencoder 'other', .*train.json of 'some/vae'"),
        ({"scale": LatentScale(0.5)}, r"test.json has scaling_factor = 0.5, .*train.json has 0.25"),
        ({"scale": LatentScale(0.25, 0.1)}, r"test.json has shift_factor = 0.1, .*train.json has 0.0"),
        ({"scale": LatentScale(0.25, 0, (0.0,) * 4, (2.0,) * 4)}, "test.json has latents_mean = .*has None"),
    ],
)
def test_splits_of_other_latents_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    write_shards(folder, "test", [posterior(3)], **(OPTIONS | changes))
    with pytest.raises(ValueError, match=message):
        latent_folder(folder, "test")
    latent_folder(folder)


def test_splits_of_another_shape_are_refused(folder: Path) -> None:
    mean, std, labels = posterior(3)
    write_shards(folder, "test", [(mean[..., :1], std[..., :1], labels)], **OPTIONS)
    with pytest.raises(ValueError, match=r"test.json has latents \(4, 2, 1\), .*train.json has \(4, 2, 3\)"):
        latent_folder(folder, "test")


def test_a_shard_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, changes in (
        ("scaling_factor", {"scale": LatentScale(0.5)}),
        ("class_names", {"class_names": NAMES[::-1]}),
    ):
        write_shards(tmp_path / name, "train", cut(posterior(10), 3), **(OPTIONS | changes))
        other = (tmp_path / name / "train-00001.safetensors").read_bytes()
        mine = (folder / "train-00001.safetensors").read_bytes()
        (folder / "train-00001.safetensors").write_bytes(other)
        with pytest.raises(ValueError, match=rf"train-00001.safetensors: {name} is .*, in the index of its split"):
            latent_folder(folder)
        (folder / "train-00001.safetensors").write_bytes(mine)
    # Shards and indexes of older versions note less, and are read.
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, file)
    changed_index(shift_factor=None, latents_mean=None, latents_std=None)(folder)
    assert len(latent_folder(folder)) == 10
    write_shards(folder, "test", [posterior(3)], **OPTIONS)
    assert len(latent_folder(folder, "test")) == 3


@pytest.mark.parametrize("placement", ["host", "device"])
@pytest.mark.parametrize(("part", "value"), [("mean", float("nan")), ("mean", float("-inf")), ("std", -1.0)])
def test_values_that_no_autoencoder_gives(folder: Path, placement: str, part: str, value: float) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[part][2, 1, 0, 1] = value
        return tensors

    changed_shard(damage)(folder)
    with pytest.raises(ValueError, match=rf"train-00001.safetensors, row 2: {part} has values that are not finite"):
        LatentBatches(latent_folder(folder), device=CPU, placement=placement)
    with pytest.raises(ValueError, match=rf"train-00001.safetensors, row 2: {part} has values that are not finite"):
        latent_folder(folder).rows(part, torch.tensor([0, 6]))  # as of data too large to be looked at whole


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["auto", "device", "host"])
def test_batches_draw_from_the_posterior(folder: Path, placement: str) -> None:
    make = LatentBatches(latent_folder(folder), device=CPU, scale=0.75, placement=placement)
    assert make.num_examples == 10
    assert make.on_device == (placement == "device")
    indices = torch.tensor([9, 4, 4, 0])
    batch = make(indices, torch.Generator().manual_seed(7))
    mean, std, labels = posterior(10)
    noise = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(7))
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"], (mean[indices].float() + std[indices].float() * noise) * 0.75)
    assert torch.equal(batch["labels"], labels[indices])
    assert not torch.equal(batch["pixel_values"][1], batch["pixel_values"][2]), "draws are per latent"


def test_batches_repeat_with_the_generator() -> None:
    make = LatentBatches(in_memory(), device=CPU)
    indices = torch.arange(10)
    first, again, other = (make(indices, torch.Generator().manual_seed(s))["pixel_values"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_posterior_statistics() -> None:
    data = in_memory(rows=1)
    make = LatentBatches(data, device=CPU, scale=0.5)
    draws = make(torch.zeros(40_000, dtype=torch.int64), torch.Generator().manual_seed(0))["pixel_values"]
    torch.testing.assert_close(draws.mean(0), data.mean[0][0].float() * 0.5, atol=0.01, rtol=0)
    torch.testing.assert_close(draws.std(0), data.std[0][0].float() * 0.5, atol=0.01, rtol=0)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_the_mean_alone(placement: str) -> None:
    data = in_memory(shards=3)
    make = LatentBatches(data, device=CPU, scale=2.0, sample_posterior=False, placement=placement)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    batch = make(torch.tensor([8, 1]), generator)
    assert torch.equal(batch["pixel_values"], torch.cat(data.mean)[[8, 1]].float() * 2)
    assert torch.equal(generator.get_state(), before), "nothing was drawn"


def test_batches_refuse_bad_arguments() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"placement": "gpu"}, r"placement = 'gpu': must be one of \['auto', 'device', 'host'\]"),
        ({"scale": 0.0}, "scale = 0.0: must be finite and > 0"),
        ({"scale": float("inf")}, "scale = inf"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            LatentBatches(in_memory(), device=CPU, **changes)


@pytest.mark.slow
def test_compiled_batches_equal_eager() -> None:
    torch.compiler.reset()
    make = LatentBatches(in_memory(), device=CPU)
    eager = make(torch.arange(8), torch.Generator().manual_seed(0))
    make.compile()
    compiled = make(torch.arange(8), torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled["pixel_values"], eager["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_placements_agree_on_a_gpu(folder: Path) -> None:
    device, indices = torch.device("cuda"), torch.tensor([9, 4, 4, 0])
    data = latent_folder(folder)

    def noise() -> torch.Generator:
        return torch.Generator(device).manual_seed(3)

    host, inside = (LatentBatches(data, device=device, placement=where) for where in ("host", "auto"))
    assert inside.on_device
    assert not host.on_device
    want = inside(indices.to(device), noise())
    for given in (indices, indices.to(device)):
        got = host(given, noise())
        assert all(got[key].is_cuda and torch.equal(got[key], want[key]) for key in want)

    generator, given = noise(), indices.to(device)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        replayed = inside(given, generator)
    generator.manual_seed(3)
    graph.replay()
    assert all(torch.equal(replayed[key], want[key]) for key in want)
    with pytest.raises(ValueError, match="a CUDA graph cannot gather"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        host(given, None)


# --- the tool -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real autoencoder with random weights; two resolutions, so that it halves its images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    return path


def image(height: int, width: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


SIZES = [(16, 16), (20, 16), (16, 25), (40, 33), (9, 12), (70, 140), (17, 31)]


def write(path: Path, encoded: list[bytes | None], labels: list[int | None], label_feature: Any = None) -> None:
    features = {"image": datasets.Image(), "label": label_feature or datasets.ClassLabel(names=list(NAMES))}
    images = [None if data is None else {"bytes": data, "path": None} for data in encoded]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": images, "label": labels}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(path))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Seven images of many sizes, in two files."""
    pictures = [png(image(*size, seed)) for seed, size in enumerate(SIZES)]
    write(tmp_path / "pets" / "train-0.parquet", pictures[:4], [0, 1, 2, 0])  # type: ignore[arg-type]
    write(tmp_path / "pets" / "train-1.parquet", pictures[4:], [1, 1, 2])  # type: ignore[arg-type]
    return tmp_path / "pets"


def arguments(pets: Path, vae: Path, out: Path, *more: str) -> list[str]:
    given = ["encode", "--source", str(pets), "--vae", str(vae), "--out", str(out), "--size", "16", "--batch-size", "3"]
    return [*given, "--shard-rows", "4", "--device", "cpu", *more]


def test_tool_end_to_end(pets: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import AutoencoderKL

    out = tmp_path / "latents"
    assert main(arguments(pets, vae, out)) == 0
    output = capsys.readouterr().out
    assert "7 latents (4, 8, 8) of 3 classes" in output
    assert re.search(r"PSNR \d+\.\d\d dB, mean of the first 7 images", output)
    data = latent_folder(out)
    assert (len(data), data.image_shape, data.class_names) == (7, (4, 8, 8), NAMES)
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 1, 2]
    assert [len(shard) for shard in data.mean] == [4, 3]
    assert (data.vae, data.scaling_factor) == (str(vae), 0.18215)

    # By hand: each image by itself, through diffusers alone.
    model = AutoencoderKL.from_pretrained(vae)
    for row, size in enumerate(SIZES):
        pixels = np.asarray(tool.center_crop(image(*size, row), 16), dtype=np.float32)
        with torch.no_grad():
            dist = model.encode(torch.from_numpy(pixels / 255 * 2 - 1).permute(2, 0, 1)[None]).latent_dist
        for part, want in (("mean", dist.mean), ("std", dist.std)):
            got = data.rows(part, torch.tensor([row])).float()  # type: ignore[arg-type]
            torch.testing.assert_close(got, want * 0.18215, atol=2e-5, rtol=1e-3)

    assert main(arguments(pets, vae, out)) == 2
    assert "error: " in (message := capsys.readouterr().err)
    assert "split 'train' exists" in message
    assert main(arguments(pets, vae, out, "--overwrite")) == 0


def test_decode_undoes_the_scale(vae: Path) -> None:
    model = autoencoder.load_vae(str(vae), CPU)
    assert not model.module.training
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, _ = model.encode(images, LatentScale(0.5))
    decoded = model.decode(mean * 0.25, LatentScale(0.5).times(0.25))
    assert decoded.shape == images.shape
    assert not decoded.requires_grad
    with torch.no_grad():
        want = model.module.decode(model.module.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, want, atol=1e-5, rtol=0)
    # An autoencoder may also have a shift; it cancels, and it is there.
    shifted, _ = model.encode(images, LatentScale(0.5, 0.3))
    torch.testing.assert_close(shifted, mean - 0.15, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(shifted, LatentScale(0.5, 0.3)), want, atol=1e-4, rtol=0)


def statistics(vae: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, a channel, of the latents of some images."""
    model = autoencoder.load_vae(str(vae), CPU)
    raw, _ = model.encode(
        torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1, LatentScale(1.0)
    )
    mean, std = raw.mean((0, 2, 3)).tolist(), raw.std((0, 2, 3)).tolist()
    return tuple(mean), tuple(std)


@pytest.mark.parametrize("kind", ["plain", "shift", "mean and std"])
def test_decode_inverts_encode_through_the_files(vae: Path, pets: Path, tmp_path: Path, kind: str) -> None:
    from diffusers import AutoencoderKL

    mean, std = statistics(vae)
    changes: dict[str, Any] = {
        "shift": {"shift_factor": 0.3},
        "mean and std": {"latents_mean": mean, "latents_std": std},
    }.get(kind, {})
    model = AutoencoderKL.from_pretrained(vae)
    model.register_to_config(**changes)
    model.save_pretrained(tmp_path / "vae")
    data = tool.encode_images(str(pets), str(tmp_path / "vae"), tmp_path / "out", size=16, device="cpu")
    by = decoded_by(tmp_path / "out", "train")
    assert by is not None
    assert (by.vae, by.scale_of_latents) == (str(tmp_path / "vae"), False)
    noted = by.scale
    assert noted == LatentScale(**{"scaling_factor": 0.18215} | changes)

    loaded = autoencoder.load_vae(str(tmp_path / "vae"), CPU)
    assert loaded.scale == noted
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents, _ = loaded.encode(images, dataclasses.replace(noted, scaling_factor=1.0))
    if kind == "mean and std":
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    # What comes out of the files and back is what the autoencoder itself makes of its own latents.
    rows = data.rows("mean", torch.arange(7)).float() * 0.5
    decoded = loaded.decode(rows, noted.times(0.5))
    pixels = torch.stack([row.pixels([(16, 16)]) for row in tool.open_table(str(pets), "train")])
    with torch.no_grad():
        raw = model.encode(pixels.float() / 127.5 - 1).latent_dist.mean
        expected = model.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, expected, atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match=r"vae has scaling_factor = 0.18215, folder has 0.2"):
        noted.check_same(LatentScale(0.2), "vae", "folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.0] * 4}, r"latents_mean = .*, latents_std = None: must both be there"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3},
            "latents_mean has 3 values: must be 4, one per channel",
        ),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "std > 0"),
        ({"latents_mean": [float("nan")] * 4, "latents_std": [1.0] * 4}, "must be finite"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.2}, "only one of them can be meant"),
        ({"scaling_factor": -1.0}, "scaling_factor = -1.0: must be finite and > 0"),
    ],
)
def test_an_autoencoder_with_odd_statistics(
    vae: Path, pets: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = autoencoder.load_vae(str(vae), CPU)
    model.module.register_to_config(**changes)
    with pytest.raises(ValueError, match=message):
        _ = model.scale
    model.module.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=rf"vae = .*{message}"):
        tool.encode_images(str(pets), str(tmp_path / "vae"), tmp_path / "out", size=16, device="cpu")
    assert not (tmp_path / "out").exists()


def test_samples_are_decoded_as_the_latents_were_scaled(folder: Path, vae: Path, tmp_path: Path) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "dit" / "imagenet-latents.yaml")
    data = LatentsConfig(kind="latents", source=str(folder), vae=str(vae))
    with pytest.raises(ValueError, match=r"vae = .* has scaling_factor = 0.18215, .*latents, split 'train', has 0.25"):
        recipe.model_copy(update={"data": data}).data.to_pixels(CPU)
    write_shards(folder, "train", [posterior(3)], **(OPTIONS | {"scale": LatentScale(0.18215)}), overwrite=True)
    for source in (folder, tmp_path / "not here"):
        data = LatentsConfig(kind="latents", source=str(source), vae=str(vae))
        assert recipe.model_copy(update={"data": data}).data.to_pixels(CPU)(torch.zeros(1, 4, 2, 2)).shape == (
            1,
            3,
            4,
            4,
        )


# --- autoencoders whose config says no scale, of other classes, and folders of pictures ---------------------------


def tiny_files(folder: Path, *, pool: bool = True, channels: int = 4, seed: int = 0) -> Path:
    """TAESD's two files, with random weights of a small net of the published shape."""
    torch.manual_seed(seed)
    weights = TinyAutoencoder(channels, pool=pool).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for half in ("encoder", "decoder"):
        part = {name[len(half) + 1 :]: tensor.half() for name, tensor in weights.items() if name.startswith(half)}
        save_file(part, folder / f"taef2_{half}.safetensors")
    return folder


def test_latents_of_other_weights_are_noticed(pets: Path, tmp_path: Path) -> None:
    """Under the same name they are refused, under another one told; other channels never decode."""
    out, files = tmp_path / "out", tiny_files(tmp_path / "taesd")
    (pets / "test-0.parquet").write_bytes((pets / "train-0.parquet").read_bytes())
    tool.encode_images(str(pets), str(files), out, size=16, device="cpu")

    def decoder(**options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return LatentsConfig(kind="latents", source=str(out), **options).to_pixels(CPU)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder()
        decoder(vae=str(tiny_files(tmp_path / "copy")))  # the same weights elsewhere
    other = tiny_files(tmp_path / "other", seed=1)
    with pytest.warns(UserWarning, match=r"other' has other weights than .*taesd', which encoded .*out, split 'train'"):
        decoder(vae=str(other))
    wide = tiny_files(tmp_path / "wide", channels=8)
    with pytest.raises(ValueError, match=r"wide': its latents have 8 channels, those of .* 4: name the autoencoder"):
        decoder(vae=str(wide))
    tiny_files(files, seed=1)
    (out / "notes.json").write_text('["of the user\'s own"]')  # which is no split
    with pytest.raises(ValueError, match=r"taesd': its weights are not those that encoded .*out, split 'train': bring"):
        decoder()
    with pytest.raises(ValueError, match=r"taesd': its weights are not those that encoded split 'train' of .*out: br"):
        tool.encode_images(str(pets), str(files), out, split="test", size=16, device="cpu")
    # A split of an older version notes no weights, and is decoded as ever.
    index = json.loads((out / "train.json").read_text())
    (out / "train.json").write_text(json.dumps({name: v for name, v in index.items() if name != "vae_weights"}))
    decoder()


def test_tiny_autoencoder_is_that_of_diffusers() -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    theirs = AutoencoderTiny(latent_channels=4)
    ours = TinyAutoencoder(4, pool=False)
    names = [f"encoder.{name.removeprefix('encoder.layers.')}" for name in theirs.state_dict() if "encoder" in name]
    assert names == [name for name in ours.state_dict() if name.startswith("encoder")]
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(images).latents
        assert torch.equal(ours.encode(images), latents)
        assert torch.equal(ours.decode(latents), theirs.decode(latents).sample)


def test_the_published_autoencoder_of_flux_2() -> None:
    root = os.environ.get("DIFFUSIONBLOCKS_DATA")
    if root is None or not (Path(root) / "taef2").is_dir():
        pytest.skip(
            "needs taef2/ with taesd's taef2_encoder.safetensors and taef2_decoder.safetensors in the data folder"
        )
    model = autoencoder.load_vae(str(Path(root) / "taef2"), CPU)
    assert model.latent_shape == (32, 8)
    assert model.scale is None
    # A smooth picture, which it was trained to give back; half a pixel of error would be 48 dB.
    ramp = torch.linspace(-0.8, 0.8, 64)
    picture = torch.stack([ramp[None].expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])[None]
    decoded = model.decode(model.encode(picture, LatentScale(1.0))[0], LatentScale(1.0))
    assert float((decoded - picture).square().mean().sqrt()) < 0.06


@pytest.mark.parametrize("pool", [True, False])
def test_statistics_are_measured_where_a_config_says_none(pets: Path, tmp_path: Path, pool: bool) -> None:
    files = tiny_files(tmp_path / "tiny", pool=pool)
    out = tmp_path / "out"
    data = tool.encode_images(str(pets), str(files), out, size=16, device="cpu", shard_rows=3)
    by = decoded_by(out, "train")
    assert by is not None
    assert by.scale_of_latents
    # By hand: the network alone, in double precision over all rows.
    model = TinyAutoencoder.from_files(*TinyAutoencoder.files_in(files))  # type: ignore[misc]
    pixels = torch.stack([row.pixels([(16, 16)]) for row in tool.open_table(str(pets), "train")])
    with torch.no_grad():
        raw = model.encode(pixels.float() / 127.5 - 1).double()
    torch.testing.assert_close(torch.tensor(by.scale.latents_mean), raw.mean((0, 2, 3)).float(), atol=1e-3, rtol=1e-3)
    deviation = raw.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(by.scale.latents_std), deviation.float(), atol=1e-4, rtol=2e-3)
    rows = data.rows("mean", torch.arange(7)).double()
    torch.testing.assert_close(rows.mean((0, 2, 3)), torch.zeros(4).double(), atol=2e-3, rtol=0)
    torch.testing.assert_close(rows.std((0, 2, 3), correction=0), torch.ones(4).double(), atol=2e-3, rtol=0)
    assert not data.rows("std", torch.arange(7)).any(), "it has no noise"
    # Samples come back through the recorded autoencoder, on the measured scale.
    config = LatentsConfig(kind="latents", source=str(out), scale=0.5)
    with torch.no_grad():
        expected = model.decode(raw.float()).clamp(-1, 1)
    shown = config.to_pixels(CPU)(rows.float() * 0.5).float() / 127.5 - 1
    torch.testing.assert_close(shown, expected, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match=r"its config says no scale .* train.json .*: set data.source"):
        LatentsConfig(kind="latents", source=str(tmp_path / "not here"), vae=str(files)).to_pixels(CPU)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "train.json").write_bytes((out / "train.json").read_bytes())
    elsewhere = LatentsConfig(kind="latents", source=str(tmp_path / "copy"), vae=str(files)).to_pixels(CPU)
    assert torch.equal(elsewhere(rows.float() * 0.5), config.to_pixels(CPU)(rows.float() * 0.5))
    # Another split gets the scale of the first, whatever its own statistics are.
    (pets / "test-0.parquet").write_bytes((pets / "train-0.parquet").read_bytes())
    test = tool.encode_images(str(pets), str(files), out, split="test", size=16, device="cpu")
    assert torch.equal(test.rows("mean", torch.arange(4)), latent_folder(out).rows("mean", torch.arange(4)))
    assert decoded_by(out, "test") == by
    with pytest.raises(ValueError, match=r"statistics = config: that of .* says nothing of its latents; use measured"):
        tool.encode_images(str(pets), str(files), tmp_path / "b", size=16, device="cpu", statistics="config")


def test_measured_deviation_counts_the_posteriors_own(tmp_path: Path) -> None:
    mean = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2).half()
    write_shards(
        tmp_path / "a",
        "train",
        [(mean, torch.full_like(mean, 2.0), torch.zeros(4, dtype=torch.int64))],
        **(OPTIONS | {"scale": None}),
    )
    by = decoded_by(tmp_path / "a", "train")
    assert by is not None
    assert by.scale.latents_std == pytest.approx((5**0.5,))  # variance 1 of the means, 4 of each posterior
    nothing = (torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="channel 0 of the latents is 0 everywhere; check the autoencoder"):
        write_shards(tmp_path / "b", "train", [nothing], **(OPTIONS | {"scale": None}))
    assert not list((tmp_path / "b").iterdir())


def _classes() -> dict[str, Callable[[], Any]]:
    """Small autoencoders of the classes whose outputs differ: two latents without noise, and video."""
    import diffusers

    return {
        "AutoencoderTiny": lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "AutoencoderDC": lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.4,
        ),
        "AutoencoderKLFlux2": lambda: diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ),
        "AutoencoderKLQwenImage": lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=(0.1, 0.2, 0.3, 0.4),
            latents_std=(1.0, 2.0, 3.0, 4.0),
        ),
    }


def _refused_classes() -> dict[str, Callable[[], Any]]:
    """Small autoencoders of classes that cannot be called as those of images are."""
    import diffusers

    return {
        # Its latents have one size, whatever the image's; it reads [0, 1], and scales its latents itself.
        "AutoencoderRAE": lambda: diffusers.AutoencoderRAE(
            encoder_type="mae",
            encoder_hidden_size=64,
            encoder_patch_size=16,
            encoder_num_hidden_layers=1,
            decoder_hidden_size=8,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=1,
            decoder_intermediate_size=8,
            patch_size=16,
            encoder_input_size=64,
        ),
        # Its decoder is told a number of frames.
        "AutoencoderKLTemporalDecoder": lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32,), layers_per_block=1
        ),
    }


@pytest.mark.parametrize("name", ["AutoencoderRAE", "AutoencoderKLTemporalDecoder"])
def test_an_autoencoder_that_does_not_give_images_back_is_refused(name: str, tmp_path: Path, pets: Path) -> None:
    import diffusers

    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    _refused_classes()[name]().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae = .*: a black image cannot be encoded and decoded: .*; give an"):
        tool.encode_images(str(pets), str(tmp_path / "vae"), tmp_path / "out", size=64, statistics="measured")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["AutoencoderTiny", "AutoencoderDC", "AutoencoderKLFlux2", "AutoencoderKLQwenImage"])
def test_autoencoders_of_other_classes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = _classes()[name]()
    made.save_pretrained(tmp_path / "pipeline" / "vae")  # as in a pipeline's folder
    model = autoencoder.load_vae(str(tmp_path / "pipeline"), CPU)
    assert type(model.module).__name__ == name
    assert model.latent_shape == (4, 2)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = model.scale
    says = {"AutoencoderDC": 0.4, "AutoencoderKLQwenImage": 1.0}
    assert (None if scale is None else scale.scaling_factor) == says.get(name)
    mean, std = model.encode(images, scale or LatentScale(1.0))
    assert mean.shape == std.shape == (2, 4, 8, 8)
    frames = images[:, :, None] if name == "AutoencoderKLQwenImage" else images
    with torch.no_grad():
        output = made.eval().encode(frames)
        raw = output[0].mean if hasattr(output, "latent_dist") else output[0]
        want = made.decode(raw).sample.reshape(2, 3, 16, 16).clamp(-1, 1)
    raw = raw.reshape(2, 4, 8, 8)
    if name == "AutoencoderKLQwenImage":
        raw = (raw - torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1)) / torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)
    torch.testing.assert_close(mean, raw * says.get(name, 1.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(mean, scale or LatentScale(1.0)), want, atol=1e-4, rtol=0)


def test_pictures_in_folders_are_encoded_as_they_are(vae: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for split, name, seed in [("train", "dog", 0), ("train", "cat", 1), ("train", "cat", 2), ("val", "dog", 3)]:
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed}.png").write_bytes(png(image(20, 16, seed)))
    (root / "val" / "cat").mkdir()
    (root / "val" / "cat" / "9.png").write_bytes(png(image(16, 16, 9)))
    options: dict[str, Any] = {"size": 16, "device": "cpu"}
    data = tool.encode_images(str(root), str(vae), tmp_path / "out", **options)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 1, 0], "classes take turns"
    model = autoencoder.load_vae(str(vae), CPU)
    pixels = torch.from_numpy(np.array(tool.center_crop(image(20, 16, 0), 16))).permute(2, 0, 1)[None]
    expected, _ = model.encode(pixels.float() / 127.5 - 1, LatentScale(0.18215))
    torch.testing.assert_close(data.rows("mean", torch.tensor([1])).float(), expected, atol=2e-5, rtol=1e-3)
    val = tool.encode_images(str(root), str(vae), tmp_path / "out", split="val", limit=1, **options)
    assert len(val) == 1
    with pytest.raises(ValueError, match=r"photos has no pictures in test/CLASS/, nor parquet files"):
        tool.encode_images(str(root), str(vae), tmp_path / "b", split="test", **options)
    with pytest.raises(
        ValueError, match=r"label_column = 'x': .* has pictures in folders, not in columns; leave it out"
    ):
        tool.encode_images(str(root), str(vae), tmp_path / "b", label_column="x", **options)
    with pytest.raises(ValueError, match=r"num_classes = 3: .* has 2 classes"):
        tool.encode_images(str(root), str(vae), tmp_path / "b", num_classes=3, **options)


def adm_crop(picture: Image.Image, size: int) -> np.ndarray:
    """As in the code of ADM and DiT, word for word in what it does, as a second opinion."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)  # type: ignore[arg-type]
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC)  # type: ignore
    array = np.array(picture)
    crop_y = (array.shape[0] - size) // 2
    crop_x = (array.shape[1] - size) // 2
    return array[crop_y : crop_y + size, crop_x : crop_x + size]


@pytest.mark.parametrize("size", SIZES)
def test_center_crop(size: tuple[int, int]) -> None:
    picture = image(*size, 0)
    got = np.asarray(tool.center_crop(picture, 16))
    assert got.shape == (16, 16, 3)
    assert np.array_equal(got, adm_crop(picture, 16))


def test_grey_images_and_plain_columns(vae: Path, tmp_path: Path) -> None:
    grey = image(16, 16, 0).convert("L")
    (tmp_path / "plain").mkdir()
    for name, column in (("struct", [{"bytes": png(grey), "path": "x"}] * 2), ("binary", [png(grey)] * 2)):
        pq.write_table(pa.table({"photo": pa.array(column), "kind": [3, 0]}), tmp_path / "plain" / f"{name}.parquet")
        data = tool.encode_images(
            str(tmp_path / "plain"),
            str(vae),
            tmp_path / "out",
            split=name,
            size=16,
            image_column="photo",
            label_column="kind",
            num_classes=4,
            device="cpu",
        )
        assert data.class_names == ("0", "1", "2", "3")
        assert data.labels.tolist() == [3, 0]
        assert torch.equal(data.mean[0][0], data.mean[0][1])


def good() -> list[bytes | None]:
    return [png(image(16, 16, seed)) for seed in range(3)]


@pytest.mark.parametrize(
    ("encoded", "labels", "label_feature", "message"),
    [
        (lambda: [], [], None, "there are no rows"),
        (good, [0, 1, 3], datasets.Value("int64"), "row 2: label 3 in 'label': must be from 0 to 2"),
        (good, [0, 1, -1], None, "row 2: label -1 in 'label'"),
        (good, [0, None, 1], None, "row 1: no label in 'label'"),
        (good, [0.0, 1.0, 2.0], datasets.Value("float32"), "has type float32: must be integers"),
        (lambda: [*good()[:2], b"not an image"], [0, 1, 2], None, r"row 2: cannot decode the image \(12 bytes\)"),
        (lambda: [*good()[:2], None], [0, 1, 2], None, "row 2: no image bytes"),
    ],
)
def test_tool_refuses_bad_rows(
    vae: Path, tmp_path: Path, encoded: Any, labels: list[Any], label_feature: Any, message: str
) -> None:
    write(tmp_path / "bad" / "train.parquet", encoded(), labels, label_feature)
    classes = 3 if isinstance(label_feature, datasets.Value) else None
    with pytest.raises(ValueError, match=message):
        tool.encode_images(
            str(tmp_path / "bad"), str(vae), tmp_path / "out", size=16, batch_size=1, num_classes=classes, shard_rows=1
        )
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--split", "valid"], r"no file in .* matches 'valid\*.parquet'; the folder holds \['train-0.parquet'"),
        (["--split", "../x"], "split = '../x'"),
        (["--size", "15"], "size = 15: must be a multiple of 2"),
        (["--size", "0"], "size = 0: must be at least 1"),
        (["--workers", "0"], "workers = 0: must be at least 1"),
        (["--limit", "0"], "limit = 0: must be at least 1"),
        (["--check", "-1"], "--check -1: must be at least 0"),
        (["--statistics", "mine"], r"invalid choice: 'mine' \(choose from 'auto', 'config', 'measured'\)"),
        (["--num-classes", "5"], "num_classes = 5: column 'label' has 3 classes"),
        (["--image-column", "img"], r"image_column = 'img': must be one of \['image', 'label'\]"),
        (["--image-column", "label"], "image column 'label' has type int64: must be struct<bytes"),
        (["--label-column", "kind"], "label_column = 'kind'"),
        (["--device", "abacus"], "device = 'abacus'"),
        (["--source", "./nothing"], "source = './nothing': no such folder"),
        (["--vae", "./nothing"], "vae = ./nothing: no such folder here"),
    ],
)
def test_tool_refuses_bad_arguments(
    pets: Path, vae: Path, tmp_path: Path, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments(pets, vae, tmp_path / "out", *changes))
    except SystemExit as stopped:  # of the parser
        status = int(stopped.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_encoder_that_fails_midway(pets: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = autoencoder.ImageAutoencoder.encode, []

    def failing(*args: Any) -> Any:
        calls.append("batch")
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(autoencoder.ImageAutoencoder, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        tool.encode_images(str(pets), str(vae), tmp_path / "out", size=16, batch_size=3, shard_rows=2, device="cpu")
    assert len(calls) == 3
    assert not list((tmp_path / "out").iterdir())


def test_autoencoder_files(vae: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    UNet2DModel(block_out_channels=(8,), **blocks).save_pretrained(tmp_path / "unet")
    with pytest.raises(
        ValueError, match=r"unet': not an autoencoder of diffusers: its config names the class UNet2DModel"
    ):
        autoencoder.load_vae(str(tmp_path / "unet"), CPU)
    # Weights that are missing would otherwise be random ones.
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    del weights["encoder.conv_out.bias"]
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "config.json").write_text((vae / "config.json").read_text())
    save_file(weights, partial / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its file lacks \['encoder.conv_out.bias'\]"):
        autoencoder.load_vae(str(partial), CPU)


def test_damaged_parquet(pets: Path, vae: Path, tmp_path: Path) -> None:
    (pets / "train-2.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"train-2.parquet is not parquet, or is damaged"):
        tool.encode_images(str(pets), str(vae), tmp_path / "out", size=16)


def test_hub_name_is_streamed(pets: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = datasets.load_dataset, []

    def hub(name: str, **options: Any) -> Any:
        calls.append((name, options))
        if options["split"] != "train":
            raise ValueError(f'Bad split: {options["split"]}. Available splits: ["train"]')
        if name != "someone/pets":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return real("parquet", data_files=str(pets / "train-0.parquet"), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_: None)
    options: dict[str, Any] = {"size": 16, "device": "cpu"}
    data = tool.encode_images("someone/pets", str(vae), tmp_path / "out", **options)
    assert data.labels.tolist() == [0, 1, 2, 0]
    assert calls == [("someone/pets", {"split": "train", "streaming": True})]
    with pytest.raises(ValueError, match=r"'someone/pets', split = 'val': Bad split.*\[\"train\"\]"):
        tool.encode_images("someone/pets", str(vae), tmp_path / "out", split="val", **options)
    with pytest.raises(FileNotFoundError, match=r"source = 'someone/absent': no local folder .* and the hub gave"):
        tool.encode_images("someone/absent", str(vae), tmp_path / "out", **options)


def test_a_hub_that_cannot_be_reached_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder's name with a mistake: the library asks for a data set of that name for half a minute, and says so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    closed = "http://127.0.0.1:9"
    for module, name in ((huggingface_hub.constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(module, name, closed)
    with pytest.raises(FileNotFoundError) as error:
        tool.encode_images("nosuch", "vae", tmp_path / "out")
    assert re.fullmatch(
        rf"source = 'nosuch': no local folder of that name, and the hub gave no such data set \(nosuch: the hub at "
        rf"{closed} cannot be reached .*\); check the name, or download its parquet files and give their folder",
        str(error.value),
    )
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]


def test_images_keep_their_proportions_in_buckets(vae: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 40), (24, 40), (40, 40), (41, 22), (25, 41)]):
        folder = tmp_path / "photos" / "cats"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    options: dict[str, Any] = {"size": 16, "bucket_step": 4, "batch_size": 2, "device": "cpu"}
    data = tool.encode_images(str(tmp_path / "photos"), str(vae), tmp_path / "out", **options)
    assert data.groups is not None
    assert sorted((tuple(mean.shape[2:]), len(mean)) for mean in data.mean) == [((6, 10), 2), ((8, 8), 2), ((10, 6), 1)]
    with pytest.raises(ValueError, match=r"bucket_step = 3: must be a multiple of 2"):
        tool.encode_images(str(tmp_path / "photos"), str(vae), tmp_path / "other", **(options | {"bucket_step": 3}))
