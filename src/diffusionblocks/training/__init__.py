"""One trainer for end-to-end models and for blocks; see `trainer.py`."""

from .config import TrainConfig
from .optim import check_optimizer
from .step import BatchMaker
from .trainer import Diverged, Interrupted, Trainer
from .units import EndToEnd, Unit, trainable, units_of

__all__ = [
    "BatchMaker",
    "Diverged",
    "EndToEnd",
    "Interrupted",
    "TrainConfig",
    "Trainer",
    "Unit",
    "check_optimizer",
    "trainable",
    "units_of",
]
