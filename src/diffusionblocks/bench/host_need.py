"""Host memory that a method will take, refused before it is taken: users and machines run out of it first."""

from __future__ import annotations

from ..common.machine import free_host_memory
from ..common.modules import bytes_of
from ..experiments.experiment import Experiment
from ..planning.predictor import Predictor
from ..reports.tables import format_bytes
from .bench_models import recipe_of
from .methods import METHODS, Spec


def host_bytes_of(spec: Spec) -> int:
    """Bytes of weights, gradients and optimizer state that a method keeps in host memory, before they are there."""
    recipe, copies = recipe_of(spec), METHODS[spec.method].host_copies
    if copies:
        return round(copies * bytes_of(Experiment(recipe).outline.parameters()))
    waiting = Predictor(recipe).host_bytes().waiting
    # Blocks are built on the host before their buffers are.
    return waiting + bytes_of(Experiment(recipe).outline.parameters()) if waiting else 0


def check_host(spec: Spec) -> None:
    """Refuse a measurement that the host's memory has no room for.

    Raises:
        ValueError: it is so.
    """
    if spec.device != "cuda":
        return
    need, free = host_bytes_of(spec), free_host_memory()
    if need > free:
        raise ValueError(
            f"{spec.method} of {spec.model} keeps about {format_bytes(need)} in host memory, of which "
            f"{format_bytes(free)} is free"
        )
