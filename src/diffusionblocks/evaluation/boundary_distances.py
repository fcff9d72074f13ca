"""How well neighbouring blocks agree where one hands over to the other, and what moving that boundary changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.finite import FiniteCheck
from ..common.modules import evaluating
from ..core.model import DiffusionBlocks
from ..noise import GaussianProcess
from ..targets import ImageTarget
from .row import Row
from .trajectories import path_velocity

#: By what shares of its level a boundary is moved.
SHARES = (-0.10, -0.05, 0.0, 0.05, 0.10)


@dataclass(frozen=True)
class BoundaryRow(Row):
    """How far two neighbouring blocks differ at the boundary between them, at the same noised examples.

    Attributes:
        level: the boundary: sigma, or t of flow matching before the shift.
        above: index of the block that owns the levels above it.
        below: index of the block that owns it and the levels below.
        velocity: root mean square of the difference of their velocities, over that of the velocities themselves.
        denoised: the same of D, which at low noise is much less: there z says most of it.
        examples: how many.
    """

    level: float
    above: int
    below: int
    velocity: float
    denoised: float
    examples: int


@dataclass(frozen=True)
class MovedRow(Row):
    """What a moved boundary changes of the samples of the same seeds.

    Attributes:
        boundary: where it was trained.
        share: by what share of its level it is moved.
        level: where it is then.
        calls: of a chain's network calls, those that another block answers now.
        change: root mean square of the images' difference from those of no moved boundary, over that of the images.
    """

    boundary: float
    share: float
    level: float
    calls: int
    change: float


def check_boundaries(model: DiffusionBlocks) -> GaussianProcess:
    """The noise process of a model that has boundaries between blocks.

    Raises:
        ValueError: no diffusion model of images, or one block, which has no neighbour.
    """
    if not isinstance(model.target, ImageTarget):
        raise ValueError(f"boundaries are compared of diffusion models of images, and {model.model_class} is none")
    if model.partition.num_blocks < 2:
        raise ValueError("a boundary lies between two blocks, and this model has one; give one of several blocks")
    assert isinstance(model.noise, GaussianProcess), "images have no other"
    return model.noise


@torch.no_grad()
def boundary_distances(
    model: DiffusionBlocks, batches: Iterable[Mapping[str, Tensor]], *, seed: int = 0
) -> list[BoundaryRow]:
    """How far neighbouring blocks differ at each boundary, of examples noised to it.

    Velocities are those of the straight path of unit-variance data: of flow matching its own, v = (z - D) / t'. The
    mean square of both blocks' velocities is what a difference is measured by. Labels and texts are those of the
    examples, without guidance.

    Args:
        model: blocks of a diffusion model of images, two or more.
        batches: of examples on the model's device, read once.
        seed: of the noise.

    Returns:
        A row a boundary, that between blocks 0 and 1 first.

    Raises:
        ValueError: another model, no examples, or D that is not finite.
    """
    noise, partition = check_boundaries(model), model.partition
    boundaries = partition.boundaries[-2:0:-1]
    sums = torch.zeros(len(boundaries), 4, dtype=torch.float64, device=model.device)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    check, count = FiniteCheck(), 0
    with evaluating(model):
        for batch in batches:
            eps = model.block(0).draw_noise(batch, generator)
            count += len(eps)
            for upper, level in enumerate(boundaries):
                above, below = (model.block(b).losses_at(batch, level, noise=eps) for b in (upper, upper + 1))
                denoised = [check.values(result.output, "D", level).double() for result in (above, below)]
                process = noise.for_tokens(model.target.tokens_of(above.z.shape))
                velocities = [path_velocity(process, level, above.z.double(), each) for each in denoised]
                sums[upper] += torch.stack([part for pair in (velocities, denoised) for part in _squares(*pair)])
    check.read()
    if not count:
        raise ValueError("there are no examples to compare neighbouring blocks at: the batches are empty")
    tiny = torch.finfo(torch.float64).tiny  # fresh networks may give 0, all of them the same
    distances = (sums[:, ::2] / sums[:, 1::2].clamp(min=tiny)).sqrt().tolist()
    return [
        BoundaryRow(level, upper, upper + 1, velocity, denoised, count)
        for upper, (level, (velocity, denoised)) in enumerate(zip(boundaries, distances, strict=True))
    ]


def _squares(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The squared norm of a difference, and the mean of both squared norms."""
    return (one - other).square().sum(), (one.square().sum() + other.square().sum()) / 2


def moved_boundaries(
    model: DiffusionBlocks,
    draw: Callable[[DiffusionBlocks], Tensor],
    call_levels: Sequence[float],
    shares: Sequence[float] = SHARES,
) -> Iterator[tuple[MovedRow, Tensor]]:
    """Sample with each boundary moved by shares of its level, the others staying where they are.

    Args:
        model: see `boundary_distances`.
        draw: images (n, ...) of a model, always of the same seeds.
        call_levels: the levels of a chain's network calls.
        shares: each > -1; one that moves a boundary to its neighbour or beyond the levels is left out.

    Yields:
        A row and its images, for each boundary, that between blocks 0 and 1 first, and each share.

    Raises:
        ValueError: another model.
    """
    check_boundaries(model)
    inner = list(model.partition.boundaries[1:-1])
    unmoved = draw(model)
    for place in range(len(inner) - 1, -1, -1):
        low, high = model.partition.boundaries[place], model.partition.boundaries[place + 2]
        for share in shares:
            level = inner[place] * (1 + share)
            if not low < level < high:
                continue
            view = model.with_boundaries([*inner[:place], level, *inner[place + 1 :]]) if share else model
            images = draw(view) if share else unmoved
            calls = sum(model.partition.block_of(one) != view.partition.block_of(one) for one in call_levels)
            difference = (images.double() - unmoved.double()).square().mean().sqrt()
            change = float(difference / unmoved.double().square().mean().sqrt())
            yield MovedRow(inner[place], share, level, calls, change), images
