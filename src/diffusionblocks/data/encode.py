"""From labelled images or videos to a folder of latents (see `latent_shards.py`), once, before training:

    diffusionblocks encode --source FOLDER_OR_HUB_NAME --vae FOLDER_OR_HUB_NAME --out FOLDER

(`python -m diffusionblocks.data.encode` is the same command.) Images are read one after the other, so the data set may
be of any size."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..common.progress import Progress
from .autoencoder import load_vae
from .image_decoder import center_crop, oversized_refused
from .image_folder import CaptionedPictures, PictureFolder, class_folders, has_videos
from .image_table import ImageRow, ImageTable, open_table
from .latent_data import LatentData, LatentScale
from .latent_shards import Prompts, check_split, decoded_by, latent_folder, measured_scale, write_shards
from .prompt_states import load_prompt_encoder
from .video_files import VIDEO_ENDINGS, ClipRow, Clips, VideoClips

__all__ = ["STATISTICS", "center_crop", "encode_images", "reconstructions"]

#: Where the latents' mean and deviation may be from.
STATISTICS = ("auto", "config", "measured")

_FPS = 16.0  # of clips, as Wan 2.1 was trained
_AHEAD = 2  # batches whose images are decoded while the autoencoder works on an older one


# --- the images ---------------------------------------------------------------------------------------------


def bucket_sizes(size: int, step: int) -> list[tuple[int, int]]:
    """Heights and widths that are multiples of a step, of at most size x size pixels, no side twice the other's.

    Of each width it is the largest height, and of each height the largest width.
    """
    most, sides = size * size, range(step, 2 * size + 1, step)
    wide = {(most // width // step * step, width) for width in sides if width <= size * 2**0.5 + step}
    pairs = wide | {(width, height) for height, width in wide}
    return sorted((h, w) for h, w in pairs if h and h * w <= most and max(h, w) <= 2 * min(h, w))


def _batches(
    rows: Iterator[ImageRow | ClipRow], sizes: Sequence[tuple[int, int]], batch_size: int, workers: int
) -> Generator[tuple[Tensor, Tensor, list[str]]]:
    """uint8 (n, 3, ...) of one size, int64 (n,) and prompts, decoded by threads ahead of time: Pillow lets them run
    side by side."""
    waiting: deque[tuple[list[Future[Tensor]], list[int], list[str]]] = deque()

    full: dict[torch.Size, list[tuple[Tensor, int, str]]] = {}  # what is still too little for a batch, by size

    def batch_of(examples: list[tuple[Tensor, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
        pixels, labels, prompts = zip(*examples, strict=True)
        return torch.stack(pixels), torch.tensor(labels), list(prompts)

    def first() -> Generator[tuple[Tensor, Tensor, list[str]]]:
        futures, labels, prompts = waiting.popleft()
        for future, label, prompt in zip(futures, labels, prompts, strict=True):
            pixels = future.result()
            examples = full.setdefault(pixels.shape, [])
            examples.append((pixels, label, prompt))
            if len(examples) == batch_size:
                yield batch_of(full.pop(pixels.shape))

    with oversized_refused(), ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(rows, batch_size)):
            futures = [pool.submit(row.pixels, sizes) for row in batch]
            waiting.append((futures, [row.label for row in batch], [row.prompt for row in batch]))
            if len(waiting) > _AHEAD:
                yield from first()
        while waiting:
            yield from first()
    yield from map(batch_of, full.values())


# --- the tool -----------------------------------------------------------------------------------------------


def encode_images(
    source: str,
    vae: str,
    out: str | Path,
    *,
    split: str = "train",
    size: int = 256,
    bucket_step: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    statistics: str = "auto",
    batch_size: int | None = None,
    device: str = "auto",
    shard_rows: int = 4096,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    text_encoder: str | None = None,
    prompt_column: str | None = None,
    prompt_length: int | None = None,
    limit: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> LatentData:
    """Encode a split of a data set of images, or of videos, of any size, and write it as a folder of latents.

    Args:
        source: a local folder with `<split>*.parquet` files in the schema of the Hugging Face hub, or with pictures in
            `<split>/<class>/`; or the name of a data set on the hub. Images of any size and colour; they are cropped to
            the middle square. With `frames`: a local folder with videos (mp4, webm, mkv, mov, avi).
        vae: the autoencoder, see `load_vae`.
        out: folder of the latents, which may hold other splits.
        split: which split, of `source` and of `out`.
        size: height and width of the images, in pixels: a multiple of the autoencoder's reduction (8 for those of
            Stable Diffusion).
        bucket_step: bring each image to the size that is nearest in its proportions, of `bucket_sizes`: multiples of
            so many pixels, of at most size x size in all. None: the middle square.
        frames: cut videos into clips of so many frames, one behind the other; the autoencoder must give as many back,
            as that of Wan does 1, 5, 9, ... None: the source has images.
        fps: frames a second of the clips, by default 16: each shows what a player shows then.
        statistics: where the latents' mean and deviation are from: `config`, the autoencoder's; `measured`, on each
            channel of the split that `out` gets first; `auto`, the config's where it says any.
        batch_size: images or clips encoded at a time; by default 32 images, 1 clip.
        device: a device of PyTorch; "auto" for the GPU if there is one.
        shard_rows: rows of a file.
        image_column: column with the images; by default "img" or "image", whichever exists.
        label_column: column with the integer labels; by default "label" or "fine_label", whichever exists.
        num_classes: number of classes; needed when the label column is plain integers without class names, checked
            otherwise.
        text_encoder: what makes the states of each image's prompt, which lie beside its latent, and of the empty
            prompt: see `load_prompt_encoder`. A prompt is in a column of the parquet files, or in the text file of a
            picture's or video's name. Labels need not be there then. None: images have no prompts.
        prompt_column: column with the prompts; by default "text", "caption" or "prompt", whichever exists.
        prompt_length: tokens of a prompt; by default the pipeline's, or 128.
        limit: how many images or clips, the first of the split; None for all.
        workers: threads that decode and resize; by default one per processor, at most 16.
        overwrite: whether to replace the split in `out`.
        progress: show a progress bar; without a terminal a line now and then.

    Returns:
        The written split, opened.

    Raises:
        FileNotFoundError: no such source, split or autoencoder.
        FileExistsError: `out` has the split already.
        ValueError: an argument outside its range, a wrong column, a label out of range, an image that cannot be
            decoded, latents that are not finite, or no rows. The message names value and fix. Nothing is left in
            `out`.
        OSError: the disk is full.
        ImportError: an autoencoder of diffusers, which is not installed.
    """
    counts = {
        "size": size,
        "bucket_step": bucket_step,
        "batch_size": batch_size,
        "shard_rows": shard_rows,
        "limit": limit,
        "workers": workers,
        "frames": frames,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value!r}: must be at least 1")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps = {fps!r}: must be finite and > 0")
    if fps is not None and frames is None:
        raise ValueError(f"fps = {fps!r} is of videos: give frames, how many a clip has, or leave it out")
    if statistics not in STATISTICS:
        raise ValueError(f"statistics = {statistics!r}: must be one of {', '.join(STATISTICS)}")
    check_split(split)
    of_prompts = {"prompt_column": prompt_column, "prompt_length": prompt_length}
    for option, of_prompt in of_prompts.items():
        if of_prompt is not None and text_encoder is None:
            raise ValueError(f"{option} = {of_prompt!r} is of prompts: set text_encoder, or leave it out")
    columns = _Columns(image_column, label_column, num_classes, prompt_column)
    prompted = text_encoder is not None
    sizes = [(size, size)] if bucket_step is None else bucket_sizes(size, bucket_step)
    if not sizes:
        raise ValueError(f"bucket_step = {bucket_step}: must be at most size = {size}")
    clips = _clips(frames, fps, sizes)
    table = _open(source, split, columns, prompted, clips)
    table.check_labels()
    where = _device(device)
    encoder = None if text_encoder is None else load_prompt_encoder(text_encoder, prompt_length, where)
    prompts = None
    if encoder is not None:
        empty = {name: value[0] for name, value in encoder.empty().items()}
        prompts = Prompts(encoder.name, prompt_length, empty)
    model = load_vae(vae, where)
    _, reduction = model.latent_shape
    for option, pixels in (("size", size), ("bucket_step", bucket_step)):
        if pixels is not None and pixels % reduction:
            raise ValueError(f"{option} = {pixels}: must be a multiple of {reduction}, the reduction of {vae!r}")
    if frames is not None:
        model.check_frames(frames)
    batch_size = batch_size or (32 if frames is None else 1)
    try:
        own = None if statistics == "measured" else model.scale
    except ValueError as error:
        raise ValueError(f"vae = {vae!r}: {error}") from None
    if own is None and statistics == "config":
        raise ValueError(f"statistics = config: that of {vae!r} says nothing of its latents; use measured")
    of_others = measured_scale(out, split, vae, model.weights)
    scale = own or of_others
    workers = workers or min(16, os.cpu_count() or 1)

    def latents() -> Generator[tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]]:
        batches = _batches(islice(table, limit), sizes, batch_size, workers)
        total = limit if table.rows is None else min(table.rows, limit or table.rows)
        bar = Progress(f"encode {split}", total, "images" if frames is None else "clips", show=progress)
        with bar, contextlib.closing(batches):
            for images, labels, texts in batches:
                # Without a scale yet, the autoencoder's own latents.
                mean, std = model.encode(_signed(images, where), scale or LatentScale(1.0))
                yield mean, std, labels, {} if encoder is None else encoder(texts)
                bar.update(len(labels))

    with contextlib.closing(latents()) as encoded:
        write_shards(
            out,
            split,
            encoded,
            shard_rows=shard_rows,
            class_names=table.class_names,
            vae=vae,
            vae_weights=model.weights,
            scale=scale,
            scale_of_latents=own is None and of_others is not None,
            prompts=prompts,
            fps=None if clips is None else clips.fps,
            overwrite=overwrite,
        )
    return latent_folder(out, split)


def reconstructions(
    source: str,
    out: str | Path,
    *,
    split: str = "train",
    size: int = 256,
    frames: int | None = None,
    fps: float | None = None,
    count: int = 16,
    device: str = "auto",
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    prompt_column: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first images or clips of a split, and what the autoencoder makes of their latents in the files.

    Args:
        source, split, size, frames, fps, device, image_column, label_column, num_classes, prompt_column: as they were
            given to `encode_images`.
        out: the folder of latents that it wrote.
        count: how many; fewer where there are fewer.

    Returns:
        uint8 (n, 3, size, size), or of clips (n, 3, frames, size, size), each: the images, and the latents' means
        decoded.
    """
    noted, data = decoded_by(out, split), latent_folder(out, split, reference_split=None)
    assert noted is not None, "`latent_folder` has read the index"
    model = load_vae(noted.vae, _device(device))
    columns, sizes = _Columns(image_column, label_column, num_classes, prompt_column), [(size, size)]
    clips = _clips(frames, fps, sizes)
    table = _open(source, split, columns, bool(data.states), clips)
    rows: list[ImageRow | ClipRow] = list(islice(table, min(count, len(data))))
    images = torch.stack([row.pixels(sizes) for row in rows])
    means = data.rows("mean", torch.arange(len(rows))).to(model.device)
    return images, _unsigned(model.decode(means, noted.scale)).cpu()


@dataclass(frozen=True)
class _Columns:
    """Of parquet files, as `encode_images` is told them."""

    image: str | None
    label: str | None
    num_classes: int | None
    prompt: str | None

    def refuse(self, source: str, what: str) -> None:
        """Refuse columns of a source that has none: it has the files that `what` names."""
        for name, value in (("image_column", self.image), ("label_column", self.label), ("prompt_column", self.prompt)):
            if value is not None:
                raise ValueError(f"{name} = {value!r}: {source} has {what}, not in columns; leave it out")


def _open(
    source: str, split: str, columns: _Columns, prompts: bool, clips: Clips | None = None
) -> ImageTable | PictureFolder | CaptionedPictures | VideoClips:
    """The rows of a source, images or, where `clips` says how to cut them, clips of videos."""
    folder = Path(source).expanduser()
    if clips is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"source = {source!r}: no such folder here; videos are read from a local folder")
        columns.refuse(source, "videos in files")
        if prompts:
            return VideoClips(CaptionedPictures(folder, split, VIDEO_ENDINGS), clips)
        videos = PictureFolder(folder, split, VIDEO_ENDINGS)
        _check_classes(source, columns, videos)
        return VideoClips(videos, clips)
    if prompts and folder.is_dir() and not any(folder.glob("*.parquet")):
        columns.refuse(source, "pictures in files")
        return CaptionedPictures(folder, split)
    if folder.is_dir() and not any(folder.glob("*.parquet")) and (class_folders(folder) or has_videos(folder)):
        pictures = PictureFolder(folder, split)
        columns.refuse(source, "pictures in folders")
        _check_classes(source, columns, pictures)
        return pictures
    return open_table(
        source,
        split,
        image_column=columns.image,
        label_column=columns.label,
        num_classes=columns.num_classes,
        reference_split="train",
        streaming=True,
        prompts=prompts,
        prompt_column=columns.prompt,
    )


def _clips(frames: int | None, fps: float | None, sizes: Sequence[tuple[int, int]]) -> Clips | None:
    return None if frames is None else Clips(frames, _FPS if fps is None else fps, sizes)


def _check_classes(source: str, columns: _Columns, files: PictureFolder) -> None:
    if columns.num_classes not in (None, len(files.class_names)):
        raise ValueError(f"num_classes = {columns.num_classes}: {source} has {len(files.class_names)} classes")


def _signed(images: Tensor, device: torch.device) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def _unsigned(images: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    return ((images + 1) * 127.5).round().to(torch.uint8)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # An unknown name, or a device that is not there.
        raise ValueError(f"device = {name!r}: {error}; give 'auto', 'cpu', or 'cuda' where there is a GPU") from error
    return device


if __name__ == "__main__":  # the command's former name
    os.execv(sys.executable, [sys.executable, "-m", "diffusionblocks", "encode", *sys.argv[1:]])
