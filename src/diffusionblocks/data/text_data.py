"""Text as ids, in ordinary memory or mapped from a file, whole and as examples of one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from .dataset import Dataset

__all__ = ["TextChunks", "TextData"]

_DTYPES = (torch.uint8, torch.uint16, torch.uint32)


@dataclass(frozen=True)
class TextData:
    """One long text as ids, in ordinary memory or mapped from a file.

    Attributes:
        ids: uint8, uint16 or uint32, shape (N,), N >= 1, on the CPU, each from 0 to vocab_size - 1.
        vocab_size: number of different ids; 27 for characters.
        processing: the content of `tokenizer.json`, whose ids these are, and of what lies beside it, by name; empty
            where that is not known, and for characters.

    Raises:
        ValueError: a dtype, a shape or an id is not as above.
    """

    ids: Tensor
    vocab_size: int
    processing: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.ids.dtype not in _DTYPES or self.ids.dim() != 1 or len(self.ids) == 0:
            raise ValueError(
                f"ids: {self.ids.dtype} {tuple(self.ids.shape)}: must be uint8, uint16 or uint32 (N,), N >= 1"
            )
        highest = int(self.ids.numpy().max())  # torch has no maximum of uint16
        if highest >= self.vocab_size:
            raise ValueError(f"ids: {highest} is among them: must be from 0 to {self.vocab_size - 1}")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TextChunks(Dataset):
    """A text as examples of one length.

    Attributes:
        text: the text.
        length: ids of an example.
    """

    text: TextData
    length: int

    @property
    @override
    def num_classes(self) -> int:
        return self.text.vocab_size

    @property
    @override
    def example_shape(self) -> tuple[int]:
        return (self.length,)

    @property
    @override
    def classes(self) -> int:
        return self.num_classes

    @property
    @override
    def processing(self) -> Mapping[str, bytes]:
        return self.text.processing

    @override
    def tensors(self) -> list[Tensor]:
        return [self.text.ids]

    def first(self, count: int | None) -> Self:
        """The first `count` chunks; None: all of the text."""
        if count is None:
            return self
        return dataclasses.replace(self, text=dataclasses.replace(self.text, ids=self.text.ids[: count * self.length]))

    @override
    def part(self, count: int) -> Self:
        return self.first(count)

    def __len__(self) -> int:
        """Chunks that do not overlap."""
        return len(self.text) // self.length
