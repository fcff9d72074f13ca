"""Flow matching on the straight path (rectified flow: arXiv 2209.03003, 2210.02747), as Stable Diffusion 3 trains it.

A *level* is t in [0, 1], the time of the UNSHIFTED path: 0 is the target, 1 is noise. The resolution shift s (arXiv
2403.03206, section 5.3.2) moves each level to a noisier place of the path, t' = s * t / (1 + (s - 1) * t), and only
there does it enter:

    z = (1 - t') * y + t' * eps,     v = eps - y,     D = z - t' * v.

So there is one space for all that names a level, and one place where t' is made of it:

    in t, the unshifted time            in t' = `shifted(t)`
    ------------------------            --------------------
    the training distribution           alpha and sigma
    boundaries, training intervals      what the network is told (c_noise = t')
    the levels of a sampling grid       what solvers take differences in
    a level's block (`Partition`)

The shift may depend on the resolution, as Flux and Stable Diffusion 3.5 have it (`use_dynamic_shifting` of diffusers'
schedulers): s = exp(mu), with mu on a straight line over the number of an image's tokens. `for_tokens` gives the
process of one resolution; levels, boundaries and training distribution are those of all.

Boundaries of equal probability are therefore those of the unshifted distribution, whatever the shift. A grid of equal
steps is linspace(1, 0) in t, shifted: that of diffusers' FlowMatchEulerDiscreteScheduler. A saved model stores its
boundaries in t, and the shift beside them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..common.fields import Number
from .gaussian import GaussianProcess, Preconditioning
from .process import normal_cdf, register_noise_process

#: The least t' that the weight 1 / t'^2 tells apart: below, rounding in D would be weighted up, not the error of v.
_LEAST = 1e-4


@register_noise_process
@dataclass(frozen=True)
class FlowMatching(GaussianProcess):
    """The straight path from data to noise, with velocity prediction and a resolution shift.

    z = (1 - t') * y + t' * eps with t' = shift * t / (1 + (shift - 1) * t). Levels, boundaries and the distribution are
    in t, the time before the shift. Data are expected with a standard deviation of about 1.

    Args:
        distribution: of t in training: `logit-normal` (logit t ~ N(mean, std^2)) or `uniform` (mean and std then mean
            nothing).
        mean: mean of logit t.
        std: standard deviation of logit t, > 0.
        shift: the resolution shift, > 0; 1 is none, 3 is that of Stable Diffusion 3 at 1024 pixels. More means noisier
            levels.
        coverage: (lowest, highest) quantile between which levels are read, see `EDM.coverage`.
        base_shift: mu at `base_image_seq_len` tokens of an image, where the shift exp(mu) follows the resolution (0.5
            of Flux); None: it does not.
        max_shift: mu at `max_image_seq_len` tokens (1.15 of Flux); given with `base_shift`.
        base_image_seq_len: tokens at which mu is `base_shift`, >= 1.
        max_image_seq_len: tokens at which mu is `max_shift`, > `base_image_seq_len`.
        kind: tells the noise processes apart in a config.

    Raises:
        ValueError: a parameter out of its range.
    """

    symbol: ClassVar[str] = "t"
    grids: ClassVar[tuple[str, ...]] = ("equal-quantile", "uniform")
    sampling_grid: ClassVar[str] = "uniform"

    distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    mean: Number = 0.0
    std: Number = 1.0
    shift: Number = 1.0
    coverage: tuple[Number, Number] | None = None
    base_shift: Number | None = None
    max_shift: Number | None = None
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    kind: Literal["flow"] = "flow"

    def _check(self) -> None:
        if self.distribution not in ("logit-normal", "uniform"):
            raise ValueError(f"unknown distribution {self.distribution!r}; allowed: logit-normal, uniform")
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        for name in ("std", "shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")

        if (self.base_shift is None) != (self.max_shift is None):
            raise ValueError(
                f"base_shift = {self.base_shift}, max_shift = {self.max_shift}: both make the shift follow the "
                "resolution; give both, or neither"
            )
        if self.base_shift is None or self.max_shift is None:
            return
        if self.shift != 1:
            raise ValueError(f"shift = {self.shift} and base_shift = {self.base_shift}: give one of them")
        if not (math.isfinite(self.base_shift) and math.isfinite(self.max_shift)):
            raise ValueError(f"base_shift = {self.base_shift}, max_shift = {self.max_shift}: must be finite")
        if not 1 <= self.base_image_seq_len < self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len = {self.base_image_seq_len}, max_image_seq_len = {self.max_image_seq_len}: must "
                "be whole numbers >= 1, the second larger"
            )

    def for_tokens(self, tokens: int) -> FlowMatching:
        """The process with the shift of an image of so many tokens, as diffusers' pipelines compute it."""
        if self.base_shift is None:
            return self
        return dataclasses.replace(self, shift=self._shift_of(tokens), base_shift=None, max_shift=None)

    @property
    def path(self) -> FlowMatching:
        """Itself, or without a shift where that follows the resolution: then a level is t'."""
        return self if self.base_shift is None else dataclasses.replace(self, base_shift=None, max_shift=None)

    def on_path(self, level: Tensor, tokens: int) -> Tensor:
        """t' of t, where the shift follows the resolution."""
        if self.base_shift is None:
            return level
        shift = self._shift_of(tokens)
        return shift * level / ((1.0 - level) + shift * level)

    def _shift_of(self, tokens: int) -> float:
        assert self.base_shift is not None
        assert self.max_shift is not None
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return math.exp(self.base_shift + slope * (tokens - self.base_image_seq_len))

    # ---- the training distribution, in t -------------------------------------------------------------

    def _cdf(self, level: Tensor) -> Tensor:
        if self.distribution == "uniform":
            return level
        return normal_cdf((level.logit() - self.mean) / self.std)

    def _icdf(self, quantile: Tensor) -> Tensor:
        if self.distribution == "uniform":
            return quantile
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(quantile))

    def density(self, level: Tensor) -> Tensor:
        """Density of the training distribution per unit of t, float64, shape of `level`; 0 at the logit-normal's ends.

        (There the derivative of the logit has no value.)
        """
        return super().density(level).nan_to_num(0.0)

    # ---- the path, in t' -----------------------------------------------------------------------------

    def shifted(self, level: Tensor) -> Tensor:
        """t' = s * t / (1 + (s - 1) * t), shape and dtype of `level`: where on the path a level lies.

        Raises:
            ValueError: the shift follows the resolution: that of one is `for_tokens`'.
        """
        return self.shift * level / self._total(level)

    def unshifted(self, time: float) -> float:
        """t of t' in [0, 1]: the level at a place of the path, such as a pipeline's `boundary_ratio`.

        Raises:
            ValueError: t' is not in [0, 1].
        """
        if not 0 <= time <= 1:
            raise ValueError(f"t' must be in [0, 1], got {time}")
        self._check_resolution()
        return time / (self.shift - (self.shift - 1) * time)

    def _total(self, level: Tensor) -> Tensor:
        """1 + (s - 1) * t, written so that t' is exactly 1 at t = 1, and alpha exactly 0, whatever the shift."""
        self._check_resolution()
        return (1.0 - level) + self.shift * level

    def _check_resolution(self) -> None:
        if self.base_shift is not None:
            raise ValueError(
                "the shift of this process follows the resolution: ask for_tokens for that of one, with the number of "
                "an image's tokens"
            )

    def alpha(self, level: Tensor) -> Tensor:
        """1 - t'."""
        return (1.0 - level) / self._total(level)

    def sigma(self, level: Tensor) -> Tensor:
        """t'."""
        return self.shifted(level)

    def time(self, level: float) -> float:
        """t': along it the path is straight."""
        return self.alpha_sigma(level)[1]

    def rates(self, level: float) -> tuple[float, float]:
        """-1 and 1, by t'."""
        return -1.0, 1.0

    def precondition(self, level: Tensor) -> Preconditioning:
        """D = z - t' * F, F the velocity, which is shown z itself and told t'."""
        level = level if level.dtype == torch.float64 else level.float()
        time = self.shifted(level)
        one = torch.ones_like(time)
        return Preconditioning(c_skip=one, c_out=-time, c_in=one, c_noise=time)

    def weight(self, level: Tensor) -> Tensor:
        """1 / t'^2, shape of `level`: with it the squared error of D is that of the velocity (t' at least 1e-4)."""
        return self.sigma(level if level.dtype == torch.float64 else level.float()).clamp(min=_LEAST).pow(-2)
