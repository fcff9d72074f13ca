"""Whether a run fits the machine that it is about to start on: the free memory of its GPU, and of its host."""

from __future__ import annotations

import logging

import torch

from ..common.machine import free_host_memory
from ..common.messages import Say, one_line
from ..experiments.experiment import Experiment
from ..reports.tables import format_bytes
from .planner import MARGIN, cheapest_changes
from .predictor import Predictor, why_not_predicted

_log = logging.getLogger(__name__)


def check_fits(experiment: Experiment, *, say: Say = lambda line: None) -> None:
    """Refuse a run on a GPU whose step would run out of the GPU's free memory, or that would fill the host's.

    A step within the prediction's error of what is free is told in a warning. On a CPU nothing is predicted.

    Args:
        experiment: what to train; one that distils is not predicted.
        say: is told of each step that is about to be traced, which takes up to some seconds.

    Raises:
        ValueError: it would not fit; with the three cheapest changes with which it would.
    """
    if experiment.device.type != "cuda" or experiment.recipe.train.teaching is not None:
        return
    predictor = Predictor(experiment.recipe, say=say)
    check_host(predictor, free_host_memory())
    if (why := why_not_predicted(experiment.recipe)) is not None:
        _log.warning("%s", why)
        return
    try:
        predictor.forecast()
    except ValueError:
        raise
    except Exception as error:  # what cannot be followed without memory can be trained all the same
        _log.warning("the memory of a step is not predicted: %s", one_line(error))
        return
    free, _ = torch.cuda.mem_get_info(experiment.device)
    check_device(predictor, free)


def check_device(predictor: Predictor, free: int) -> None:
    """Refuse a step that needs more than is free on the GPU, were the prediction too high by `MARGIN`.

    Args:
        predictor: of the recipe.
        free: bytes.

    Raises:
        ValueError: see `check_fits`.
    """
    peak = predictor.forecast().ledger.peak
    if peak * (1 + MARGIN) <= free:
        return
    what = f"a step takes {format_bytes(peak)} by prediction, and the GPU has {format_bytes(free)} free"
    if peak * (1 - MARGIN) <= free:
        _log.warning("%s, which is within the prediction's error: it may run out of memory", what)
        return
    options = [fit.options for fit in cheapest_changes(predictor, free)]
    fixes = (
        f"what fits, the cheapest first: {'; or '.join(options)}" if options else "no memory optimisation makes it fit"
    )
    raise ValueError(f"{what}: {fixes}. --unchecked starts it all the same")


def check_host(predictor: Predictor, free: int) -> None:
    """Refuse blocks and data that the host's memory has no room for.

    Args:
        predictor: of the recipe.
        free: bytes.

    Raises:
        ValueError: more than is free, with the settings that would take less.
    """
    host, train = predictor.host_bytes(), predictor.recipe.train
    if host.total <= free:
        return
    fixes = []
    if host.waiting and train.offload == "host":
        fixes.append("--set train.offload=disk")
    if host.data:
        fixes.append("fewer examples")
    if host.waiting and train.optimizer == "adamw":
        fixes.append("--set train.optimizer=adamw-8bit")
    if not fixes:
        fixes.append("fewer layers, or more blocks with fewer each (blocks.num_blocks)")
    raise ValueError(
        f"the host has {format_bytes(free)} of memory free, and the run keeps {format_bytes(host.waiting)} of waiting "
        f"blocks and {format_bytes(host.data)} of data there: take less with {', or '.join(fixes)}. --unchecked starts "
        "it all the same"
    )
