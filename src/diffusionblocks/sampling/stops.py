"""Where generated texts end: behind a token, or where a string is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Stands before the first token of a text: beyond every vocabulary, so that no string goes through it.
_NOTHING = 2**31 - 1


class TextEnds:
    """Notes, token by token, how many new tokens each row has up to its end; nothing waits for the device.

    Args:
        rows: the prompts, int64 (length,) each, on the CPU.
        count: most new tokens of a row.
        tokens: a row ends behind the first of these that it generates.
        criterion: says of ids (n, some) whether a stop string ends with the last of each row, (n,)
            (`families.generation_config.stop_criterion`); None: there are no strings.
        device: where tokens are generated.

    Attributes:
        lengths: new tokens of each row, int64 (n,).
    """

    def __init__(
        self, rows: Sequence[Tensor], count: int, tokens: Sequence[int], criterion: Any, device: torch.device
    ) -> None:
        self.lengths = torch.full((len(rows),), count, device=device)
        self._tokens = torch.tensor(list(tokens), dtype=torch.int64, device=device)
        self._criterion, self._step = criterion, 0
        self._last = torch.empty(len(rows), 0, dtype=torch.int64)
        if criterion is not None:
            self._last = torch.full((len(rows), criterion.maximum_token_len), _NOTHING)
            for place, row in zip(self._last, rows, strict=True):
                end = row[-len(place) :]
                place[len(place) - len(end) :] = end
        self._last = self._last.to(device)

    @property
    def any(self) -> bool:
        """Whether anything ends a row."""
        return len(self._tokens) > 0 or self._criterion is not None

    def hear(self, token: Tensor) -> Tensor:
        """Take the next token of each row (n,); returns whether all rows have ended, bool ()."""
        self._step += 1
        at_end = torch.isin(token, self._tokens)
        if self._criterion is not None:
            self._last = torch.cat([self._last[:, 1:], token[:, None]], dim=1)
            at_end = at_end | self._criterion(self._last, None)
        self.lengths = torch.where(at_end, self.lengths.clamp(max=self._step), self.lengths)
        return (self.lengths <= self._step).all()
