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


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.mp4"])
def test_a_video_that_is_cut_off_is_told_before_it_is_read(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a download that broke off: the whole file beside it is not told of."""
    (tmp_path / "dog").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)  # frames of many bytes
    options = {"movflags": "+faststart"} if name == "a.mp4" else {}
    with av.open(str(tmp_path / "dog" / name), "w", options=options) as container:
        codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
        write_frames(container, add_stream(container, codec, (48, 64)), list(noise))
    assert len(clips_of(tmp_path, 10, 30)) == 6
    assert not caplog.messages
    content = (tmp_path / "dog" / name).read_bytes()
    cut = tmp_path / "cut" / "dog" / name
    cut.parent.mkdir(parents=True)
    cut.write_bytes(content[: len(content) // 2])
    videos = VideoClips(PictureFolder(tmp_path / "cut", "train", VIDEO_ENDINGS), Clips(10, 30, SIZES))
    (line,) = caplog.messages
    told = re.fullmatch(
        re.escape(f"{cut} is cut off: about ") + r"(\d+) of its 60 frames are there, and the clips are of these; "
        r"copy it anew, or take it out",
        line,
    )
    assert told is not None, line
    assert len(list(videos)) == 2
    assert 20 < int(told[1]) < 32
    with pytest.raises(ValueError, match=r"is a video of [01]\.\d+ s: 40 frames at 30 a second take 1\.33 s"):
        VideoClips(PictureFolder(tmp_path / "cut", "train", VIDEO_ENDINGS), Clips(40, 30, SIZES))
    cut.write_bytes(content[:400])
    with pytest.raises(ValueError, match=re.escape(str(cut))):
        VideoClips(PictureFolder(tmp_path / "cut", "train", VIDEO_ENDINGS), Clips(10, 30, SIZES))


def test_a_video_that_begins_late_is_told_where_it_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    (tmp_path / "dog").mkdir()
    with av.open(str(tmp_path / "dog" / "a.mp4"), "w", options={"movflags": "+faststart"}) as container:
        stream = add_stream(container, "libx264", (48, 64))
        for number, pixels in enumerate(noise):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = 120 + number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    videos = PictureFolder(tmp_path, "train", VIDEO_ENDINGS)
    VideoClips(videos, Clips(10, 30, SIZES))
    assert not caplog.messages
    content = (tmp_path / "dog" / "a.mp4").read_bytes()
    (tmp_path / "dog" / "a.mp4").write_bytes(content[: len(content) // 2])
    VideoClips(videos, Clips(10, 30, SIZES))
    (line,) = caplog.messages
    told = re.search(r"about (\d+) of its 60 frames are there", line)
    assert told is not None, line
    assert 20 < int(told[1]) < 32


def test_sound_that_is_longer_than_the_pictures_is_no_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "dog").mkdir()
    with av.open(str(tmp_path / "dog" / "a.mkv"), "w") as container:
        film = add_stream(container, "libx264", (16, 16))
        sound = container.add_stream("aac", rate=8000, layout="mono")
        write_frames(container, film, [np.zeros((16, 16, 3), dtype=np.uint8)] * 6)
        for number in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * number
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert len(clips_of(tmp_path, 3, 30)) == 2
    assert not caplog.messages


@pytest.mark.parametrize(("size", "matrix"), [((720, 960), "ITU709"), ((544, 1280), "ITU709"), ((480, 640), "ITU601")])
def test_colours_that_a_file_does_not_tell_are_those_of_its_size(
    size: tuple[int, int], matrix: str, tmp_path: Path
) -> None:
    """As players have it: HD is BT.709. A file that does tell is believed, whatever its size."""
    colour, sides = (200, 30, 60), [(size[0] // 16, size[1] // 16)]

    def written(name: str, used: str, told: int) -> None:
        (tmp_path / name / "dog").mkdir(parents=True)
        with av.open(str(tmp_path / name / "dog" / "a.mp4"), "w") as container:
            stream = add_stream(container, "libx264", size)
            stream.codec_context.colorspace = told
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), colour, dtype=np.uint8), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=used)
            frame.colorspace = told
            container.mux(stream.encode(frame))
            container.mux(stream.encode())

    def read(name: str) -> list[float]:
        (row,) = VideoClips(PictureFolder(tmp_path / name, "train", VIDEO_ENDINGS), Clips(1, 30, sides))
        return row.frames.float().mean((1, 2, 3)).tolist()

    other = "ITU601" if matrix == "ITU709" else "ITU709"
    written("untold", matrix, 2)
    assert read("untold") == pytest.approx(colour, abs=3)
    written("other", other, 2)
    assert max(abs(a - b) for a, b in zip(read("other"), colour, strict=True)) > 10, "the matrices differ"
    written("told", other, 6 if other == "ITU601" else 1)
    assert read("told") == pytest.approx(colour, abs=3)
    frames = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, *size)
    save_video(frames, tmp_path / "ours" / "dog" / "a.mp4", 30)
    assert read("ours") == pytest.approx(colour, abs=3)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    frames = torch.stack([torch.full((3, 16, 24), grey_of(number), dtype=torch.uint8) for number in range(5)], dim=1)
    save_video(frames, tmp_path / "dog" / "a.mp4", fps=12.5)
    (row,) = clips_of(tmp_path, 5, 12.5)
    assert greys(row) == pytest.approx([grey_of(number) for number in range(5)], abs=3)
    with pytest.raises(ValueError, match=r"frames must be uint8, \(3, F, H, W\), H and W even; got torch.float32"):
        save_video(frames.float(), tmp_path / "a.mp4", fps=8)
    with pytest.raises(ValueError, match=r"H and W even; got torch.uint8, \(3, 5, 15, 24\)"):
        save_video(frames[:, :, :15], tmp_path / "a.mp4", fps=8)
