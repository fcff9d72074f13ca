"""Latents of several sizes: a step is of one size, in an order keyed as ever, and runs resume exactly."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import TINY
from helpers import run_like_torchrun
from safetensors.torch import load_file
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.common.messages import report_errors
from diffusionblocks.data import LatentBatches, latent_folder
from diffusionblocks.data.latent_data import LatentScale
from diffusionblocks.data.latent_shards import Prompts, write_shards
from diffusionblocks.experiments import parallel, run
from diffusionblocks.experiments.boundaries import place_boundaries, read_boundaries
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.preflight import check_disk
from diffusionblocks.experiments.recipe import parse_recipe
from diffusionblocks.noise import path_time
from diffusionblocks.training.data_order import DataOrder

CPU = torch.device("cpu")
KIND = "SD3Transformer2DModel"
SIZES = {(8, 8): 10, (4, 8): 7, (8, 4): 3}  # and how many have it


def rows_of(sizes: dict[tuple[int, int], int]) -> list[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    rows = []
    for (height, width), count in sizes.items():
        mean = torch.randn(count, 4, height, width, generator=random)
        states = {
            "encoder_hidden_states": torch.randn(count, 5, 24, generator=random),
            "pooled_projections": torch.randn(count, 20, generator=random),
        }
        rows.append((mean, torch.full_like(mean, 0.1), torch.zeros(count, dtype=torch.int64), states))
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty latents with prompts, of three sizes."""
    empty = {"encoder_hidden_states": torch.zeros(5, 24), "pooled_projections": torch.zeros(20)}
    options: dict[str, Any] = {"shard_rows": 4, "class_names": ["image"], "vae": "vae", "scale": LatentScale(1.0)}
    write_shards(tmp_path, "train", rows_of(SIZES), **options, prompts=Prompts("encoder", None, empty))
    return tmp_path


def recipe(folder: Path, **changes: Any) -> Experiment:
    values: dict[str, Any] = {
        "name": "sizes",
        "device": "cpu",
        "model": {"type": KIND, "config": {**TINY[KIND].config}},
        "blocks": {"num_blocks": 2, "noise": {"kind": "flow"}},
        "data": {"kind": "latents", "source": str(folder), "scale": 1.0},
        "train": {"steps": 9, "batch_size": 2, "accumulation": 2, "lr": 1e-3},
        "evaluate": {"features": None, "grid": ["uniform"], "steps": [2], "samples": 4},
    }
    for name, more in changes.items():
        values[name] = values.get(name, {}) | more
    return Experiment(parse_recipe(values, "test"))


def test_shards_have_one_size_each(folder: Path) -> None:
    data = latent_folder(folder)
    assert len(data) == 20
    assert {tuple(mean.shape[2:]): 0 for mean in data.mean}.keys() == SIZES.keys()
    assert data.groups is not None
    assert data.groups.bincount().tolist() == list(SIZES.values())
    first = torch.cat([mean for mean in data.mean if mean.shape[2:] == (4, 8)])
    torch.testing.assert_close(first, rows_of(SIZES)[1][0].half())
    with pytest.raises(ValueError, match=r"rows of several sizes, \[\(4, 4, 8\), \(4, 8, 8\)\], cannot be one batch"):
        data.rows("mean", torch.tensor([0, 9]))
    part = data.part(5)
    assert len(part) == 5
    batches = [len(rows) for rows in data.batches_in_order(4)]
    assert batches == [4, 4, 2, 4, 3, 3]


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (3, 1), (5, 1)])
def test_a_step_is_of_one_group_and_an_epoch_has_as_many_steps_as_ever(size: int, accumulation: int) -> None:
    groups = torch.tensor([g for g, count in enumerate(SIZES.values()) for _ in range(count)])
    order = DataOrder(20, size, accumulation, 0, CPU, groups)
    assert order.steps_per_epoch == 20 // (size * accumulation)
    seen: Counter[int] = Counter()
    epochs = 300
    for step in range(epochs * order.steps_per_epoch):
        indices = order(1, step)
        assert indices.shape == (accumulation, size)
        assert len(groups[indices].unique()) == 1
        seen.update(groups[indices].flatten().tolist())
    total = sum(seen.values())
    for group, count in enumerate(SIZES.values()):
        assert seen[group] / total == pytest.approx(count / 20, abs=0.02), (
            "groups are met as often as they have examples"
        )


def test_the_order_is_keyed_by_seed_unit_and_step() -> None:
    groups = torch.arange(20) % 3
    first, again = (DataOrder(20, 4, 1, 0, CPU, groups) for _ in range(2))
    later = [again(1, step) for step in (13, 2, 7)]  # in another order of steps
    assert all(torch.equal(first(1, step), indices) for step, indices in zip((13, 2, 7), later, strict=True))
    assert not torch.equal(first(0, 2), later[1])
    plain, one = DataOrder(20, 4, 1, 0, CPU), DataOrder(20, 4, 1, 0, CPU, None)
    assert torch.equal(plain(0, 3), one(0, 3))


def weights(experiment: Experiment, folder: Path, *stops: int) -> list[Tensor]:
    trainer = None
    for stop in stops:
        trainer = experiment.trainer(folder, progress=False)
        trainer.train(until=stop)
    assert trainer is not None
    return [tensor.clone() for tensor in trainer.model.state_dict().values()]


def test_a_run_on_several_sizes_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    experiment = recipe(folder)
    batches = experiment.batches()
    assert {tuple(batches(torch.tensor([i]), None)["pixel_values"].shape[2:]) for i in (0, 9, 19)} == SIZES.keys()
    whole = weights(experiment, tmp_path / "whole", 18)
    parts = weights(experiment, tmp_path / "parts", 5, 11, 18)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_what_latents_of_several_sizes_cannot_do_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"gathered on the host: set data\.placement to auto"):
        LatentBatches(latent_folder(folder), device=CPU, placement="device")
    LatentBatches(latent_folder(folder), device=CPU, placement="auto")
    with pytest.raises(ValueError, match=r"captures steps of one size, .*: set train\.cuda_graph to false"):
        recipe(folder, train={"cuda_graph": True}).trainer()
    recipe(folder, train={"cuda_graph": False}).trainer()
    measured = {"features": "efficientnet-lite0"}
    experiment = recipe(folder, evaluate=measured)
    experiment.data("train")
    with pytest.raises(ValueError, match=r"compares images of one size, .*: set evaluate\.features to null"):
        experiment.task.check(experiment, experiment.outline)


@pytest.mark.parametrize("partition", ["loss", "acceleration", "energy"])
def test_boundaries_are_measured_over_all_sizes_each_with_its_shift(
    partition: str, folder: Path, tmp_path: Path
) -> None:
    noise = {"kind": "flow", "base_shift": 0.5, "max_shift": 2.0, "base_image_seq_len": 4, "max_image_seq_len": 16}
    kind = "QwenImageTransformer2DModel"  # its layers are alike, so it has a trunk
    changes = {"blocks": {"noise": noise, "partition": partition}, "trunk": {"steps": 2}}
    changes["model"] = {"type": kind, "config": {**TINY[kind].config}}
    experiment = recipe(folder, **changes, monitor={"levels": 6, "examples": 20, "batch_size": 4})
    run.train_before_blocks(experiment, tmp_path, progress=False)
    placed = place_boundaries(experiment, tmp_path)
    result = read_boundaries(experiment, tmp_path)
    assert result is not None
    (boundary,) = placed.recipe.blocks.boundaries or ()
    assert 0 < boundary < 1
    if partition == "loss":
        return
    tokens = {16: 10, 8: 10}  # 2 x 2 latents a token, and how many examples have so many
    process = db.FlowMatching(**{name: value for name, value in noise.items() if name != "kind"})  # type: ignore[arg-type]
    for level, time in zip(result.levels, result.times, strict=True):
        each = {count: path_time(process.for_tokens(count), level) for count in tokens}
        assert time == pytest.approx(sum(tokens[count] * each[count] for count in tokens) / 20, abs=1e-9)
        assert level in (0.0, 1.0) or len({*each.values()}) == 2, "sizes differ"


@pytest.mark.parametrize(
    ("blocks", "train"),
    [
        ({"split": "experts", "lora": {"rank": 2}}, {"blocks": [1]}),  # with all of the fixed weights
        ({"split": "experts", "lora": {"rank": 2}}, {"ema_decay": 0.9}),
        ({"split": "experts", "lora": {"rank": 2, "base": "int8"}}, {"blocks": [0]}),
        ({}, {"blocks": [1], "snapshot_every": 3}),
        ({"shared": "joint"}, {"ema_decay": 0.9}),
    ],
    ids=str,
)
def test_the_disk_is_checked_for_what_a_run_writes(
    blocks: dict[str, Any], train: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    once = {"steps": 6, "checkpoint_every": None, "checkpoint_seconds": None}  # one checkpoint, at the end
    experiment = recipe(folder, blocks=blocks, train=once | train)
    out = tmp_path / "run"
    with torch.random.fork_rng():
        run.train(experiment, out, progress=False, measure=False)
    files = list(out.rglob("*.safetensors"))
    written = sum(file.stat().st_size for file in files)
    heads = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)  # names and shapes
    for place in ("checkpoints", "snapshots"):
        shutil.rmtree(out / place, ignore_errors=True)  # else they are there already
    check_disk(experiment, out, free=written)
    with pytest.raises(ValueError, match=r"its disk has [\d.]+ free: make room"):
        check_disk(experiment, out, free=int(0.97 * (written - heads)))


def test_two_ranks_of_a_block_train_on_several_sizes_as_one_process_does(folder: Path, tmp_path: Path) -> None:
    """Each micro-batch of a step is of one size, and each rank computes its rows of it: two and one of three."""
    steps, block = 5, 1
    experiment = recipe(folder, train={"steps": steps, "batch_size": 3, "lr": 1e-4, "blocks": [block]})
    order, data = experiment.trainer(progress=False).order, latent_folder(folder)
    assert data.groups is not None
    sizes = [data.groups[order(block, step)] for step in range(steps)]
    assert len({int(size[0, 0]) for size in sizes}) > 1
    assert all(size.shape == (2, 3) and len(size.unique()) == 1 for size in sizes)

    ranks, alone = tmp_path / "ranks", tmp_path / "alone"
    run_like_torchrun(
        lambda _: report_errors(lambda: parallel.train(experiment, ranks, progress=False) and None), tmp_path, ranks=2
    )
    run.train(experiment, alone, progress=False)
    ours, its = (next((place / "model").rglob("*01*.safetensors")) for place in (ranks, alone))
    weights, expected = load_file(ours), load_file(its)
    assert weights.keys() == expected.keys() != set()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
