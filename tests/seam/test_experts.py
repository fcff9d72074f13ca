"""Experts: each block is the whole model, for its own levels; and boundaries that are given."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import batch_for, tiny_diffuser, velocity
from helpers import convert, image_batch, same_states, seeded, tiny
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.core.materialise import build
from diffusionblocks.core.merging import merge
from diffusionblocks.core.weights import Fresh

FLUX = "FluxTransformer2DModel"
CONFIG = db.BlocksConfig(num_blocks=2, split="experts")


def test_experts_start_as_the_model_each_and_train_apart() -> None:
    original = tiny_diffuser(FLUX)
    model = db.convert(original, CONFIG)
    whole = db.convert(original, db.BlocksConfig(num_blocks=1)).eval()
    assert [len(block.layer_paths) for block in model.blocks] == [4, 4]
    assert model.partition.num_layers == 4
    for block in model.blocks:
        assert same_states(block.network.state_dict(), original.state_dict())
    batch = batch_for(model, FLUX)
    told = {name: value for name, value in batch.items() if name != "pixel_values"}
    options: dict[str, Any] = {"seeds": [1, 2], "steps": 4, "inputs": told, "sizes": (8, 8)}
    assert torch.equal(model.sample(**options), whole.sample(**options))
    model.loss(batch, block=1, generator=seeded()).mean().backward()
    assert all(p.grad is None for p in model.block(0).parameters())
    torch.optim.SGD(model.block(1).parameters(), lr=0.1).step()
    assert same_states(model.block(0).network.state_dict(), original.state_dict())
    assert not torch.equal(model.sample(**options), whole.sample(**options))


@pytest.mark.parametrize("family", ["dit", "vit"])
def test_experts_of_other_families(family: str) -> None:
    model = convert(family, num_blocks=2, split="experts")
    assert [len(block.layers()) for block in model.blocks] == [3, 3]
    for b in range(2):
        model.zero_grad()
        model.loss(image_batch(), block=b, generator=seeded()).mean().backward()
        assert all(
            (p.grad is not None) == (i == b)
            for i in range(2)
            for p in list(model.block(i).layers()[-1].parameters())[:1]
        )


def test_experts_are_saved_merged_and_exported(tmp_path: Path) -> None:
    original = tiny_diffuser(FLUX)
    model = db.convert(original, CONFIG).eval()
    with torch.no_grad():
        for p in model.block(1).parameters():
            p.mul_(1.1)
    for b in range(2):
        model.save_pretrained(tmp_path / f"part{b}", blocks=[b])
    merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "whole")
    loaded = db.load(tmp_path / "whole")
    assert loaded.partition == model.partition
    assert same_states(loaded.state_dict(), model.state_dict())
    for b in range(2):
        exported = model.export_block(b)
        assert type(exported) is type(original)
        assert same_states(exported.state_dict(), model.block(b).network.state_dict())
    with pytest.raises(ValueError, match=r"each of the 2 blocks is a whole FluxTransformer2DModel .* export_block"):
        model.export_initialisation()


def test_experts_are_built_one_by_one_and_start_alike() -> None:
    config = tiny_diffuser(FLUX).config
    model = build(Fresh(FLUX, config, seed=3), CONFIG)
    assert same_states(model.block(0).network.state_dict(), model.block(1).network.state_dict())
    one = build(Fresh(FLUX, config, seed=3), CONFIG, blocks=[1])
    assert same_states(one.block(1).state_dict(), model.block(1).state_dict())
    pointers = [{p.data_ptr() for p in block.parameters()} for block in model.blocks]
    assert not pointers[0] & pointers[1]


@pytest.mark.parametrize("name", [FLUX, "WanTransformer3DModel"])
def test_a_trunk_branches_into_experts(name: str) -> None:
    trunk = db.convert(tiny_diffuser(name), db.BlocksConfig(num_blocks=1))
    model = db.branch(trunk, 3, split="experts", boundaries=(0.2, 0.6), overlap=0.0)
    assert model.partition.boundaries == (0.0, 0.2, 0.6, 1.0)
    assert model.partition.training_intervals == ((0.6, 1.0), (0.2, 0.6), (0.0, 0.2))
    for block in model.blocks:
        assert same_states(block.network.state_dict(), trunk.block(0).network.state_dict())


def test_layers_are_as_ever_and_older_indices_mean_layers() -> None:
    partition = convert("dit").partition
    values = partition.to_dict()
    assert "split" not in values
    assert db.Partition.from_dict(values) == partition
    assert [*partition.layer_range(1)] == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "experts", "layers": (1, 2)}, "with split = experts each block has all layers"),
        ({"split": "halves"}, "layers"),
        ({"boundaries": (0.5, 0.6)}, "2 blocks have 1 between them; give as many, or set num_blocks to 3"),
        ({"num_blocks": 3, "layers": (1, 1, 2), "boundaries": (0.6, 0.5)}, r"\[0.6, 0.5\] must ascend"),
        ({"boundaries": (200.0,)}, "must lie between the levels 0.002 and 80"),
        ({"boundaries": (80.0,)}, "must lie between the levels"),
    ],
)
def test_other_splits_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        db.convert(tiny("dit", layers=4), db.BlocksConfig(**({"num_blocks": 2} | changes)))


# ---- the two experts of Wan 2.2 --------------------------------------------------------------------------------


def test_unshifted_is_the_inverse_of_shifted() -> None:
    noise = db.FlowMatching(shift=5.0)
    for level in (0.0, 0.1, 0.5, 0.99, 1.0):
        shifted: Tensor = noise.shifted(torch.tensor(level, dtype=torch.float64))
        assert noise.unshifted(shifted.item()) == pytest.approx(level, abs=1e-15)
    with pytest.raises(ValueError, match=r"must be in .0, 1., got 1.5"):
        noise.unshifted(1.5)


def test_a_pair_samples_as_the_two_models_take_turns() -> None:
    name, ratio, steps = "WanTransformer3DModel", 0.875, 6
    pair = [tiny_diffuser(name, seed=seed) for seed in (0, 1)]
    noise = db.FlowMatching(shift=3.0)
    boundaries = (noise.unshifted(ratio),)
    config = db.BlocksConfig(num_blocks=2, split="experts", noise=noise, boundaries=boundaries, overlap=0.0)
    model = db.convert(pair[0], config).eval()
    model.block(1).network.load_state_dict(pair[1].state_dict())
    told = {n: v for n, v in batch_for(model, name).items() if n != "pixel_values"}
    ours = model.sample(seeds=[5, 6], steps=steps, inputs=told, sizes=(3, 8, 8))
    times = [noise.shifted(torch.tensor(level, dtype=torch.float64)).item() for level in noise.sampling_levels(steps)]
    z = torch.stack([torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    for now, after in itertools.pairwise(times):
        expert = pair[0] if now >= ratio else pair[1]
        with torch.no_grad():
            z = z + (after - now) * velocity(expert, name, z, torch.full((2,), now), told)
    torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)
