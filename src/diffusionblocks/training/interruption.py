"""Signals that end a run: noted at once, acted on between two steps, when the state can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


class Interrupted(RuntimeError):
    """SIGINT or SIGTERM arrived; the state was saved. `signum` says which."""

    def __init__(self, signum: int, where: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again to resume from {where}")
        self.signum = signum
        self.exit_status = 128 + signum


class SignalWatch:
    """Notes SIGINT and SIGTERM instead of dying in the middle of a step; a second one dies.

    Attributes:
        signum: the signal that arrived; None so far.
    """

    signum: int | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Watch in the main thread, the only one that Python tells of signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
