"""Generated images, measured: Frechet distance to real ones under given features, and images a second."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..core.image_sampler import ImageSampler
from ..core.model import DiffusionBlocks
from ..noise import GaussianProcess
from ..sampling import Callback, calls, in_interval, network_calls
from ..targets import ImageTarget
from .features import Features
from .frechet import FeatureStatistics, frechet_distance
from .row import Row


@dataclass(frozen=True)
class Setting:
    """How images are sampled; see `DiffusionBlocks.sample`."""

    solver: str = "euler"
    steps: int = 50
    grid: str = "karras"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    churn: float = 0.0
    churn_interval: tuple[float, float] | None = None
    churn_noise: float = 1.0

    @property
    def calls(self) -> int:
        """Network calls per chain; with guidance each is for two images."""
        return calls(self.solver, self.steps, ends_at_zero=True)

    def evaluations(self, noise: GaussianProcess) -> int:
        """How often the network sees an image of its own: `calls`, those that are guided counted twice (NFE)."""
        if self.guidance == 1:
            return self.calls
        if self.guidance_interval is None:
            return 2 * self.calls
        levels = noise.sampling_levels(self.steps, self.grid)
        each = network_calls(self.solver, levels, noise, churn=self.churn, churn_interval=self.churn_interval)
        return sum(1 + in_interval(call.level, self.guidance_interval) for call in each)


@dataclass(frozen=True)
class SampleRow(Row):
    """What one setting gave.

    Attributes:
        solver, steps, calls, grid, guidance: the setting.
        evaluations: how often the network saw an image of its own, guided calls counted twice.
        samples: number of images.
        features: what the Frechet distances are measured with; None where they are not.
        fd_train, fd_test: distance to all training and test images.
        images_per_second: sampling alone, after a first batch.
        guidance_interval, churn, churn_interval, churn_noise: of the setting too.
    """

    solver: str
    steps: int
    calls: int
    grid: str
    guidance: float
    samples: int
    features: str | None
    fd_train: float | None
    fd_test: float | None
    images_per_second: float
    evaluations: int
    guidance_interval: tuple[float, float] | None = None
    churn: float = 0.0
    churn_interval: tuple[float, float] | None = None
    churn_noise: float = 1.0


def statistics(features: Features, batches: Iterable[Tensor]) -> FeatureStatistics:
    """Mean and covariance of the features of uint8 images (n, C, H, W), a batch at a time."""
    result = FeatureStatistics(features.dim)
    for images in batches:
        result.update(features(images))
    return result


def sample_batches(
    model: DiffusionBlocks | ImageSampler,
    count: int,
    setting: Setting,
    *,
    batch_size: int,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Iterator[Tensor]:
    """Samples (n, C, H, W) of a model or its sampler, `batch_size` at a time; image i has seed `seed` + i.

    Labels take turns: `labels`, default all classes. The callback sees the first batch (see `DiffusionBlocks.sample`).
    """
    target = model.target
    assert isinstance(target, ImageTarget)
    turns = range(target.num_classes) if labels is None else labels
    for start in tqdm(range(0, count, batch_size), disable=not progress, unit="batch"):
        images = range(start, min(start + batch_size, count))
        watched: dict[str, Any] = {"callback": callback} if callback is not None and start == 0 else {}
        yield model.sample(
            torch.tensor([turns[i % len(turns)] for i in images]) if turns else None,
            seeds=[seed + i for i in images],
            **dataclasses.asdict(setting),
            **watched,
        )


def measure_samples(
    model: DiffusionBlocks | ImageSampler,
    settings: Iterable[Setting],
    *,
    samples: int,
    batch_size: int,
    pixels: Callable[[Tensor], Tensor],
    features: Features | None,
    references: Mapping[str, FeatureStatistics],
    seed: int = 0,
    progress: bool = False,
) -> list[SampleRow]:
    """Sample with every setting, and measure the images' Frechet distances.

    Args:
        model: a diffusion model's blocks, or their sampler.
        settings: what to measure.
        samples: images a setting.
        batch_size: images at a time.
        pixels: turns samples into uint8 images, which the features see: as they would be saved.
        features: what to measure with; None measures speed alone.
        references: feature statistics of the real images `train` and `test`.
        seed: see `sample_batches`.
        progress: show a progress bar.

    Raises:
        ValueError: samples < 1, samples or features that are not finite, or what `DiffusionBlocks.sample` refuses.
    """
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    rows, noise = [], model.noise
    assert isinstance(noise, GaussianProcess)
    for setting in settings:
        own = FeatureStatistics(features.dim) if features is not None else None
        seconds, timed = 0.0, 0
        source = sample_batches(model, samples, setting, batch_size=batch_size, seed=seed, progress=progress)
        begin = _now(model.device)
        for number, batch in enumerate(source):
            # The first batch warms up, and counts only where it is the only one.
            end = _now(model.device)
            if number or samples <= batch_size:
                seconds, timed = seconds + end - begin, timed + len(batch)
            if own is not None and features is not None:
                own.update(features(pixels(batch)))
            begin = _now(model.device)
        distances = {}
        if own is not None:
            distances = {name: frechet_distance(own, real) for name, real in references.items()}
        rows.append(
            SampleRow(
                **dataclasses.asdict(setting),
                calls=setting.calls,
                evaluations=setting.evaluations(noise),
                samples=samples,
                features=features.name if features is not None else None,
                fd_train=distances.get("train"),
                fd_test=distances.get("test"),
                images_per_second=timed / seconds,
            )
        )
    return rows


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
