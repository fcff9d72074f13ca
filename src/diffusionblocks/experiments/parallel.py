"""Training by whoever there is: one process, or several that train the parts of a run side by side."""

from __future__ import annotations

from pathlib import Path

from ..training.run_log import Logger
from . import run
from .experiment import Experiment
from .parts import is_in_parts, train_in_parts
from .tasks.task import RunResult


def train(
    experiment: Experiment,
    folder: Path,
    *,
    loggers: tuple[Logger, ...] = (),
    resume: bool = True,
    progress: bool = True,
    measure: bool = True,
) -> RunResult:
    """Train, save and evaluate an experiment: see `run.train`. A run that several processes began goes on in this one.

    Args:
        experiment, folder: of the run.
        loggers: further receivers of the log.
        resume: False starts anew.
        progress: announce the phases, and show progress bars.
        measure: whether to evaluate.
    """
    engine = train_in_parts if resume and is_in_parts(folder) else run.train
    return engine(experiment, folder, loggers=loggers, resume=resume, progress=progress, measure=measure)
