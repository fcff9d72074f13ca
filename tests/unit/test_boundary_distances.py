"""Boundaries: distances of neighbours whose velocities are known, and samples with the boundary moved."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.evaluation.boundary_distances import boundary_distances, moved_boundaries
from diffusionblocks.models import DiT

VELOCITIES = (0.5, -0.3, 0.2)  # of each block, the same everywhere
SHIFT = 3.0
STEPS = 40


def tiny() -> DiT:
    sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "mlp_ratio": 1.0}
    return DiT(**sizes, num_layers=1, num_attention_heads=2, num_classes=0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> db.DiffusionBlocks:
    """Three experts, each of which answers with one velocity."""
    noise = db.FlowMatching(shift=SHIFT)
    blocks = db.convert(tiny(), db.BlocksConfig(num_blocks=3, split="experts", noise=noise))
    for block, velocity in zip(blocks.blocks, VELOCITIES, strict=True):
        last = block.network.get_submodule("final_layer.linear")
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.constant_(last.bias, velocity)
    return blocks


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(n, 1, 4, 4, generator=generator)} for n in (5, 3)]


def relative(one: Tensor, other: Tensor) -> float:
    return float(((one - other).square().sum() / ((one.square().sum() + other.square().sum()) / 2)).sqrt())


def test_distances_of_known_velocities(model: db.DiffusionBlocks) -> None:
    rows = boundary_distances(model, batches())
    assert [(row.above, row.below, row.examples) for row in rows] == [(0, 1, 8), (1, 2, 8)]
    assert [row.level for row in rows] == list(model.partition.boundaries[2:0:-1])
    eps = torch.Generator().manual_seed(0)
    noised = [(batch["pixel_values"], torch.randn(batch["pixel_values"].shape, generator=eps)) for batch in batches()]
    for row in rows:
        upper, lower = VELOCITIES[row.above], VELOCITIES[row.below]
        assert row.velocity == pytest.approx(abs(upper - lower) / math.sqrt((upper**2 + lower**2) / 2), rel=1e-5)
        time = SHIFT * row.level / (1 + (SHIFT - 1) * row.level)
        z = torch.cat([(1 - time) * y + time * noise for y, noise in noised])
        assert row.denoised == pytest.approx(relative(z - time * upper, z - time * lower), rel=1e-5)


def test_neighbours_that_are_the_same_do_not_differ(model: db.DiffusionBlocks) -> None:
    same = db.convert(tiny(), model.blocks_config)
    for row in boundary_distances(same, batches()):
        assert (row.velocity, row.denoised) == (0, 0)


def test_moved_boundaries_change_what_the_calls_that_move_change(model: db.DiffusionBlocks) -> None:
    called = model.noise.sampling_levels(STEPS)[:-1]  # type: ignore[attr-defined]
    asked: Counter[int] = Counter()
    hooks = [block.register_forward_pre_hook(lambda b, _: asked.update([b.index])) for block in model.blocks]  # type: ignore[misc]
    counts: list[Counter[int]] = []

    def draw(view: db.DiffusionBlocks) -> Tensor:
        asked.clear()
        images = view.sample(seeds=[0, 1], steps=STEPS)
        counts.append(Counter(asked))
        return images

    results = list(moved_boundaries(model, draw, called, (-0.10, 0.0, 0.10)))
    for hook in hooks:
        hook.remove()
    assert [(row.boundary, row.share) for row, _ in results] == [
        (boundary, share) for boundary in model.partition.boundaries[2:0:-1] for share in (-0.10, 0.0, 0.10)
    ]
    unmoved, moved_counts = counts[0], iter(counts[1:])
    times = [SHIFT * level / (1 + (SHIFT - 1) * level) for level in [*called, 0.0]]
    images = results[1][1]
    for row, others in results:
        if row.share == 0:
            assert (row.calls, row.change) == (0, 0)
            continue
        assert sum((unmoved - next(moved_counts)).values()) == row.calls > 0, "as counted at the blocks"
        above = [row.boundary, row.level]
        steps = [i for i, level in enumerate(called) if min(above) < level <= max(above)]
        assert len(steps) == row.calls
        upper = model.partition.block_of(row.boundary * 1.01)
        difference = VELOCITIES[upper] - VELOCITIES[upper + 1]
        expected = sum(times[i] - times[i + 1] for i in steps) * difference * (1 if row.share > 0 else -1)
        torch.testing.assert_close(others - images, torch.full_like(images, expected))
        assert row.change == pytest.approx(abs(expected) / float(images.square().mean().sqrt()), rel=1e-5)


def test_a_view_shares_weights_and_leaves_the_model_as_it_is(model: db.DiffusionBlocks) -> None:
    before = model.partition
    view = model.with_boundaries([0.3, 0.6])
    assert view.partition.boundaries == (0.0, 0.3, 0.6, 1.0)
    assert view.partition.training_intervals == before.training_intervals, "as they were trained"
    assert view.blocks_config.boundaries == (0.3, 0.6)
    assert model.partition is before
    assert view.block(0) is model.block(0)


def test_places_that_are_none_are_left_out(model: db.DiffusionBlocks) -> None:
    results = list(moved_boundaries(model, lambda view: view.sample(seeds=[0], steps=4), [1.0], (-0.9, 0.0, 5.0)))
    assert [row.share for row, _ in results] == [0.0, -0.9, 0.0]


@pytest.mark.parametrize(
    ("values", "says"),
    [([0.5], "3 blocks have 2 between them"), ([0.6, 0.3], "must ascend"), ([0.3, 1.5], "between the levels 0 and 1")],
)
def test_other_boundaries_are_refused(model: db.DiffusionBlocks, values: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model.with_boundaries(values)


def test_models_without_boundaries_are_refused(model: db.DiffusionBlocks) -> None:
    one = db.convert(tiny(), db.BlocksConfig(num_blocks=1, noise=model.noise))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"this model has one; give one of several blocks"):
        boundary_distances(one, batches())
    with pytest.raises(ValueError, match="the batches are empty"):
        boundary_distances(model, [])
