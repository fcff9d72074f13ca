"""Batches of latents on the training device, each drawn from its posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .latent_data import LatentData
from .placement import gather, on_device, refuse_capture

__all__ = ["LatentBatches"]

_CHECKED_AT_ONCE = 2**28  # bytes on the host that are looked at before training; of more, each row as it is gathered


class LatentBatches:
    """Make training batches on a device: gather the posteriors and draw a latent from each.

    Nothing is flipped: the flip of a latent is not the latent of the flipped image.

    Args:
        data: the latents.
        device: where the batches are made.
        scale: multiplies the latents, > 0. Those of `data` have a deviation of about 1 (see its `scaling_factor`), so
            0.5 gives the usual sigma_data = 0.5.
        sample_posterior: whether to draw mean + std * noise, anew every time; otherwise it is the mean.
        placement: where the latents are kept. "device": on the device (on a CPU: read into memory); "host": where
            `data` has them, each batch being copied over through page-locked memory; "auto": on a GPU if they take at
            most a quarter of its free memory. The batches are the same. A CUDA graph can only be made of "device".

    Attributes:
        num_examples: number of latents.
        on_device: whether all latents were copied to the device.

    Raises:
        ValueError: scale or placement is not as above.
    """

    def __init__(
        self,
        data: LatentData,
        *,
        device: torch.device,
        scale: float = 0.5,
        sample_posterior: bool = True,
        placement: str = "auto",
    ) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale = {scale!r}: must be finite and > 0")
        self.num_examples = len(data)
        self.device = torch.device(device)
        self.scale = float(scale)
        self.sample_posterior = sample_posterior
        self._data = data
        num_bytes = self.num_examples * math.prod(data.image_shape) * 2 * (1 + sample_posterior)
        self.on_device = on_device(placement, num_bytes, self.device)
        self._labels = data.labels
        if self.on_device:
            self._labels = data.labels.to(self.device)
            self._mean = self._on_device("mean")
            self._std = self._on_device("std") if sample_posterior else None
        elif num_bytes <= _CHECKED_AT_ONCE:
            for part in ("mean", "std") if sample_posterior else ("mean",):
                for number, shard in enumerate(self._shards(part)):
                    data.check_values(part, number, shard)
        self._draw = self._eager_draw

    def _on_device(self, name: Literal["mean", "std"]) -> Tensor:
        """All shards as one tensor on the device; no second copy is ever in memory."""
        shards = self._shards(name)
        result = torch.empty((self.num_examples, *self._data.image_shape), dtype=torch.float16, device=self.device)
        for number, part in enumerate(result.split([len(shard) for shard in shards])):
            self._data.check_values(name, number, shards[number])
            part.copy_(shards[number])
        return result

    def _shards(self, part: Literal["mean", "std"]) -> Sequence[Tensor]:
        return self._data.mean if part == "mean" else self._data.std

    def compile(self) -> None:
        """Compile the arithmetic into one kernel; the latents stay the same, up to rounding."""
        self._draw = torch.compile(self._eager_draw, fullgraph=True)

    def _eager_draw(self, mean: Tensor, std: Tensor | None, noise: Tensor | None) -> Tensor:
        latents = mean.to(torch.float32)
        if std is not None and noise is not None:
            latents = latents + std.to(torch.float32) * noise
        return latents * self.scale

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Make the batch of the given examples.

        Args:
            indices: int64 (n,), 0 to num_examples - 1; on the device when the latents are there (then nothing waits
                for the device), else on the CPU.
            generator: source of the posterior's noise, on `device`; None for the default one.

        Returns:
            On the device: "pixel_values" float32 (n, C, H, W), named like images because it is what a diffusion model
            denoises, and "labels" int64 (n,).

        Raises:
            ValueError: a CUDA graph is being captured, but the latents are not on the device.
        """
        std = None
        if self.on_device:
            labels, mean = self._labels.index_select(0, indices), self._mean.index_select(0, indices)
            if self._std is not None:
                std = self._std.index_select(0, indices)
        else:
            refuse_capture(self.device, "latents")
            indices = indices.cpu()
            labels, mean = gather(self._labels, indices, self.device), self._rows("mean", indices)
            if self.sample_posterior:
                std = self._rows("std", indices)
        noise = None
        if std is not None:
            noise = torch.randn(std.shape, generator=generator, device=self.device)
        return {"pixel_values": self._draw(mean, std, noise), "labels": labels}

    def _rows(self, part: Literal["mean", "std"], indices: Tensor) -> Tensor:
        rows = self._data.rows(part, indices, pin_memory=self.device.type == "cuda")
        return rows.to(self.device, non_blocking=True)
