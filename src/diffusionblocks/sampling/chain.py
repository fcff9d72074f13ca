"""What all chains of network calls share: checks of their arguments, randomness by seed, the draw of a token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.fields import MOST_SAMPLES, check_count

#: (z, level) -> D of the shape of z, or logits of the tokens in z.
Denoiser = Callable[[Tensor, float], Tensor]

#: Called once a step with (step, level, z, what the network gave).
Callback = Callable[[int, float, Tensor, Tensor], None]


def check_levels(levels: Sequence[float]) -> None:
    """Raise ValueError unless levels are at least two, and descend."""
    if len(levels) < 2 or not all(high > low for high, low in itertools.pairwise(levels)):
        raise ValueError(f"levels must be at least two, descending; got {list(levels)}")


def check_interval(name: str, interval: Sequence[float] | None) -> None:
    """Raise ValueError unless an interval is None, or two finite numbers 0 <= low < high."""
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] < math.inf:
        raise ValueError(f"{name} must be two finite numbers, 0 <= low < high; got {list(interval)}")


def in_interval(value: float, interval: Sequence[float] | None) -> bool:
    """Whether low < value <= high, as a block owns its levels; None holds every value."""
    return interval is None or interval[0] < value <= interval[1]


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError unless seeds are one or more whole numbers from 0 to 2^63 - 1."""
    if len(seeds) == 0:
        raise ValueError("seeds must be at least one whole number, got none")
    check_count("the number of seeds", len(seeds), MOST_SAMPLES)
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"every seed must be a whole number from 0 to 2^63 - 1, got {seed!r}")


def check_num_tokens(num_tokens: int | None, vocabulary: int) -> None:
    """Raise ValueError unless that many ids can be generated; None: all."""
    if num_tokens is not None and not 1 <= num_tokens <= vocabulary:
        raise ValueError(f"num_tokens must be from 1 to the vocabulary's {vocabulary}, got {num_tokens}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless a temperature is a finite number >= 0."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """A generator on the CPU for each seed: what it draws is the same in every batch and for every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.library.custom_op("diffusionblocks::running_sums", mutates_args=())
def _running_sums(values: Tensor) -> Tensor:
    return values.cumsum(dim=-1)


@_running_sums.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def running_sums(values: Tensor) -> Tensor:
    """Sums of each row (n, m) up to each place. Compiled, it is torch's own kernel: inductor fails at long rows."""
    # torch 2.11 on a GPU: 64 rows of 16,384 are split, and the code for that cannot be made.
    return _running_sums(values) if torch.compiler.is_compiling() else values.cumsum(dim=-1)


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities, float64, of logits (n, vocab_size) divided by a temperature > 0, however low."""
    logits = logits.double()
    from_best = logits - logits.amax(dim=-1, keepdim=True)  # 0 stays 0 where all else overflows
    return (from_best / temperature).softmax(dim=-1)


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token from each row of probabilities: the quantile at its uniform.

    Args:
        probabilities: (n, vocab_size), float64; a row need not sum to 1.
        uniforms: in [0, 1), shape (n,).

    Returns:
        Token ids, int64, shape (n,).
    """
    cumulative = running_sums(probabilities)
    # Rounding may leave the last sum a little below or above 1. `right`: tokens of probability 0 are never drawn.
    places = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, places, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)
