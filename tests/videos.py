"""Tiny videos, written by PyAV, whose frames tell their number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av: Any = pytest.importorskip("av", reason="needs PyAV (the extra `video`)")


def grey_of(number: int) -> int:
    """How bright a frame is."""
    return 20 + 7 * number


def write_video(path: Path, count: int, *, fps: int = 30, size: tuple[int, int] = (24, 32)) -> Path:
    """A video of plain frames, frame i as bright as `grey_of(i)`, of (height, width)."""
    with av.open(str(path), "w") as container:
        stream = add_stream(container, "libvpx" if path.suffix == ".webm" else "libx264", size, fps=fps)
        write_frames(
            container, stream, [np.full((*size, 3), grey_of(number), dtype=np.uint8) for number in range(count)]
        )
    return path


def add_stream(container: Any, codec: str, size: tuple[int, int], pixels: str = "yuv420p", *, fps: int = 30) -> Any:
    """A stream of pictures of (height, width) in a container that is written."""
    stream = container.add_stream(codec, rate=Fraction(fps))
    stream.height, stream.width = size
    stream.pix_fmt = pixels
    return stream


def write_frames(container: Any, stream: Any, frames: Sequence[np.ndarray[Any, Any]]) -> None:
    """Write all frames of a stream: uint8 (height, width, 3)."""
    for pixels in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())


def write_sound(path: Path) -> Path:
    """A file that has sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
