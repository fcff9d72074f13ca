"""Batches of text on the training device: chunks of one length, which overlap in training only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .placement import gather, on_device, refuse_capture
from .text_data import TextData

__all__ = ["TextBatches", "evaluation_chunks"]

_SIGNED = {torch.uint8: torch.uint8, torch.uint16: torch.int16, torch.uint32: torch.int32}


class TextBatches:
    """Make training batches on a device: chunks of `length` ids that start anywhere in the text.

    Example i is a chunk that starts at i * length plus a number below `length`, drawn anew each time. So every start is
    equally likely over time, and an epoch reads the text about once.

    Args:
        data: the text.
        length: ids of a chunk, >= 1.
        device: where the batches are made.
        placement: where the ids are kept. "device": on the device (on a CPU: read into memory); "host": where `data`
            has them, each batch being copied over through page-locked memory; "auto": on a GPU if they take at most a
            quarter of its free memory. The batches are the same. A CUDA graph can only be made of "device".

    Attributes:
        num_examples: chunks of an epoch.
        on_device: whether all ids were copied to the device.

    Raises:
        ValueError: length or placement is not as above, or the text is shorter than two chunks.
    """

    def __init__(self, data: TextData, length: int, *, device: torch.device, placement: str = "auto") -> None:
        _check_length(length, data, (len(data) + 1) // 2)
        self.length = length
        self.num_examples = (len(data) - length + 1) // length
        self.device = torch.device(device)
        self._ids = _signed(data)
        self._highest = _all_ones(data)
        self.on_device = on_device(placement, self._ids.nbytes, self.device)
        if self.on_device:
            self._ids = self._ids.to(self.device, copy=True)

    def compile(self) -> None:
        """There is nothing to compile: a batch is one gather."""

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Make the batch of the given examples.

        Args:
            indices: int64 (n,), 0 to num_examples - 1; on the device when the ids are there (then nothing waits for the
                device), else on either.
            generator: source of the starts, on `device`; None for the default one.

        Returns:
            On the device: "input_ids" int64 (n, length).

        Raises:
            ValueError: a CUDA graph is being captured, but the ids are not on the device.
        """
        if not self.on_device:
            refuse_capture(self.device, "text")
        # Drawn on the device in either placement, so that batches do not depend on it.
        shift = torch.randint(self.length, indices.shape, generator=generator, device=self.device)
        place = self._ids.device
        starts = indices.to(place) * self.length + shift.to(place)
        positions = (starts[:, None] + torch.arange(self.length, device=place)).flatten()
        chunks = gather(self._ids, positions, self.device).view(-1, self.length)
        return {"input_ids": _widen(chunks, self._highest)}


def evaluation_chunks(
    data: TextData, length: int, *, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The text once, in order, in chunks that do not overlap; ids left over at its end (fewer than length) are dropped.

    Args:
        data: the text.
        length: ids of a chunk, >= 1.
        batch_size: chunks a batch, at least 1; the last batch may be smaller.
        device: where the batches are made.

    Returns:
        Iterator over {"input_ids": int64 (n, length)} on the device.

    Raises:
        ValueError: length or batch_size is not as above, or the text is shorter than a chunk (at the call, not at the
            first batch).
    """
    _check_length(length, data, len(data))
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r}: must be at least 1")
    chunks = _signed(data)[: len(data) // length * length].view(-1, length)

    def batches() -> Iterator[dict[str, Tensor]]:
        for some in chunks.split(batch_size):
            yield {"input_ids": _widen(some.to(device), _all_ones(data))}

    return batches()


def _check_length(length: int, data: TextData, most: int) -> None:
    if not 1 <= length <= most:
        raise ValueError(f"length = {length!r}: must be from 1 to {most} for a text of {len(data)} ids")


def _signed(data: TextData) -> Tensor:
    """The same bits in a type that torch can gather."""
    return data.ids.view(_SIGNED[data.ids.dtype])


def _all_ones(data: TextData) -> int:
    return (1 << 8 * data.ids.element_size()) - 1


def _widen(ids: Tensor, highest: int) -> Tensor:
    """int64 of the unsigned bits."""
    return ids.to(torch.int64) & highest
