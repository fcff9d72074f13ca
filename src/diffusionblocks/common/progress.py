"""How far long work on files is: a bar on a terminal, elsewhere a line on standard error now and then."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

from tqdm import tqdm

from .messages import announce

_LINE = re.compile(r"(?!error: |warning: ).+: ([\d,]+ )?(of [\d,]+ )?[a-z]+(, [\d:]+( days?, [\d:]+)? left)?")


def on_terminal() -> bool:
    """Whether a bar can be shown; bars of several processes would write over one another."""
    return sys.stderr.isatty() and int(os.environ.get("WORLD_SIZE", 1)) == 1


def begin_line(name: str, total: int | None, unit: str) -> str:
    """What is said as work begins: its name, and how much of what it is, if that is known."""
    return f"{name}: {unit}" if total is None else f"{name}: {total:,} {unit}"


def is_progress(line: str) -> bool:
    """Whether a line is one that tells of work, see `begin_line` and `Progress`."""
    return _LINE.fullmatch(line) is not None


class Progress:
    """Shows how much of some work is done, as a context manager; of several ranks the first one's alone.

    Args:
        name: what is done, as a line begins.
        total: how much there is of it; None where it is not known.
        unit: what is counted, in the plural.
        show: False shows nothing.
        seconds: between two lines, at least; the first comes at once.
    """

    def __init__(self, name: str, total: int | None, unit: str, *, show: bool = True, seconds: float = 10.0) -> None:
        self._name, self._total, self._unit, self._seconds = name, total, unit, seconds
        self._show = show and os.environ.get("RANK", "0") == "0"
        self._bar: tqdm[Any] | None = None
        self._count, self._start, self._last = 0, 0.0, 0.0

    def __enter__(self) -> Self:
        if self._show and on_terminal():
            self._bar = tqdm(total=self._total, desc=self._name, unit=f" {self._unit}", unit_scale=True)
        elif self._show:
            announce(begin_line(self._name, self._total, self._unit))
        self._start = self._last = time.monotonic()
        return self

    def update(self, count: int) -> None:
        """So many more are done."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._show and (now := time.monotonic()) - self._last >= self._seconds:
            self._last = now
            announce(self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        amount = f"{self._name}: {self._count:,}"
        if self._total is None:
            return f"{amount} {self._unit}"
        left = datetime.timedelta(seconds=round(seconds * (self._total - self._count) / max(1, self._count)))
        return f"{amount} of {self._total:,} {self._unit}, {left} left"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Let diffusers draw no bars of the files that it loads: they would stand between the lines that are told."""
    from diffusers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
