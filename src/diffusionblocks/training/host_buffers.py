"""Where units wait that are not on the device: in page-locked host memory, or in memory-mapped files."""

from __future__ import annotations

import abc
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .arena import Arena, Layout, host_memory, mapped_file, unpin


@dataclass(frozen=True)
class Luggage:
    """All that a unit brings to the device.

    Attributes:
        weights: parameters and buffers.
        state: optimizer state and averages.
    """

    weights: Arena
    state: Arena

    def copy_(self, other: Luggage) -> None:
        """Take over the values of another of the same layout."""
        for mine, theirs in ((self.weights, other.weights), (self.state, other.state)):
            mine.memory.copy_(theirs.memory)


Layouts = tuple[Layout, Layout]


class Homes(abc.ABC):
    """Keeps what units bring, and lends the buffers through which it travels.

    A switch from unit a to unit b is: `leaving(a)` gives the buffer to copy into from the device, `coming(b)` the one
    to copy onto it; `switched` tells that these copies are enqueued.

    Attributes:
        host_bytes: host memory that it occupies (mapped files do not count: the system can drop their pages).
    """

    host_bytes = 0

    @abc.abstractmethod
    def home(self, unit: int) -> Luggage:
        """The unit's own; up to date when nothing of it is on the device and `settle` was called."""

    @abc.abstractmethod
    def leaving(self, unit: int) -> Luggage:
        """A buffer for what comes off the device."""

    @abc.abstractmethod
    def coming(self, unit: int) -> Luggage:
        """A buffer with what shall go to the device."""

    def switched(self, left: int | None, came: int | None, copied: Callable[[], Any]) -> None:  # noqa: B027
        """The copies of `left` and `came` are enqueued; `copied()` waits for them."""

    def prefetch(self, unit: int) -> None:  # noqa: B027
        """The unit will come next."""

    def settle(self) -> None:  # noqa: B027
        """Wait for all that is under way."""


class HostHomes(Homes):
    """All units in host memory, page-locked where there is a GPU."""

    def __init__(self, layouts: list[Layouts], *, pinned: bool) -> None:
        self._homes = [
            Luggage(*(Arena(one, host_memory(one.bytes, pinned=pinned)) for one in both)) for both in layouts
        ]
        self.host_bytes = sum(layout.bytes for both in layouts for layout in both)
        if pinned:
            memories = [arena.memory for home in self._homes for arena in (home.weights, home.state)]
            weakref.finalize(self, unpin, memories)

    def home(self, unit: int) -> Luggage:
        """See `Homes`."""
        return self._homes[unit]

    leaving = coming = home


class DiskHomes(Homes):
    """All units in safetensors files that are mapped into memory; two buffers in host memory.

    A thread reads the coming unit ahead and writes the last one back, one after the other, while the device computes.

    Args:
        layouts: of each unit.
        folder: for the files; it is emptied first, and removed with this object.
        pinned: page-lock the buffers.
    """

    def __init__(self, layouts: list[Layouts], folder: Path, *, pinned: bool) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._layouts = layouts
        self._homes = []
        for unit, both in enumerate(layouts):
            paths = [folder / f"unit-{unit:02d}-{part}.safetensors" for part in ("weights", "state")]
            arenas = [Arena(one, mapped_file(path, one)) for one, path in zip(both, paths, strict=True)]
            self._homes.append(Luggage(*arenas))
        largest = [max(both[part].bytes for both in layouts) for part in range(2)]
        self._free = [[host_memory(size, pinned=pinned) for size in largest] for _ in range(2)]
        self.host_bytes = 2 * sum(largest)
        if pinned:
            weakref.finalize(self, unpin, [memory for pair in self._free for memory in pair])
        self._reads: dict[int, Future[list[Tensor]]] = {}
        self._lent: dict[int, list[Tensor]] = {}
        self._last: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(1, "homes")

    def home(self, unit: int) -> Luggage:
        """See `Homes`."""
        return self._homes[unit]

    def _in(self, unit: int, buffers: list[Tensor]) -> Luggage:
        pairs = zip(self._layouts[unit], buffers, strict=True)
        return Luggage(*(Arena(layout, buffer[: layout.bytes]) for layout, buffer in pairs))

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        self._last = self._thread.submit(work)
        return self._last

    def leaving(self, unit: int) -> Luggage:
        """See `Homes`."""
        if not self._free:
            self.settle()
        self._lent[unit] = self._free.pop()
        return self._in(unit, self._lent[unit])

    def coming(self, unit: int) -> Luggage:
        """See `Homes`."""
        for other in [u for u in self._reads if u != unit]:  # read ahead, but another one comes
            self._free.append(self._reads.pop(other).result())
        self.prefetch(unit)
        self._lent[unit] = self._reads.pop(unit).result()
        return self._in(unit, self._lent[unit])

    def prefetch(self, unit: int) -> None:
        """See `Homes`."""
        if unit in self._reads:
            return
        self._reads[unit] = self._submit(lambda: self._read(unit))

    def _read(self, unit: int) -> list[Tensor]:
        buffers = self._free.pop()
        self._in(unit, buffers).copy_(self._homes[unit])
        return buffers

    def switched(self, left: int | None, came: int | None, copied: Callable[[], Any]) -> None:
        """See `Homes`."""
        lent = [(unit, self._lent.pop(unit)) for unit in (left, came) if unit is not None]

        def finish() -> None:
            copied()
            for unit, buffers in lent:
                if unit == left:
                    self._homes[unit].copy_(self._in(unit, buffers))
                self._free.append(buffers)

        self._submit(finish)

    def settle(self) -> None:
        """See `Homes`."""
        if self._last is not None:
            self._last.result()
