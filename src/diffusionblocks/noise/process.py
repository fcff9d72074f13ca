"""What every noise process offers, and all that follows from its training distribution: written once."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from ..common.fields import MOST_LEVELS, check_count
from ..common.registry import Registry
from .grids import GRIDS, grid_name

PARTITION_STRATEGIES = ("equi-probability", "log-uniform", "uniform")

#: Strategies whose boundaries are measured on a trained network: see `complexity.py`.
MEASURED_STRATEGIES = ("loss", "acceleration", "energy")


class NoiseProcess(abc.ABC):
    """What a noise level means: its training distribution, its corruption of the target, what the network is told.

    A process is a frozen dataclass: its fields are the section `noise` of a recipe and of a saved model. It says how
    levels are distributed by `_cdf` and `_icdf`. A level's *quantile* is the share of the drawn levels below it, 0 for
    the cleanest. Sampling, boundaries, overlap and level grids follow here. `GaussianProcess` is for processes of the
    form z = alpha * y + sigma * eps.

    Attributes:
        kind: the name of the process in a config.
        symbol: what a level is called in reports.
        logarithmic: whether levels are spread over their logarithm, for overlap, density and figures.
        discrete: whether z is tokens, not numbers.
        grids: the level grids that suit the process, names of `GRIDS`.
        sampling_grid: the grid for generated images and other long chains.
        coverage: (lowest, highest) quantile between which levels are read: there chains begin and end, and the network
            is told no level outside. Drawn levels and the partition do not depend on it. None: all. A process takes
            it if it has a field of that name.
    """

    # pydantic reads this when the process is a field of a config: unknown keys are refused there.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    symbol: ClassVar[str] = "level"
    logarithmic: ClassVar[bool] = False
    discrete: ClassVar[bool] = False
    grids: ClassVar[tuple[str, ...]] = ("equal-quantile", "uniform")
    sampling_grid: ClassVar[str] = "equal-quantile"

    kind: str
    coverage: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self._check()
        if isinstance(self.coverage, list):  # from JSON; it would have no hash
            object.__setattr__(self, "coverage", tuple(self.coverage))
        low, high = self._read  # looked up now: compiled graphs take finished numbers
        if not low < high:
            raise ValueError(f"coverage = {self.coverage} holds no more than the level {low:g}: widen it")

    def _check(self) -> None:  # noqa: B027 - not all have something to refuse
        """Raise ValueError where a parameter is out of its range."""

    # ---- the training distribution -------------------------------------------------------------------

    @property
    def level_min(self) -> float:
        """The cleanest level."""
        return 0.0

    @property
    def level_max(self) -> float:
        """The noisiest level: z carries (almost) nothing of the target there."""
        return 1.0

    @abc.abstractmethod
    def _cdf(self, level: Tensor) -> Tensor:
        """The quantile of levels within the range, float64."""

    @abc.abstractmethod
    def _icdf(self, quantile: Tensor) -> Tensor:
        """The inverse of `_cdf`, of quantiles in [0, 1], float64."""

    def cdf(self, level: Tensor) -> Tensor:
        """Quantile in [0, 1] of each level, float64, shape of `level` (levels outside the range are clamped)."""
        return self._cdf(level.double().clamp(self.level_min, self.level_max))

    def icdf(self, quantile: Tensor) -> Tensor:
        """Level at each quantile: the inverse of `cdf`, float64, shape of `quantile`.

        Raises:
            ValueError: a quantile outside [0, 1] (checked on the CPU; on a GPU it is clamped, to save a wait).
        """
        if quantile.device.type == "cpu" and not bool(((quantile >= -1e-9) & (quantile <= 1 + 1e-9)).all()):
            raise ValueError(f"quantiles must be in [0, 1], got {quantile.min().item():g} to {quantile.max().item():g}")
        return self._icdf(quantile.double().clamp(0.0, 1.0)).clamp(self.level_min, self.level_max)

    def density(self, level: Tensor) -> Tensor:
        """Density of the training distribution, float64, shape of `level`.

        It is per unit of the level or, where `logarithmic`, of its logarithm.
        """
        with torch.enable_grad():
            place = level.detach().double().requires_grad_()
            (slope,) = torch.autograd.grad(self.cdf(place).sum(), place)
        return slope * level.double() if self.logarithmic else slope

    def share(self, interval: tuple[float, float]) -> float:
        """The share of the drawn levels in an interval: 1/B for each of B blocks of equal probability."""
        low, high = self._quantiles(*interval)
        return high - low

    def sample(
        self,
        n: int,
        interval: tuple[float, float] | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw n levels from the training distribution restricted to an interval.

        Args:
            n: how many.
            interval: (lowest, highest) level; default the whole range.
            generator: source of randomness (its device must be `device`).
            device: where to draw.

        Returns:
            Levels, float32, shape (n,). The quantile is inverted in float64.

        Raises:
            ValueError: an interval that does not ascend within the range of levels.
        """
        low, high = self._inside(interval)
        u_low, u_high = self._quantiles(low, high)
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        return self.icdf(u_low + u * (u_high - u_low)).clamp(low, high).float()

    def _inside(self, interval: tuple[float, float] | None) -> tuple[float, float]:
        low, high = interval or (self.level_min, self.level_max)
        if not self.level_min <= low < high <= self.level_max:
            raise ValueError(
                f"interval ({low}, {high}) must ascend within the noise range [{self.level_min:g}, {self.level_max:g}]"
            )
        return low, high

    def _quantiles(self, *levels: float) -> list[float]:
        quantiles: list[float] = self.cdf(torch.tensor(levels, dtype=torch.float64, device="cpu")).tolist()
        return quantiles

    def _levels(self, *quantiles: float) -> list[float]:
        levels: list[float] = self.icdf(torch.tensor(quantiles, dtype=torch.float64, device="cpu")).tolist()
        return levels

    # ---- the levels that are read --------------------------------------------------------------------

    @functools.cached_property
    def _read(self) -> tuple[float, float]:
        """The levels at both ends of `coverage`; those of the whole range exactly, free of rounding."""
        if self.coverage is None:
            return self.level_min, self.level_max
        ends = isinstance(self.coverage, tuple) and len(self.coverage) == 2
        if not (ends and 0.0 <= self.coverage[0] < self.coverage[1] <= 1.0):  # NaN is nowhere
            raise ValueError(
                f"coverage must be (lowest, highest) quantile with 0 <= lowest < highest <= 1, got {self.coverage}; "
                "leave it out for the default"
            )
        low, high = self._levels(*self.coverage)
        return low if self.coverage[0] > 0 else self.level_min, high if self.coverage[1] < 1 else self.level_max

    @property
    def read_min(self) -> float:
        """The cleanest level at which a trained network is read, where chains end: see `coverage`."""
        return self._read[0]

    @property
    def read_max(self) -> float:
        """The noisiest level at which a trained network is read, where chains start; reports rank by it."""
        return self._read[1]

    @classmethod
    def takes_coverage(cls) -> bool:
        """Whether `coverage` is a field of the process."""
        return any(field.name == "coverage" for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    def with_coverage(self, coverage: tuple[float, float] | None) -> Self:
        """The same process read between other quantiles; itself where `coverage` is no field of it."""
        return dataclasses.replace(self, coverage=coverage) if self.takes_coverage() else self  # type: ignore[type-var]

    # ---- intervals and grids of levels ---------------------------------------------------------------

    def boundaries(self, num_intervals: int, strategy: str = "equi-probability") -> list[float]:
        """Ascending boundaries of `num_intervals` intervals that tile the range of levels.

        Args:
            num_intervals: B >= 1.
            strategy: `equi-probability` (equal steps of the quantile, paper section 3.3), `log-uniform` (equal width
                in the level's logarithm) or `uniform` (equal width in the level, the paper's ablation).

        Raises:
            ValueError: unknown strategy, or num_intervals < 1.
        """
        check_count("the number of blocks", num_intervals, MOST_LEVELS)
        fraction = torch.linspace(0.0, 1.0, num_intervals + 1, dtype=torch.float64)
        low, high = self.level_min, self.level_max
        if strategy in MEASURED_STRATEGIES and num_intervals > 1:
            raise ValueError(
                f"partition = {strategy} is measured on a trained network: give the boundaries that were measured, or "
                f"one of {', '.join(PARTITION_STRATEGIES)}"
            )
        if strategy in MEASURED_STRATEGIES:
            return [low, high]
        choices = PARTITION_STRATEGIES if low > 0 else ("equi-probability", "uniform")
        if strategy not in choices:
            why = "" if low > 0 else " (its levels start at 0, where a logarithm has no value)"
            raise ValueError(
                f"unknown partition strategy {strategy!r} for {self.kind}; allowed: {', '.join(choices)}{why}"
            )
        if strategy == "equi-probability":
            levels = self.icdf(fraction)
        elif strategy == "uniform":
            levels = low + fraction * (high - low)
        else:
            levels = low * (high / low) ** fraction
        inner: list[float] = levels[1:-1].tolist()
        return [low, *inner, high]  # the ends exactly, free of rounding

    def widen(self, interval: tuple[float, float], overlap: float) -> tuple[float, float]:
        """The interval that a block trains on, its own widened and clipped to the range.

        Levels on a logarithmic scale get [low / a, high * a] with a = (high / low)^overlap (paper, section 3.3).
        Others, whose lowest is 0, are widened at each end by `overlap` times their share of the drawn levels.
        """
        low, high = interval
        if self.logarithmic:
            factor = (high / low) ** overlap
            return max(self.level_min, low / factor), min(self.level_max, high * factor)
        if overlap == 0:
            return interval
        u_low, u_high = self._quantiles(low, high)
        extra = overlap * (u_high - u_low)
        wide_low, wide_high = self._levels(max(0.0, u_low - extra), min(1.0, u_high + extra))
        return wide_low, wide_high

    def levels(self, steps: int, grid: str = "equal-quantile", *, rho: float = 7.0) -> list[float]:
        """`steps` + 1 descending levels from `read_max` to `read_min`: one network call at each but the last.

        Args:
            steps: number of sampling steps, >= 1.
            grid: one of `grids`, see `diffusionblocks.noise.grids`.
            rho: the exponent of the grid `karras`, > 0.

        Raises:
            ValueError: steps < 1, unknown grid, or rho <= 0.
        """
        check_count("steps", steps, MOST_LEVELS)
        grid = self.check_grid(grid)
        inner: list[float] = GRIDS[grid](self, steps, rho)[1:-1].tolist()
        return [self.read_max, *inner, self.read_min]

    def even_levels(self, low: float, high: float, count: int) -> Tensor:
        """`count` levels from low to high, float64, even over their logarithm where `logarithmic`, else by themselves.

        Args:
            low: the first of them, within the range of levels.
            high: the last.
            count: >= 1.
        """
        if not self.logarithmic:
            return torch.linspace(low, high, count, dtype=torch.float64)
        return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).clamp(low, high)

    def check_grid(self, grid: str, where: str = "") -> str:
        """Return a grid's name of today, if it is one of `grids`.

        Args:
            grid: the name.
            where: the setting that it is of, for the message.

        Raises:
            ValueError: it is not; the message names the process and its grids.
        """
        grid = grid_name(grid)
        if grid not in self.grids:
            field = f"{where}: " if where else ""
            raise ValueError(f"{field}unknown level grid {grid!r} for {self.kind}; allowed: {', '.join(self.grids)}")
        return grid

    # ---- levels fitted to losses ---------------------------------------------------------------------

    def fit_grid(self, count: int) -> list[float]:
        """`count` ascending levels at which losses are measured, for `fit_to`.

        Raises:
            NotImplementedError: the process has no field `quantiles`.
        """
        raise NotImplementedError(f"levels of {self.kind} are not fitted")

    def fit_to(self, levels: Sequence[float], losses: Sequence[float], *, equal: str, floor: float) -> Self:
        """The same process, with the training distribution that follows from measured losses.

        Args:
            levels: of `fit_grid`.
            losses: mean loss at each, without the level's weight.
            equal: what equal probability is equal of, the losses' `rise` or the `loss` itself.
            floor: share of the probability that is spread evenly, in (0, 1].

        Raises:
            NotImplementedError: the process has no field `quantiles`.
        """
        raise NotImplementedError(f"levels of {self.kind} are not fitted")

    # ---- corruption, and what the network is shown and told ------------------------------------------

    @property
    def path(self) -> NoiseProcess:
        """The process without what depends on the resolution, of levels that `on_path` gives."""
        return self

    def on_path(self, level: Tensor, tokens: int) -> Tensor:
        """Levels of `path`, shape and dtype of `level`, in place of these at a resolution of so many tokens."""
        return level

    def for_tokens(self, tokens: int) -> NoiseProcess:
        """The process at a resolution of so many tokens: itself, but where its path depends on the resolution."""
        return self

    @abc.abstractmethod
    def draws(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The randomness that `corrupt` takes, float32."""

    @abc.abstractmethod
    def corrupt(self, target: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """z: the target (batch, ...) at levels (batch,), from `draws` of its shape."""

    def noised(self, target: Tensor, level: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z: the target (batch, ...) at levels (batch,), with noise of its own from `generator`."""
        return self.corrupt(target, level, self.draws(target.shape, generator=generator, device=target.device))

    @abc.abstractmethod
    def prior(self, shape: tuple[int, ...], *, generator: torch.Generator | None = None, device: Any = None) -> Tensor:
        """z at `read_max`, where chains start."""

    @abc.abstractmethod
    def condition(self, level: Tensor) -> Tensor:
        """What the network is told of levels (batch,): same shape, float32 or better."""

    @abc.abstractmethod
    def scaled(self, z: Tensor, level: Tensor) -> Tensor:
        """z as the network is shown it; `level` (batch,) broadcasts over the rest."""

    @abc.abstractmethod
    def combine(self, z: Tensor, raw: Tensor, level: Tensor) -> Tensor:
        """D, from z and the network's output F; float32 or better."""

    @abc.abstractmethod
    def training_weight(self, level: Tensor) -> Tensor:
        """Weight of the loss at levels (batch,), for levels that `sample` draws."""

    # ---- saving --------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]


_Process = TypeVar("_Process", bound=type[NoiseProcess])

#: Noise processes by `kind`.
NOISE_PROCESSES: Registry[type[NoiseProcess]] = Registry("noise process")


def register_noise_process(process: _Process) -> _Process:
    """Make a noise process known by its `kind`, in recipes and in saved models; a class decorator.

    Args:
        process: a frozen dataclass on `NoiseProcess` or `GaussianProcess`, with a default for each field and
            `kind: Literal["name"] = "name"`.

    Raises:
        TypeError: no such class, or methods that it must write are missing.
        ValueError: the kind is no field, no name, or taken.
    """
    is_process = isinstance(process, type) and issubclass(process, NoiseProcess)
    if not (is_process and "__dataclass_fields__" in vars(process)):
        raise TypeError(f"a noise process is a dataclass on NoiseProcess, got {process!r}")
    if not process.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{process.__name__}: a noise process does not change; use @dataclass(frozen=True)")
    if missing := sorted(process.__abstractmethods__):
        raise TypeError(f"{process.__name__} lacks {', '.join(missing)}: a noise process says these as methods")
    kind = process.__dataclass_fields__.get("kind")  # type: ignore[attr-defined]
    if kind is None or not isinstance(kind.default, str):  # else a saved model would not say of what process it is
        raise ValueError(f"{process.__name__}: give the process a name, as in kind: Literal['cosine'] = 'cosine'")
    NOISE_PROCESSES.register(kind.default, process)
    return process


def one_level(level: float, z: Tensor) -> Tensor:
    """A level for each sample of z (batch, ...): shape (batch,), float32, or float64 where z is.

    Never in the dtype of z itself: bfloat16 has three digits, and a level told with three is another level.
    """
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return torch.full((len(z),), level, dtype=dtype, device=z.device)


def match(level: Tensor, like: Tensor) -> Tensor:
    """View a (batch,) tensor so that it broadcasts over the trailing dimensions of `like`."""
    return level.reshape(level.shape[0], *([1] * (like.dim() - 1))).to(
        torch.float64 if like.dtype == torch.float64 else torch.float32
    )


def normal_cdf(x: Tensor) -> Tensor:
    """Phi(x), exact in the far tails too (torch.special.ndtr loses digits there)."""
    below: Tensor = 0.5 * torch.special.erfc(-x / math.sqrt(2.0))
    return below
