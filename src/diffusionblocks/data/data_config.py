"""Which data a recipe names, and where they lie: its `data` section."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..common.fields import MOST_TOKENS, Float, Int, IsNumber, Labels, Length, Pixels, Positive, Share
from .augment import AugmentConfig

#: Folder that holds local data sets, one sub-folder each (see `resolved_source`).
DATA_VARIABLE = "DIFFUSIONBLOCKS_DATA"


class _DataSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PixelsConfig(_DataSection):
    """Images, and how their pixels become the model's numbers.

    Attributes:
        mean: Mean of each channel, of pixels in [0, 1]; it is subtracted.
        std: Standard deviation of each channel, by which the pixels are divided then.
        augment: Random changes of training images.
        placement: Where training examples wait: on the `device`, on the `host`, or `auto`: on the device where they
            take at most a quarter of its free memory.
    """

    mean: tuple[Float, ...]
    std: tuple[Positive, ...]
    augment: AugmentConfig = AugmentConfig()
    placement: Literal["auto", "device", "host"] = "auto"

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> Self:
        count = getattr(self, "channels", 1)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != count:
                raise ValueError(f"{name} = {list(values)}: must be {count} finite numbers, one a channel")
        return self


class DigitsConfig(PixelsConfig):
    """The handwritten digits that ship with scikit-learn: 8x8, one channel, 1,437 train and 360 test images."""

    kind: Literal["digits"]
    mean: tuple[Float, ...] = (0.3,)
    std: tuple[Positive, ...] = (0.376,)


class ImageFilesConfig(PixelsConfig):
    """Image-classification parquet in the hub's schema.

    Attributes:
        source: A local folder, or a name on the hub.
        folder: Name below the folder that the environment variable DIFFUSIONBLOCKS_DATA holds. Where that exists, it is
            used instead of a `source` in the file.
        split_files: Patterns of file names below a local folder, by split; null: files named after the split, without
            backups.
        train_split: Name of the split to train on.
        test_split: Name of the split to measure on.
        image_column: Name of the column of images; null finds it.
        label_column: Name of the column of labels; null finds it.
        image_size: Height and width in pixels; images of other sizes are refused.
        channels: Channels of an image.
        num_classes: Number of classes; null takes that of the data.
        cache: Folder for decoded images; null decodes at every start.
    """

    kind: Literal["images"]
    source: str | None = None
    folder: str | None = None
    split_files: dict[str, str] | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    image_size: Pixels
    channels: Annotated[Literal[1, 3], IsNumber] = 3
    num_classes: Labels | None = None
    cache: Path | None = None


class LatentsConfig(_DataSection):
    """Latents of an autoencoder, in shards that `python -m diffusionblocks.data.encode` wrote.

    Attributes:
        source: Folder of the shards.
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        train_split: Name of the split to train on.
        test_split: Name of the split to measure on.
        scale: Factor that brings the latents to a standard deviation of about sigma_data.
        sample_posterior: Draw each latent from the encoder's posterior, instead of taking its mean.
        vae: Folder or hub name of the autoencoder that decodes samples; null keeps samples as latents.
        placement: Where training examples wait, see kind `images`.
    """

    kind: Literal["latents"]
    source: str | None = None
    folder: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    scale: Positive = 0.5
    sample_posterior: bool = True
    vae: str | None = None
    placement: Literal["auto", "device", "host"] = "auto"


class _ChunksConfig(_DataSection):
    """A text in examples of one length.

    Attributes:
        length: Characters or tokens of an example; examples overlap in training.
        placement: Where training examples wait, see kind `images`.
    """

    length: Length
    placement: Literal["auto", "device", "host"] = "auto"


class TopicsConfig(_ChunksConfig):
    """The language reference that CPython carries, in the 27 characters of text8: some 300,000; needs no download."""

    kind: Literal["topics"]


class TextConfig(_ChunksConfig):
    """A text in the 27 characters of text8: a file, which is split by shares, or a folder with files for each split.

    Attributes:
        source: A text file (plain, .xz, .gz or .bz2), or a folder.
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        split_files: Patterns of file names in a folder, by split; null: files named after the split, without backups.
        fractions: Shares of train, valid and test, of a single file.
        train_split: Name of the split to train on.
        test_split: Name of the split to measure on.
        cache: Folder for the text as ids, which are then mapped and not read into memory; null reads it at every start.
    """

    kind: Literal["text"]
    source: str | None = None
    folder: str | None = None
    split_files: dict[str, str] | None = None
    fractions: tuple[Share, Share, Share] = (0.9, 0.05, 0.05)
    train_split: str = "train"
    test_split: str = "test"
    cache: Path | None = None


class TokensConfig(_ChunksConfig):
    """A corpus as byte-level BPE tokens, of a tokenizer that is trained on its train split; encoded once, then mapped.

    Attributes:
        source: A folder with text files for each split (plain, .xz, .gz or .bz2).
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        split_files: Patterns of file names, by split; null: files named after the split, without backups.
        train_split: Name of the split to train on.
        test_split: Name of the split to measure on.
        separator: What stands between documents within a file; null: a file is a document.
        special_tokens: Read special tokens in the text, such as chat markers, as their ids. Otherwise their letters are
            letters; those of <|endoftext|> always are.
        vocab_size: Tokens of the tokenizer that is trained, the end of a document among them.
        tokenizer: A ready tokenizer.json, which has a size of its own; null trains one.
        train_characters: Characters of the train split, the first, on which the tokenizer is trained; null takes all.
        cache: Folder for the tokenizer and the ids; null: runs/tokens-<name of the folder>.
    """

    kind: Literal["tokens"]
    source: str | None = None
    folder: str | None = None
    split_files: dict[str, str] | None = None
    train_split: str = "train"
    test_split: str = "test"
    separator: str | None = Field(default=None, min_length=1)
    special_tokens: bool = False
    vocab_size: Int = Field(default=8192, ge=257, le=MOST_TOKENS)
    tokenizer: Path | None = None
    train_characters: Int | None = Field(default=None, ge=1, le=10**15)
    cache: Path | None = None

    @property
    def cache_folder(self) -> Path:
        """Where tokenizer and ids are kept."""
        return self.cache or Path("runs") / f"tokens-{self.folder or Path(str(self.source)).name}"


def resolved_source(data: ImageFilesConfig | LatentsConfig | TextConfig | TokensConfig) -> str:
    """The folder or hub name to read.

    Raises:
        ValueError: neither source nor folder leads anywhere.
    """
    root = os.environ.get(DATA_VARIABLE)
    if data.folder is not None and root and (Path(root) / data.folder).is_dir():
        return str(Path(root) / data.folder)
    if data.source is None:
        raise ValueError(
            f"data.source is not set; give a folder or hub name (--set data.source=...), or set {DATA_VARIABLE} to "
            f"a folder that holds {data.folder!r}"
        )
    return data.source


DataConfig = Annotated[
    DigitsConfig | ImageFilesConfig | LatentsConfig | TopicsConfig | TextConfig | TokensConfig,
    Field(discriminator="kind"),
]
