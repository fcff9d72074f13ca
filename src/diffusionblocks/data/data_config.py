"""The `data` section of a recipe: what every kind of data answers, and the registry of kinds."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import SerializeAsAny
from torch import Tensor
from typing_extensions import override

from ..common.by_kind import ByKind, kind_of
from ..common.config_model import ConfigModel
from ..common.registry import Registry
from .dataset import BatchMaker, Dataset, ExampleCount
from .text_codec import TextCodec

#: Folder that holds local data sets, one sub-folder each (see `FilesSection.location`).
DATA_VARIABLE = "DIFFUSIONBLOCKS_DATA"

Batches = Iterator[dict[str, Tensor]]


class DataSection(ConfigModel, ABC):
    """What every kind of data answers.

    Attributes:
        examples: What an example is: `images`, `latents`, `characters` or `tokens`; a task says which it takes.
        users: Models that take such examples, for messages.
        of_text: Whether examples are texts.
        mapped: Whether a CPU reads examples from files when they are used, instead of having them in memory.
        placement: Where training examples wait: on the `device`, on the `host`, or `auto`: on the device where they
            take at most a quarter of its free memory.
    """

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
            split: "train", "test", or "valid" where the data have such a split.

        Raises:
            FileNotFoundError, ValueError: they are missing, damaged, or of another form than the section says.
        """

    def load_first(self, split: str, count: int | None) -> Dataset:
        """As `load`, but examples after the first so many may be left out, where they take work; None: all."""
        return self.load(split)

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

    def largest_example(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the train split's largest example by entry, where files at hand say them; else nothing."""
        return {}

    def conditions_without_prompt(self, data: Any, count: int, device: torch.device) -> dict[str, Tensor]:
        """What a model is told of so many examples beside image and label, of latents with prompts that of the empty
        prompt; nothing of other data."""
        return {}

    def codec(self) -> TextCodec:
        """What turns text into the data's ids and back; see `TextSection.codec`.

        Raises:
            ValueError: data without text.
        """
        raise ValueError(f"data.kind: {self.kind} has no text; text has data.kind: topics, text or tokens")

    def image_processor(self, shape: tuple[int, ...]) -> dict[str, Any] | None:
        """The values of an image processor of transformers that makes inputs of such images; None where there is none.

        Args:
            shape: (channels, height, width) of the model's images.
        """
        return None

    def pictures(self, files: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
        """Read pictures of any size as inputs of a model that was trained on this section's images.

        Args:
            files: of the pictures.
            shape: (channels, height, width) of the model's images.

        Returns:
            float32 (len(files), channels, height, width), normalised.

        Raises:
            FileNotFoundError: no such file.
            ValueError: what cannot be decoded, or data of another kind.
        """
        raise ValueError(f"data.kind: {self.kind} has no pictures; give a run on images")

    def with_processing_of(self, folder: Path) -> Self:
        """The section with the tokenizer, or image processor, that lies in a trained model's folder, if one does.

        Raises:
            ValueError: the section's own is another one.
        """
        return self

    def of_pretrained(self, folder: Path | None) -> Self:
        """The section with what it leaves to the model that training starts from: its tokenizer, or image processor.

        Args:
            folder: of that model; None: training starts afresh.

        Raises:
            ValueError: what is left out is not there either, or what the section says does not suit the model.
        """
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
        TypeError: no such subclass.
        ValueError: no such field, or a name that is taken.
    """
    if not isinstance(section, type) or not issubclass(section, DataSection):
        raise TypeError(f"register_data takes a subclass of DataSection, got {section!r}")
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
        valid_split: Name of the split that early stopping measures on (`train.early_stopping`).
    """

    #: how a user comes by such a folder, for messages; nothing where folders of others will do
    made_by: ClassVar[str] = ""

    source: str | None = None
    folder: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    valid_split: str = "valid"

    @property
    def name(self) -> str:
        """A short name of the data: that of their folder."""
        return str(self.folder or Path(str(self.source)).name)

    def split_name(self, split: str) -> str:
        """What the files call a split."""
        return {"train": self.train_split, "test": self.test_split, "valid": self.valid_split}[split]

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
                f"a folder that holds {self.folder!r}{self.made_by}"
            )
        return self.source

    @override
    def count_examples(self) -> ExampleCount:
        try:
            return self._count(self.location(), self.train_split)
        except (OSError, ValueError) as error:
            return ExampleCount(None, str(error))

    def unreadable_splits(self) -> dict[str, str]:
        """The reason for each of the train and test splits whose files are missing or damaged; nothing is downloaded.

        Raises:
            ValueError: neither source nor folder leads anywhere.
        """
        location, reasons = self.location(), {}
        for split in (self.train_split, self.test_split):
            try:
                self._count(location, split)
            except (OSError, ValueError) as error:
                reasons[split] = str(error)
        return reasons

    @abstractmethod
    def _count(self, location: str, split: str) -> ExampleCount:
        """Count the examples that a split's files say they hold.

        Raises:
            FileNotFoundError, ValueError: a local folder lacks the split's files, or they are damaged.
        """
