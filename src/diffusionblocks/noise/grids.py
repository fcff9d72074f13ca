"""Level grids: how the steps of a sampler are spread over the noise levels, by name.

A grid gives the levels between the highest and the lowest that are read. Each process names the grids that suit it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..common.registry import Registry

if TYPE_CHECKING:
    from .process import NoiseProcess

#: Names of earlier versions, which recipes and callers may go on using.
_OLDER_NAMES = {"equal-mass": "equal-quantile"}


def grid_name(name: Any) -> Any:
    """The name of today for a level grid; whatever is no older name stays as it is."""
    return _OLDER_NAMES.get(name, name) if isinstance(name, str) else name


def _equal_quantile(process: NoiseProcess, steps: int, rho: float) -> torch.Tensor:
    """Equal steps of the quantile: as much training between any two neighbours."""
    quantile = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64).flip(0)
    low, high = process.coverage or (0.0, 1.0)
    if steps > 1 and not (low < 0.5 / steps and high > 1 - 0.5 / steps):
        quantile = low + quantile * (high - low)
    # Else the inner levels stay those of the whole range: with a step a block they are the blocks' boundaries.
    return process.icdf(quantile)


def _karras(process: NoiseProcess, steps: int, rho: float) -> torch.Tensor:
    """Equal steps of level^(1/rho) (EDM eq. 5)."""
    if not (math.isfinite(rho) and rho > 0):
        raise ValueError(f"rho must be a finite number > 0, got {rho}")
    ramp = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    top, bottom = process.read_max ** (1 / rho), process.read_min ** (1 / rho)
    levels: torch.Tensor = (top + ramp * (bottom - top)) ** rho
    return levels


def _uniform(process: NoiseProcess, steps: int, rho: float) -> torch.Tensor:
    """Equal steps of the level."""
    return torch.linspace(process.read_min, process.read_max, steps + 1, dtype=torch.float64).flip(0)


def _cosine(process: NoiseProcess, steps: int, rho: float) -> torch.Tensor:
    """Quantile sin(pi/2 * (1 - i/steps)) at step i: the first steps are the shortest (MD4)."""
    ramp = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return process.icdf(torch.sin(math.pi / 2 * ramp))


#: name -> function of (process, steps, rho) to steps + 1 descending levels, float64, of which only the inner ones count
GRIDS: Registry[Callable[[NoiseProcess, int, float], torch.Tensor]] = Registry("level grid")
GRIDS.register("equal-quantile", _equal_quantile)
GRIDS.register("karras", _karras)
GRIDS.register("uniform", _uniform)
GRIDS.register("cosine", _cosine)
