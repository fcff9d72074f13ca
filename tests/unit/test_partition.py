"""The one road from level to block, and the layers that go with it."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionblocks import EDM, FlowMatching, NoiseProcess, Partition

NOISE = EDM()
STRATEGIES = ("equi-probability", "log-uniform", "uniform")


def build(blocks: int, strategy: str = "equi-probability", **kwargs: object) -> Partition:
    return Partition.build(NOISE, num_layers=blocks, num_blocks=blocks, strategy=strategy, **kwargs)  # type: ignore[arg-type]


def test_block_0_owns_the_highest_noise_and_the_last_block_the_lowest() -> None:
    partition = build(3)
    assert partition.block_of(80.0) == 0
    assert partition.block_of(0.002) == 2
    assert partition.interval(0) == (pytest.approx(0.505, abs=1e-3), 80.0)
    assert partition.interval(2) == (0.002, pytest.approx(0.180, abs=1e-3))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("blocks", range(1, 13))
def test_a_boundary_belongs_to_the_block_below_it(blocks: int, strategy: str) -> None:
    partition = build(blocks, strategy)
    for b in range(blocks):
        low, high = partition.interval(b)
        assert partition.block_of(high) == b
        assert partition.block_of(low) == min(b + 1, blocks - 1)  # sigma_min belongs to the last block
        assert partition.block_of(low * (1 + 1e-4)) == b
        assert partition.block_of((low * high) ** 0.5) == b


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("blocks", range(1, 13))
def test_float32_copies_of_boundaries_route_as_the_boundaries(blocks: int, strategy: str) -> None:
    partition = build(blocks, strategy)
    exact = torch.tensor(partition.boundaries, dtype=torch.float64)
    below, above = exact.float(), exact.float()
    below = torch.nextafter(below, torch.zeros(()))
    above = torch.nextafter(above, torch.full((), 1e9))
    expected = partition.block_of(exact)
    for copy in (exact.float(), below, above):
        assert torch.equal(partition.block_of(copy), expected)


@pytest.mark.parametrize("blocks", range(1, 13))
def test_a_chain_of_b_steps_visits_the_blocks_in_order(blocks: int) -> None:
    """The seam that re-implementations got wrong: levels of the sampler against owners of the trainer."""
    partition = build(blocks)
    levels = NOISE.levels(blocks)[:-1]
    assert [partition.block_of(level) for level in levels] == list(range(blocks))
    assert partition.block_of(torch.tensor(levels, dtype=torch.float32)).tolist() == list(range(blocks))


@pytest.mark.parametrize("blocks", range(1, 9))
@pytest.mark.parametrize("per_block", [2, 3, 7])
def test_a_chain_of_several_steps_a_block_visits_each_block_as_often(blocks: int, per_block: int) -> None:
    visited = [build(blocks).block_of(level) for level in NOISE.levels(blocks * per_block)[:-1]]
    assert visited == [b for b in range(blocks) for _ in range(per_block)]


@given(
    st.integers(1, 12),
    st.sampled_from(STRATEGIES),
    st.lists(st.floats(0.002, 80.0), min_size=1, max_size=20),
)
def test_block_of_is_membership_in_the_interval(blocks: int, strategy: str, levels: list[float]) -> None:
    partition = build(blocks, strategy)
    inner = [s for s in levels if all(abs(s / edge - 1) > 1e-5 for edge in partition.boundaries)]
    for level in inner:
        owners = [b for b in range(blocks) if partition.interval(b)[0] < level <= partition.interval(b)[1]]
        assert owners == [partition.block_of(level)]
    as_tensor = partition.block_of(torch.tensor(levels, dtype=torch.float64))
    assert as_tensor.tolist() == [partition.block_of(level) for level in levels]


@pytest.mark.parametrize("blocks", range(1, 9))
def test_levels_drawn_for_a_block_without_overlap_are_routed_to_it(blocks: int) -> None:
    partition = build(blocks)
    for b in range(blocks):
        levels = NOISE.sample(2000, partition.training_interval(b), generator=torch.Generator().manual_seed(b))
        owners = partition.block_of(levels)
        # The lower end itself, of measure zero, is the only level that may go to the neighbour.
        assert (owners == b).float().mean().item() > 0.999


def test_block_of_keeps_the_shape_and_is_an_index() -> None:
    partition = build(3)
    owners = partition.block_of(torch.tensor([[80.0, 0.3], [0.01, 0.6]]))
    assert owners.tolist() == [[0, 1], [2, 0]]
    assert owners.dtype == torch.int64
    assert type(partition.block_of(1.0)) is int
    assert partition.block_of(torch.empty(0)).shape == (0,)
    assert partition.block_of(torch.tensor(80)).item() == 0  # integers are levels too


@pytest.mark.parametrize("blocks", range(1, 13))
def test_equal_mass_of_blocks(blocks: int) -> None:
    masses = NOISE.cdf(torch.tensor(build(blocks).boundaries, dtype=torch.float64)).diff()
    torch.testing.assert_close(masses, torch.full_like(masses, 1 / blocks), rtol=0, atol=1e-10)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.sampled_from(STRATEGIES))
def test_explicit_layer_counts_tile_the_network(layers: list[int], strategy: str) -> None:
    partition = Partition.build(NOISE, sum(layers), len(layers), layers=layers, strategy=strategy)
    assert partition.layers == tuple(layers)
    assert (partition.num_blocks, partition.num_layers) == (len(layers), sum(layers))
    owned = [i for b in range(len(layers)) for i in partition.layer_range(b)]
    assert owned == list(range(sum(layers)))
    assert [len(partition.layer_range(b)) for b in range(len(layers))] == layers


@pytest.mark.parametrize(("layers", "blocks"), [(12, 1), (12, 3), (12, 12), (24, 4)])
def test_even_split(layers: int, blocks: int) -> None:
    assert Partition.build(NOISE, layers, blocks).layers == (layers // blocks,) * blocks


@pytest.mark.parametrize("overlap", [0.0, 0.05, 0.1, 0.5])
def test_training_intervals_are_the_widened_intervals_of_the_same_block(overlap: float) -> None:
    partition = build(4, overlap=overlap)
    for b in range(4):
        assert partition.training_interval(b) == NOISE.widen(partition.interval(b), overlap)
    for upper, lower in itertools.pairwise(range(4)):
        meet = partition.training_interval(lower)[1] - partition.training_interval(upper)[0]
        assert (meet > 0) if overlap else (meet == 0)


def test_overlap_does_not_change_inference() -> None:
    assert build(4, overlap=0.3).boundaries == build(4).boundaries
    assert [build(4, overlap=0.3).interval(b) for b in range(4)] == [build(4).interval(b) for b in range(4)]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.sampled_from(STRATEGIES), st.floats(0.0, 0.9))
def test_json_round_trip_is_exact(layers: list[int], strategy: str, overlap: float) -> None:
    partition = Partition.build(NOISE, sum(layers), len(layers), layers=layers, strategy=strategy, overlap=overlap)
    assert Partition.from_dict(json.loads(json.dumps(partition.to_dict()))) == partition


def test_one_block_owns_everything() -> None:
    partition = build(1, overlap=0.05)
    assert partition.interval(0) == partition.training_interval(0) == (0.002, 80.0)
    assert partition.block_of(torch.tensor([0.002, 0.5, 80.0])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("noise", [FlowMatching(mean=15.0), FlowMatching(mean=40.0), EDM(p_std=1e-7)], ids=str)
def test_boundaries_that_count_as_one_level_are_refused(noise: NoiseProcess) -> None:
    with pytest.raises(ValueError, match=r"must ascend, each by more than a share of 1e-06.* a wider distribution"):
        Partition.build(noise, num_layers=3, num_blocks=3)
    Partition.build(noise, num_layers=3, num_blocks=1)
