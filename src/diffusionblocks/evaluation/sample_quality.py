"""Generated images, measured: Frechet distance to real ones under given features, and images a second."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from ..core.image_sampler import ImageSampler
from ..core.model import DiffusionBlocks
from ..noise import GaussianProcess
from ..sampling import Callback, calls, in_interval, network_calls
from ..targets import ImageTarget
from .features import Features
from .frechet import FeatureStatistics, frechet_distance
from .row import Row
from .work import ALONE, Work

T = TypeVar("T")

#: The uint8 images (n, C, H, W) of a batch, by what names it.
Images = Callable[[T], Tensor]


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
        images_per_second: sampling alone, after a first batch; of several ranks together.
        guidance_interval, churn, churn_interval, churn_noise: of the setting too; what is as by default is no entry of
            `to_dict`.
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

    @override
    def to_dict(self) -> dict[str, Any]:
        own = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in super().to_dict().items() if value != own[name]}


def pieces_of(count: int, size: int) -> list[range]:
    """The numbers 0 to `count` - 1, so many at a time."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def statistics(features: Features, batches: Iterable[Tensor]) -> FeatureStatistics:
    """Mean and covariance of the features of uint8 images (n, C, H, W), a batch at a time."""
    return shared_statistics(features, batches, lambda images: images, ALONE)


def shared_statistics(features: Features, batches: Iterable[T], images: Images[T], work: Work) -> FeatureStatistics:
    """As `statistics`, by several ranks.

    Args:
        features: what to measure with.
        batches: what names each batch.
        images: gives the uint8 images (n, C, H, W) of one.
        work: who computes which batch; on ranks but the first the statistics are of nothing.
    """
    result = FeatureStatistics(features.dim)
    for results in work.in_order(batches, lambda batch: {"features": features(images(batch))}):
        result.update(results["features"])
    return result


def sample_batch(
    model: DiffusionBlocks | ImageSampler,
    images: range,
    setting: Setting,
    *,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Some of the samples (n, C, H, W) of a model or its sampler; image i has seed `seed` + i.

    Labels take turns: `labels`, default all classes. For the callback see `DiffusionBlocks.sample`.
    """
    target = model.target
    assert isinstance(target, ImageTarget)
    turns = range(target.num_classes) if labels is None else labels
    watched: dict[str, Any] = {} if callback is None else {"callback": callback}
    return model.sample(
        torch.tensor([turns[i % len(turns)] for i in images]) if turns else None,
        seeds=[seed + i for i in images],
        **dataclasses.asdict(setting),
        **watched,
    )


def sample_batches(
    model: DiffusionBlocks | ImageSampler, count: int, setting: Setting, *, batch_size: int, seed: int = 0
) -> Iterator[Tensor]:
    """Samples (n, C, H, W), `batch_size` at a time: see `sample_batch`."""
    return (sample_batch(model, images, setting, seed=seed) for images in pieces_of(count, batch_size))


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
    work: Work = ALONE,
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
        seed: see `sample_batch`.
        progress: show a progress bar.
        work: who computes which batch.

    Returns:
        A row a setting; none on ranks but the first.

    Raises:
        ValueError: samples < 1, samples or features that are not finite, or what `DiffusionBlocks.sample` refuses.
    """
    if samples < 1:
        raise ValueError(f"samples must be >= 1, got {samples}")
    pieces = pieces_of(samples, batch_size)
    rows, noise = [], model.noise
    assert isinstance(noise, GaussianProcess)
    for setting in settings:

        def measure(images: range, setting: Setting = setting) -> dict[str, Tensor]:
            begin = _now(model.device)
            batch = sample_batch(model, images, setting, seed=seed)
            seconds = torch.tensor(_now(model.device) - begin, dtype=torch.float64)
            more = {} if features is None else {"features": features(pixels(batch))}
            return {"seconds": seconds, **more}

        own = FeatureStatistics(features.dim) if features is not None else None
        seconds = []
        bar = tqdm(pieces, disable=not (progress and work.leads), unit="batch")
        for results in work.in_order(bar, measure):
            seconds.append(float(results["seconds"]))
            if own is not None:
                own.update(results["features"])
        if not work.leads:
            continue
        # The first batch of each rank warms up, and counts only where no rank has another one.
        warm = work.size if len(pieces) > work.size else 0
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
                images_per_second=sum(map(len, pieces[warm:])) / work.seconds(seconds[warm:]),
            )
        )
    return rows


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
