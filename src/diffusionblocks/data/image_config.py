"""The `data` sections of images and of their latents."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from ..common.fields import Float, IsNumber, Labels, Pixels, Positive
from ..common.messages import warn_once
from ..common.processing_files import IMAGE_PROCESSOR
from .augment import AugmentConfig
from .autoencoder import load_vae
from .data_config import Batches, DataSection, FilesSection, register_data
from .dataset import BatchMaker, ExampleCount
from .image_batches import ImageBatches, Normalise, evaluation_batches, to_uint8
from .image_data import ImageData, digits, image_classification, resized
from .image_decoder import center_crop, decode_image, oversized_refused
from .image_processor import ImageProcessor, processor_in
from .image_table import rows_of_split
from .latent_batches import LatentBatches
from .latent_data import LatentData
from .latent_shards import MAKE_LATENTS, decoded_by, examples_of_split, largest_example, latent_folder, noted_prompts
from .prompt_states import load_prompt_encoder


class Normalisation(TypedDict):
    """What is subtracted from each channel of pixels in [0, 1], and what they are divided by then."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def _left_out(name: str, folder: Path | None = None) -> ValueError:
    """The error of a field that only an image processor could replace."""
    reason = "no pretrained model's image processor says it" if folder is None else f"{folder} has no {IMAGE_PROCESSOR}"
    return ValueError(f"{name} is left out, and {reason}: set {name}")


class ImagesSection(DataSection):
    """Images, or their latents: what a diffusion model's samples are compared with."""

    def frames_per_second(self) -> float | None:
        """Of videos; None of images."""
        return None

    @abstractmethod
    def to_pixels(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """What turns model-space samples (n, C, H, W) into uint8 images (n, 1 or 3, H, W).

        Raises:
            ValueError: the samples are latents and no autoencoder is named, or one that scales latents otherwise than
                those of the data are, where they are at hand.
        """

    @abstractmethod
    def real_images(self, data: Any, rows: Tensor, pixels: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        """Real images by their numbers int64 (n,), as uint8 (n, C, H, W); of latents, what `pixels` makes of means."""


class PixelsConfig(ImagesSection):
    """Images, and how their pixels become the model's numbers.

    Attributes:
        mean: Mean of each channel, of pixels in [0, 1]; it is subtracted.
        std: Standard deviation of each channel, by which the pixels are divided then.
        processor: A preprocessor_config.json of transformers, which says of the image size, mean and std those that are
            left out; null takes that of `model.pretrained`.
        augment: Random changes of training images.
    """

    examples: ClassVar[str] = "images"

    mean: tuple[Float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    processor: Path | None = None
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> Self:
        count = self.number_of_channels
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"{name} = {list(values)}: must be {count} finite numbers, one a channel")
        return self

    @property
    def number_of_channels(self) -> int:
        """Of an image."""
        return 1

    @property
    def normalisation(self) -> Normalisation:
        """`mean` and `std`.

        Raises:
            ValueError: they are left out, and nothing else says them.
        """
        if self.mean is None or self.std is None:
            raise _left_out("data.mean" if self.mean is None else "data.std")
        return {"mean": self.mean, "std": self.std}

    @override
    def of_pretrained(self, folder: Path | None) -> Self:
        file = self.processor or (None if folder is None else processor_in(folder))
        own = self._own_values()
        if file is not None and not file.is_file() and own["mean"] and own["std"]:
            return self  # of a run whose model has a copy beside it
        if file is None:
            if missing := [name for name, value in own.items() if value is None]:
                raise _left_out(f"data.{missing[0]}", folder)
            return self
        try:
            processor = ImageProcessor(file, self.number_of_channels)
        except ValueError:
            if self.processor is not None or None in own.values():
                raise
            return self  # nothing is left to it
        theirs = {"mean": processor.mean, "std": processor.std}
        other = [
            name for name in theirs if own[name] is not None and not np.allclose(own[name], theirs[name], atol=1e-3)
        ]
        for name in other:
            warn_once(
                f"data.{name} = {list(own[name])}, but {file} has {[round(value, 4) for value in theirs[name]]}, with "
                f"which the weights were trained: leave data.{name} out"
            )
        if other and None in own.values():
            left = next(name for name, value in own.items() if value is None)
            raise ValueError(
                f"data.{left} is left out, and data.{other[0]} is not that of {file}: leave both out, or none"
            )
        update = {name: values for name, values in theirs.items() if own[name] is None}
        # Beside the trained model a file that was not followed would be wrong.
        return self.model_copy(update={**update, "processor": None if other else file})

    @override
    def with_processing_of(self, folder: Path) -> Self:
        theirs = processor_in(folder)
        return self if theirs is None else self.model_copy(update={"processor": theirs})

    def _own_values(self) -> dict[str, Any]:
        """What an image processor may say instead: the values of this section, None for those that are left out."""
        return {"mean": self.mean, "std": self.std}

    def _noted(self, data: ImageData) -> ImageData:
        """Data with the content of the processor's file, which goes with a model that learns them."""
        return data if self.processor is None else dataclasses.replace(data, processor=self.processor.read_bytes())

    @override
    def batches(self, data: ImageData, device: torch.device) -> BatchMaker:
        return ImageBatches(data, **self.normalisation, augment=self.augment, device=device, placement=self.placement)

    @override
    def evaluation_batches(self, data: ImageData, *, batch_size: int, device: torch.device) -> Batches:
        return evaluation_batches(data, **self.normalisation, batch_size=batch_size, device=device)

    @override
    def to_pixels(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        return functools.partial(to_uint8, **self.normalisation)

    @override
    def pictures(self, files: Sequence[Path], shape: tuple[int, ...]) -> Tensor:
        processor = None if self.processor is None else ImageProcessor(self.processor, self.number_of_channels)
        pixels = torch.from_numpy(np.stack([self._pixels(file, shape, processor) for file in files]))
        return Normalise(**self.normalisation, channels=self.number_of_channels, device=pixels.device)(pixels)

    def _pixels(self, file: Path, shape: tuple[int, ...], processor: ImageProcessor | None) -> np.ndarray:
        """A picture as the processor brings it to its size, or else its middle: uint8 (channels, height, width)."""
        with oversized_refused():
            picture = decode_image(file.read_bytes(), str(file), self.number_of_channels)
        if processor is not None:
            pixels = processor(picture)
        else:
            values = np.asarray(center_crop(picture, shape[-1]))
            pixels = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        if pixels.shape != shape:
            ours, theirs = ("x".join(map(str, size)) for size in (shape, pixels.shape))
            raise ValueError(f"{file} becomes {theirs}, and the model takes images of {ours}: give one of that size")
        return pixels

    @override
    def image_processor(self, shape: tuple[int, ...]) -> dict[str, Any]:
        channels, height, width = shape
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": channels == 3,
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.normalisation["mean"]),
            "image_std": list(self.normalisation["std"]),
        }

    @override
    def real_images(
        self, data: ImageData, rows: Tensor, pixels: Callable[[Tensor], Tensor], device: torch.device
    ) -> Tensor:
        return data.images[rows].to(device)

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        return math.prod(shape) + 8  # uint8 pixels, and an int64 label


@register_data
class DigitsConfig(PixelsConfig):
    """The handwritten digits that ship with scikit-learn: 8x8, one channel, 1,438 train and 359 test images."""

    kind: Literal["digits"]
    mean: tuple[Float, ...] | None = (0.3,)
    std: tuple[Positive, ...] | None = (0.376,)

    @override
    def _own_values(self) -> dict[str, Any]:
        """Defaults give way to what a pretrained model was trained with."""
        return {name: getattr(self, name) if name in self.model_fields_set else None for name in ("mean", "std")}

    @override
    def of_pretrained(self, folder: Path | None) -> Self:
        has_processor = self.processor is not None or (folder is not None and processor_in(folder) is not None)
        return super().of_pretrained(folder) if has_processor else self

    @override
    def load(self, split: str) -> ImageData:
        data = digits(split)
        if self.processor is not None:
            data = resized(data, ImageProcessor(self.processor, self.number_of_channels))
        return self._noted(data)

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
        image_size: Height and width in pixels; images of other sizes are refused. null: the processor brings them to
            its own.
        channels: Channels of an image.
        num_classes: Number of classes; null takes that of the data.
        cache: Folder for decoded images; null decodes at every start.
    """

    kind: Literal["images"]
    split_files: dict[str, str] | None = None
    image_column: str | None = None
    label_column: str | None = None
    image_size: Pixels | None = None
    channels: Annotated[Literal[1, 3], IsNumber] = 3
    num_classes: Labels | None = None
    cache: Path | None = None

    @property
    @override
    def number_of_channels(self) -> int:
        return self.channels

    @override
    def _own_values(self) -> dict[str, Any]:
        return {"image_size": self.image_size, **super()._own_values()}

    @override
    def load(self, split: str) -> ImageData:
        if self.image_size is None and self.processor is None:
            raise _left_out("data.image_size")
        resize = None if self.image_size or self.processor is None else ImageProcessor(self.processor, self.channels)
        data = image_classification(
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
            processor=resize,
        )
        return self._noted(data)

    @override
    def _count(self, location: str, split: str) -> ExampleCount:
        rows = rows_of_split(location, self.split_files, split)
        return ExampleCount(
            rows, location if rows is not None else f"{location!r} is no local folder, and a plan downloads nothing"
        )


@register_data
class LatentsConfig(ImagesSection, FilesSection):
    """Latents of an autoencoder, in shards that `diffusionblocks encode` wrote.

    Attributes:
        source: Folder of the shards.
        folder: Name below the folder in DIFFUSIONBLOCKS_DATA, see kind `images`.
        scale: Factor that brings the latents to a standard deviation of about sigma_data.
        sample_posterior: Draw each latent from the encoder's posterior, instead of taking its mean.
        vae: Folder or hub name of the autoencoder that decodes samples; null takes the one that the shards note.
        prompt_dropout: Share of the training examples that get the empty prompt's states instead of their own, for
            classifier-free guidance. Without effect on latents without prompts.
        constants: What the model is told with every example besides, by the names of its class's `forward`, as
            `guidance: 3.5` of FLUX.1-dev: a number, or a list of them.
    """

    examples: ClassVar[str] = "latents"
    users: ClassVar[str] = "diffusion models"
    mapped: ClassVar[bool] = True
    made_by: ClassVar[str] = f"; {MAKE_LATENTS}"

    kind: Literal["latents"]
    scale: Positive = 0.5
    sample_posterior: bool = True
    vae: str | None = None
    prompt_dropout: Float = Field(default=0.1, ge=0.0, lt=1.0)
    constants: dict[str, Float | tuple[Float, ...]] = Field(default_factory=dict)

    def _constants(self, device: torch.device) -> dict[str, Tensor]:
        """Of one example."""
        return {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in self.constants.items()}

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
            prompt_dropout=self.prompt_dropout,
            constants=self._constants(device),
        )

    @override
    def evaluation_batches(self, data: LatentData, *, batch_size: int, device: torch.device) -> Batches:
        for rows in data.batches_in_order(batch_size):
            means = data.rows("mean", rows).to(device).float() * self.scale
            yield {"pixel_values": means, "labels": data.labels[rows].to(device), **self.conditions(data, rows, device)}

    def conditions(self, data: LatentData, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """What a model is told of some rows, int64 (n,): states of their prompts, and constants."""
        states = {name: data.rows(name, rows).to(device) for name in data.states}
        constants = self._constants(device)
        return states | {name: value.expand(len(rows), *value.shape) for name, value in constants.items()}

    def states_of_prompts(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """States of prompts by the text encoder that the train split notes, by name, (n, ...) on the CPU.

        Raises:
            ValueError: the latents have no prompts, or the encoder cannot be loaded.
        """
        noted = noted_prompts(self.location(), self.train_split)
        if noted is None:
            raise ValueError(f"{self.location()} notes no text encoder: encode it with --text-encoder")
        states = load_prompt_encoder(noted.text_encoder, noted.length, device)(prompts)
        shapes, shapes_of_data = (
            {name: tuple(value.shape[1:]) for name, value in states.items()},
            {name: tuple(value.shape) for name, value in noted.empty.items()},
        )
        if shapes != shapes_of_data:
            raise ValueError(
                f"text encoder {noted.text_encoder!r} gives states {shapes} of a prompt, and those of the data are "
                f"{shapes_of_data}: encode the split again"
            )
        return states

    @override
    def conditions_without_prompt(self, data: LatentData, count: int, device: torch.device) -> dict[str, Tensor]:
        values = {name: value.to(device) for name, value in data.empty.items()} | self._constants(device)
        return {name: value.expand(count, *value.shape) for name, value in values.items()}

    @override
    def frames_per_second(self) -> float | None:
        try:
            noted = decoded_by(self.location(), self.train_split)
        except ValueError:  # without the latents
            return None
        return None if noted is None else noted.fps

    @override
    def to_pixels(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        try:
            source = self.location()
        except ValueError:  # without the latents the autoencoder is trusted
            source, noted = "", None
        else:
            noted = decoded_by(source, self.train_split)
        name = self.vae or (None if noted is None else noted.vae)
        if name is None:
            raise ValueError(
                "samples are latents: name their autoencoder to see images, --set data.vae=FOLDER_OR_HUB_NAME"
            )
        vae = load_vae(name, device)
        if noted is not None:
            noted.check_decoder(vae, f"{source}, split {self.train_split!r}")
        scale = vae.scale
        if noted is not None and scale is not None and not noted.scale_of_latents:
            scale.check_same(noted.scale, f"vae = {name!r}", f"{source}, split {self.train_split!r},")
        elif noted is not None:
            scale = noted.scale
        if scale is None:
            raise ValueError(
                f"vae = {name!r}: its config says no scale of its latents, that was measured and lies in "
                f"{self.train_split}.json of their folder: set data.source to a folder with a copy of that file"
            )
        total, half = scale.times(self.scale), (0.5, 0.5, 0.5)
        of_videos = noted is not None and noted.fps is not None

        def pixels(samples: Tensor) -> Tensor:
            images = samples.squeeze(2) if samples.dim() == 5 and not of_videos else samples  # a video of one frame
            decoded = vae.decode(images, total)
            return to_uint8(decoded.flatten(2, -2), half, half).view(decoded.shape)  # frames below each other

        return pixels

    @override
    def real_images(
        self, data: LatentData, rows: Tensor, pixels: Callable[[Tensor], Tensor], device: torch.device
    ) -> Tensor:
        means = data.rows("mean", rows)
        return pixels(means.to(device).float() * self.scale)

    @override
    def _count(self, location: str, split: str) -> ExampleCount:
        return ExampleCount(examples_of_split(location, split), location)

    @override
    def largest_example(self) -> dict[str, tuple[int, ...]]:
        try:
            return largest_example(self.location(), self.train_split)
        except (OSError, ValueError):  # which reading them will say
            return {}

    @override
    def example_bytes(self, shape: tuple[int, ...], num_classes: int) -> int:
        # float16 means, and deviations if latents are drawn; an int64 label; bfloat16 states of a prompt
        states = sum(2 * math.prod(of) for name, of in self.largest_example().items() if name != "pixel_values")
        return math.prod(shape) * 2 * (1 + self.sample_posterior) + 8 + states
