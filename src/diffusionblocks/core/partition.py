"""The partition: which layers and which noise levels each block owns, and the one function from level to block."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ..common.fields import MOST_LAYERS, MOST_LEVELS, check_count
from ..noise import NoiseProcess

#: A level this close (relative) to a boundary *is* that boundary: float32 copies of a level and levels that
#: two formulas computed may differ in the last bits, and must not change block.
SAME_LEVEL = 1e-6
#: a boundary times this is above all levels that count as the boundary, and go to the block below it
ABOVE_BOUNDARY = 1 + 2 * SAME_LEVEL


@dataclass(frozen=True)
class Partition:
    """B blocks: consecutive layers times consecutive intervals of noise levels.

    Block 0 is the input side and owns the HIGHEST levels (paper, section 3.3). A block owns the half-open
    interval (lowest, highest] of its levels, and the last block also owns the lowest level of all: so a
    sampling chain that starts a step at a boundary runs the block below that boundary.

    Attributes:
        boundaries: B + 1 levels, ascending.
        layers: number of layers of each block, block 0 first; their sum is the depth of the network. Of `experts` each
            is the depth.
        training_intervals: for each block the (lowest, highest) level that it trains on (with overlap).
        split: `layers`, consecutive ones for each block, or `experts`, the whole depth for each.
    """

    boundaries: tuple[float, ...]
    layers: tuple[int, ...]
    training_intervals: tuple[tuple[float, float], ...]
    split: str = "layers"

    def __post_init__(self) -> None:
        if len(self.boundaries) != len(self.layers) + 1:
            raise ValueError(
                f"{len(self.layers)} blocks need {len(self.layers) + 1} boundaries, got {len(self.boundaries)}"
            )
        if not all(a < b for a, b in itertools.pairwise(self.boundaries)):
            raise ValueError(f"boundaries must ascend strictly, got {list(self.boundaries)}")
        if len(self.training_intervals) != len(self.layers):
            raise ValueError("every block needs one training interval")
        if self.split not in ("layers", "experts"):
            raise ValueError(f"unknown split {self.split!r}; allowed: layers, experts")
        if self.split == "experts" and len(set(self.layers)) > 1:
            raise ValueError(f"experts have the whole depth each, got layers = {list(self.layers)}")

    @classmethod
    def build(
        cls,
        noise: NoiseProcess,
        num_layers: int,
        num_blocks: int,
        *,
        strategy: str = "equi-probability",
        layers: Sequence[int] | None = None,
        overlap: float = 0.0,
        split: str = "layers",
        boundaries: Sequence[float] | None = None,
    ) -> Partition:
        """Split `num_layers` layers and the levels of `noise` into `num_blocks` blocks.

        Args:
            noise: the noise process that defines the levels.
            num_layers: depth of the network, >= 1.
            num_blocks: B, from 1 to num_layers.
            strategy: how levels are split, see the process's `boundaries`.
            layers: layers of each block, block 0 first; default an even split.
            overlap: gamma >= 0; training intervals are widened by it (paper, section 3.3).
            split: `layers`, or `experts`: each block has all layers.
            boundaries: the B - 1 levels between the blocks, ascending, instead of a strategy.

        Raises:
            ValueError: layers that do not divide or do not add up, or a value out of range.
        """
        check_count("num_layers", num_layers, MOST_LAYERS)
        if layers is not None and split == "layers" and len(layers) != num_blocks:
            raise ValueError(f"layers = {list(layers)} names {len(layers)} blocks, but num_blocks = {num_blocks}")
        if split == "experts":
            if layers is not None:
                raise ValueError(f"layers = {list(layers)}: of split = experts each block has all layers; leave it out")
            check_count("num_blocks", num_blocks, MOST_LAYERS)
            layers = [num_layers] * num_blocks
        elif not 1 <= num_blocks <= num_layers:
            raise ValueError(f"num_blocks must be from 1 to the number of layers, {num_layers}; got {num_blocks}")
        if not (math.isfinite(overlap) and 0.0 <= overlap < 1.0):
            raise ValueError(f"overlap must be in [0, 1), got {overlap}")
        if layers is None:
            if num_layers % num_blocks:
                divisors = [b for b in range(1, num_layers + 1) if num_layers % b == 0]
                raise ValueError(
                    f"{num_layers} layers do not divide into num_blocks = {num_blocks} equal blocks; choose "
                    f"num_blocks from {divisors}, or give the layers of each block, e.g. "
                    f"layers={even_layers(num_layers, num_blocks)}"
                )
            layers = [num_layers // num_blocks] * num_blocks
        if split == "layers" and (any(int(n) != n or n < 1 for n in layers) or sum(layers) != num_layers):
            raise ValueError(
                f"layers = {list(layers)} must be positive whole numbers and add up to the model's "
                f"{num_layers} layers, not {sum(layers)}"
            )
        if boundaries is None:
            boundaries = noise.boundaries(num_blocks, strategy)
        else:
            boundaries = _whole_range(noise, boundaries, num_blocks)
        ascending = list(itertools.pairwise(boundaries))
        if not all(low * (1 + SAME_LEVEL) < high for low, high in ascending):
            raise ValueError(
                f"the boundaries of the blocks' levels must ascend, each by more than a share of {SAME_LEVEL:g}: got "
                f"{list(boundaries)}; give blocks.noise a wider distribution of levels, or set num_blocks lower"
            )
        owned = ascending[::-1]  # block 0 owns the highest interval
        return cls(
            boundaries=tuple(boundaries),
            layers=tuple(int(n) for n in layers),
            training_intervals=tuple(noise.widen(interval, overlap) for interval in owned),
            split=split,
        )

    @property
    def num_blocks(self) -> int:
        """B."""
        return len(self.layers)

    @property
    def num_layers(self) -> int:
        """Depth of the whole network; of experts, that of each."""
        return self.layers[0] if self.split == "experts" else sum(self.layers)

    def with_boundaries(self, noise: NoiseProcess, inner: Sequence[float]) -> Partition:
        """The same blocks, trained as they were, owning other levels.

        Args:
            noise: the process that the partition was built on.
            inner: the B - 1 levels between the blocks, ascending.

        Raises:
            ValueError: another number of levels, or levels that do not ascend or lie outside the process's range.
        """
        return dataclasses.replace(self, boundaries=tuple(_whole_range(noise, inner, self.num_blocks)))

    def check_block(self, block: int) -> int:
        """Return `block` if it names one of the B blocks, else raise ValueError."""
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < self.num_blocks:
            raise ValueError(f"block must be an integer from 0 to {self.num_blocks - 1}, got {block!r}")
        return block

    def interval(self, block: int) -> tuple[float, float]:
        """(lowest, highest] level that the block owns at inference."""
        upper = self.num_blocks - self.check_block(block)
        return self.boundaries[upper - 1], self.boundaries[upper]

    def training_interval(self, block: int) -> tuple[float, float]:
        """(lowest, highest) level that the block trains on: its own interval widened by the overlap."""
        return self.training_intervals[self.check_block(block)]

    def levels(self, noise: NoiseProcess, each: int = 1) -> list[float]:
        """Descending levels at which every block is asked `each` times, and the level at which a chain of them ends.

        A block's levels begin at the noisiest of its own that is read, and are even over what the process spreads them
        over (their logarithm, or themselves). With `each` = 1 and blocks of equal probability they are the grid
        `equal-quantile` of as many steps as blocks.

        Args:
            noise: the process that the partition was built on.
            each: >= 1.

        Returns:
            num_blocks * each + 1 levels, of which the last is not asked.
        """
        check_count("each", each, MOST_LEVELS)
        # A block that owns no level that is read has trained all the same: it is asked in the whole of its interval.
        highest, lowest = self.block_of(noise.read_max), self.block_of(noise.read_min)
        levels: list[float] = []
        low = self.boundaries[0]
        for block in range(self.num_blocks):
            low, high = self.interval(block)
            high, low = noise.read_max if block == highest else high, noise.read_min if block == lowest else low
            levels += [high, *noise.even_levels(low, high, each + 1).flip(0)[1:-1].tolist()]  # `high` free of rounding
        return [*levels, low]

    def layer_range(self, block: int) -> range:
        """Indices in the original network of the layers that the block owns."""
        if self.split == "experts":
            return range(self.layers[self.check_block(block)])
        start = sum(self.layers[: self.check_block(block)])
        return range(start, start + self.layers[block])

    @overload
    def block_of(self, level: float) -> int: ...
    @overload
    def block_of(self, level: Tensor) -> Tensor: ...
    def block_of(self, level: float | Tensor) -> int | Tensor:
        """The block that owns a level: the one function used by training, evaluation, sampling and reports.

        Args:
            level: a number, or a tensor of levels of any shape.

        Returns:
            The block's index (int for a number, int64 tensor of the same shape for a tensor).

        Raises:
            ValueError: a level outside [boundaries[0], boundaries[-1]] or not a number.
        """
        if isinstance(level, Tensor):
            return self._blocks_of(level)
        return _owner(self, float(level))  # a chain asks for the same few levels over and over

    def _blocks_of(self, level: Tensor) -> Tensor:
        sigma = level.detach().double()
        low, high = self.boundaries[0], self.boundaries[-1]
        inside = within(sigma, low, high)
        if not bool(inside.all()):
            wrong = sigma[~inside].flatten()[0].item()
            raise ValueError(f"level {wrong:g} is outside the noise range [{low:g}, {high:g}]")
        upper_ends = torch.tensor(self.boundaries[1:-1], dtype=torch.float64, device=sigma.device)
        # Counts the inner boundaries strictly below the level.
        above = torch.searchsorted(upper_ends * (1 + SAME_LEVEL), sigma)
        return self.num_blocks - 1 - above

    def to_dict(self) -> dict[str, Any]:
        """Everything that is needed to route levels to blocks, as plain JSON values."""
        return {
            "boundaries": list(self.boundaries),
            "layers": list(self.layers),
            "training_intervals": [list(interval) for interval in self.training_intervals],
            **({} if self.split == "layers" else {"split": self.split}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Partition:
        """The inverse of `to_dict`."""
        return cls(
            boundaries=tuple(values["boundaries"]),
            layers=tuple(values["layers"]),
            training_intervals=tuple((low, high) for low, high in values["training_intervals"]),
            split=values.get("split", "layers"),
        )


def _whole_range(noise: NoiseProcess, inner: Sequence[float], num_blocks: int) -> list[float]:
    """All B + 1 boundaries, of the B - 1 between the blocks."""
    low, high = noise.level_min, noise.level_max
    if len(inner) != num_blocks - 1:
        raise ValueError(
            f"boundaries = {list(inner)}: {num_blocks} blocks have {num_blocks - 1} between them; give as many, or set "
            f"num_blocks to {len(inner) + 1}"
        )
    if not all(a * (1 + SAME_LEVEL) < b for a, b in itertools.pairwise(inner)):
        raise ValueError(
            f"boundaries = {list(inner)} must ascend, each by more than a share of {SAME_LEVEL:g}: give them in that "
            "order, each once"
        )
    if not all(low < level < high for level in inner):
        raise ValueError(f"boundaries = {list(inner)} must lie between the levels {low:g} and {high:g}")
    return [low, *inner, high]


@functools.lru_cache(maxsize=4096)
def _owner(partition: Partition, level: float) -> int:
    return int(partition._blocks_of(torch.tensor([level], dtype=torch.float64, device="cpu")))


def within(level: Tensor, low: float, high: float) -> Tensor:
    """Which levels lie in [low, high], its ends being as wide as levels that count as the same; NaN lies nowhere."""
    return (level >= low * (1 - SAME_LEVEL)) & (level <= high * (1 + SAME_LEVEL))


def even_layers(num_layers: int, num_blocks: int) -> list[int]:
    """Layers of each block, as even as can be; the first blocks have one more."""
    small, extra = divmod(num_layers, num_blocks)
    return [small + (i < extra) for i in range(num_blocks)]
