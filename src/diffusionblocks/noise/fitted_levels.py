"""Noise levels placed by measured difficulty: equal probability is equal rise of the cross-entropy over log sigma.

Where the cross-entropy of a trained network does not change with the level, the levels teach nothing new: at low noise
the target can be read off z, at high noise z says nothing. Where it rises, what the network knows of the input decides.
Levels that are drawn evenly over the rise spend the training there.

Where the likelihood of z is added to the logits, the network learns the same context logits at every level. What a step
teaches of them is what z leaves open, the cross-entropy itself: `accumulated` losses share that evenly instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..common.fields import MOST_LEVELS, check_count

#: Steps of equal probability that the fitted distribution is written as.
STEPS = 128


def fitted_quantiles(
    levels: Sequence[float], losses: Sequence[float], *, floor: float = 0.05, steps: int = STEPS
) -> tuple[float, ...]:
    """Levels at equal steps of probability, from measured losses: what `EDM.quantiles` takes.

    The probability between two neighbouring levels is their share of the rise of the losses, which are first made
    monotone (`isotonic`), mixed with a share that is spread evenly over log sigma. Within such an interval probability
    is even over log sigma. Losses that nowhere rise give levels that are even over log sigma.

    Args:
        levels: where losses were measured, > 0, ascending, at least two.
        losses: mean loss at each of them.
        floor: the share of the probability that is spread evenly, in (0, 1]; so no level is without.
        steps: how many steps of equal probability.

    Returns:
        `steps` + 1 levels, strictly ascending, the first and last of `levels` included.

    Raises:
        ValueError: levels that do not ascend, losses of another number or not finite, or a value out of range.
    """
    _check(levels, losses, floor, steps)
    places = [math.log(level) for level in levels]
    monotone = isotonic(losses)
    rises = [high - low for low, high in itertools.pairwise(monotone)]
    inner = places_by_share(places, rises, floor=floor, steps=steps)
    return (float(levels[0]), *(math.exp(place) for place in inner), float(levels[-1]))


def places_by_share(
    places: Sequence[float], parts: Sequence[float], *, floor: float, steps: int = STEPS
) -> list[float]:
    """Where equal steps of probability end, if the probability of an interval is its share of all parts.

    Args:
        places: n + 1, ascending: the ends of intervals, within which probability is even.
        parts: n, >= 0: what was measured of each. Where all are 0, probability is even.
        floor: share of the probability that is spread evenly over all places, in (0, 1].
        steps: how many steps.

    Returns:
        `steps` - 1 places, without both ends.
    """
    widths = [high - low for low, high in itertools.pairwise(places)]
    width, total = math.fsum(widths), math.fsum(parts)
    if total <= 0:
        floor = 1.0
    shares = [(1 - floor) * part / (total or 1.0) + floor * w / width for part, w in zip(parts, widths, strict=True)]
    return inverse(places, shares, [step / steps for step in range(1, steps)])


def accumulated(levels: Sequence[float], losses: Sequence[float]) -> list[float]:
    """The integral of losses over log sigma, up to each level: where it rises evenly, the losses are shared evenly.

    Args:
        levels: where losses were measured, > 0, ascending.
        losses: mean loss >= 0 at each of them; between them it is taken for linear over log sigma.
    """
    places = [math.log(level) for level in levels]
    parts = [
        (high - low) * (one + other) / 2
        for (low, high), (one, other) in zip(itertools.pairwise(places), itertools.pairwise(losses), strict=True)
    ]
    return [0.0, *itertools.accumulate(parts)]


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest sequence in squares that never falls, by pooling neighbours that do (adjacent violators).

    Raises:
        ValueError: a value is not finite.
    """
    if wrong := [value for value in values if not math.isfinite(value)]:
        raise ValueError(f"values must be finite, got {wrong[0]} among {len(values)}")
    pools: list[tuple[float, int]] = []  # mean and size, from left to right
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] >= mean:
            other, more = pools.pop()
            mean, size = (mean * size + other * more) / (size + more), size + more
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def inverse(places: Sequence[float], shares: Sequence[float], quantiles: Sequence[float]) -> list[float]:
    """Where the share from the left reaches each of some quantiles.

    Args:
        places: n + 1, ascending: the ends of intervals.
        shares: n, > 0: of each interval, within which it is even; they need not add up to 1.
        quantiles: in (0, 1), ascending.
    """
    total = math.fsum(shares)  # 1, up to rounding
    edges = [0.0, *(below / total for below in itertools.accumulate(shares))]
    levels, interval = [], 0
    for quantile in quantiles:
        while interval < len(shares) - 1 and edges[interval + 1] < quantile:
            interval += 1
        low, high = edges[interval], edges[interval + 1]
        within = min(1.0, max(0.0, (quantile - low) / (high - low)))
        levels.append(places[interval] + within * (places[interval + 1] - places[interval]))
    return levels


def _check(levels: Sequence[float], losses: Sequence[float], floor: float, steps: int) -> None:
    if len(levels) < 2 or len(levels) != len(losses):
        raise ValueError(f"a fit needs a loss at each of at least 2 levels, got {len(losses)} at {len(levels)}")
    if not (levels[0] > 0 and math.isfinite(levels[-1]) and all(a < b for a, b in itertools.pairwise(levels))):
        raise ValueError(f"levels must be finite, > 0 and ascend strictly, got {list(levels)}")
    for level, loss in zip(levels, losses, strict=True):
        if not math.isfinite(loss):
            raise ValueError(f"losses must be finite, got {loss} at level {level:g}")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must be in (0, 1], got {floor}: without a floor some levels are never drawn")
    check_count("steps", steps, MOST_LEVELS)
