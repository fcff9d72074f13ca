"""Files of videos: which frames a clip has, what is refused, and that what is written is read back."""

from __future__ import annotations

import re
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import add_stream, av, grey_of, write_frames, write_sound, write_video

from diffusionblocks.data.image_folder import CaptionedPictures, PictureFolder
from diffusionblocks.data.video_files import VIDEO_ENDINGS, ClipRow, Clips, VideoClips, save_video

SIZES = [(16, 16)]


def clips_of(folder: Path, frames: int, fps: float) -> list[ClipRow]:
    return list(VideoClips(PictureFolder(folder, "train", VIDEO_ENDINGS), Clips(frames, fps, SIZES)))


def greys(row: ClipRow) -> list[float]:
    return row.frames.float().mean((0, 2, 3)).tolist()


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
@pytest.mark.parametrize(
    ("fps", "frames", "numbers"),
    [
        (30, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        (10, 2, [[0, 3], [6, 9]]),
        (15, 5, [[0, 2, 4, 6, 8]]),  # the sixth frame is left over
        (60, 8, [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7], [8, 8, 9, 9, 10, 10, 11, 11]]),
        (20, 4, [[0, 1, 3, 4], [6, 7, 9, 10]]),
    ],
)
def test_a_clip_has_the_frames_that_a_player_shows(
    name: str, fps: float, frames: int, numbers: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "dog").mkdir()
    write_video(tmp_path / "dog" / name, 12)
    rows = clips_of(tmp_path, frames, fps)
    assert [row.frames.shape for row in rows] == [(3, frames, 16, 16)] * len(numbers)
    for row, expected in zip(rows, numbers, strict=True):
        assert greys(row) == pytest.approx([grey_of(number) for number in expected], abs=3)


def test_clips_have_the_label_or_the_prompt_of_their_video(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a.mp4", 6)
        (tmp_path / name / "a.txt").write_text(f" a {name}\n")
    assert [row.label for row in clips_of(tmp_path, 3, 30)] == [0, 0, 1, 1]
    prompted = VideoClips(CaptionedPictures(tmp_path, "train", VIDEO_ENDINGS), Clips(3, 30, SIZES))
    assert [(row.label, row.prompt) for row in prompted] == [(0, "a cat")] * 2 + [(0, "a dog")] * 2
    (tmp_path / "dog" / "a.txt").write_text("a dog", encoding="utf-8-sig")
    marked = CaptionedPictures(tmp_path, "train", VIDEO_ENDINGS)
    assert [prompt for _, _, prompt in marked.files()] == ["a cat", "a dog"]
    (tmp_path / "dog" / "a.txt").write_bytes("chi\xeanne".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is no text in UTF-8: .*; write it anew"):
        CaptionedPictures(tmp_path, "train", VIDEO_ENDINGS)
    (tmp_path / "dog" / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.mp4 has no prompt: write it into a\.txt beside it"):
        CaptionedPictures(tmp_path, "train", VIDEO_ENDINGS)


def test_each_video_gets_the_size_that_is_nearest(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    write_video(tmp_path / "dog" / "wide.mp4", 2, size=(24, 48))
    write_video(tmp_path / "dog" / "tall.mp4", 2, size=(48, 24))
    videos = PictureFolder(tmp_path, "train", VIDEO_ENDINGS)
    rows = list(VideoClips(videos, Clips(2, 30, [(8, 16), (16, 8), (12, 12)])))
    assert [tuple(row.frames.shape) for row in rows] == [(3, 2, 16, 8), (3, 2, 8, 16)]


def test_what_is_no_video_is_refused_before_any_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "dog"
    folder.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} has no files in train/CLASS/ that end in .avi, .m4v")):
        clips_of(tmp_path, 2, 30)
    write_video(folder / "a.mp4", 6)
    short = r"a\.mp4 is a video of 0\.20 s: 7 frames at 30 a second take 0\.23 s; set frames to fewer, fps to more, or"
    with pytest.raises(ValueError, match=short):
        VideoClips(PictureFolder(tmp_path, "train", VIDEO_ENDINGS), Clips(7, 30, SIZES))
    (folder / "b.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"b\.mp4: cannot decode the video: "):
        VideoClips(PictureFolder(tmp_path, "train", VIDEO_ENDINGS), Clips(2, 30, SIZES))
    write_sound(folder / "b.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 has no pictures, only audio; take the file out"):
        VideoClips(PictureFolder(tmp_path, "train", VIDEO_ENDINGS), Clips(2, 30, SIZES))


def test_a_video_is_turned_as_a_player_turns_it(tmp_path: Path) -> None:
    """Of a phone that was held upright: its file says that pictures are shown 90 degrees to the right."""
    (tmp_path / "dog").mkdir()
    frames = torch.zeros(3, 3, 16, 24, dtype=torch.uint8)
    frames[..., :12] = 200  # the left half
    save_video(frames, tmp_path / "dog" / "a.mp4", fps=10)
    (plain,) = clips_of(tmp_path, 3, 10)
    content = (tmp_path / "dog" / "a.mp4").read_bytes()
    place = content.index(b"tkhd") + 4 + 40  # the matrix of a track header of version 0
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (tmp_path / "dog" / "a.mp4").write_bytes(content[:place] + turned + content[place + 36 :])
    (row,) = clips_of(tmp_path, 3, 10)
    left, top = plain.frames.float().mean((0, 1)), row.frames.float().mean((0, 1))
    assert left[:, :4].min() > 150 > 50 > left[:, -4:].max()
    assert top[:4].min() > 150 > 50 > top[-4:].max()


def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are(tmp_path: Path) -> None:
    """Of a wide film on a DVD: 16 pixels stand for 32, of which the middle square is white."""
    (tmp_path / "dog").mkdir()
    stored = np.zeros((16, 16, 3), dtype=np.uint8)
    stored[:, 4:12] = 255
    with av.open(str(tmp_path / "dog" / "a.mp4"), "w") as container:
        stream = add_stream(container, "libx264", (16, 16))
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        write_frames(container, stream, [stored, stored])
    (row,) = clips_of(tmp_path, 2, 30)
    assert row.frames[..., 1:-1].min() > 240
    (tall,) = VideoClips(PictureFolder(tmp_path, "train", VIDEO_ENDINGS), Clips(2, 30, [(16, 16), (16, 32)]))
    assert tall.frames.shape == (3, 2, 16, 32)


def test_a_cover_is_not_the_video(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    with av.open(str(tmp_path / "dog" / "a.mkv"), "w") as container:
        cover = add_stream(container, "mjpeg", (16, 16), "yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic
        film = add_stream(container, "libx264", (16, 16))
        write_frames(container, cover, [np.full((16, 16, 3), 255, dtype=np.uint8)])
        write_frames(container, film, [np.full((16, 16, 3), grey_of(number), dtype=np.uint8) for number in (0, 1)])
    (row,) = clips_of(tmp_path, 2, 30)
    assert greys(row) == pytest.approx([grey_of(0), grey_of(1)], abs=3)


def test_a_video_has_one_size_also_where_its_frames_change_theirs(tmp_path: Path) -> None:
    """As of a call: the size is that of its first frame."""
    parts = [write_video(tmp_path / name, 2, size=size) for name, size in (("a.webm", (24, 48)), ("b.webm", (48, 24)))]
    (tmp_path / "dog").mkdir()
    with av.open(str(tmp_path / "dog" / "a.mkv"), "w") as container:
        stream = None
        for number, part in enumerate(parts):
            with av.open(str(part)) as source:
                stream = stream or container.add_stream_from_template(source.streams.video[0])
                for packet in [packet for packet in source.demux(video=0) if packet.dts is not None]:
                    later = int(number * 2 / 30 / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts + later, packet.dts + later, stream
                    container.mux(packet)
    videos = PictureFolder(tmp_path, "train", VIDEO_ENDINGS)
    (row,) = (row for row in VideoClips(videos, Clips(4, 30, [(8, 16), (16, 8)])) if "mkv" in row.where)
    assert row.frames.shape == (3, 4, 8, 16)
    assert greys(row) == pytest.approx([grey_of(number) for number in (0, 1, 0, 1)], abs=3)


def test_a_video_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    path = write_video(tmp_path / "dog" / "a.webm", 30)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"a\.webm"):
        clips_of(tmp_path, 20, 30)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 16, 24), grey_of(number), dtype=torch.uint8) for number in range(5)], dim=1)
    save_video(frames, tmp_path / "dog" / "a.mp4", fps=12.5)
    (row,) = clips_of(tmp_path, 5, 12.5)
    assert greys(row) == pytest.approx([grey_of(number) for number in range(5)], abs=3)
    with pytest.raises(ValueError, match=r"frames must be uint8, \(3, F, H, W\), H and W even; got torch.float32"):
        save_video(frames.float(), tmp_path / "a.mp4", fps=8)
    with pytest.raises(ValueError, match=r"H and W even; got torch.uint8, \(3, 5, 15, 24\)"):
        save_video(frames[:, :, :15], tmp_path / "a.mp4", fps=8)
