"""The quality of a set of images beside real ones: every measure of one network's features, in one pass.

Measures are of the features' network. Their names say so: only of Inception's is the distance called FID.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Features
from .frechet import FeatureStatistics, frechet_distance
from .frechet_infinity import GrowingStatistics, sizes_to_extrapolate
from .neighbours import K_DENSITY, RealNeighbours
from .row import Row
from .scores import InceptionScoreAnalogue

#: Features that are held of a set, for distances among neighbours: 244 MiB of EfficientNet-Lite0.
MOST_NEIGHBOURS = 50_000

#: (uint8 images, their features) -> logits of the data's own labels.
ClassLogits = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """Features of the real images of one split.

    Attributes:
        statistics: of all of them.
        rows: (m, dim) float32, of at most `MOST_NEIGHBOURS` of them in random order; None: only distances are measured.
    """

    statistics: FeatureStatistics
    rows: Tensor | None = None


@dataclass(frozen=True)
class Quality(Row):
    """Measures of a set of images; None where one could not be taken.

    Attributes:
        samples: number of images.
        fd_train, fd_test: Frechet distance to all real images of a split.
        fd_train_infinity, fd_test_infinity: the same, extrapolated to infinitely many images; the difference is the
            bias of their number. None below four images for each feature.
        precision, recall, density, coverage: see `Neighbours`; beside as many images of the train split.
        neighbours: how many these are.
        inception_score_analogue: see `InceptionScoreAnalogue`.
        class_accuracy: share of images that a classifier of the data's labels gives the label they were drawn with.
    """

    samples: int
    fd_train: float | None = None
    fd_test: float | None = None
    fd_train_infinity: float | None = None
    fd_test_infinity: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    neighbours: int | None = None
    inception_score_analogue: float | None = None
    class_accuracy: float | None = None


def distance_name(features: str | None) -> str:
    """What a Frechet distance of features is called: "FID" of Inception's alone."""
    if features is None:
        return "FD"
    return "FID" if features == "Inception" else f"FD ({features})"


class ImageMeasures:
    """What images are measured by: features, and those of real images, which are kept for one set after another.

    Args:
        features: maps images to features.
        references: of the real images `train` and `test`, or of one of them.
        class_logits: a classifier of the data's own labels; None: no accuracy is measured.
        real_class_accuracy: that of the classifier on the real test images.

    Attributes:
        features, references: as given.
    """

    def __init__(
        self,
        features: Features,
        references: Mapping[str, Reference],
        class_logits: ClassLogits | None = None,
        real_class_accuracy: float | None = None,
    ) -> None:
        self.features, self.references = features, references
        self._class_logits, self._real_class_accuracy = class_logits, real_class_accuracy
        self._neighbours: dict[int, RealNeighbours] = {}

    def results_of(self, images: Tensor) -> dict[str, Tensor]:
        """What is computed of a batch of images, on any rank: `features` (n, dim), and `labels` that they seem to have.

        Args:
            images: uint8 (n, C, H, W).
        """
        features = self.features(images)
        if self._class_logits is None:
            return {"features": features}
        return {"features": features, "labels": self._class_logits(images, features).argmax(-1)}

    def start(self, count: int) -> Measuring:
        """Begin to measure a set of images.

        Args:
            count: how many there will be.
        """
        return Measuring(self, count)

    def neighbours_of(self, count: int) -> RealNeighbours | None:
        """As many images of the train split as there are others to lay beside them; None where they are too few."""
        train = self.references.get("train")
        if train is None or train.rows is None or min(count, len(train.rows)) <= K_DENSITY:
            return None
        count = min(count, len(train.rows))
        if count not in self._neighbours:
            self._neighbours = {count: RealNeighbours(train.rows[:count])}  # of one number: radii are large
        return self._neighbours[count]

    @functools.cached_property
    def real(self) -> Quality | None:
        """The real test images, measured as if they were generated; None without both splits."""
        train, test = self.references.get("train"), self.references.get("test")
        if train is None or test is None:
            return None
        if test.rows is None:
            distance = frechet_distance(test.statistics, train.statistics)
            return Quality(test.statistics.count, fd_train=distance, class_accuracy=self._real_class_accuracy)
        measuring = Measuring(ImageMeasures(self.features, {"train": train}), len(test.rows))
        measuring.add({"features": test.rows})
        quality = dataclasses.replace(measuring.quality(), class_accuracy=self._real_class_accuracy)
        if quality.samples == test.statistics.count:
            return quality
        distance = frechet_distance(test.statistics, train.statistics)  # there are more images than rows
        return dataclasses.replace(quality, samples=test.statistics.count, fd_train=distance)


class Measuring:
    """Measures of one set of images, which arrive in batches without a wait for the device; see `ImageMeasures.start`.

    Args:
        measures: what they are measured by.
        count: how many images there will be.
    """

    def __init__(self, measures: ImageMeasures, count: int) -> None:
        self._measures, dim = measures, measures.features.dim
        self._statistics = GrowingStatistics(dim, sizes_to_extrapolate(count, dim))
        self._rows: list[Tensor] = []
        self._room = min(count, MOST_NEIGHBOURS) if any(r.rows is not None for r in measures.references.values()) else 0
        self._of_classes: InceptionScoreAnalogue | None = None
        self._hits: list[Tensor] = []

    def add(self, results: Mapping[str, Tensor], labels: Tensor | None = None) -> None:
        """Add a batch; batches come in random order of their images.

        Args:
            results: of `ImageMeasures.results_of`.
            labels: int64 (n,), the labels that the images were drawn with; None: there are none.
        """
        features = results["features"]
        self._statistics.update(features)
        if self._room > 0:
            self._rows.append(features[: self._room])
            self._room -= len(self._rows[-1])
        logits = self._measures.features.logits(features)
        if logits is not None:
            self._of_classes = self._of_classes or InceptionScoreAnalogue()
            self._of_classes.add(logits.double().log_softmax(-1))
        if labels is not None and "labels" in results:
            self._hits.append(results["labels"] == labels.to(features.device))

    def quality(self) -> Quality:
        """The measures of all images that were added.

        Raises:
            ValueError: see `frechet_distance` and `RealNeighbours`.
        """
        values: dict[str, float | None] = {}
        for split, reference in self._measures.references.items():
            distance, at_infinity = self._statistics.distances(reference.statistics)
            values |= {f"fd_{split}": distance, f"fd_{split}_infinity": at_infinity}
        real = self._measures.neighbours_of(sum(map(len, self._rows)))
        if real is not None:
            values |= vars(real.measure(torch.cat(self._rows)[: real.count]))
        return Quality(
            self._statistics.total.count,
            neighbours=None if real is None else real.count,
            inception_score_analogue=None if self._of_classes is None else self._of_classes.value(),
            class_accuracy=torch.cat(self._hits).double().mean().item() if self._hits else None,
            **values,
        )
