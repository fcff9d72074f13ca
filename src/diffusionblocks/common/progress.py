"""How far long work on files is: a bar on a terminal, elsewhere a line on standard error now and then."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Self

from tqdm import tqdm

from .messages import announce


def on_terminal() -> bool:
    """Whether a bar can be shown; bars of several processes would write over one another."""
    return sys.stderr.isatty() and int(os.environ.get("WORLD_SIZE", 1)) == 1


class Progress:
    """Shows how much of some work is done, as a context manager; of several ranks the first one's alone.

    Args:
        name: what is done, as a line begins.
        total: how much there is of it.
        unit: what is counted, in the plural.
        show: False shows nothing.
        seconds: between two lines, at least; the first comes at once.
    """

    def __init__(self, name: str, total: int, unit: str, *, show: bool = True, seconds: float = 10.0) -> None:
        self._name, self._total, self._unit, self._seconds = name, total, unit, seconds
        self._show = show and os.environ.get("RANK", "0") == "0"
        self._bar: tqdm[Any] | None = None
        self._count, self._last = 0, 0.0

    def __enter__(self) -> Self:
        if self._show and on_terminal():
            self._bar = tqdm(total=self._total, desc=self._name, unit=f" {self._unit}", unit_scale=True)
        elif self._show:
            announce(f"{self._name}: {self._total:,} {self._unit}")
        self._last = time.monotonic()
        return self

    def update(self, count: int) -> None:
        """So many more are done."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._show and time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            announce(f"{self._name}: {self._count:,} of {self._total:,} {self._unit}")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
