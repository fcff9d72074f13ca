"""One trainer for end-to-end models and for blocks; see `trainer.py`."""

from ..data.dataset import BatchMaker
from .checkpoint import RunDescription
from .interruption import Interrupted
from .optim import check_optimizer
from .train_config import TrainConfig
from .trainer import Diverged, Trainer
from .units import Baseline, EndToEnd, Unit, trainable, units_of

__all__ = [
    "Baseline",
    "BatchMaker",
    "Diverged",
    "EndToEnd",
    "Interrupted",
    "RunDescription",
    "TrainConfig",
    "Trainer",
    "Unit",
    "check_optimizer",
    "trainable",
    "units_of",
]
