"""Files of videos, by PyAV (the extra `video`): clips of them for training, and samples written as mp4."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..common.files import whole_file
from ..common.messages import warn_once
from .image_decoder import crop_to, nearest_size

#: Endings of the files that are read.
VIDEO_ENDINGS = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v"})

#: Seconds by which a frame may come late, where times are rounded to a container's ticks.
_LATE = 1e-3
#: Frames by which a file may end before the length that it tells, as one with a last frame of its own duration.
_EARLY = 3
#: What FFmpeg calls the matrix of colours of a video that tells none, and that of BT.709.
_UNTOLD, _BT709 = 2, 1


def pyav() -> Any:
    """The package PyAV.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import av  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(f"videos need PyAV ({error}): run pip install 'diffusionblocks[video]', or av") from error
    return av


class FileRows(Protocol):
    """Files with a label and a prompt each: see `PictureFolder` and `CaptionedPictures`."""

    class_names: tuple[str, ...]

    def files(self) -> Iterator[tuple[Path, int, str]]:
        """Path, label and prompt of each."""


@dataclass(frozen=True)
class ClipRow:
    """One clip, with the label and the prompt of its video.

    Attributes:
        where: file and time, for messages.
        frames: uint8 (3, frames, height, width), of one of the sizes already.
    """

    where: str
    frames: Tensor
    label: int
    prompt: str

    def pixels(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """The frames: see `ImageRow.pixels`."""
        return self.frames


@dataclass(frozen=True)
class Clips:
    """How videos are cut.

    Attributes:
        frames: of a clip.
        fps: frames a second. Frame i of a clip is the one that a player shows i / fps seconds after its start.
        sizes: heights and widths, of which a video gets the nearest in its proportions: see `crop_to`.
    """

    frames: int
    fps: float
    sizes: Sequence[tuple[int, int]]


class VideoClips:
    """The clips of videos, one behind the other, as labelled rows: what an `ImageTable` is of pictures.

    What a video has left over, less than a clip, is left out. A file that is cut off is warned of, and read to its end.

    Args:
        videos: the files, with labels and prompts.
        clips: how they are cut.

    Attributes:
        class_names: as of `videos`.
        rows: None: how many there are is known at the end.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: a file is no video, or shorter than a clip.
    """

    rows: int | None = None

    def __init__(self, videos: FileRows, clips: Clips) -> None:
        self._videos, self._frames, self._fps, self._sizes = videos, clips.frames, clips.fps, clips.sizes
        self._av = pyav()
        self.class_names = videos.class_names
        self._cut_off: set[Path] = set()
        for path, _, _ in videos.files():  # before hours of work
            with self._opened(path) as (container, stream):
                seconds = None if container.duration is None else container.duration / self._av.time_base
                length = self._length(container, stream)
                rate = float(stream.average_rate or self._fps)
                start = float((stream.start_time or 0) * stream.time_base)
                if length and (end := self._end(container, stream, length)) < length - _EARLY / rate:
                    self._cut_off.add(path)
                    seconds = end = max(0.0, end - start)
                    warn_once(
                        f"{path} is cut off: about {round(end * rate):,} of its {round((length - start) * rate):,} "
                        "frames are there, and the clips are of these; copy it anew, or take it out"
                    )
                if seconds is not None and (self._frames - 1) / self._fps > seconds - _LATE:
                    raise self._too_short(path, seconds)

    def check_labels(self) -> None:
        """Nothing to do: a video's folder is its label."""

    def __iter__(self) -> Iterator[ClipRow]:
        for path, label, prompt in self._videos.files():
            clip: list[Tensor] = []
            count, seconds = 0, 0.0
            for time, frame in self._frames_of(path):
                seconds = time + 1 / self._fps
                clip.append(frame)
                if len(clip) == self._frames:
                    where = f"{path}, clip {count}"
                    yield ClipRow(where, torch.stack(clip, dim=1), label, prompt)
                    clip, count = [], count + 1
            if not count:
                raise self._too_short(path, seconds)

    def _length(self, container: Any, stream: Any) -> float:
        """Where the pictures of a file end, in seconds, as it says itself; 0: it does not say."""
        if "avi" in container.format.name:  # whose duration follows from the bytes that are there
            return float(stream.frames / (stream.average_rate or self._fps))
        if stream.duration is not None:
            return float((stream.duration + (stream.start_time or 0)) * stream.time_base)
        hours = stream.metadata.get("DURATION", "").split(":")  # of Matroska, where that of the file may be its sound's
        try:
            return sum(float(part) * unit for part, unit in zip(hours, (3600, 60, 1), strict=True))
        except ValueError:
            return 0.0

    def _end(self, container: Any, stream: Any, length: float) -> float:
        """Where the last picture of a file ends, in seconds: what lies far before it is passed over."""
        end = 0.0
        try:
            container.seek(int(max(0.0, length - 1) / stream.time_base), stream=stream)
            for packet in container.demux(stream):
                at = packet.dts if packet.pts is None else packet.pts
                if packet.size and at is not None:
                    end = max(end, float((at + (packet.duration or 0)) * packet.time_base))
        except self._av.FFmpegError:  # told where it is decoded
            pass
        return end

    def _too_short(self, path: Path, seconds: float) -> ValueError:
        frames, fps = self._frames, self._fps
        return ValueError(
            f"{path} is a video of {seconds:.2f} s: {frames} frames at {fps:g} a second take {frames / fps:.2f} s; set "
            "frames to fewer, fps to more, or take the file out"
        )

    def _frames_of(self, path: Path) -> Generator[tuple[float, Tensor]]:
        """The frames that a player shows at times 0, 1 / fps, 2 / fps, ..., with these times: uint8 (3, h, w)."""
        number = 0
        size: tuple[int, int] | None = None  # of the whole video, also where its frames change theirs
        with self._opened(path) as (container, stream):
            for frame, end in self._with_ends(path, container, stream):
                pixels: Tensor | None = None  # of 60 frames a second most are not asked for
                while number / self._fps < end - _LATE:
                    if pixels is None:
                        image = _as_shown(frame, stream.sample_aspect_ratio)
                        size = size or nearest_size(image.height, image.width, self._sizes)
                        pixels = torch.from_numpy(np.array(crop_to(image, *size))).permute(2, 0, 1)
                    yield number / self._fps, pixels
                    number += 1

    def _with_ends(self, path: Path, container: Any, stream: Any) -> Generator[tuple[Any, float]]:
        """Each frame of a video, and the time until which a player shows it."""
        first: float | None = None
        last: Any = None
        time = 0.0
        for frame in self._decoded(path, container, stream):
            at = frame.time or 0.0
            first = at if first is None else first
            time = at - first
            if last is not None:
                yield last, time
            last = frame
        if last is not None:
            yield last, time + 1 / float(stream.average_rate or self._fps)

    def _opened(self, path: Path) -> _Opened:
        return _Opened(self._av, path)

    def _decoded(self, path: Path, container: Any, stream: Any) -> Iterator[Any]:
        try:
            yield from container.decode(stream)
        except self._av.FFmpegError as error:
            if path in self._cut_off:  # within its last frame
                return
            raise ValueError(f"{path}: cannot decode the video: {_reason(error)}") from None


class _Opened:
    """A context in which a video is open, with the stream of pictures that a player shows: no cover, no preview."""

    def __init__(self, av: Any, path: Path) -> None:
        self._av, self._path = av, path

    def __enter__(self) -> tuple[Any, Any]:
        try:
            self._container = self._av.open(str(self._path))
        except (self._av.FFmpegError, OSError) as error:
            raise ValueError(f"{self._path}: cannot decode the video: {_reason(error)}") from None
        stream = self._container.streams.best("video")
        if stream is None:
            others = " and ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
            self._container.close()
            raise ValueError(f"{self._path} has no pictures, only {others}; take the file out")
        stream.thread_type = "AUTO"
        return self._container, stream

    def __exit__(self, *_: object) -> None:
        self._container.close()


def _as_shown(frame: Any, aspect: Fraction | None) -> Any:
    """A frame as a picture of square pixels, in its colours, turned as its file says.

    Args:
        frame: of PyAV.
        aspect: width of a stored pixel over its height, as of a DVD; None or 0: it is not told, and 1.
    """
    # FFmpeg's own default, whatever the size, is BT.601.
    in_bt709 = frame.colorspace == _UNTOLD and _is_hd(frame.height, frame.width)
    image = frame.to_image(src_colorspace="ITU709" if in_bt709 else None)
    if aspect and aspect != 1:  # the side that is too short is stretched: no detail is lost
        wide = aspect > 1
        width = round(image.width * aspect) if wide else image.width
        image = image.resize((width, image.height if wide else round(image.height / aspect)))
    if turn := getattr(frame, "rotation", 0):
        image = image.rotate(turn, expand=True)
    return image


def _is_hd(height: int, width: int) -> bool:
    """Whether players take the colours of a video that does not tell them for BT.709 (as mpv does); else for BT.601."""
    return height > 576 or width >= 1280


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def save_video(frames: Tensor, path: Path, fps: float) -> None:
    """Write one video as H.264 in mp4, of HD sizes in the colours of BT.709, else of BT.601.

    Args:
        frames: uint8, shape (3, F, H, W), H and W even.
        path: the mp4; its folder is made.
        fps: frames a second.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: another shape or dtype.
    """
    fits = frames.dtype == torch.uint8 and frames.dim() == 4 and frames.shape[0] == 3
    if not fits or any(side % 2 for side in frames.shape[2:]):
        raise ValueError(f"frames must be uint8, (3, F, H, W), H and W even; got {frames.dtype}, {tuple(frames.shape)}")
    av = pyav()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17"})
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv420p"
        colours = "ITU601"
        if _is_hd(*frames.shape[2:]):
            colours, stream.codec_context.colorspace = "ITU709", _BT709
        for pixels in frames.cpu().permute(1, 2, 3, 0).contiguous().numpy():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=colours)))
        container.mux(stream.encode())
