"""Where units wait that are not on the device: in page-locked host memory, or in memory-mapped files."""

from __future__ import annotations

import abc
import os
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .arena import Arena, Layout, host_memory, mapped_file, unpin

#: Bytes of a call: more than 2 GiB none moves.
_AT_ONCE = 2**26


@dataclass(frozen=True)
class UnitMemory:
    """All of a unit that moves between host and device.

    Attributes:
        weights: parameters and buffers.
        state: optimizer state and averages.
    """

    weights: Arena
    state: Arena


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


class OpenFile:
    """A file that `mapped_file` made, to be read and written by calls.

    Args:
        path: of the file.
        layout: of its tensors, with which the file ends.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._layout = layout
        self._start = path.stat().st_size - layout.bytes
        self._file = os.open(path, os.O_RDWR)
        weakref.finalize(self, os.close, self._file)

    def read(self, buffer: Tensor) -> None:
        """Read all tensors into the beginning of a buffer."""
        self._move(os.preadv, buffer[: self._layout.bytes])

    def write_changes(self, buffer: Tensor) -> None:
        """Write what training changes, which lies at the beginning of a buffer as of the tensors."""
        self._move(os.pwritev, buffer[: self._layout.changing])

    def _move(self, call: Callable[[int, list[memoryview], int], int], buffer: Tensor) -> None:
        memory, place = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        while place < len(memory):
            count = call(self._file, [memory[place : place + _AT_ONCE]], self._start + place)
            if count == 0:
                raise OSError(f"a file of waiting blocks ends at byte {self._start + place:,}: it was cut")
            place += count


class FileBuffers(HostBuffers):
    """All units in safetensors files that are mapped into memory; two buffers in host memory.

    A thread reads the coming unit ahead and writes the last one back, one after the other, while the device computes.
    It does so by calls, which are twice as fast as copies from and to a mapping, page by page, and see the same pages.

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
        self._files: list[list[OpenFile]] = []
        for unit, both in enumerate(layouts):
            paths = [folder / f"unit-{unit:02d}-{part}.safetensors" for part in ("weights", "state")]
            arenas = [Arena(one, mapped_file(path, one)) for one, path in zip(both, paths, strict=True)]
            self._units.append(UnitMemory(*arenas))
            self._files.append([OpenFile(path, one) for one, path in zip(both, paths, strict=True)])
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
        for file, buffer in zip(self._files[unit], buffers, strict=True):
            file.read(buffer)
        return buffers

    def finish_switch(self, left: int | None, came: int | None, wait: Callable[[], Any]) -> None:
        """Let the thread wait for the copies, write back what left, and free the buffers."""
        pairs = [(unit, self._moving.pop(unit)) for unit in (left, came) if unit is not None]

        def finish() -> None:
            wait()
            for unit, buffers in pairs:
                if unit == left:
                    for file, buffer in zip(self._files[unit], buffers, strict=True):
                        file.write_changes(buffer)
                self._free.append(buffers)

        self._submit(finish)

    def settle(self) -> None:
        """Wait for the thread's last work."""
        if self._last is not None:
            self._last.result()
