"""Images as the posteriors of an autoencoder, in memory or mapped from files, and the scale that they are on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from .dataset import LabelledImages, evenly_spread

__all__ = ["LatentData", "LatentScale"]


@dataclass(frozen=True)
class LatentScale:
    """How an autoencoder's latents are brought to a mean of about 0 and a deviation of about 1, as diffusers does:
    `(latent - shift_factor) * scaling_factor`, or `(latent - latents_mean) / latents_std * scaling_factor` a channel.

    Attributes:
        scaling_factor: finite, > 0.
        shift_factor: None where it was not noted (folders of older versions).
        latents_mean, latents_std: a number a channel, std > 0; None for an autoencoder without them.

    Raises:
        ValueError: a value is not as above, only one of mean and std is there, or mean and shift_factor are.
    """

    scaling_factor: float
    shift_factor: float | None = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scaling_factor) and self.scaling_factor > 0):
            raise ValueError(f"scaling_factor = {self.scaling_factor!r}: must be finite and > 0")
        if self.shift_factor is not None and not math.isfinite(self.shift_factor):
            raise ValueError(f"shift_factor = {self.shift_factor!r}: must be finite")
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None):
            raise ValueError(f"latents_mean = {mean}, latents_std = {std}: must both be there, or neither")
        if mean is None or std is None:
            return
        if self.shift_factor:
            raise ValueError(f"latents_mean and shift_factor = {self.shift_factor}: only one of them can be meant")
        if len(mean) != len(std) or not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
            raise ValueError(
                f"latents_mean = {list(mean)}, latents_std = {list(std)}: must be finite, as many as channels, std > 0"
            )

    def check_channels(self, channels: int) -> None:
        """ValueError unless mean and std, where they are there, have a value a channel."""
        if self.latents_mean is not None and len(self.latents_mean) != channels:
            raise ValueError(f"latents_mean has {len(self.latents_mean)} values: must be {channels}, one per channel")

    def shift_and_factor(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted first and multiplied with then: float32 (C or 1, 1, ...), for `like` (n, C, ...)."""
        mean = torch.tensor(self.latents_mean or [self.shift_factor or 0.0], dtype=torch.float32, device=like.device)
        std = torch.tensor(self.latents_std or [1.0], dtype=torch.float32, device=like.device)
        ones = [1] * (like.dim() - 2)
        return mean.view(-1, *ones), (self.scaling_factor / std).view(-1, *ones)

    def times(self, factor: float) -> LatentScale:
        """That of the latents multiplied by a factor > 0."""
        return dataclasses.replace(self, scaling_factor=self.scaling_factor * factor)

    def check_same(self, other: LatentScale, here: str, there: str) -> None:
        """Refuse latents of another scale.

        Raises:
            ValueError: it is another one; the message names the field and both places.
        """
        for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            own, theirs = getattr(self, name), getattr(other, name)
            unknown = name == "shift_factor" and (own is None or theirs is None)
            if own != theirs and not unknown:
                raise ValueError(
                    f"{here} has {name} = {own}, {there} has {theirs}: latents of one are not those of the other; "
                    "encode with the autoencoder that is meant"
                )


@dataclass(frozen=True)
class LatentData(LabelledImages):
    """Labelled latents, in ordinary memory or mapped from files: N rows in one or more shards, each of one size.

    Attributes:
        mean: per shard, float16 (n, C, H, W), of videos (n, C, T, H, W), n >= 1: the mean of the autoencoder's
            posterior, multiplied by `scaling_factor`. Shards may differ in all but C.
        std: the posterior's standard deviation, multiplied by it too; shapes as in `mean`.
        labels: int64 (N,), each from 0 to num_classes - 1.
        class_names: one name per class, in the order of the labels.
        vae: folder or hub name of the autoencoder.
        scaling_factor: the autoencoder's factor, which makes the latents' deviation about 1.
        files: per shard, where it is from, for messages; empty for latents that were never in a file.
        states: what text encoders gave for the rows' prompts, by name, per shard: (n, ...), floating or bool.
        empty: the same of the empty prompt, by name, without the first axis; where there are states.

    Raises:
        ValueError: a dtype, a shape or a label is not as above.
    """

    mean: tuple[Tensor, ...]
    std: tuple[Tensor, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    vae: str
    scaling_factor: float
    files: tuple[str, ...] = ()
    states: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    empty: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean: {len(self.mean)} shards, std: {len(self.std)}: must be as many, and at least one")
        for shard, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            shape = (len(mean), self.mean[0].shape[1], *mean.shape[2:])
            for name, tensor in (("mean", mean), ("std", std)):
                dims = tensor.dim() in (4, 5) and tensor.dim() == self.mean[0].dim()
                if tensor.dtype != torch.float16 or tensor.shape != shape or not dims or 0 in shape:
                    raise ValueError(
                        f"shard {shard}, {name}: {tensor.dtype} {tuple(tensor.shape)}: must be float16 (n, C, H, W) or "
                        "(n, C, T, H, W), n >= 1, C the same everywhere, the sizes in a shard"
                    )
            for name, tensors in self.states.items():
                if tensors[shard].shape != (len(mean), *self.empty[name].shape):
                    raise ValueError(
                        f"shard {shard}, {name}: {tuple(tensors[shard].shape)}: must be "
                        f"{(len(mean), *self.empty[name].shape)}, a row a latent, as the empty prompt's"
                    )
        self._check_labels(sum(len(mean) for mean in self.mean))

    @property
    @override
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.mean[0].shape[1:])

    @functools.cached_property
    def groups(self) -> Tensor | None:
        """Which rows have one size: int64 (N,), numbers of sizes as they come; None where all have one."""
        sizes = list(dict.fromkeys(mean.shape[2:] for mean in self.mean))
        if len(sizes) == 1:
            return None
        return torch.cat([torch.full((len(mean),), sizes.index(mean.shape[2:])) for mean in self.mean])

    def in_groups(self, indices: Tensor) -> list[Tensor]:
        """Row numbers, int64 (n,), in parts of rows of one size."""
        if self.groups is None:
            return [indices]
        return [part for group in self.groups.unique() if len(part := indices[self.groups[indices] == group])]

    def batches_in_order(self, batch_size: int) -> Iterator[Tensor]:
        """Numbers of all rows, int64 (at most `batch_size`,), each batch of one size."""
        for rows in self.in_groups(torch.arange(len(self))):
            yield from rows.split(batch_size)

    @override
    def tensors(self) -> list[Tensor]:
        states = [tensor for name in sorted(self.states) for tensor in (self.empty[name], *self.states[name])]
        return [self.labels, *self.mean, *self.std, *states]

    @override
    def part(self, count: int) -> Self:
        """In ordinary memory."""
        if count >= len(self):
            return self
        groups = self.in_groups(evenly_spread(len(self), count))
        shards = {name: tuple(self.rows(name, rows) for rows in groups) for name in ("mean", "std", *self.states)}
        mean, std = shards.pop("mean"), shards.pop("std")
        labels = self.labels[torch.cat(groups)]
        return dataclasses.replace(self, mean=mean, std=std, labels=labels, files=(), states=shards)

    def shards_of(self, part: str) -> tuple[Tensor, ...]:
        """`mean`, `std` or states by their name, per shard."""
        return self.states[part] if part in self.states else {"mean": self.mean, "std": self.std}[part]

    def rows(self, part: str, indices: Tensor, pin_memory: bool = False) -> Tensor:
        """Gather rows of all shards into fresh memory.

        Args:
            part: `mean`, `std`, or states by their name.
            indices: int64 (n,) on the CPU, 0 to N - 1, in any order, repeats rule.
            pin_memory: whether the result is page-locked.

        Returns:
            (n, ...) on the CPU: float16 (n, C, H, W) of a mean.

        Raises:
            IndexError: an index is out of range.
            ValueError: rows of several sizes, a value that is not finite, or a negative deviation.
        """
        shards = self.shards_of(part)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices from {int(indices.min())} to {int(indices.max())}: must be 0 to {len(self) - 1}")
        shard = torch.searchsorted(self._ends, indices, right=True)
        order = shard.argsort()
        numbers, counts = shard[order].unique_consecutive(return_counts=True)
        shapes = {tuple(shards[number].shape[1:]) for number in numbers.tolist()} or {tuple(shards[0].shape[1:])}
        if len(shapes) > 1:
            raise ValueError(f"rows of several sizes, {sorted(shapes)}, cannot be one batch: take those of one size")
        result = torch.empty((len(indices), *shapes.pop()), dtype=shards[0].dtype, pin_memory=pin_memory)
        for number, places in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            local = indices[places] - (int(self._ends[number]) - len(shards[number]))
            rows = shards[number].index_select(0, local)
            self.check_values(part, number, rows, local)
            result.index_copy_(0, places, rows)
        return result

    def check_values(self, part: str, shard: int, rows: Tensor, numbers: Tensor | None = None) -> None:
        """Refuse what no autoencoder gives.

        Args:
            part: which tensor.
            shard: its number.
            rows: (n, ...), of the shard.
            numbers: int64 (n,), which rows of the shard they are; None: the first n.

        Raises:
            ValueError: a value is not finite, or a deviation is negative; the message names shard and row.
        """
        fine = rows.isfinite() & (rows >= 0) if part == "std" else rows.isfinite()
        if not bool(fine.all()):
            first = int((~fine.flatten(1).all(dim=1)).nonzero()[0])
            row = first if numbers is None else int(numbers[first])
            where = self.files[shard] if self.files else f"shard {shard}"
            rule = "finite and >= 0" if part == "std" else "finite"
            raise ValueError(f"{where}, row {row}: {part} has values that are not {rule}; encode the split again")

    @functools.cached_property
    def _ends(self) -> Tensor:
        """int64 (number of shards,): the row after each shard's last."""
        return torch.tensor([len(mean) for mean in self.mean]).cumsum(0)
