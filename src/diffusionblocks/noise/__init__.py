"""What a noise level means: its distribution, its corruption of the target, what the network sees and is told of it."""

from .complexity import Monitor, path_time, quantile_times
from .ddpm import DDPM
from .edm import EDM
from .exploding import VarianceExploding
from .fitted_levels import accumulated, fitted_quantiles
from .flow import FlowMatching
from .gaussian import GaussianProcess, Preconditioning
from .grids import GRIDS, grid_name
from .masking import SCHEDULES, Masking
from .process import (
    MEASURED_STRATEGIES,
    NOISE_PROCESSES,
    PARTITION_STRATEGIES,
    NoiseProcess,
    match,
    one_level,
    register_noise_process,
)

__all__ = [
    "DDPM",
    "EDM",
    "GRIDS",
    "MEASURED_STRATEGIES",
    "NOISE_PROCESSES",
    "PARTITION_STRATEGIES",
    "SCHEDULES",
    "FlowMatching",
    "GaussianProcess",
    "Masking",
    "Monitor",
    "NoiseProcess",
    "Preconditioning",
    "VarianceExploding",
    "accumulated",
    "fitted_quantiles",
    "grid_name",
    "match",
    "one_level",
    "path_time",
    "quantile_times",
    "register_noise_process",
]
