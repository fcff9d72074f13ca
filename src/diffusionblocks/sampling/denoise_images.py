"""Images by denoising: starting noise that follows seeds alone, classifier-free guidance, and the chain itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.finite import FiniteCheck
from ..noise import GaussianProcess
from .chain import Callback, Denoiser, check_interval, in_interval
from .seed_noise import SeedNoise
from .solvers import SOLVERS, Churn

# (z, labels, level) -> D. Labels are a tensor, or None for a network that has none.
Network = Callable[[Tensor, Any, float], Tensor]

# (z, what the model reads beside it, level) -> D
InputsNetwork = Callable[[Tensor, Mapping[str, Tensor], float], Tensor]


def prior_of_seeds(
    noise: GaussianProcess, shape: tuple[int, ...], seeds: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """z at the highest level that is read, where chains start, one a seed.

    Row i depends on seeds[i] alone, so it is the same in every batch, and up to rounding on every device: `SeedNoise`.

    Args:
        noise: the noise process.
        shape: of one sample, such as (C, H, W).
        seeds: one a sample, whole numbers from 0 to 2^63 - 1; equal seeds give equal rows.
        device: where the result is needed.

    Returns:
        z, float32, shape (len(seeds), *shape).

    Raises:
        ValueError: no seed, or one that is no whole number from 0 to 2^63 - 1.
    """
    return first_z(noise, SeedNoise(seeds, shape, device))


def first_z(noise: GaussianProcess, source: SeedNoise) -> Tensor:
    """z at the highest level that is read, of a source whose later draws a stochastic chain goes on with."""
    return noise.alpha_sigma(noise.read_max)[1] * source.draw()


class GuidedDenoiser:
    """A denoiser under classifier-free guidance: `guided` and `guided_by_inputs` make one.

    Args:
        network: maps z, what the model reads beside it, and a level to D, each row on its own.
        inputs: what the model reads, by name, n rows each.
        both: the same, with the n rows behind them that guidance leads away from; None where guidance is 1.
        guidance: see `guided`.
        interval: see `guided`.
    """

    def __init__(
        self,
        network: InputsNetwork,
        inputs: Mapping[str, Tensor],
        both: Mapping[str, Tensor] | None,
        guidance: float,
        interval: tuple[float, float] | None,
    ) -> None:
        self.network = network
        self.inputs = inputs
        self.both = both
        self.guidance = guidance
        self.interval = interval

    def guides(self, level: float) -> bool:
        """Whether D is guided at a level: then a call is of 2n rows, else of n."""
        return self.guidance != 1 and in_interval(level, self.interval)

    def __call__(self, z: Tensor, level: float) -> Tensor:
        """D of z (n, ...) at a level, in one network call."""
        for name, value in self.inputs.items():
            if len(value) != len(z):
                raise ValueError(f"{name} must be one a sample: z has {len(z)} samples, {name} {len(value)}")
        if not self.guides(level):
            return self.network(z, self.inputs, level)
        assert self.both is not None
        of_inputs, of_negative = self.network(torch.cat([z, z]), self.both, level).chunk(2)
        return of_negative + self.guidance * (of_inputs - of_negative)


def guided(
    network: Network,
    labels: Tensor | None,
    null_class: int | None,
    guidance: float,
    interval: tuple[float, float] | None = None,
) -> GuidedDenoiser:
    """Classifier-free guidance (arXiv 2207.12598) on D: D = D_null + guidance * (D_label - D_null).

    Args:
        network: maps z (n, ...), labels (n,) and a level to D (n, ...), each row on its own. Labelled and unlabelled
            rows go through it in one call, of 2n rows, labelled rows first; with guidance 1, one call of n rows.
        labels: int64 (n,), the class of each sample; None for a model without labels, which then gets None.
        null_class: the label that stands for "no class"; None if the model has none.
        guidance: 0 ignores the labels, 1 follows the model, more than 1 exaggerates the labels.
        interval: (low, high): only levels low < level <= high are guided (arXiv 2404.07724). At others D is that of the
            labels, from one call of n rows. None: all levels are guided.

    Returns:
        The denoiser of these n samples, for `sample_images`.

    Raises:
        ValueError: guidance negative or not finite, or other than 1 without labels or null class; an interval that is
            none, or without guidance; labels of another shape; or, when called, a z of another batch size.
    """
    check_guidance(guidance)
    if labels is not None and labels.dim() != 1:
        raise ValueError(f"labels must have shape (n,), one a sample; got {tuple(labels.shape)}")
    if guidance != 1:
        for name, value in (("labels", labels), ("null_class", null_class)):
            if value is None:
                raise ValueError(f"guidance = {guidance} needs {name}, got None: give {name}, or set guidance to 1")

    def of_labels(z: Tensor, inputs: Mapping[str, Tensor], level: float) -> Tensor:
        return network(z, inputs.get("labels"), level)

    inputs = {} if labels is None else {"labels": labels}
    null = None if labels is None or null_class is None else {"labels": torch.full_like(labels, null_class)}
    return guided_by_inputs(of_labels, inputs, null, guidance, interval)


def check_guidance(guidance: float) -> None:
    """Raise ValueError unless guidance is a finite number >= 0."""
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance must be a finite number >= 0, got {guidance}")


def guided_by_inputs(
    network: InputsNetwork,
    inputs: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None,
    guidance: float,
    interval: tuple[float, float] | None = None,
) -> GuidedDenoiser:
    """Classifier-free guidance of any inputs: D = D_negative + guidance * (D_inputs - D_negative).

    Args:
        network: maps z (n, ...), inputs of n rows and a level to D (n, ...), each row on its own. Both kinds of rows go
            through it in one call, of 2n rows; with guidance 1, one call of n rows.
        inputs: what the model reads, by name.
        negative: what it reads of the other rows, of the same names and shapes; None where guidance is 1.
        guidance: a finite number >= 0.
        interval: see `guided`.

    Returns:
        The denoiser of these n samples, for `sample_images`.

    Raises:
        ValueError: guidance out of range, or other than 1 without `negative`, or where that has other shapes; an
            interval that is none, or where guidance is 1.
    """
    check_guidance(guidance)
    check_interval("guidance_interval", interval)
    if guidance == 1:
        if interval is not None:
            raise ValueError(
                f"guidance_interval = {list(interval)} says which levels are guided, and guidance = 1 guides none: set "
                "guidance to another number, or leave guidance_interval out"
            )
        return GuidedDenoiser(network, inputs, None, guidance, interval)
    if negative is None:
        raise ValueError(f"guidance = {guidance} needs negative_inputs, got None: give these, or set guidance to 1")
    if inputs.keys() != negative.keys():
        raise ValueError(
            f"negative_inputs has {sorted(negative)}, inputs has {sorted(inputs)}; give the same entries in both"
        )
    for name, value in inputs.items():
        if value.shape != negative[name].shape:
            raise ValueError(
                f"negative_inputs: {name} has shape {tuple(negative[name].shape)}, that of inputs "
                f"{tuple(value.shape)}; pad both to one length, with a mask where the model reads one"
            )
    both = {name: torch.cat([value, negative[name]]) for name, value in inputs.items()}
    return GuidedDenoiser(network, inputs, both, guidance, interval)


def check_guided_levels(
    levels: Sequence[float], interval: tuple[float, float] | None, name: str = "guidance_interval"
) -> None:
    """Raise ValueError unless some level at which a chain asks its network lies in the guidance interval."""
    check_interval(name, interval)
    starts = list(levels[:-1])
    if not any(in_interval(level, interval) for level in starts):
        raise ValueError(
            f"{name} = {list(interval or ())} holds none of the chain's levels, which go from "
            f"{starts[0]:.4g} down to {starts[-1]:.4g}, so nothing would be guided: widen it, or set guidance to 1"
        )


def sample_images(
    denoiser: Denoiser,
    z: Tensor,
    levels: Sequence[float],
    process: GaussianProcess,
    *,
    solver: str = "euler",
    churn: Churn | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    owner: Callable[[float], int] | None = None,
) -> Tensor:
    """Run a chain of denoising steps, without gradients.

    Args:
        denoiser: maps z and its level to D, such as `guided` gives.
        z: noised images at levels[0], float32 or float64, such as `prior_of_seeds` gives.
        levels: descending, such as `GaussianProcess.sampling_levels` gives; see `solvers.euler`.
        process: the noise process.
        solver: a name in `SOLVERS`.
        churn: fresh noise before every step, of solvers that take it; None: none.
        callback: called once a step with (step, level, z, D), see `solvers.euler`.
        progress: show a progress bar, one tick a step.
        owner: level -> block, which an error then names.

    Returns:
        z at levels[-1], which at a last level of 0 is the images; shape and dtype of z.

    Raises:
        ValueError: unknown solver, churn that it does not take, levels that do not descend or are out of range, z of
            another dtype, or D or z that are not finite.
    """
    solve = SOLVERS[SOLVERS.check(solver)]
    check = FiniteCheck(owner=owner)
    with torch.no_grad(), tqdm(total=max(len(levels) - 1, 0), disable=not progress, unit="step") as bar:

        def tick(step: int, level: float, z: Tensor, denoised: Tensor) -> None:
            if callback is not None:
                callback(step, level, z, denoised)
            bar.update()

        images = solve(lambda z, level: check.values(denoiser(z, level), "D", level), z, levels, process, tick, churn)
    check.values(images, "the images at the chain's end")
    check.read()
    return images
