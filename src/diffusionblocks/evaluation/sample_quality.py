"""Generated images, measured: their quality beside real ones by every sampling setting, and images a second."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..common.progress import Progress
from ..core.image_sampler import ImageSampler
from ..core.model import DiffusionBlocks
from ..noise import GaussianProcess
from ..sampling import Callback, calls, in_interval, network_calls
from ..targets import ImageTarget
from .features import Features
from .frechet import FeatureStatistics
from .image_quality import ImageMeasures, Quality
from .row import Row
from .work import ALONE, Work

#: Numbers of images -> what `DiffusionBlocks.sample` is told of them: `inputs`, `negative_inputs`, `sizes`.
Conditions = Callable[[range], Mapping[str, Any]]


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
        features: what the images are measured with; None where they are not.
        fd_train, fd_test, fd_train_infinity, fd_test_infinity, precision, recall, density, coverage, neighbours,
        inception_score_analogue, class_accuracy: see `Quality`.
        fd_real: distance of all real test images to all real training images.
        images_per_second: sampling alone, after a first batch; of several ranks together.
        guidance_interval, churn, churn_interval, churn_noise: of the setting too; what is as by default is no entry of
            `to_dict`.
        real: the real test images, measured as if they were generated.
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
    fd_real: float | None
    fd_train_infinity: float | None
    fd_test_infinity: float | None
    precision: float | None
    recall: float | None
    density: float | None
    coverage: float | None
    neighbours: int | None
    inception_score_analogue: float | None
    class_accuracy: float | None
    images_per_second: float
    evaluations: int
    guidance_interval: tuple[float, float] | None = None
    churn: float = 0.0
    churn_interval: tuple[float, float] | None = None
    churn_noise: float = 1.0
    real: Quality | None = None

    @override
    def to_dict(self) -> dict[str, Any]:
        own = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in super().to_dict().items() if value != own[name]}


def best_of(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the setting whose images are nearest to the training images, of equal ones that of fewer calls.

    Args:
        rows: of `SampleRow.to_dict`, of one model. None of them need have a distance.

    Returns:
        One of them; None where no distance was measured. The minimum of several noisy distances is a little too low.
    """
    with_distance = [row for row in rows if row.get("fd_train") is not None]
    return min(with_distance, key=lambda row: (row["fd_train"], row["calls"]), default=None)


def pieces_of(count: int, size: int) -> list[range]:
    """The numbers 0 to `count` - 1, so many at a time."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def statistics(features: Features, batches: Iterable[Tensor]) -> FeatureStatistics:
    """Mean and covariance of the features of uint8 images (n, C, H, W), a batch at a time."""
    result = FeatureStatistics(features.dim)
    for images in batches:
        result.update(features(images))
    return result


def labels_in_turn(images: range, turns: Sequence[int]) -> Tensor | None:
    """Labels int64 (n,) of images by their numbers: those of `turns`, over and over; None where there are none."""
    return torch.tensor([turns[i % len(turns)] for i in images]) if turns else None


def sample_batch(
    model: DiffusionBlocks | ImageSampler,
    images: range,
    setting: Setting,
    *,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    callback: Callback | None = None,
    conditions: Conditions | None = None,
    **options: Any,
) -> Tensor:
    """Some of the samples (n, C, H, W) of a model or its sampler; image i has seed `seed` + i.

    Labels take turns: `labels`, default all classes. For the callback see `DiffusionBlocks.sample`; `conditions` gives
    what else it is told of these images, such as states of prompts. `options` are further ones of `sample`.
    """
    target = model.target
    assert isinstance(target, ImageTarget)
    turns = range(target.num_classes) if labels is None else labels
    watched: dict[str, Any] = {} if callback is None else {"callback": callback}
    return model.sample(
        labels_in_turn(images, turns),
        seeds=[seed + i for i in images],
        **dataclasses.asdict(setting),
        **watched,
        **({} if conditions is None else conditions(images)),
        **options,
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
    measures: ImageMeasures | None,
    seed: int = 0,
    progress: bool = False,
    work: Work = ALONE,
    conditions: Conditions | None = None,
) -> list[SampleRow]:
    """Sample with every setting, and measure the images.

    Args:
        model: a diffusion model's blocks, or their sampler.
        settings: what to measure.
        samples: images a setting.
        batch_size: images at a time.
        pixels: turns samples into uint8 images, which the features see: as they would be saved.
        measures: what to measure by; None measures speed alone.
        seed: see `sample_batch`.
        progress: show a progress bar.
        work: who computes which batch.
        conditions: see `sample_batch`.

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
    assert isinstance(model.target, ImageTarget)
    turns = range(model.target.num_classes)
    real = measures.real if measures is not None and work.leads else None
    for setting in settings:

        def measure(images: range, setting: Setting = setting) -> dict[str, Tensor]:
            begin = _now(model.device)
            batch = sample_batch(model, images, setting, seed=seed, conditions=conditions)
            seconds = torch.tensor(_now(model.device) - begin, dtype=torch.float64)
            more = {} if measures is None else measures.results_of(pixels(batch))
            return {"seconds": seconds, **more}

        measuring = None if measures is None else measures.start(samples)
        seconds = []
        with Progress("sample", samples, "images", show=progress and work.leads) as bar:
            for images, results in zip(pieces, work.in_order(pieces, measure), strict=False):  # the first rank has them
                seconds.append(float(results["seconds"]))
                if measuring is not None:
                    measuring.add(results, labels_in_turn(images, turns))
                bar.update(len(images))
        if not work.leads:
            continue
        # The first batch of each rank warms up, and counts only where no rank has another one.
        warm = work.size if len(pieces) > work.size else 0
        quality = Quality(samples) if measuring is None else measuring.quality()
        rows.append(
            SampleRow(
                **dataclasses.asdict(setting),
                calls=setting.calls,
                evaluations=setting.evaluations(noise),
                features=None if measures is None else measures.features.name,
                fd_real=None if real is None else real.fd_train,
                **quality.to_dict(),
                images_per_second=sum(map(len, pieces[warm:])) / work.seconds(seconds[warm:]),
                real=real,
            )
        )
    return rows


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
