"""A small classifier of images, trained on the data at hand, and its features for a Frechet distance."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.digests import tensors_digest
from ..common.files import whole_folder
from ..common.finite import require_finite
from ..common.formats import read_json, read_tensors, write_json, write_tensors
from ..common.precision import without_autocast
from ..common.seeds import seed_global
from ..data import AugmentConfig, ImageBatches, ImageData, evaluation_batches
from ..data.image_batches import Normalise
from ..training import EndToEnd, TrainConfig, Trainer
from .accuracy import accuracy_grid
from .features import check_images

_FORMAT = 1
_INDEX = "classifier.json"
_WEIGHTS = "classifier.safetensors"
_OURS = re.compile(r"classifier\.(json|safetensors)")


class Logits(NamedTuple):
    """What a classifier returns: logits (n, num_classes)."""

    logits: Tensor


class SmallCNN(nn.Module):
    """A classifier of small images (8x8 to 64x64): three stages of two 3x3 convolutions, mean over positions, a head.

    The stages have width, 2 width and 4 width channels, with batch norm and ReLU after each convolution. Between
    stages the size is halved as long as 2x2 positions remain.

    Args:
        channels: of the images, >= 1.
        num_classes: >= 1.
        width: channels of the first stage, >= 1; a quarter of the features' length.
        dropout: of the features before the head, 0 <= dropout < 1.

    Attributes:
        dim: length of the features, 4 width.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, channels: int, num_classes: int, *, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("num_classes", num_classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} = {value!r}: must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout!r}: must be at least 0 and below 1")
        self.channels, self.num_classes, self.width, self.dropout = channels, num_classes, width, dropout
        self.dim = 4 * width
        sizes = [channels, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(_stage(n, m) for n, m in itertools.pairwise(sizes))
        self.head = nn.Linear(self.dim, num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # tensor cores' own order

    def features(self, pixel_values: Tensor) -> Tensor:
        """Normalised images (n, C, H, W) -> features (n, dim), all >= 0."""
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        for index, stage in enumerate(self.stages):
            if index and min(x.shape[2:]) >= 4:
                x = F.max_pool2d(x, 2)
            x = stage(x)
        return x.mean((2, 3))

    def forward(self, pixel_values: Tensor) -> Logits:
        """Normalised images (n, C, H, W) -> logits (n, num_classes)."""
        return Logits(self.head(F.dropout(self.features(pixel_values), self.dropout, self.training)))


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in (inputs, outputs):
        # No bias: batch norm takes the mean away.
        layers += [nn.Conv2d(n, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class ClassifierFeatures:
    """The features of a trained classifier: what its head reads.

    Args:
        network: the trained classifier; it is put into evaluation mode and frozen.
        dataset: name of the data it was trained on.
        image_shape: (C, H, W) of that data; other images are refused.
        mean, std: per channel, on the 0..1 scale of the pixels, with which it was trained.
        accuracy: on test data, in [0, 1].

    Attributes:
        name: "classifier on DATASET".
        dim: length of a feature vector.
        dataset, image_shape, accuracy: as given.

    Raises:
        ValueError: mean, std or image_shape do not fit the network.
    """

    def __init__(
        self,
        network: SmallCNN,
        *,
        dataset: str,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        accuracy: float,
    ) -> None:
        if image_shape[0] != network.channels:
            raise ValueError(f"image_shape = {image_shape}: the network takes {network.channels} channels")
        self.network = network.eval().requires_grad_(False)
        self.name = f"classifier on {dataset}"
        self.dim = network.dim
        self.dataset, self.image_shape, self.accuracy = dataset, image_shape, accuracy
        self.device = network.head.weight.device
        self._mean, self._std = list(mean), list(std)
        self._normalise = Normalise(mean, std, network.channels, self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) on the classifier's device -> features float32 (n, dim), without gradient.

        Raises:
            ValueError: another dtype, image size or device.
        """
        shape = f"(n, {', '.join(map(str, self.image_shape))})"
        check_images(images, shape, images.shape[1:] == self.image_shape, self.device, "classifier")
        with torch.no_grad(), without_autocast(images):
            return self.network.features(self._normalise(images))

    def logits(self, features: Tensor) -> Tensor:
        """Features (n, dim) -> logits (n, num_classes) of the data's labels, without gradient."""
        with torch.no_grad(), without_autocast(features):
            logits: Tensor = self.network.head(features)
        return logits

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, and of how images are normalised."""
        normalisation = {"mean": torch.tensor(self._mean), "std": torch.tensor(self._std)}
        return tensors_digest(self.network.state_dict() | normalisation)

    def save(self, folder: Path) -> None:
        """Write weights and settings to `folder`; an older classifier there is replaced once the new one is whole."""
        with whole_folder(folder, _OURS) as temporary:
            write_tensors(temporary / _WEIGHTS, self.network.state_dict())
            values = {
                "format": _FORMAT,
                "dataset": self.dataset,
                "image_shape": list(self.image_shape),
                "num_classes": self.network.num_classes,
                "width": self.network.width,
                "dropout": self.network.dropout,
                "mean": self._mean,
                "std": self._std,
                "accuracy": self.accuracy,
            }
            write_json(temporary / _INDEX, values)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> ClassifierFeatures:
        """Read what `save` wrote; it gives the same features, bit for bit on the same machine.

        Raises:
            FileNotFoundError: no such folder, or a file of it is missing.
            ValueError: not a saved classifier, another format, or tensors that do not match.
        """
        values = read_json(folder / _INDEX)
        if values.get("format") != _FORMAT:
            raise ValueError(f"{folder / _INDEX}: format {values.get('format')!r}; this version reads format {_FORMAT}")
        tensors = read_tensors(folder / _WEIGHTS)
        require_finite(tensors.items(), str(folder / _WEIGHTS), f"remove {folder} to have it trained again")
        try:
            channels, height, width = (int(size) for size in values["image_shape"])
            network = SmallCNN(channels, values["num_classes"], width=values["width"], dropout=values["dropout"])
            network.load_state_dict(tensors)
            return cls(
                network.to(device),
                dataset=str(values["dataset"]),
                image_shape=(channels, height, width),
                mean=values["mean"],
                std=values["std"],
                accuracy=float(values["accuracy"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / _INDEX} does not describe a classifier: {type(error).__name__}: {error}"
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{folder / _WEIGHTS} does not match {_INDEX} beside it: {error}") from None


def train_classifier(
    train: ImageData,
    test: ImageData,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dataset: str,
    device: torch.device | str,
    flip: bool,
    crop_padding: int,
    epochs: float = 15,
    batch_size: int = 128,
    lr: float = 2e-3,
    width: int = 64,
    dropout: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> ClassifierFeatures:
    """Train a `SmallCNN` with the project's trainer (on a GPU in bfloat16, each step one CUDA graph).

    Args:
        train, test: images of one shape and the same classes; the test images only measure `accuracy`.
        mean, std: per channel, on the 0..1 scale of the pixels.
        dataset: name of the data, for the features' name.
        device: where to train; the classifier stays there.
        flip, crop_padding: augmentation of the training images, see `AugmentConfig`.
        epochs, batch_size, lr: of AdamW with one epoch of warm-up and a cosine to zero.
        width, dropout: see `SmallCNN`; features are of length 4 width. 64 suits CIFAR-10; 32 is plenty for the digits.
        seed: of weights, data order, augmentation and dropout.
        progress: show a progress bar.

    Raises:
        ValueError: train and test do not match, or a setting is out of range (pydantic's error is one, too).
        Diverged: the loss became NaN or infinite.
    """
    if train.image_shape != test.image_shape or train.num_classes != test.num_classes:
        raise ValueError(
            f"train has images {train.image_shape} of {train.num_classes} classes, test {test.image_shape} of "
            f"{test.num_classes}: both must be of the same data"
        )
    device = torch.device(device)
    gpu = device.type == "cuda"
    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        warmup_epochs=min(1.0, epochs / 5),
        weight_decay=0.05,
        precision="bfloat16" if gpu else "float32",
        cuda_graph=gpu,
        loss_chunk=None,  # of texts
        seed=seed,
    )
    # A training of its own: to the one that may go on around it, the global generators are as they were.
    with torch.random.fork_rng(devices=[device] if gpu else []):
        seed_global(seed)
        network = SmallCNN(train.image_shape[0], train.num_classes, width=width, dropout=dropout)
        model = EndToEnd(network.to(device))
        augment = AugmentConfig(crop_padding=crop_padding, flip=flip) if flip or crop_padding else None
        batches = ImageBatches(train, mean=mean, std=std, augment=augment, device=device)
        Trainer(model, batches, config, progress=progress).train()
    (row,) = accuracy_grid(model, lambda: evaluation_batches(test, mean=mean, std=std, batch_size=1000, device=device))
    return ClassifierFeatures(
        network, dataset=dataset, image_shape=train.image_shape, mean=mean, std=std, accuracy=row.accuracy
    )
