"""What every data set answers, whatever its examples are, and what makes training batches of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["BatchMaker", "Dataset", "ExampleCount", "LabelledImages", "check_labels", "evenly_spread"]


class Dataset(ABC):
    """The examples of one split; `len` counts them."""

    @property
    def processing(self) -> Mapping[str, bytes]:
        """Files that say how the examples were made, content by name: of text `tokenizer.json`, whose ids they are."""
        return {}

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of labels, or of different ids."""

    @property
    @abstractmethod
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one example, without a batch dimension."""

    @property
    @abstractmethod
    def classes(self) -> list[str] | int:
        """The names of the labels in their order, or the number of different ids."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Everything that the examples consist of, in a fixed order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def part(self, count: int) -> Self:
        """At most `count` examples that stand for all: of images evenly spread, of a text the first."""


class LabelledImages(Dataset):
    """Images, or latents, of one shape with a label each.

    Attributes:
        labels: int64 (N,), each from 0 to num_classes - 1.
        class_names: one name per class, in the order of the labels.
    """

    labels: Tensor
    class_names: tuple[str, ...]

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image, (C, T, H, W) of latents of videos."""

    @property
    @override
    def num_classes(self) -> int:
        return len(self.class_names)  # also of those that have no image here

    @property
    @override
    def classes(self) -> list[str]:
        return list(self.class_names)

    @property
    @override
    def example_shape(self) -> tuple[int, ...]:
        return self.image_shape

    def __len__(self) -> int:
        return len(self.labels)

    def _check_labels(self, count: int) -> None:
        """ValueError unless `labels` and `class_names` are those of `count` images."""
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise ValueError(f"labels: {self.labels.dtype} {tuple(self.labels.shape)}: must be int64 ({count},)")
        check_labels(self.labels, len(self.class_names))


@dataclass(frozen=True)
class ExampleCount:
    """How many examples a train split has, as far as that is cheap to know.

    Attributes:
        count: how many; None where it is not known.
        where: the folder that they lie in, or "" for data that come with a library; without a count the reason.
    """

    count: int | None
    where: str


class BatchMaker(Protocol):
    """Makes a batch on the device from example indices (batch,) and a generator."""

    num_examples: int

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> Mapping[str, Tensor]:
        """Make the batch."""

    def compile(self) -> None:
        """torch.compile what can be."""


class ReadBatches:
    """Batches as a model's class reads them.

    Args:
        batches: makes a batch of examples.
        batch_of: makes of it one that the class reads.
    """

    def __init__(self, batches: BatchMaker, batch_of: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        self.num_examples, self.compile = batches.num_examples, batches.compile
        self.groups = groups_of(batches)
        self._batches, self._batch_of = batches, batch_of

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> Mapping[str, Tensor]:
        """Make the batch: see `BatchMaker`."""
        return self._batch_of(self._batches(indices, generator))


def groups_of(batches: BatchMaker) -> Tensor | None:
    """Which examples may be in one step, int64 (num_examples,), as latents of one size; None: all may."""
    groups: Tensor | None = getattr(batches, "groups", None)
    return groups


def evenly_spread(total: int, count: int) -> Tensor:
    """Numbers of `count` of `total` examples, ascending, int64: files often hold one class after the other."""
    return torch.arange(count) * total // count


def check_labels(labels: Tensor, classes: int, where: str = "", first_row: int = 0) -> None:
    """Refuse a label below 0 or above classes - 1.

    Args:
        labels: int64 (n,).
        classes: how many there are.
        where: file or argument that holds them, for the message.
        first_row: number of the first label's row.

    Raises:
        ValueError: it names place, row and label.
    """
    bad = (labels < 0) | (labels >= classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}{', ' if where else ''}row {first_row + row}: label {int(labels[row])}: must be from 0 to "
            f"{classes - 1} ({classes} classes); rows without a label must be dropped first"
        )
