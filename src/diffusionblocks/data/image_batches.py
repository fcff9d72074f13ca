"""Batches of images on the training device: gathered, augmented and normalised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .augment import Augment, AugmentConfig
from .image_data import ImageData
from .placement import gather, on_device

__all__ = ["ImageBatches", "evaluation_batches", "to_uint8"]


class Normalise:
    """uint8 (n, C, H, W) to float32: (pixel / 255 - mean) / std per channel, as one multiply and add."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels: int, device: torch.device) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels or not all(math.isfinite(v) for v in values):
                raise ValueError(f"{name} = {list(values)}: must be {channels} finite numbers, one per channel")
        if not all(value > 0 for value in std):
            raise ValueError(f"std = {list(std)}: every value must be > 0 (on the 0..1 scale of the pixels)")
        m, s = (torch.tensor(list(v), dtype=torch.float64)[:, None, None] for v in (mean, std))
        self.scale = (1 / (255 * s)).to(device, torch.float32)
        self.shift = (-m / s).to(device, torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        return images.to(torch.float32) * self.scale + self.shift


def to_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images to pixels: (x * std + mean) * 255, rounded and clamped; undoes the data's normalisation.

    Args:
        images: floating, shape (n, C, H, W), every value finite.
        mean: per channel, on the 0..1 scale of the pixels.
        std: per channel, on the same scale, > 0.

    Returns:
        uint8, shape (n, C, H, W), on the device of `images`.

    Raises:
        ValueError: another shape or dtype, values that are not finite, or mean and std not as above.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating, (n, C, H, W); got {images.dtype}, {tuple(images.shape)}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[1] or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} = {list(values)}: must be {images.shape[1]} finite numbers, one per channel")
    if not all(value > 0 for value in std):
        raise ValueError(f"std = {list(std)}: every value must be > 0 (on the 0..1 scale of the pixels)")
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite, some values are nan or inf: the chain that made them diverged")
    x = images.float()
    m, s = (x.new_tensor(list(values))[:, None, None] for values in (mean, std))
    return ((x * s + m) * 255).round().clamp(0, 255).to(torch.uint8)


class ImageBatches:
    """Make training batches on a device: gathers the images, augments and normalises them.

    Args:
        data: the images.
        mean: per channel, on the 0..1 scale of the pixels.
        std: per channel, on the same scale, > 0.
        augment: what to apply at random; None for nothing.
        device: where the batches are made.
        placement: where the images are kept. "device": on the device; "host": in ordinary memory, each batch
            being copied over through page-locked memory; "auto": on the device if they take at most a quarter
            of its free memory. A CPU device makes no difference between them.

    Attributes:
        num_examples: number of images.
        on_device: whether the images are on the device.

    Raises:
        ValueError: mean, std or placement is not as above, or an image with C other than 1 or 3 is to be
            augmented.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: AugmentConfig | None,
        device: torch.device,
        placement: str = "auto",
    ) -> None:
        channels = data.image_shape[0]
        if augment is not None and channels not in (1, 3):
            raise ValueError(f"augment: images have {channels} channels: must be 1 or 3, or set augment to None")
        self.num_examples = len(data)
        self.device = torch.device(device)
        self.on_device = on_device(placement, data.images.nbytes, self.device) or self.device.type == "cpu"
        place = self.device if self.on_device else torch.device("cpu")
        self._images, self._labels = data.images.to(place), data.labels.to(place)
        self._augment = None if augment is None else Augment(augment)
        self._normalise = Normalise(mean, std, channels, self.device)
        self._transform = self._eager_transform

    def compile(self) -> None:
        """Compile augmentation and normalisation into few kernels; the pixels stay the same, up to rounding
        of the normalisation."""
        self._transform = torch.compile(self._eager_transform, fullgraph=True)

    def _eager_transform(self, images: Tensor, draws: Tensor | None) -> Tensor:
        if self._augment is not None and draws is not None:
            images = self._augment.apply(images, draws)
        return self._normalise(images)

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Make the batch of the given examples.

        Args:
            indices: int64 (n,), 0 to num_examples - 1; on the device when the images are there (then nothing
                waits for the device), else on the CPU.
            generator: source of the augmentation's randomness, on `device`; None for the default one.

        Returns:
            On the device: "pixel_values" float32 (n, C, H, W) and "labels" int64 (n,).
        """
        images, labels = (gather(rows, indices, self.device) for rows in (self._images, self._labels))
        draws = None
        if self._augment is not None:
            draws = self._augment.draw(len(indices), self.device, generator)
        return {"pixel_values": self._transform(images, draws), "labels": labels}


def evaluation_batches(
    data: ImageData, *, mean: Sequence[float], std: Sequence[float], batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """All images once, in order, not augmented; the last batch may be smaller.

    Args:
        data: the images.
        mean: per channel, on the 0..1 scale of the pixels.
        std: per channel, on the same scale, > 0.
        batch_size: images per batch, at least 1.
        device: where the batches are made.

    Returns:
        Iterator over {"pixel_values": float32 (n, C, H, W), "labels": int64 (n,)} on the device.

    Raises:
        ValueError: mean, std or batch_size is not as above (at the call, not at the first batch).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r}: must be at least 1")
    normalise = Normalise(mean, std, data.image_shape[0], torch.device(device))

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(data), batch_size):
            rows = slice(start, start + batch_size)
            images, labels = data.images[rows].to(device), data.labels[rows].to(device)
            yield {"pixel_values": normalise(images), "labels": labels}

    return batches()
