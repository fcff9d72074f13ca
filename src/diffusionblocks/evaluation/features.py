"""What turns images into features for a Frechet distance: Inception's, or those of a classifier (`classifier.py`).

Inception's weights are a download of 91 MB and know photographs. A classifier that the project's own trainer makes in
a minute on the data at hand needs neither; its distances compare models on the same data, not with published FIDs.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..common.digests import tensors_digest
from ..common.precision import without_autocast


class Features(Protocol):
    """Maps images to feature vectors.

    Attributes:
        name: what the features are of, to name the figure they lead to; "Inception" makes it an FID.
        dim: length of a feature vector.
        digest: tells these features from all others: of the network's weights.
    """

    name: str
    dim: int

    @property
    def digest(self) -> str:
        """SHA-256."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) -> features float32 (n, dim) on the same device, without gradient."""

    def logits(self, features: Tensor) -> Tensor | None:
        """Features (n, dim) -> logits (n, num_classes) of the network's own classes; None where it has no head."""


class InceptionFeatures:
    """The 2048 features of the Inception network that FID is defined by, as the package torch-fidelity computes them.

    Args:
        device: where the network runs.
        weights: its weights as a PyTorch file of plain tensors; None lets torch-fidelity download them (91 MB).

    Attributes:
        name: "Inception".
        dim: 2048.

    Raises:
        ImportError: torch-fidelity is not installed; the message says how to install it.
        FileNotFoundError, ValueError: `weights` is missing, damaged, or holds anything but tensors.
    """

    name = "Inception"
    dim = 2048

    def __init__(self, device: torch.device | str = "cpu", *, weights: Path | None = None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-not-found,import-untyped]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise ImportError(
                f"FID needs torch-fidelity ({error}): run pip install 'diffusionblocks[fid]', or measure with a "
                "classifier of your own (train_classifier)"
            ) from error
        if weights is not None:
            _check_tensors_only(weights)  # torch-fidelity itself would unpickle, and so run, anything
        path = None if weights is None else str(weights)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
        except OSError as error:  # urllib's errors, too
            raise FileNotFoundError(
                f"torch-fidelity could not get the Inception weights ({error}): fetch them on a machine with network "
                "access, or measure with a classifier (evaluate.features: classifier)"
            ) from error
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{weights} does not match the Inception network of torch-fidelity: {error}") from None
        self.network: nn.Module = network.to(device)  # in evaluation mode and frozen already
        self.device = next(self.network.parameters()).device

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 (n, 1 or 3, H, W) on the network's device -> features float32 (n, 2048), without gradient.

        Grey images are repeated to three channels; every image is resized to 299x299 as FID prescribes.

        Raises:
            ValueError: another dtype, number of channels or device.
        """
        check_images(images, "(n, 1 or 3, H, W)", images.dim() == 4 and images.shape[1] in (1, 3), self.device)
        with torch.no_grad(), without_autocast(images):
            features: Tensor = self.network(images.expand(-1, 3, -1, -1))[0]
        return features

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return tensors_digest(self.network.state_dict())

    def logits(self, features: Tensor) -> None:
        """None: torch-fidelity's head is not that of the Inception Score's definition."""


def check_images(images: Tensor, shape: str, matches: bool, device: torch.device, reader: str = "network") -> None:
    """ValueError unless images are uint8, of the shape that the message names, and on the device of what reads them."""
    if images.dtype != torch.uint8 or not matches:
        raise ValueError(f"images: {images.dtype} {tuple(images.shape)}: must be uint8 {shape}")
    if images.device != device:
        raise ValueError(f"images are on {images.device}, the {reader} on {device}: move the images there")


def _check_tensors_only(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the file of Inception weights, or None to download it")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not a PyTorch file of plain tensors: {error}") from None
