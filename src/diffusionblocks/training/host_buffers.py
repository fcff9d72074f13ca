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
class UnitMemory:
    """All of a unit that moves between host and device.

    Attributes:
        weights: parameters and buffers.
        state: optimizer state and averages.
    """

    weights: Arena
    state: Arena

    def copy_(self, other: UnitMemory) -> None:
        """Take over the values of another of the same layout."""
        for mine, theirs in ((self.weights, other.weights), (self.state, other.state)):
            mine.memory.copy_(theirs.memory)

    def take_changes(self, other: UnitMemory) -> None:
        """Take over what training changed of another of the same layout."""
        for mine, theirs in ((self.weights, other.weights), (self.state, other.state)):
            mine.changing.copy_(theirs.changing)


Layouts = tuple[Layout, Layout]


class HostBuffers(abc.ABC):
    """Keeps the units that are not active, and lends the buffers through which they move.

    A switch from unit a to unit b is: `outgoing(a)` gives the buffer to copy into from the device, `incoming(b)` the
    one to copy onto it; `finish_switch` says that these copies are enqueued.

    Attributes:
        host_bytes: host memory that it occupies (mapped files do not count: the system can drop their pages).
    """

    host_bytes = 0

    @abc.abstractmethod
    def of(self, unit: int) -> UnitMemory:
        """The unit's own memory; up to date when nothing of it is on the device and `settle` was called."""

    @abc.abstractmethod
    def outgoing(self, unit: int) -> UnitMemory:
        """A buffer for what comes off the device: what training changed; what it only read stays where it was."""

    @abc.abstractmethod
    def incoming(self, unit: int) -> UnitMemory:
        """A buffer with what shall go to the device."""

    def finish_switch(self, left: int | None, came: int | None, wait: Callable[[], Any]) -> None:  # noqa: B027
        """The copies of `left` and `came` are enqueued; `wait()` waits for them."""

    def prefetch(self, unit: int) -> None:  # noqa: B027
        """The unit will come next."""

    def settle(self) -> None:  # noqa: B027
        """Wait for all that is under way."""


class MemoryBuffers(HostBuffers):
    """All units in host memory, page-locked where there is a GPU."""

    def __init__(self, layouts: list[Layouts], *, pinned: bool) -> None:
        self._units = [
            UnitMemory(*(Arena(one, host_memory(one.bytes, pinned=pinned)) for one in both)) for both in layouts
        ]
        self.host_bytes = sum(layout.bytes for both in layouts for layout in both)
        if pinned:
            memories = [arena.memory for unit in self._units for arena in (unit.weights, unit.state)]
            weakref.finalize(self, unpin, memories)

    def of(self, unit: int) -> UnitMemory:
        """Return the unit's own memory."""
        return self._units[unit]

    outgoing = incoming = of


class FileBuffers(HostBuffers):
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
        self._units = []
        for unit, both in enumerate(layouts):
            paths = [folder / f"unit-{unit:02d}-{part}.safetensors" for part in ("weights", "state")]
            arenas = [Arena(one, mapped_file(path, one)) for one, path in zip(both, paths, strict=True)]
            self._units.append(UnitMemory(*arenas))
        largest = [max(both[part].bytes for both in layouts) for part in range(2)]
        self._free = [[host_memory(size, pinned=pinned) for size in largest] for _ in range(2)]
        self.host_bytes = 2 * sum(largest)
        if pinned:
            weakref.finalize(self, unpin, [memory for pair in self._free for memory in pair])
        self._reads: dict[int, Future[list[Tensor]]] = {}
        self._moving: dict[int, list[Tensor]] = {}
        self._last: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(1, "host-buffers")

    def of(self, unit: int) -> UnitMemory:
        """Return the unit's own memory."""
        return self._units[unit]

    def _in(self, unit: int, buffers: list[Tensor]) -> UnitMemory:
        pairs = zip(self._layouts[unit], buffers, strict=True)
        return UnitMemory(*(Arena(layout, buffer[: layout.bytes]) for layout, buffer in pairs))

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        self._last = self._thread.submit(work)
        return self._last

    def outgoing(self, unit: int) -> UnitMemory:
        """Lend a free buffer; wait for one where both are under way."""
        if not self._free:
            self.settle()
        self._moving[unit] = self._free.pop()
        return self._in(unit, self._moving[unit])

    def incoming(self, unit: int) -> UnitMemory:
        """Lend the buffer that the unit was read into; read it now where `prefetch` did not."""
        for other in [u for u in self._reads if u != unit]:  # read ahead, but another one comes
            self._free.append(self._reads.pop(other).result())
        self.prefetch(unit)
        self._moving[unit] = self._reads.pop(unit).result()
        return self._in(unit, self._moving[unit])

    def prefetch(self, unit: int) -> None:
        """Let the thread read the unit into a free buffer."""
        if unit in self._reads:
            return
        self._reads[unit] = self._submit(lambda: self._read(unit))

    def _read(self, unit: int) -> list[Tensor]:
        buffers = self._free.pop()
        self._in(unit, buffers).copy_(self._units[unit])
        return buffers

    def finish_switch(self, left: int | None, came: int | None, wait: Callable[[], Any]) -> None:
        """Let the thread wait for the copies, write back what left, and free the buffers."""
        pairs = [(unit, self._moving.pop(unit)) for unit in (left, came) if unit is not None]

        def finish() -> None:
            wait()
            for unit, buffers in pairs:
                if unit == left:
                    self._units[unit].take_changes(self._in(unit, buffers))
                self._free.append(buffers)

        self._submit(finish)

    def settle(self) -> None:
        """Wait for the thread's last work."""
        if self._last is not None:
            self._last.result()
