"""Batches of latents on the training device, each drawn from its posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .latent_data import LatentData
from .placement import gather, on_device, refuse_capture

__all__ = ["LatentBatches"]

_CHECKED_AT_ONCE = 2**28  # bytes on the host that are looked at before training; of more, each row as it is gathered


class LatentBatches:
    """Make training batches on a device: gather the posteriors and draw a latent from each.

    Nothing is flipped: the flip of a latent is not the latent of the flipped image.

    Latents with prompts come with the states of these, some of them with the empty prompt's instead.

    Args:
        data: the latents.
        device: where the batches are made.
        scale: multiplies the latents, > 0. Those of `data` have a deviation of about 1 (see its `scaling_factor`), so
            0.5 gives the usual sigma_data = 0.5.
        sample_posterior: whether to draw mean + std * noise, anew every time; otherwise it is the mean.
        placement: where the latents are kept. "device": on the device (on a CPU: read into memory); "host": where
            `data` has them, each batch being copied over through page-locked memory; "auto": on a GPU if they take at
            most a quarter of its free memory. The batches are the same. A CUDA graph can only be made of "device", and
            latents of several sizes are on the "host".
        prompt_dropout: share of the examples that get the empty prompt's states instead of their own, in [0, 1).
        constants: what every example has besides, by name, each the value of one example.

    Attributes:
        num_examples: number of latents.
        groups: which examples have one size, see `LatentData.groups`.
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
        prompt_dropout: float = 0.0,
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale = {scale!r}: must be finite and > 0")
        self.num_examples = len(data)
        self.device = torch.device(device)
        self.scale = float(scale)
        self.sample_posterior = sample_posterior
        self._data = data
        self.groups = data.groups
        self.prompt_dropout = prompt_dropout
        self._constants = {name: value.to(self.device) for name, value in (constants or {}).items()}
        self._empty = {name: value.to(self.device) for name, value in data.empty.items()}
        self._names = ("mean", "std", *data.states) if sample_posterior else ("mean", *data.states)
        num_bytes = sum(shard.nbytes for name in self._names for shard in data.shards_of(name))
        if self.groups is not None:
            if placement == "device":
                raise ValueError(
                    "data.placement = device: latents of several sizes are gathered on the host: set data.placement to "
                    "auto"
                )
            placement = "host"
        self.on_device = on_device(placement, num_bytes, self.device)
        self._labels = data.labels
        if self.on_device:
            self._labels = data.labels.to(self.device)
            self._tensors = {name: self._on_device(name) for name in self._names}
        elif num_bytes <= _CHECKED_AT_ONCE:
            for part in self._names:
                for number, shard in enumerate(data.shards_of(part)):
                    data.check_values(part, number, shard)
        self._draw = self._eager_draw

    def _on_device(self, name: str) -> Tensor:
        """All shards as one tensor on the device; no second copy is ever in memory."""
        shards = self._data.shards_of(name)
        first = shards[0]
        result = torch.empty((self.num_examples, *first.shape[1:]), dtype=first.dtype, device=self.device)
        for number, part in enumerate(result.split([len(shard) for shard in shards])):
            self._data.check_values(name, number, shards[number])
            part.copy_(shards[number])
        return result

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
            denoises, "labels" int64 (n,), states by their names, and constants.

        Raises:
            ValueError: a CUDA graph is being captured, but the latents are not on the device; or rows of several sizes.
        """
        if self.on_device:
            labels = self._labels.index_select(0, indices)
            parts = {name: tensor.index_select(0, indices) for name, tensor in self._tensors.items()}
        else:
            refuse_capture(self.device, "latents")
            indices = indices.cpu()
            labels = gather(self._labels, indices, self.device)
            parts = {name: self._rows(name, indices) for name in self._names}
        mean, std, noise = parts.pop("mean"), parts.pop("std", None), None
        if std is not None:
            noise = torch.randn(std.shape, generator=generator, device=self.device)
        batch = {"pixel_values": self._draw(mean, std, noise), "labels": labels}
        constants = {name: value.expand(len(labels), *value.shape) for name, value in self._constants.items()}
        return {**batch, **self._without_some(parts, generator), **constants}

    def _without_some(self, states: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """States, of some examples the empty prompt's."""
        if not states or not self.prompt_dropout:
            return states
        count = len(next(iter(states.values())))
        drop = torch.rand(count, generator=generator, device=self.device) < self.prompt_dropout
        return {
            name: torch.where(drop.view(-1, *[1] * (value.dim() - 1)), self._empty[name], value)
            for name, value in states.items()
        }

    def _rows(self, part: str, indices: Tensor) -> Tensor:
        rows = self._data.rows(part, indices, pin_memory=self.device.type == "cuda")
        return rows.to(self.device, non_blocking=True)
