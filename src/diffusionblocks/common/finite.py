"""Finite numbers: nothing is read off NaN or an infinity, and no weights with one are taken for trained ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: What to do about weights that are not finite.
DIVERGED = (
    "the training diverged, or the file is damaged: take an earlier checkpoint or another copy, or train again at a "
    "lower learning rate"
)


class FiniteCheck:
    """Refuses what a network gives where it is not finite, before a token, label or score is read off it.

    On a CPU that is at once. A GPU is not waited for: the first place that is not finite is noted there, and `read`
    raises. So call `read` where the result goes to the host anyway.

    Args:
        network: what messages call the network.
        owner: level -> index of the block that owns it; the message then names the block. Blocks rule no token out, so
            all of their logits must be finite.
    """

    def __init__(self, network: str = "the network", owner: Callable[[float], int] | None = None) -> None:
        self.network = network
        self.owner = owner
        self._places: list[tuple[str, float | None]] = []
        self._first: Tensor | None = None

    def values(self, values: Tensor, name: str, level: float | None = None) -> Tensor:
        """The same values, each of which must be finite; `name` says what they are."""
        self._note(all_finite(values), name, level)
        return values

    def logits(self, logits: Tensor, level: float | None = None) -> Tensor:
        """The same logits (..., classes). Of a network without `owner` -inf may rule out some, not all, classes."""
        # A row's maximum is finite where its softmax is one: with NaN, inf, or -inf alone there is none.
        self._note(all_finite(logits if self.owner else logits.amax(dim=-1)), "logits", level)
        return logits

    def steps(self, good: Tensor, levels: Sequence[float]) -> None:
        """Note which of some network calls at once gave finite logits: bool (steps,), and the level of each.

        Always of the same steps: a captured step may note them, and so may any number of replays.
        """
        if good.device.type == "cpu":
            if not good.all():
                raise self._error("logits", levels[int(good.byte().argmin())])
            return
        self._places = [("logits", level) for level in levels]
        self._note_first(good.all(), good.byte().argmin())

    def clear(self) -> None:
        """Forget what was noted, where it is noted."""
        if self._first is not None:
            self._first.fill_(-1)

    def read(self) -> None:
        """Raise ValueError for the first place that was not finite; waits for a GPU."""
        first = -1 if self._first is None else int(self._first)
        if first >= 0:
            raise self._error(*self._places[first])

    def _note(self, good: Tensor, name: str, level: float | None) -> None:
        if good.device.type == "cpu":
            if not good:
                raise self._error(name, level)
            return
        self._note_first(good, len(self._places))
        self._places.append((name, level))

    def _note_first(self, good: Tensor, place: Tensor | int) -> None:
        if self._first is None:
            self._first = torch.full((), -1, dtype=torch.int64, device=good.device)
        # In place: a step that notes it may be captured in a CUDA graph.
        self._first.copy_(torch.where((self._first < 0) & ~good, place, self._first))

    def _error(self, name: str, level: float | None) -> ValueError:
        whose = self.network if self.owner is None or level is None else f"block {self.owner(level)}"
        where = "" if level is None else f" at level {level:g}"
        return ValueError(
            f"{whose}: {name}{where} hold NaN or infinite values, so nothing can be read off them; look for damaged "
            "weights, inputs that are not finite, or an overflow in half precision"
        )


def all_finite(values: Tensor) -> Tensor:
    """Whether all values, of any floating dtype, are finite: bool () on their device, without a wait or a copy."""
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    low, high = torch.aminmax(values.detach())  # which give NaN where there is one
    return low.isfinite() & high.isfinite()


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that holds NaN or an infinity; None if there is none. Waits once for a GPU.

    Whole numbers, and tensors on the meta device, are passed over.
    """
    floating = [(name, t) for name, t in tensors if t.is_floating_point() and not t.is_meta]
    # 8-bit floats have no minimum.
    good = [all_finite(t.float() if t.element_size() == 1 else t) for _, t in floating]
    places: dict[torch.device, list[int]] = {}
    for place, flag in enumerate(good):
        places.setdefault(flag.device, []).append(place)
    bad = [
        place
        for together in places.values()
        for place, flag in zip(together, torch.stack([good[p] for p in together]).tolist(), strict=True)
        if not flag
    ]
    return floating[min(bad)][0] if bad else None


def require_finite(tensors: Iterable[tuple[str, Tensor]], owner: str, fix: str) -> None:
    """Raise ValueError where a tensor holds NaN or an infinity.

    Args:
        tensors: by name.
        owner: what holds them, a file for example: the message starts with it.
        fix: what to do, the message's end.
    """
    if (name := first_not_finite(tensors)) is not None:
        raise ValueError(f"{owner}: {name} holds NaN or infinite values; {fix}")


def not_finite_entry(values: Any, name: str = "") -> tuple[str, float] | None:
    """Dotted name and value of the first number, in JSON values, that is NaN or infinite; None if there is none."""
    if isinstance(values, float) and not math.isfinite(values):
        return name, values
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, dict):
        entries = values.items()
    elif isinstance(values, (list, tuple)):
        entries = enumerate(values)
    for key, value in entries:
        if (entry := not_finite_entry(value, f"{name}.{key}" if name else str(key))) is not None:
            return entry
    return None
