"""Classification by denoising: from noise at the highest level read down to a label, averaged over noise seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.fields import MOST_LEVELS, check_count
from ..common.finite import FiniteCheck
from ..noise import GaussianProcess
from ..targets import LabelTarget
from .solvers import euler


@dataclass(frozen=True)
class Prediction:
    """Class probabilities, averaged over noise seeds.

    Attributes:
        probabilities: float32, shape (batch, num_classes), rows sum to 1.
        logits: their logarithm, same shape.
        trajectory: on request, the probabilities at every denoising step, shape (steps, batch, num_classes).
        levels: the steps' levels, descending.
    """

    probabilities: Tensor
    logits: Tensor
    levels: tuple[float, ...]
    trajectory: Tensor | None = None


def predict_labels(
    network: Callable[[Tensor, float], Tensor],
    target: LabelTarget,
    noise: GaussianProcess,
    *,
    batch_size: int,
    device: torch.device,
    steps: int = 1,
    seeds: int = 8,
    feedback: str = "soft",
    grid: str = "equal-quantile",
    generator: torch.Generator | None = None,
    return_trajectory: bool = False,
    owner: Callable[[float], int] | None = None,
) -> Prediction:
    """Run `steps` network calls at descending levels, from `seeds` noise seeds, and average the probabilities.

    A chain with one seed *samples* from p(label | image), so its accuracy falls with more steps; the average over
    seeds estimates that distribution itself. With steps=1 the label is read off at `read_max`.

    Args:
        network: maps z (batch, dim) and a level to logits (batch, num_classes).
        target: the label target, whose space z lives in.
        noise: the noise process.
        batch_size: number of samples.
        device: where to run.
        steps: network calls per chain, >= 1.
        seeds: chains to average, >= 1.
        feedback: `soft` or `hard`: what a prediction feeds to the next step.
        grid: level grid, one of `noise.grids`.
        generator: source of the starting noise.
        return_trajectory: keep the probabilities of every step.
        owner: level -> block, which an error then names.

    Raises:
        ValueError: steps or seeds < 1, unknown feedback or grid, or logits that are not finite.
    """
    check_count("seeds", seeds, MOST_LEVELS)
    if feedback not in ("soft", "hard"):
        raise ValueError(f"unknown feedback {feedback!r}; allowed: soft, hard")
    levels = noise.levels(steps, grid)
    total: Tensor | None = None
    check = FiniteCheck(owner=owner)
    with torch.no_grad():
        for _ in range(seeds):
            visited: list[Tensor] = []

            def denoise(z: Tensor, level: float, visited: list[Tensor] = visited) -> Tensor:
                logits = check.logits(network(z, level).float(), level)
                visited.append(logits.softmax(dim=-1))
                return target.denoised(logits, feedback)

            shape = (batch_size, target.embedding.shape[-1])
            euler(denoise, noise.prior(shape, generator=generator, device=device), levels, noise)
            chain = torch.stack(visited) if return_trajectory else visited[-1][None]
            total = chain if total is None else total + chain
    assert total is not None
    check.read()
    mean = total / seeds
    return Prediction(
        probabilities=mean[-1],
        logits=mean[-1].clamp_min(torch.finfo(torch.float32).tiny).log(),
        levels=tuple(levels[:-1]),
        trajectory=mean if return_trajectory else None,
    )
