"""diffusionblocks encode."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.choices import choice_of

#: What the reconstructions of an encoded split are of.
_OF_SOURCE = (
    *("source", "out", "split", "size", "frames", "fps", "device"),
    *("image_column", "label_column", "num_classes", "prompt_column"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `encode`."""
    parser.set_defaults(run=run, way_on="nothing of the split was written; run the same command again")
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="folder with <split>*.parquet files in the hub's schema, or pictures in <split>/<class>/, or a hub name; "
        "with --frames a folder of videos",
    )
    add(
        "--vae",
        required=True,
        help="an autoencoder of diffusers, as a folder or a hub name such as stabilityai/sd-vae-ft-ema, or a folder "
        "with TAESD's *encoder.safetensors and *decoder.safetensors",
    )
    add("--out", type=Path, required=True, help="folder of the latents")
    add("--split", default="train", help="split of the source, and of the latents (default: %(default)s)")
    add("--size", type=int, default=256, help="height and width in pixels (default: %(default)s)")
    add(
        "--bucket-step",
        type=int,
        metavar="N",
        help="keep proportions: bring each image to the nearest size of multiples of N pixels, of at most SIZE x SIZE",
    )
    add(
        "--frames",
        type=int,
        metavar="N",
        help="videos (mp4, webm, ...), cut into clips of N frames, as many as the autoencoder gives back (Wan: 4n + 1)",
    )
    add("--fps", type=float, help="frames a second of the clips (default: 16)")
    add(
        "--statistics",
        type=choice_of(_statistics),
        default="auto",
        metavar="WHERE",
        help="mean and deviation of the latents: config (the autoencoder's), measured (of each channel, on the split "
        "that is encoded first), or auto (the config's where it says any; the default)",
    )
    add("--limit", type=int, metavar="N", help="only the first N images or clips")
    add("--batch-size", type=int, help="encoded at a time (default: 32 images, 1 clip)")
    add("--device", default="auto", help="device of PyTorch (default: the GPU if there is one)")
    add("--shard-rows", type=int, default=4096, help="rows of a file (default: %(default)s)")
    add("--image-column", help="column with the images (default: img or image)")
    add("--label-column", help="column with the integer labels (default: label or fine_label)")
    add("--num-classes", type=int, help="number of classes, where the label column has no class names")
    add(
        "--text-encoder",
        metavar="NAME",
        help="also cache the states of prompts: folder or hub name of a pipeline of diffusers, whose encode_prompt is "
        "used, or of a text encoder of transformers; prompts are in a column, or in NAME.txt beside each picture or "
        "video",
    )
    add("--prompt-column", help="column with the prompts (default: text, caption or prompt)")
    add("--prompt-length", type=int, metavar="N", help="tokens of a prompt (default: the pipeline's, or 128)")
    add("--workers", type=int, help="threads that decode and resize (default: one per processor, at most 16)")
    add("--overwrite", action="store_true", help="replace the split in the folder of the latents")
    add("--check", type=int, metavar="N", help="how many are decoded again (default: 16 images, 1 clip)")
    add("--figure", type=Path, help="draw these images, and below each what was decoded, to this PNG")


def _statistics() -> tuple[str, ...]:
    from ..data.encode import STATISTICS

    return STATISTICS


def run(options: argparse.Namespace) -> None:
    """Encode images, and say how well the autoencoder gives them back."""
    from ..data.encode import encode_images, reconstructions
    from ..evaluation.reconstruction import psnr
    from ..reports.pictures import film_strips, save_pairs

    clips = options.frames is not None
    check = options.check if options.check is not None else 1 if clips else 16
    if check < 0 or (options.figure and not check):
        least = "at least 1 for --figure" if options.figure else "at least 0"
        raise ValueError(f"--check {check}: must be {least}")
    values = {name: value for name, value in vars(options).items() if name not in ("run", "way_on", "check", "figure")}
    data = encode_images(**values, progress=True)
    shapes = " and ".join(str(shape) for shape in dict.fromkeys(tuple(mean.shape[1:]) for mean in data.mean))
    print(f"{len(data)} latents {shapes} of {data.num_classes} classes in {options.out}")
    for name, value in data.empty.items():
        print(f"{name} {tuple(value.shape)} of each prompt, by {options.text_encoder}")
    if check and options.bucket_step is None:  # what is written is in the order of sizes
        of_source = {name: values[name] for name in _OF_SOURCE}
        images, decoded = reconstructions(**of_source, count=check)
        first = f"the first {len(images)} {'clips' if clips else 'images'}"
        print(f"decoded from the files: PSNR {psnr(images, decoded):.2f} dB, mean of {first}")
        if options.figure:
            save_pairs(film_strips(images), film_strips(decoded), options.figure, columns=1 if clips else 8)
            print(f"images, and below each what was decoded, drawn to {options.figure}")
