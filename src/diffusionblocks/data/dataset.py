"""What every data set answers, whatever its examples are, and what makes training batches of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BatchMaker", "Dataset", "ExampleCount", "check_labels"]


class Dataset(ABC):
    """The examples of one split; `len` counts them.

    Attributes:
        tokenizer: the bytes of the `tokenizer.json` whose ids the examples are; None without one.
    """

    tokenizer: bytes | None = None

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
