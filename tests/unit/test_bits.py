"""The bound in bits: known answers of toys with exact posteriors, the sum over blocks, streaming moments."""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks.core.partition import Partition
from diffusionblocks.evaluation.bits import Moments, bits_per_character, interval_nll, masked_nll
from diffusionblocks.noise import Masking
from diffusionblocks.sampling.unmask_tokens import sample_tokens

SCHEDULES = pytest.mark.parametrize("schedule", ["linear", "cosine"])
JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.20, 0.08], [0.10, 0.05, 0.15]], dtype=torch.float64)


def entropy(p: Tensor) -> float:
    """Bits."""
    return -float((p * p.log2()).sum())


def exact_pair(z: Tensor, level: Tensor) -> Tensor:
    """Posteriors of two tokens under JOINT: the marginal, or the conditional where the other token shows."""
    first = torch.where((z[:, 1] == 3)[:, None], JOINT.sum(1), JOINT.T[z[:, 1].clamp(max=2)])
    second = torch.where((z[:, 0] == 3)[:, None], JOINT.sum(0), JOINT[z[:, 0].clamp(max=2)])
    return torch.stack([first, second], dim=1).log()


def exact_pair_at(z: Tensor, level: float) -> Tensor:
    """As `exact_pair`, for a sampler."""
    return exact_pair(z, torch.full((len(z),), level))


def pairs(n: int) -> Tensor:
    drawn = torch.multinomial(JOINT.flatten(), n, replacement=True, generator=seeded())
    return torch.stack([drawn // 3, drawn % 3], dim=1)


def batches(tokens: Tensor, size: int = 64) -> list[dict[str, Tensor]]:
    return [{"input_ids": some} for some in tokens.split(size)]


def network(vocab: int, length: int, seed: int = 0):
    """A small real network that uses its neighbours and the level."""
    torch.manual_seed(seed)
    table = torch.randn(vocab + 1, 8)
    mix, head = torch.randn(length, length) / length, torch.randn(8, vocab)
    return lambda z, t: torch.tanh(mix @ table[z] + t[:, None, None]) @ head


@SCHEDULES
@pytest.mark.parametrize("blocks", [1, 3])
def test_uniform_predictor_needs_log2_of_the_vocabulary(schedule: str, blocks: int) -> None:
    """Its expectation is exactly (1 - e) log2 27, and log2 27 with the prior term, in every block the same."""
    process = Masking(schedule=schedule)
    partition = Partition.build(process, blocks, blocks)  # type: ignore[arg-type]
    tokens = torch.randint(27, (512, 64), generator=seeded())
    bits = bits_per_character(lambda z, t: torch.zeros(*z.shape, 27), process, batches(tokens), partition)
    strict = bits.bits + process.prior_term(64) / (64 * math.log(2))
    assert strict == pytest.approx(math.log2(27), abs=4 * bits.standard_error)
    assert bits.standard_error < 0.1
    for block, error in zip(bits.block_bits, bits.block_errors, strict=True):
        assert block == pytest.approx((1 - 2e-4) * math.log2(27) / blocks, abs=4 * error)
    assert bits.bits == pytest.approx(sum(bits.block_bits) + bits.reconstruction, abs=1e-12)
    assert (bits.sequences, bits.length) == (512, 64)


@SCHEDULES
def test_uniform_predictor_exactly_when_every_mask_is_counted(schedule: str) -> None:
    """The expectation over masks in closed form: length * (1 - alpha) tokens are masked; no randomness is left."""
    process = Masking(schedule=schedule)
    level = process.sample(1000, generator=seeded())
    integral = (process.weight_by_quantile(level) * process.masked(level) * 256 * math.log(27)).mean().item()
    nats = integral + process.reconstruction(256) + process.prior_term(256)
    assert nats / (256 * math.log(2)) == pytest.approx(math.log2(27), abs=1e-12)


@SCHEDULES
def test_perfect_predictor_of_independent_tokens_gives_their_entropy(schedule: str) -> None:
    p = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    tokens = torch.multinomial(p, 2000 * 16, replacement=True, generator=seeded()).view(2000, 16)
    process = Masking(vocab_size=4, schedule=schedule, epsilon=1e-6)
    bits = bits_per_character(lambda z, t: p.log().expand(*z.shape, 4), process, batches(tokens))
    assert bits.bits == pytest.approx(entropy(p), abs=4 * bits.standard_error)
    assert bits.standard_error < 0.02


@SCHEDULES
@pytest.mark.parametrize("blocks", [1, 2])
def test_exact_posteriors_of_a_pair_give_its_entropy(schedule: str, blocks: int) -> None:
    process = Masking(vocab_size=3, schedule=schedule, epsilon=1e-6)
    partition = Partition.build(process, blocks, blocks)  # type: ignore[arg-type]
    bits = bits_per_character(exact_pair, process, batches(pairs(20_000), 1000), partition)
    assert bits.bits == pytest.approx(entropy(JOINT) / 2, abs=4 * bits.standard_error)
    assert bits.standard_error < 0.02
    # Positive control: the marginals, which ignore the other token, cost their mutual information.
    blind = bits_per_character(
        lambda z, t: torch.stack([JOINT.sum(1), JOINT.sum(0)]).log().expand(len(z), 2, 3),
        process,
        batches(pairs(20_000), 1000),
        partition,
    )
    assert blind.bits == pytest.approx(
        (entropy(JOINT.sum(0)) + entropy(JOINT.sum(1))) / 2, abs=4 * blind.standard_error
    )
    assert blind.bits - bits.bits > 0.05


@SCHEDULES
@pytest.mark.parametrize("blocks", [1, 2])
def test_the_bound_does_not_depend_on_fitted_levels(schedule: str, blocks: int) -> None:
    """Two letters that are the same: a masked one costs log 3 where the other is masked, and nothing else."""
    plain = Masking(vocab_size=3, schedule=schedule, epsilon=1e-6)
    shares = torch.linspace(0, 1, 33, dtype=torch.float64).square()  # most draws go to few masks
    process = dataclasses.replace(plain, quantiles=(0.0, *plain.icdf(shares)[1:-1].tolist(), 1.0))
    partition = Partition.build(process, blocks, blocks)  # type: ignore[arg-type]
    tokens = torch.randint(3, (20_000, 1), generator=seeded()).expand(-1, 2)

    def twins(z: Tensor, level: Tensor) -> Tensor:
        other = z.flip(1)[..., None]
        return torch.where((other == 3) | (other == torch.arange(3)), 0.0, -math.inf).double()

    expected = math.log2(3) / 2
    for noise in (plain, process):
        bits = bits_per_character(twins, noise, batches(tokens, 1000), None if noise is plain else partition)
        assert bits.bits == pytest.approx(expected, abs=4 * bits.standard_error)
        assert bits.standard_error < 0.02
    # Positive control: the fitted levels under the weights of even ones, of which a third is seen, not a half.
    level = process.sample(len(tokens), generator=seeded())
    z = process.noised(tokens, level, seeded(1))
    nats = plain.weight_by_quantile(level) * masked_nll(twins(z, level), tokens, z, process)
    assert nats.mean().item() / (2 * math.log(2)) == pytest.approx(math.log2(3) / 3, abs=0.02)


def test_a_sampler_on_fitted_levels_masks_what_the_process_says() -> None:
    process = Masking(vocab_size=3, quantiles=(0.0, 0.5, 0.9, 1.0))
    levels = process.levels(3)
    assert levels == pytest.approx([1.0, 0.9, 0.5, 0.0])
    shares: list[float] = []
    texts = sample_tokens(
        exact_pair_at,
        process,
        2,
        levels,
        range(20_000),
        callback=lambda step, level, z, logits: shares.append((z == 3).double().mean().item()),
    )
    assert shares == pytest.approx(process.masked(torch.tensor(levels[:-1])).tolist(), abs=0.01)
    drawn = torch.zeros(3, 3, dtype=torch.float64).index_put(
        (texts[:, 0], texts[:, 1]), torch.tensor(1 / len(texts), dtype=torch.float64), accumulate=True
    )
    coarse = 0.4 * 0.4 + 0.1 * 0.1 + 0.5 * 0.5  # pairs whose tokens are revealed in one step are drawn apart
    product = JOINT.sum(1)[:, None] * JOINT.sum(0)[None]
    torch.testing.assert_close(drawn, coarse * product + (1 - coarse) * JOINT, atol=0.012, rtol=0)


def test_the_integral_over_a_block_of_the_pair_in_closed_form() -> None:
    """At masked share m both tokens are masked with m^2, one alone with m (1 - m): a polynomial to integrate."""
    process = Masking(vocab_size=3, schedule="cosine")
    marginal = (entropy(JOINT.sum(0)) + entropy(JOINT.sum(1))) * math.log(2)
    conditional = 2 * entropy(JOINT) * math.log(2) - marginal
    low, high = process.boundaries(3)[1:3]
    m_low, m_high = process.masked(torch.tensor([low, high])).tolist()
    exact = (m_high**2 - m_low**2) / 2 * marginal + ((m_high - m_low) - (m_high**2 - m_low**2) / 2) * conditional
    nats = interval_nll(exact_pair, process, pairs(50_000), (low, high), seeded(1))
    error = nats.std().item() / 50_000**0.5
    assert nats.dtype == torch.float64
    assert nats.mean().item() == pytest.approx(exact, abs=4 * error)
    assert error < 0.02 * exact


def test_blocks_with_tied_weights_are_the_one_network() -> None:
    process = Masking(schedule="cosine")
    tokens = torch.randint(27, (256, 16), generator=seeded())
    partition = Partition.build(process, 4, 4)  # type: ignore[arg-type]
    shared = network(27, 16)
    one = bits_per_character(shared, process, batches(tokens), partition, seed=5)
    many = bits_per_character(dict.fromkeys(range(4), shared), process, batches(tokens), partition, seed=5)
    assert many == one  # the same random numbers: exactly
    # Independent ones: within the error.
    whole = bits_per_character(shared, process, batches(tokens), seed=5)
    assert abs(whole.bits - one.bits) < 4 * math.hypot(whole.standard_error, one.standard_error)
    assert one.standard_error < whole.standard_error  # levels stratified by block
    # Positive control: another network in one block changes that block's part and no other.
    odd = bits_per_character(
        {b: network(27, 16, seed=int(b == 2)) for b in range(4)}, process, batches(tokens), partition, seed=5
    )
    assert [a == b for a, b in zip(odd.block_bits, one.block_bits, strict=True)] == [True, True, False, True]


def test_each_block_gets_its_own_levels() -> None:
    process = Masking()
    partition = Partition.build(process, 3, 3)  # type: ignore[arg-type]
    seen: dict[int, Tensor] = {}

    def of_block(block: int):
        def logits(z: Tensor, level: Tensor) -> Tensor:
            seen[block] = level
            return torch.zeros(*z.shape, 27)

        return logits

    tokens = torch.randint(27, (32, 8), generator=seeded())
    bits_per_character({b: of_block(b) for b in range(3)}, process, batches(tokens), partition)
    assert {b: partition.block_of(level).unique().tolist() for b, level in seen.items()} == {b: [b] for b in range(3)}
    # Drawn independently: the same numbers in every block would leave the levels at the same places of their intervals.
    places = [seen[b][0] - partition.interval(b)[0] for b in range(3)]
    assert abs(places[0] - places[1]) > 1e-3
    assert abs(places[1] - places[2]) > 1e-3


def test_blocks_measured_apart_add_up() -> None:
    process = Masking()
    tokens = torch.randint(27, (64, 16), generator=seeded())
    partition = Partition.build(process, 2, 2)  # type: ignore[arg-type]
    together = bits_per_character(network(27, 16), process, batches(tokens), partition)
    apart = [bits_per_character({b: network(27, 16)}, process, batches(tokens), partition) for b in range(2)]
    assert [apart[b].block_bits[b] for b in range(2)] == list(together.block_bits)
    assert apart[0].block_bits[1] == 0.0


def test_bound_is_at_least_the_entropy_of_what_the_network_samples() -> None:
    """The seam of sampling and bound: sequences drawn with the exact posteriors cost what the toy's entropy says."""
    process = Masking(vocab_size=3, epsilon=1e-6)
    drawn = sample_tokens(
        lambda z, t: exact_pair(z, torch.full((len(z),), t)), process, 2, process.levels(64), range(4000)
    )
    bits = bits_per_character(exact_pair, process, batches(drawn, 500))
    assert bits.bits == pytest.approx(entropy(JOINT) / 2, abs=4 * bits.standard_error + 0.01)


def test_moments_do_not_depend_on_the_batches() -> None:
    rows = 1e6 + torch.randn(101, 3, generator=seeded(), dtype=torch.float64)
    for cuts in ([101], [1, 100], [50, 1, 50], [1] * 101):
        moments = Moments()
        for part in rows.split(cuts):
            moments.add(part)
        assert moments.count == 101
        assert torch.allclose(moments.mean, rows.mean(0), rtol=1e-14)
        assert torch.allclose(moments.standard_error, rows.std(0) / 101**0.5, rtol=1e-9)


def test_an_impossible_token_that_is_not_masked_costs_nothing() -> None:
    process = Masking(vocab_size=2)
    never = torch.tensor([0.0, -math.inf])
    tokens = torch.tensor([[1, 0]])
    nats = interval_nll(lambda z, t: never.expand(*z.shape, 2), process, tokens, (0.0, 1e-9), seeded())
    assert nats.tolist() == [0.0]
    nats = interval_nll(lambda z, t: never.expand(*z.shape, 2), process, tokens, (0.9999, 1.0), seeded())
    assert nats.tolist() == [math.inf]


def test_refusals() -> None:
    process = Masking()
    tokens = torch.randint(27, (4, 8), generator=seeded())
    partition = Partition.build(process, 2, 2)  # type: ignore[arg-type]
    good = network(27, 8)
    with pytest.raises(ValueError, match=r"blocks from 0 to 1, got \[2\]"):
        bits_per_character({2: good}, process, batches(tokens), partition)
    with pytest.raises(ValueError, match=r"must have shape \(4, 8, 27\).*got \(4, 8, 28\)"):
        bits_per_character(network(28, 8), process, batches(tokens))
    with pytest.raises(ValueError, match="one length; got 4 after 8"):
        bits_per_character(lambda z, t: torch.zeros(*z.shape, 27), process, batches(tokens) + batches(tokens[:, :4]))
    with pytest.raises(ValueError, match="at least two sequences, got 1"):
        bits_per_character(good, process, batches(tokens[:1]))
    with pytest.raises(ValueError, match="at least two sequences, got 0"):
        bits_per_character(good, process, [])
    wrong = Partition((0.002, 80.0), (1,), ((0.002, 80.0),))
    with pytest.raises(ValueError, match=r"it is of \[0.002, 80.0\]"):
        bits_per_character(good, process, batches(tokens), wrong)


def test_intervals_tile_the_levels() -> None:
    process = Masking(schedule="cosine")
    shares = [process.share(interval) for interval in itertools.pairwise(process.boundaries(7))]
    assert math.fsum(shares) == pytest.approx(1.0, abs=1e-15)
