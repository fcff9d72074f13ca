"""The `data` section of a recipe: which data, where they lie, and how they are read, batched and counted."""

from __future__ import annotations

import dataclasses
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator
from torch import Tensor
from typing_extensions import override

from ..common.by_kind import ByKind, kind_of
from ..common.fields import MOST_TOKENS, Float, Int, IsNumber, Labels, Length, Pixels, Positive, Share
from ..common.registry import Registry
from ..common.tokenizer_file import same_tokenizer, tokenizer_in
from .augment import AugmentConfig
from .autoencoder import decode, latent_scale, load_vae
from .character_text import characters, python_topics
from .dataset import BatchMaker, Dataset, ExampleCount
from .image_batches import ImageBatches, evaluation_batches, to_uint8
from .image_data import ImageData, digits, image_classification
from .image_table import rows_of_split
from .latent_batches import LatentBatches
from .latent_data import LatentData
from .latent_shards import examples_of_split, latent_folder, scale_of_split
from .text_batches import TextBatches, evaluation_chunks
from .text_codec import CharacterCodec, TextCodec, TokenCodec
from .text_data import TextChunks, TextData
from .token_text import (
    corpus_tokenizer,
    corpus_tokenizer_path,
    encoded_split,
    load_tokenizer,
    split_files,
)

#: Folder that holds local data sets, one sub-folder each (see `FilesSection.location`).
DATA_VARIABLE = "DIFFUSIONBLOCKS_DATA"

Batches = Iterator[dict[str, Tensor]]


class DataSection(BaseModel, ABC):
    """What every kind of data answers.

    Attributes:
        examples: What an example is: `images`, `latents`, `characters` or `tokens`; a task says which it takes.
        users: Models that take such examples, for messages.
        of_text: Whether examples are texts.
        mapped: Whether a CPU reads examples from files when they are used, instead of having them in memory.
        placement: Where training examples wait: on the `device`, on the `host`, or `auto`: on the device where they
            take at most a quarter of its free memory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: ClassVar[str]
    users: ClassVar[str] = "image models"
    of_text: ClassVar[bool] = False
    mapped: ClassVar[bool] = False

    kind: str
    placement: Literal["auto", "device", "host"] = "auto"

    @property
    def name(self) -> str:
        """A short name of the data."""
        return self.kind

    @abstractmethod
    def load(self, split: str) -> Dataset:
        """Read the examples of a split.

        Args:
            split: "train" or "test".

        Raises:
            FileNotFoundError, ValueError: they are missing, damaged, or of another form than the section says.
        """

    @abstractmethod
    def batches(self, data: Any, device: torch.device) -> BatchMaker:
        """What makes training batches of `data`, which `load` gave, on a device."""

    @abstractmethod
    def evaluation_batches(self, data: Any, *, batch_size: int, device: torch.device) -> Batches:
        """All of `data` once, in order, without augmentation or noise, as batches on a device."""

    @abstractmethod
    def count_examples(self) -> ExampleCount:
        """Count the train split's examples without a download, where that is cheap.

        Data that come with a library are read; of image files and latents it is what the files say they hold. Text
        files would have to be read, or encoded: theirs is not known.
        """

    @abstractmethod
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        """Bytes of one example where it is kept, labels included."""

    def codec(self) -> TextCodec:
        """What turns text into the data's ids and back; see `TextSection.codec`.

        Raises:
            ValueError: data without text.
        """
        raise ValueError(f"data.kind: {self.kind} has no text; text has data.kind: topics, text or tokens")

    def with_tokenizer_of(self, folder: Path) -> Self:
        """The section with the tokenizer that lies in a model's folder; itself where it has none."""
        return self


#: Kinds of data by name.
DATA: Registry[type[DataSection]] = Registry("kind of data")

Section = TypeVar("Section", bound=DataSection)

#: The type of a recipe's `data` section.
DataConfig = Annotated[SerializeAsAny[DataSection], ByKind(DATA)]


def register_data(section: type[Section]) -> type[Section]:
    """Add a kind of data, as a decorator of its class; recipes can then say `data.kind`.

    Args:
        section: a subclass of `DataSection` with a field `kind: Literal["its name"]`.

    Raises:
        ValueError: no such field, or a name that is taken.
    """
    DATA.register(kind_of(section), section)
    return section


class FilesSection(DataSection):
    """Data in a folder, or on the hub.

    Attributes:
        source: A local folder, or a name on the hub.
        folder: Name below the folder that the environment variable DIFFUSIONBLOCKS_DATA holds. Where that exists, it is
            used instead of a `source` in the file.
        train_split: Name of the split to train on.
        test_split: Name of the split to measure on.
    """

    source: str | None = None
    folder: str | None = None
    train_split: str = "train"
    test_split: str = "test"

    @property
    def name(self) -> str:
        """A short name of the data: that of their folder."""
        return str(self.folder or Path(str(self.source)).name)

    def split_name(self, split: str) -> str:
        """What the files call a split."""
        return {"train": self.train_split, "test": self.test_split}[split]

    def location(self) -> str:
        """The folder or hub name to read.

        Raises:
            ValueError: neither source nor folder leads anywhere.
        """
        root = os.environ.get(DATA_VARIABLE)
        if self.folder is not None and root and (Path(root) / self.folder).is_dir():
            return str(Path(root) / self.folder)
        if self.source is None:
            raise ValueError(
                f"data.source is not set; give a folder or hub name (--set data.source=...), or set {DATA_VARIABLE} to "
                f"a folder that holds {self.folder!r}"
            )
        return self.source

    @override
    def count_examples(self) -> ExampleCount:
        try:
            return self._count(self.location())
        except (OSError, ValueError) as error:
            return ExampleCount(None, str(error))

    @abstractmethod
    def _count(self, location: str) -> ExampleCount: ...


class ImagesSection(DataSection):
    """Images, or their latents: what a diffusion model's samples are compared with."""

    @abstractmethod
    def to_pixels(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What turns model-space samples (n, C, H, W) into uint8 images (n, 1 or 3, H, W).

        Raises:
            ValueError: the samples are latents and no autoencoder is named, or one that scales latents otherwise than
                those of the data are, where they are at hand.
        """

    @abstractmethod
    def real_images(
        self, data: Any, pixels: Callable[[Tensor], Tensor], *, count: int, batch_size: int, device: torch.device
    ) -> Iterator[Tensor]:
        """The first `count` real images as uint8 (n, C, H, W); of latents, their means' reconstructions by `pixels`."""


class PixelsConfig(ImagesSection):
    """Images, and how their pixels become the model's numbers.

    Attributes:
        mean: Mean of each channel, of pixels in [0, 1]; it is subtracted.
        std: Standard deviation of each channel, by which the pixels are divided then.
        augment: Random changes of training images.
    """

    examples: ClassVar[str] = "images"

    mean: tuple[Float, ...]
    std: tuple[Positive, ...]
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> Self:
        count = getattr(self, "channels", 1)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != count:
                raise ValueError(f"{name} = {list(values)}: must be {count} finite numbers, one a channel")
        return self

    @override
    def batches(self, data: ImageData, device: torch.device) -> BatchMaker:
        return ImageBatches(
            data, mean=self.mean, std=self.std, augment=self.augment, device=device, placement=self.placement
        )

    @override
    def evaluation_batches(self, data: ImageData, *, batch_size: int, device: torch.device) -> Batches:
        return evaluation_batches(data, mean=self.mean, std=self.std, batch_size=batch_size, device=device)

    @override
    def to_pixels(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return lambda samples: to_uint8(samples, self.mean, self.std)

    @override
    def real_images(
        self, data: ImageData, pixels: Callable[[Tensor], Tensor], *, count: int, batch_size: int, device: torch.device
    ) -> Iterator[Tensor]:
        for images in data.images[:count].split(batch_size):
            yield images.to(device)

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        return math.prod(shape) + 8  # uint8 pixels, and an int64 label


@register_data
class DigitsConfig(PixelsConfig):
    """The handwritten digits that ship with scikit-learn: 8x8, one channel, 1,437 train and 360 test images."""

    kind: Literal["digits"]
    mean: tuple[Float, ...] = (0.3,)
    std: tuple[Positive, ...] = (0.376,)

    @override
    def load(self, split: str) -> ImageData:
        return digits(split)

    @override
    def count_examples(self) -> ExampleCount:
        return ExampleCount(len(self.load("train")), "")


@register_data
class ImageFilesConfig(PixelsConfig, FilesSection):
    """Image-classification parquet in the hub's schema.

    Attributes:
        split_files: Patterns of file names below a local folder, by split; null: files named after the split, without
            backups.
        image_column: Name of the column of images; null finds it.
        label_column: Name of the column of labels; null finds it.
        image_size: Height and width in pixels; images of other sizes are refused.
        channels: Channels of an image.
        num_classes: Number of classes; null takes that of the data.
        cache: Folder for decoded images; null decodes at every start.
    """

    kind: Literal["images"]
    split_files: dict[str, str] | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: Pixels
    channels: Annotated[Literal[1, 3], IsNumber] = 3
    num_classes: Labels | None = None
    cache: Path | None = None

    @override
    def load(self, split: str) -> ImageData:
        return image_classification(
            self.location(),
            self.split_files,
            self.split_name(split),
            self.image_column,
            self.label_column,
            self.image_size,
            self.channels,
            self.num_classes,
            self.cache,
            reference_split=self.train_split,
        )

    def _count(self, location: str) -> ExampleCount:
        rows = rows_of_split(location, self.split_files, self.train_split)
        return ExampleCount(
            rows, location if rows is not None else f"{location!r} is no local folder, and a plan downloads nothing"
        )


@register_data
class LatentsConfig(ImagesSection, FilesSection):
    """Latents of an autoencoder, in shards that `python -m diffusionblocks.data.encode` wrote.

    Attributes:
        source: Folder of the shards.
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        scale: Factor that brings the latents to a standard deviation of about sigma_data.
        sample_posterior: Draw each latent from the encoder's posterior, instead of taking its mean.
        vae: Folder or hub name of the autoencoder that decodes samples; null keeps samples as latents.
    """

    examples: ClassVar[str] = "latents"
    users: ClassVar[str] = "diffusion models"
    mapped: ClassVar[bool] = True

    kind: Literal["latents"]
    scale: Positive = 0.5
    sample_posterior: bool = True
    vae: str | None = None

    @override
    def load(self, split: str) -> LatentData:
        return latent_folder(self.location(), self.split_name(split), reference_split=self.train_split)

    @override
    def batches(self, data: LatentData, device: torch.device) -> BatchMaker:
        return LatentBatches(
            data,
            device=device,
            scale=self.scale,
            sample_posterior=self.sample_posterior,
            placement=self.placement,
        )

    @override
    def evaluation_batches(self, data: LatentData, *, batch_size: int, device: torch.device) -> Batches:
        for rows in torch.arange(len(data)).split(batch_size):
            means = data.rows("mean", rows).to(device).float() * self.scale
            yield {"pixel_values": means, "labels": data.labels[rows].to(device)}

    @override
    def to_pixels(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        if self.vae is None:
            raise ValueError(
                "samples are latents: name their autoencoder to see images, --set data.vae=FOLDER_OR_HUB_NAME"
            )
        vae: Any = load_vae(self.vae, device)
        scale = latent_scale(vae)
        try:
            source = self.location()
        except ValueError:  # without the latents the autoencoder is trusted
            noted = None
        else:
            noted = scale_of_split(source, self.train_split)
        if noted is not None:
            scale.check_same(noted, f"vae = {self.vae!r}", f"{source}, split {self.train_split!r},")
        factor = scale.scaling_factor * self.scale
        half = (0.5, 0.5, 0.5)
        return lambda samples: to_uint8(decode(samples, vae, factor), half, half)

    @override
    def real_images(
        self, data: LatentData, pixels: Callable[[Tensor], Tensor], *, count: int, batch_size: int, device: torch.device
    ) -> Iterator[Tensor]:
        for rows in torch.arange(min(count, len(data))).split(batch_size):
            yield pixels(data.rows("mean", rows).to(device).float() * self.scale)

    def _count(self, location: str) -> ExampleCount:
        return ExampleCount(examples_of_split(location, self.train_split), location)

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        # float16 means, and deviations if latents are drawn; an int64 label
        return math.prod(shape) * 2 * (1 + self.sample_posterior) + 8


class TextSection(DataSection):
    """A text in examples of one length.

    Attributes:
        length: Characters or tokens of an example; examples overlap in training.
    """

    examples: ClassVar[str] = "characters"
    users: ClassVar[str] = "text models"
    of_text: ClassVar[bool] = True

    length: Length

    @abstractmethod
    def text(self, split: str) -> TextData:
        """Read the text of a split; see `load`."""

    @override
    def load(self, split: str) -> TextChunks:
        return TextChunks(self.text(split), self.length)

    @override
    def batches(self, data: TextChunks, device: torch.device) -> BatchMaker:
        return TextBatches(data.text, data.length, device=device, placement=self.placement)

    @override
    def evaluation_batches(self, data: TextChunks, *, batch_size: int, device: torch.device) -> Batches:
        return evaluation_chunks(data.text, data.length, batch_size=batch_size, device=device)

    def codec(self) -> TextCodec:
        """What turns text into ids and back.

        Of `tokens` this reads the tokenizer, or trains it where it is not there yet, for which the train split must be
        at hand; with `data.tokenizer` no data are needed.

        Raises:
            FileNotFoundError, ValueError: what reading or training the tokenizer refuses.
        """
        return CharacterCodec()

    def with_tokenizer_of(self, folder: Path) -> Self:
        """The section with the tokenizer that lies in a model's folder, if one does: then no corpus has to be read.

        Args:
            folder: of the saved model.

        Raises:
            ValueError: the section's own tokenizer (`tokenizer`, or the one trained on its corpus, where that is at
                hand and in the cache) is another one, or the file is no tokenizer.
        """
        return self

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        return math.prod(shape)  # uint8 characters


@register_data
class TopicsConfig(TextSection):
    """The language reference that CPython carries, in the 27 characters of text8: some 300,000; needs no download."""

    kind: Literal["topics"]

    @override
    def text(self, split: str) -> TextData:
        return python_topics(split)

    @override
    def count_examples(self) -> ExampleCount:
        return ExampleCount(len(self.load("train")), "")


class TextFilesSection(TextSection, FilesSection):
    """Texts in files.

    Attributes:
        split_files: Patterns of file names in a folder, by split; null: files named after the split, without backups.
    """

    split_files: dict[str, str] | None = None

    def _count(self, location: str) -> ExampleCount:
        return ExampleCount(None, "a plan does not read text")


@register_data
class TextConfig(TextFilesSection):
    """A text in the 27 characters of text8: a file, which is split by shares, or a folder with files for each split.

    Attributes:
        source: A text file (plain, .xz, .gz or .bz2), or a folder.
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        fractions: Shares of train, valid and test, of a single file.
        cache: Folder for the text as ids, which are then mapped and not read into memory; null reads it at every start.
    """

    kind: Literal["text"]
    fractions: tuple[Share, Share, Share] = (0.9, 0.05, 0.05)
    cache: Path | None = None

    @override
    def text(self, split: str) -> TextData:
        return characters(
            self.location(),
            self.split_name(split),
            split_files=self.split_files,
            fractions=self.fractions,
            cache_dir=self.cache,
        )


@register_data
class TokensConfig(TextFilesSection):
    """A corpus as byte-level BPE tokens, of a tokenizer that is trained on its train split; encoded once, then mapped.

    Attributes:
        source: A folder with text files for each split (plain, .xz, .gz or .bz2).
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        separator: What stands between documents within a file; null: a file is a document.
        special_tokens: Read special tokens in the text, such as chat markers, as their ids. Otherwise their letters are
            letters; those of <|endoftext|> always are.
        vocab_size: Tokens of the tokenizer that is trained, the end of a document among them.
        tokenizer: A ready tokenizer.json, which has a size of its own; null trains one.
        train_characters: Characters of the train split, the first, on which the tokenizer is trained; null takes all.
        cache: Folder for the tokenizer and the ids; null: runs/tokens-<name of the folder>.
    """

    examples: ClassVar[str] = "tokens"
    users: ClassVar[str] = "autoregressive models"

    kind: Literal["tokens"]
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

    @override
    def text(self, split: str) -> TextData:
        name = self.split_name(split)
        files = split_files(Path(self.location()), name, self.split_files)
        file = self._tokenizer_file()
        text = encoded_split(
            files,
            load_tokenizer(file),
            self.cache_folder,
            name,
            separator=self.separator,
            special_tokens=self.special_tokens,
            progress=True,
        )
        return dataclasses.replace(text, tokenizer=file.read_bytes())

    @override
    def codec(self) -> TextCodec:
        return TokenCodec(load_tokenizer(self._tokenizer_file()))

    @override
    def with_tokenizer_of(self, folder: Path) -> Self:
        theirs = tokenizer_in(folder)
        if theirs is None:
            return self
        own = self.tokenizer or self._trained_tokenizer()
        if own is not None and own.is_file() and not same_tokenizer(theirs, own):
            raise ValueError(
                f"{theirs}, which the model learned, and {own}, the recipe's own, are different tokenizers: give the "
                "recipe and the corpus that the model was trained with, or go by the model's: --set "
                f"data.tokenizer={theirs}"
            )
        return self.model_copy(update={"tokenizer": theirs})

    def _trained_tokenizer(self) -> Path | None:
        """Where the tokenizer of the corpus is kept, or would be; None without a corpus."""
        try:
            return corpus_tokenizer_path(
                self._corpus(), self.vocab_size, self.cache_folder, limit=self.train_characters
            )
        except (FileNotFoundError, ValueError):  # of the corpus: whoever reads it is told why it cannot be
            return None

    def _tokenizer_file(self) -> Path:
        """The tokenizer, which is trained where it is not there yet."""
        if self.tokenizer is not None:
            return self.tokenizer
        files, limit = self._corpus(), self.train_characters
        corpus_tokenizer(files, self.vocab_size, self.cache_folder, limit=limit, progress=True)
        return corpus_tokenizer_path(files, self.vocab_size, self.cache_folder, limit=limit)

    def _corpus(self) -> list[Path]:
        return split_files(Path(self.location()), self.train_split, self.split_files)

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        return math.prod(shape) * (2 if num_classes <= 1 << 16 else 4)  # uint16 or uint32, as `encoded_corpus` writes
