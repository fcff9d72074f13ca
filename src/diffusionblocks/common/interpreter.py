"""What CPython itself costs beside the work: its stack of frames, and garbage collection over what is no garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TypeVar

T = TypeVar("T")

# Values (of 8 bytes) for which a frame asks. The interpreter rounds up to 2 MiB, and leaves room for 100,000 more.
_FRAME = 140_000


def on_a_large_stack(action: Callable[[], T]) -> T:
    """Call a function so that the frames of all that it calls lie in one piece of memory.

    CPython keeps frames in pieces of 16 KiB, and returns a piece to the system once its first frame ends. A loop that
    calls across such a border maps and unmaps memory each time. Tracers, 200 frames deep, have many borders: it takes a
    fifth of their time. A frame that asks for more gets one large piece, in which the frames above it lie as well.

    Args:
        action: what to call.

    Returns:
        What it returns.
    """
    large = FunctionType(_call.__code__.replace(co_stacksize=_FRAME), _call.__globals__)
    return large(action)  # type: ignore[no-any-return]


def _call(action: Callable[[], T]) -> T:
    return action()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let garbage collection wait: while libraries are imported it looks at a million objects, and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def without_older_objects() -> Iterator[None]:
    """Let garbage collection pass over what is there already: a library's modules are a million objects."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
