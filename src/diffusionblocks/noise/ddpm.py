"""Networks that predict noise at the timesteps of a discrete schedule (DDPM, arXiv 2006.11239), in EDM's form.

Such a network was trained on x_t = sqrt(abar_t) y + sqrt(1 - abar_t) eps, at t = 0 to T - 1. With sigma_t =
sqrt((1 - abar_t) / abar_t) that is x_t = z / sqrt(1 + sigma_t^2) of z = y + sigma_t * eps. So its prediction of eps
denoises z (the "VP" column of EDM's table 1):

    D = z - sigma * F(z / sqrt(1 + sigma^2), t(sigma)).

A *level* is sigma. Between two timesteps t is even over log sigma.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ..common.fields import MOST_LEVELS, Number, check_count
from ..common.formats import read_json
from .exploding import VarianceExploding
from .gaussian import Preconditioning
from .process import register_noise_process

#: What diffusers calls the schedules -> what we do.
_SCHEDULES: dict[str, Any] = {"linear": "linear", "scaled_linear": "scaled-linear"}

#: Settings of a scheduler that make other levels, or another prediction, than this process has -> what they must be.
_REQUIRED = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}


@register_noise_process
@dataclass(frozen=True)
class DDPM(VarianceExploding):
    """Noise prediction at the timesteps of a discrete schedule: how published DiT weights were trained.

    Levels are drawn as such networks saw them in training, t evenly. D = z - sigma * F(z / sqrt(1 + sigma^2), t), and
    with the weight 1 / sigma^2 the loss is the squared error of the predicted noise. Levels are sigmas, from that of
    the first timestep (0.01 by default) to that of the last (157).

    Args:
        schedule: of beta over the timesteps: `linear`, or `scaled-linear` (linear in its square root).
        timesteps: T, >= 2 (default 1000).
        beta_start: the first beta, > 0 (default 1e-4).
        beta_end: the last beta, from beta_start to below 1 (default 0.02).
        coverage: (lowest, highest) quantile between which levels are read, see `EDM.coverage`.
        kind: tells the noise processes apart in a config.

    Raises:
        ValueError: a parameter out of its range.
    """

    sampling_grid: ClassVar[str] = "equal-quantile"

    schedule: Literal["linear", "scaled-linear"] = "linear"
    timesteps: int = 1000
    beta_start: Number = 1e-4
    beta_end: Number = 0.02
    coverage: tuple[Number, Number] | None = None
    kind: Literal["ddpm"] = "ddpm"

    @classmethod
    def from_scheduler(cls, folder: str | Path) -> Self:
        """The process that a diffusers pipeline's scheduler describes.

        Args:
            folder: with `scheduler_config.json`, or the pipeline's, which has that in `scheduler`.

        Raises:
            FileNotFoundError: it is in neither.
            ValueError: the scheduler is for another prediction, or has other levels, than this process.
        """
        places = [Path(folder) / name for name in ("scheduler_config.json", "scheduler/scheduler_config.json")]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{folder} has no scheduler_config.json, nor has its folder scheduler")
        values = read_json(file)
        for name, required in _REQUIRED.items():
            if (value := values.get(name, required)) != required:
                raise ValueError(f"{file}: {name} = {value!r}; kind ddpm needs {required!r}")
        names = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end")
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"{file} does not say {', '.join(missing)}: give DDPM its values yourself")
        schedule, timesteps, start, end = (values[name] for name in names)
        if schedule not in _SCHEDULES:
            raise ValueError(f"{file}: beta_schedule = {schedule!r}; allowed: {', '.join(_SCHEDULES)}")
        return cls(schedule=_SCHEDULES[schedule], timesteps=timesteps, beta_start=start, beta_end=end)

    def _check(self) -> None:
        if self.schedule not in _SCHEDULES.values():
            raise ValueError(f"unknown schedule {self.schedule!r}; allowed: {', '.join(_SCHEDULES.values())}")
        check_count("timesteps", self.timesteps, MOST_LEVELS)
        if self.timesteps < 2:
            raise ValueError(f"timesteps = {self.timesteps}: there must be at least 2")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"0 < beta_start <= beta_end < 1 must hold, got beta_start = {self.beta_start} and beta_end = "
                f"{self.beta_end}"
            )

    # ---- levels ----------------------------------------------------------------------------------------

    @functools.cached_property
    def table(self) -> tuple[float, ...]:  # type: ignore[override]
        """sigma of each timestep, ascending."""
        power = 1.0 if self.schedule == "linear" else 0.5
        ends = self.beta_start**power, self.beta_end**power
        betas = torch.linspace(*ends, self.timesteps, dtype=torch.float64, device="cpu") ** (1 / power)
        abar = (1 - betas).cumprod(0)
        sigmas: list[float] = ((1 - abar) / abar).sqrt().tolist()
        return tuple(sigmas)

    @property
    def level_min(self) -> float:
        """sigma of the first timestep."""
        return self.table[0]

    @property
    def level_max(self) -> float:
        """sigma of the last timestep."""
        return self.table[-1]

    def _cdf(self, level: Tensor) -> Tensor:
        return self._cdf_of_table(level)

    def _icdf(self, quantile: Tensor) -> Tensor:
        return self._icdf_of_table(quantile)

    # ---- preconditioning -------------------------------------------------------------------------------

    def precondition(self, level: Tensor) -> Preconditioning:
        """D = z - sigma * F, F the noise, which is shown z / sqrt(1 + sigma^2) and told t (from 0 to T - 1)."""
        sigma = level if level.dtype == torch.float64 else level.float()
        return Preconditioning(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=(1 + sigma**2).rsqrt(),
            c_noise=self.place_in_table(sigma).to(sigma.dtype),
        )
