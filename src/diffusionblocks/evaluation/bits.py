"""Bits per character of masked diffusion: the evidence bound, block by block (paper, section 4; MD4, arXiv 2406.04329).

The bound is an integral over levels. So it is the sum of the integrals over the blocks' own intervals (overlap 0, each
level in one block). Each can be estimated by its block alone, on whatever machine. Where intervals are equally
probable each estimate enters with the weight 1/B. `noise/masking.py` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.finite import FiniteCheck
from ..common.seeds import keyed_generator
from ..core.partition import Partition
from ..noise import Masking
from .row import Row
from .work import ALONE, Work

# (z, int64 (n, length) with masks; levels, float32 (n,)) -> logits (n, length, vocab_size) without the mask.
Logits = Callable[[Tensor, Tensor], Tensor]

#: Levels (n,), and tokens with masks (n, length).
Draw = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bits(Row):
    """A bound in bits per character (token), with its parts.

    Attributes:
        bits: the bound: the sum of `block_bits` and `reconstruction`. Without the prior term that MD4 leaves out too.
        standard_error: of `bits`, over sequences as if they were drawn independently. Antithetic levels make the true
            error smaller, neighbouring sequences of one book that look alike make it larger.
        block_bits: what each block adds, block 0 (the highest levels) first.
        block_errors: standard error of each of them.
        reconstruction: the constant term.
        sequences: how many were read.
        length: tokens of each.
    """

    bits: float
    standard_error: float
    block_bits: tuple[float, ...]
    block_errors: tuple[float, ...]
    reconstruction: float
    sequences: int
    length: int


def bits_per_character(
    logits: Logits | Mapping[int, Logits],
    process: Masking,
    batches: Iterable[Mapping[str, Tensor]],
    partition: Partition | None = None,
    *,
    times: int = 1,
    seed: int = 0,
) -> Bits:
    """The bound of all sequences, from a few levels a sequence and block.

    Args:
        logits: one network for all levels, or that of each block by its index. Without gradients.
        process: the masking process; the partition must be of its levels.
        batches: {"input_ids": int64 (n, length)} on the networks' device; at least two sequences, all of one length.
        partition: which levels each block owns. None: one network on all levels, one level per sequence, as in MD4. One
            network with a partition has its levels stratified by the blocks' intervals.
        times: levels drawn for each sequence and block, >= 1; a sequence's estimate is their mean.
        seed: of levels and masks. Those of a block are keyed by (seed, block): the same for every network and whichever
            other blocks are measured.

    Returns:
        The bound. Where `logits` maps only some of the blocks (a job that holds no others), the others' entries are 0.
        Then `bits` and its error are of these blocks and the reconstruction alone: add the `block_bits` of all jobs.

    Raises:
        ValueError: blocks that the partition does not have, levels that are not the process's, sequences of several
            lengths, or fewer than two; times < 1; logits of another shape; or an estimate that is not finite, as of
            logits with NaN, or of a token that is ruled out.
    """
    return bits_rows(logits, process, batches, partition, times=times, seed=seed)[0]


def bits_rows(
    logits: Logits | Mapping[int, Logits],
    process: Masking,
    batches: Iterable[Mapping[str, Tensor]],
    partition: Partition | None = None,
    *,
    times: int = 1,
    seed: int = 0,
    work: Work = ALONE,
) -> list[Bits]:
    """As `bits_per_character`, by whoever computes which batch of `work`: one row, and none on ranks but the first."""
    if times < 1:
        raise ValueError(f"times must be >= 1, got {times}")
    intervals = _intervals(process, partition)
    networks = dict.fromkeys(range(len(intervals)), logits) if callable(logits) else dict(logits)
    if not networks or not set(networks) <= set(range(len(intervals))):
        raise ValueError(f"logits must name blocks from 0 to {len(intervals) - 1}, got {sorted(networks)}")
    owner = None if callable(logits) or partition is None else partition.block_of
    checks = {block: FiniteCheck(f"block {block}", owner) for block in networks}
    generators: dict[int, torch.Generator] = {}

    def draws(tokens: Tensor, block: int) -> Iterator[Draw]:
        if block not in generators:
            generators[block] = keyed_generator(seed, block, 0, "bits", tokens.device)
        return (draw_level(process, tokens, intervals[block], generators[block]) for _ in range(times))

    def measure(tokens: Tensor) -> dict[str, Tensor]:
        parts = [torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)] * len(intervals)
        for block in sorted(networks):
            interval, network = intervals[block], _finite_logits(networks[block], checks[block])
            estimates = [nll_at(network, process, tokens, interval, draw) for draw in draws(tokens, block)]
            what = f"nats of levels {interval[0]:g} to {interval[1]:g}"
            parts[block] = checks[block].values(torch.stack(estimates), what).mean(dim=0)
        return {"nats": torch.stack([*parts, sum(parts, torch.zeros_like(parts[0]))], dim=1)}

    def skip(tokens: Tensor) -> None:
        for block in sorted(networks):
            for _ in draws(tokens, block):
                pass

    moments, lengths = Moments(), set[int]()

    def of_one_length() -> Iterator[Tensor]:
        for batch in batches:
            tokens = batch["input_ids"]
            lengths.add(tokens.shape[1])
            if len(lengths) > 1:
                before = next(iter(lengths - {tokens.shape[1]}))
                raise ValueError(f"all sequences must have one length; got {tokens.shape[1]} after {before}")
            yield tokens

    with torch.no_grad():
        for results in work.in_order(of_one_length(), measure, skip=skip, checks=[*checks.values()]):
            moments.add(results["nats"])
    if not work.leads:
        return []
    if moments.count < 2:
        raise ValueError(f"a standard error needs at least two sequences, got {moments.count}: give more text")
    for check in checks.values():
        check.read()
    (length,) = lengths
    scale = 1 / (length * math.log(2))
    mean, error = (moments.mean * scale).tolist(), (moments.standard_error * scale).tolist()
    reconstruction = process.reconstruction(length) * scale
    return [
        Bits(
            bits=mean[-1] + reconstruction,
            standard_error=error[-1],
            block_bits=tuple(mean[:-1]),
            block_errors=tuple(error[:-1]),
            reconstruction=reconstruction,
            sequences=moments.count,
            length=length,
        )
    ]


def _finite_logits(logits: Logits, check: FiniteCheck) -> Logits:
    return lambda z, level: check.logits(logits(z, level))


def interval_nll(
    logits: Logits,
    process: Masking,
    tokens: Tensor,
    interval: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """An unbiased estimate, for each sequence, of the bound's integral over an interval of levels.

    One antithetic level per sequence, uniform in its quantile: share of the interval * v(t) * NLL of the masked tokens.

    Args:
        logits: the network that owns the interval.
        process: the masking process.
        tokens: int64 (n, length), without masks.
        interval: (lowest, highest) level, without overlap.
        generator: source of levels and masks, on the tokens' device.

    Returns:
        Nats, float64, shape (n,).

    Raises:
        ValueError: logits of another shape, or an interval out of range.
    """
    return nll_at(logits, process, tokens, interval, draw_level(process, tokens, interval, generator))


def draw_level(
    process: Masking, tokens: Tensor, interval: tuple[float, float], generator: torch.Generator | None = None
) -> Draw:
    """A level in the interval for each sequence (n,), and the tokens (n, length) with masks: all that is drawn."""
    level = process.sample(len(tokens), interval, generator=generator, device=tokens.device)
    return level, process.noised(tokens, level, generator)


def nll_at(logits: Logits, process: Masking, tokens: Tensor, interval: tuple[float, float], draw: Draw) -> Tensor:
    """The estimate of `interval_nll`, of a draw of `draw_level`."""
    level, z = draw
    weight = process.share(interval) * process.weight_by_quantile(level)
    return weight * masked_nll(logits(z, level), tokens, z, process)


def masked_nll(logits: Tensor, tokens: Tensor, z: Tensor, process: Masking) -> Tensor:
    """S: the sum of -log p(token) over the masked positions of each sequence, float64, shape (n,).

    Args:
        logits: (n, length, vocab_size), any floating dtype; the softmax runs in float64.
        tokens: the true tokens, int64 (n, length).
        z: the same with masks.
        process: the masking process.

    Raises:
        ValueError: logits of another shape, such as with an entry for the mask.
    """
    if logits.shape != (*tokens.shape, process.vocab_size):
        raise ValueError(
            f"logits must have shape {(*tokens.shape, process.vocab_size)} (n, length, vocab_size), without an entry "
            f"for the mask; got {tuple(logits.shape)}"
        )
    nll = -logits.double().log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    # Not by multiplication: an impossible token at a position that is not asked for would give inf * 0.
    return torch.where(z == process.mask_id, nll, 0.0).sum(dim=1)


class Moments:
    """Streaming mean and standard error of rows, float64 on the rows' device; adding rows never waits for it.

    Chan, Golub and LeVeque's merging of means and sums of squares, so neither large sums nor batch sizes cost digits.

    Attributes:
        count: rows so far.
        mean: their mean, shape (columns,).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._squares = self.mean  # sum of squared differences from the mean

    def add(self, rows: Tensor) -> None:
        """Add rows (n, columns), n >= 1."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        squares = (rows - mean).square().sum(dim=0)
        if self.count:
            total = self.count + len(rows)
            gap = mean - self.mean
            mean = self.mean + gap * (len(rows) / total)
            squares = self._squares + squares + gap.square() * (self.count * len(rows) / total)
        self.count += len(rows)
        self.mean, self._squares = mean, squares

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, shape (columns,); NaN below two rows."""
        if self.count < 2:
            return torch.full_like(self.mean, math.nan)
        return (self._squares / (self.count - 1) / self.count).sqrt()


def _intervals(process: Masking, partition: Partition | None) -> list[tuple[float, float]]:
    """The levels each block owns, block 0 first."""
    if partition is None:
        return [(process.level_min, process.level_max)]
    ends = (partition.boundaries[0], partition.boundaries[-1])
    if ends != (process.level_min, process.level_max):
        raise ValueError(f"the partition must tile the levels of the masking process, [0, 1]; it is of {list(ends)}")
    return [partition.interval(block) for block in range(partition.num_blocks)]
