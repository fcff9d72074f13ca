"""What a noise level means: its distribution, its corruption of the target, what the network sees and is told of it."""

from .edm import EDM, PARTITION_STRATEGIES, Preconditioning
from .fitted_levels import fitted_quantiles
from .masking import SCHEDULES, Masking
from .process import NoiseProcess, one_level

__all__ = [
    "EDM",
    "PARTITION_STRATEGIES",
    "SCHEDULES",
    "Masking",
    "NoiseProcess",
    "Preconditioning",
    "fitted_quantiles",
    "one_level",
]
