"""From labelled images to a folder of latents (see `latent_shards.py`), once, before training:

    python -m diffusionblocks.data.encode --source FOLDER_OR_HUB_NAME --vae FOLDER_OR_HUB_NAME --out FOLDER

Needs the `diffusers` library. Images are read one after the other, so the data set may be of any size."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..common.messages import OneLineParser, report_errors
from .autoencoder import encode, latent_scale, load_vae
from .image_decoder import decode_image, oversized_refused
from .image_table import ImageRow, open_table
from .latent_data import LatentData
from .latent_shards import check_split, latent_folder, write_shards

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["center_crop", "encode_images", "main"]

_ELONGATED = 100
_AHEAD = 2  # batches whose images are decoded while the autoencoder works on an older one


# --- the images ---------------------------------------------------------------------------------------------


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cuts out the middle, with the pixels that ADM and DiT get: halved by box
    averaging while it is at least twice too large, then bicubic.

    Args:
        image: in a mode that can be averaged, such as "RGB".
        size: height and width of the result, in pixels.
    """
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _pixels(row: ImageRow, size: int) -> Tensor:
    """uint8 (3, size, size)."""
    image = decode_image(row.encoded, row.where, 3)
    longer, shorter = max(image.size), min(image.size)
    if longer > _ELONGATED * shorter:  # its shorter side resized, it could fill the memory
        raise ValueError(
            f"{row.where}: image is {image.width}x{image.height}: must be at most {_ELONGATED} times as long as wide"
        )
    return torch.from_numpy(np.array(center_crop(image, size))).permute(2, 0, 1)


def _batches(rows: Iterator[ImageRow], size: int, batch_size: int, workers: int) -> Generator[tuple[Tensor, Tensor]]:
    """uint8 (n, 3, size, size) and int64 (n,), decoded by threads ahead of time: Pillow lets them run side by side."""
    waiting: deque[tuple[list[Any], list[int]]] = deque()

    def first() -> tuple[Tensor, Tensor]:
        futures, labels = waiting.popleft()
        return torch.stack([future.result() for future in futures]), torch.tensor(labels)

    with oversized_refused(), ThreadPoolExecutor(workers) as pool:
        while batch := list(islice(rows, batch_size)):
            waiting.append(([pool.submit(_pixels, row, size) for row in batch], [row.label for row in batch]))
            if len(waiting) > _AHEAD:
                yield first()
        while waiting:
            yield first()


# --- the tool -----------------------------------------------------------------------------------------------


def encode_images(
    source: str,
    vae: str,
    out: str | Path,
    *,
    split: str = "train",
    size: int = 256,
    batch_size: int = 32,
    device: str = "auto",
    shard_rows: int = 4096,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> LatentData:
    """Encode a split of an image classification data set of any size, and writes it as a folder of latents.

    Args:
        source: a local folder with `<split>*.parquet` files in the schema of the Hugging Face hub, or the name of a
            data set on the hub. Images of any size and colour; they are cropped to the middle square.
        vae: folder or hub name of a diffusers `AutoencoderKL` for colour images.
        out: folder of the latents, which may hold other splits.
        split: which split, of `source` and of `out`.
        size: height and width of the images, in pixels: a multiple of the autoencoder's reduction (8 for those of
            Stable Diffusion).
        batch_size: images encoded at a time.
        device: a device of PyTorch; "auto" for the GPU if there is one.
        shard_rows: rows of a file.
        image_column: column with the images; by default "img" or "image", whichever exists.
        label_column: column with the integer labels; by default "label" or "fine_label", whichever exists.
        num_classes: number of classes; needed when the label column is plain integers without class names, checked
            otherwise.
        workers: threads that decode and resize; by default one per processor, at most 16.
        overwrite: whether to replace the split in `out`.
        progress: whether to draw a progress bar.

    Returns:
        The written split, opened.

    Raises:
        FileNotFoundError: no such source, split or autoencoder.
        FileExistsError: `out` has the split already.
        ValueError: an argument outside its range, a wrong column, a label out of range, an image that cannot be
            decoded, latents that are not finite, or no rows. The message names value and fix. Nothing is left in
            `out`.
        OSError: the disk is full.
        ImportError: diffusers is not installed.
    """
    for name, value in (("size", size), ("batch_size", batch_size), ("shard_rows", shard_rows), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value!r}: must be at least 1")
    check_split(split)
    table = open_table(
        source,
        split,
        image_column=image_column,
        label_column=label_column,
        num_classes=num_classes,
        reference_split="train",
        streaming=True,
    )
    table.check_labels()
    where = _device(device)
    model = load_vae(vae, where)
    config: Any = model.config
    if config.in_channels != 3:
        raise ValueError(f"vae = {vae!r}: takes images of {config.in_channels} channels: must be 3 (RGB)")
    reduction = 2 ** (len(config.block_out_channels) - 1)
    if size % reduction:
        raise ValueError(f"size = {size}: must be a multiple of {reduction}, the reduction of {vae!r}")
    try:
        scale = latent_scale(model)
    except ValueError as error:
        raise ValueError(f"vae = {vae!r}: {error}") from None
    workers = workers or min(16, os.cpu_count() or 1)

    def latents() -> Generator[tuple[Tensor, Tensor, Tensor]]:
        batches = _batches(iter(table), size, batch_size, workers)
        with tqdm(total=table.rows, unit="image", disable=not progress) as bar, contextlib.closing(batches):
            for images, labels in batches:
                mean, std = encode(images.to(where).float() / 127.5 - 1, model, scale.scaling_factor)
                yield mean, std, labels
                bar.update(len(labels))

    with contextlib.closing(latents()) as encoded:
        write_shards(
            out,
            split,
            encoded,
            shard_rows=shard_rows,
            class_names=table.class_names,
            vae=vae,
            scale=scale,
            overwrite=overwrite,
        )
    return latent_folder(out, split)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # An unknown name, or a device that is not there.
        raise ValueError(f"device = {name!r}: {error}; give 'auto', 'cpu', or 'cuda' where there is a GPU") from error
    return device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status (`messages.STATUSES`).
    """
    parser = OneLineParser(
        prog="python -m diffusionblocks.data.encode",
        description="Encodes labelled images with an autoencoder of diffusers, and writes the latents for training.",
    )
    add = parser.add_argument
    add("--source", required=True, help="folder with <split>*.parquet files in the hub's schema, or a hub name")
    add("--vae", required=True, help="AutoencoderKL: a folder, or a hub name such as stabilityai/sd-vae-ft-ema")
    add("--out", required=True, help="folder of the latents")
    add("--split", default="train", help="split of the source, and of the latents (default: %(default)s)")
    add("--size", type=int, default=256, help="height and width in pixels (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="images encoded at a time (default: %(default)s)")
    add("--device", default="auto", help="device of PyTorch (default: the GPU if there is one)")
    add("--shard-rows", type=int, default=4096, help="rows of a file (default: %(default)s)")
    add("--image-column", help="column with the images (default: img or image)")
    add("--label-column", help="column with the integer labels (default: label or fine_label)")
    add("--num-classes", type=int, help="number of classes, where the label column has no class names")
    add("--workers", type=int, help="threads that decode and resize (default: one per processor, at most 16)")
    add("--overwrite", action="store_true", help="replace the split in the folder of the latents")
    options = vars(parser.parse_args(argv))

    def run() -> None:
        data = encode_images(**options, progress=True)
        print(f"{len(data)} latents {data.image_shape} of {data.num_classes} classes in {options['out']}")

    return report_errors(run, lambda: "nothing of the split was written; run the same command again")


if __name__ == "__main__":
    sys.exit(main())
