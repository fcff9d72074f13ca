"""Texts that a collator packed into one row, each as a row of its own: what blocks read in place of `position_ids`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..targets.next_token import CONTEXT

#: What else collators say of packed texts, for kernels of attention.
_OF_KERNELS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


class UnpackingCollator:
    """A collator whose packed texts come apart (`unpacked`), in the process that loads the data.

    Args:
        collator: what makes a batch of examples.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: Any) -> Any:
        """A batch of the collator's, unpacked."""
        batch = self.collator(examples)
        return unpacked(batch) if isinstance(batch, Mapping) and "position_ids" in batch else batch


def unpacked(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Give each text of a packed batch a row of its own, padded on the right; the loss is that of the texts unpacked.

    A text starts where `position_ids` is 0. Texts without a label that counts are left out, but for the last one.

    Args:
        batch: `input_ids` and `position_ids` (rows, length), int64, on the CPU; `labels` and `attention_mask` of that
            shape where they are there.

    Returns:
        The batch with `attention_mask`, and without `position_ids` and what kernels are told.

    Raises:
        ValueError: positions of another shape, or that do not count up from 0 in each text.
    """
    rest = {name: value for name, value in batch.items() if name not in ("position_ids", *_OF_KERNELS)}
    tokens, positions = batch["input_ids"], batch["position_ids"]
    if positions.shape != tokens.shape:
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}, but input_ids {tuple(tokens.shape)}: give each token one"
        )
    there = rest.pop("attention_mask", torch.ones_like(tokens)) != 0
    columns = {name: rest.pop(name) for name in ("input_ids", "labels") if name in rest}
    texts: list[dict[str, Tensor]] = []
    for row in range(len(tokens)):
        starts = _starts(positions[row][there[row]])
        parts = {name: value[row][there[row]].tensor_split(starts) for name, value in columns.items()}
        texts += [dict(zip(parts, text, strict=True)) for text in zip(*parts.values(), strict=True)]
    some_loss = [text for text in texts if "labels" not in text or bool((text["labels"] != CONTEXT).any())]
    return rest | _padded(some_loss or texts[-1:])


def _starts(positions: Tensor) -> list[int]:
    """Where texts start but the first, of the positions of a row without padding."""
    places = torch.arange(len(positions))
    starts = (positions == 0).nonzero().flatten()
    if not len(starts) or not torch.equal(places - positions, starts[(positions == 0).cumsum(0) - 1]):
        raise ValueError(
            "position_ids must count up from 0 in each text of a row: others have no meaning for blocks, which read "
            "texts whole; leave them out of the batch"
        )
    return starts[1:].tolist()  # type: ignore[no-any-return]


def _padded(texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    fill = {"labels": CONTEXT}
    lengths = torch.tensor([len(text["input_ids"]) for text in texts])
    batch = {
        name: pad_sequence([text[name] for text in texts], batch_first=True, padding_value=fill.get(name, 0))
        for name in texts[0]
    }
    return batch | {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
