"""What every noise process offers: the face that partition, blocks, samplers and reports know it by."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


def one_level(level: float, z: Tensor) -> Tensor:
    """A level for each sample of z (batch, ...): shape (batch,), float32, or float64 where z is.

    Never in the dtype of z itself: bfloat16 has three digits, and a level told with three is another level.
    """
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.full((len(z),), level, dtype=dtype, device=z.device)


class NoiseProcess(Protocol):
    """What a noise level means. `EDM` and `Masking` are the two there are; see them for each method's account.

    Attributes:
        symbol: what a level is called in reports.
        logarithmic: whether levels are spread over their logarithm, which reports then use.
    """

    symbol: ClassVar[str]
    logarithmic: ClassVar[bool]

    @property
    def kind(self) -> str:
        """Tells the processes apart in a config."""

    @property
    def level_min(self) -> float:
        """The cleanest level."""

    @property
    def level_max(self) -> float:
        """The noisiest level."""

    @property
    def read_min(self) -> float:
        """The cleanest level at which a trained network is read: chains end there."""

    @property
    def read_max(self) -> float:
        """The noisiest level at which a trained network is read: chains start there, reports rank by it."""

    def cdf(self, level: Tensor) -> Tensor:
        """Mass u in [0, 1] below each level, float64."""

    def icdf(self, mass: Tensor) -> Tensor:
        """The inverse of `cdf`, float64."""

    def sample(
        self,
        n: int,
        interval: tuple[float, float] | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw n levels from the training distribution restricted to an interval: float32, shape (n,)."""

    def density(self, level: Tensor) -> Tensor:
        """Density of the training distribution, per unit of the level or (where `logarithmic`) of its logarithm."""

    def boundaries(self, num_intervals: int, strategy: str = "equi-probability") -> list[float]:
        """Ascending boundaries of intervals that tile [level_min, level_max]."""

    def widen(self, interval: tuple[float, float], overlap: float) -> tuple[float, float]:
        """The interval that a block of a given interval trains on."""

    def draws(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The randomness that `corrupt` takes, float32."""

    def corrupt(self, target: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """z: the target at levels (batch,)."""

    def condition(self, level: Tensor) -> Tensor:
        """What the network is told of levels (batch,): same shape, float32 or better."""

    def scaled(self, z: Tensor, level: Tensor) -> Tensor:
        """z as the network is shown it."""

    def combine(self, z: Tensor, raw: Tensor, level: Tensor) -> Tensor:
        """D, from z and the network's output F; float32 or better."""

    def training_weight(self, level: Tensor) -> Tensor:
        """Weight of the loss at levels (batch,), for levels that `sample` draws."""

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
