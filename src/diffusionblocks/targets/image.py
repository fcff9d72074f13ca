"""The image or latent itself as the target of a diffusion model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..common.fields import Float
from .label import check_labels
from .target import BaseTargetConfig, Batch, Target


class ImageTargetConfig(BaseTargetConfig):
    """What a diffusion model's blocks denoise: the image or latent, under a squared error.

    Attributes:
        weight: Weight of the squared error at each level: `none`, or `edm` = 1 / c_out^2 of the noise process (EDM
            table 1). Under flow matching it makes the loss that of the velocity.
        label_dropout: Share of the training examples that see the null class instead of their label. 0 rules out
            classifier-free guidance. Without effect in an unconditional model.
    """

    #: none: a chain must start where nothing of the image shows (EDM's sigma_max), for at sigma 10 the noised image
    #: still tells its mean colour, which noise alone would get wrong
    unread: ClassVar[float] = 0.0

    kind: Literal["image"] = "image"
    weight: Literal["none", "edm"] = "edm"
    label_dropout: Float = Field(default=0.1, ge=0.0, lt=1.0)


#: What is cached of a prompt: its tokens' states (length, width), which of these count, and states of the whole.
STATES, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"


class Condition(NamedTuple):
    """An entry of a batch that a diffusion model reads beside the noised image, such as the states of a text.

    Attributes:
        shape: of one example; None where any size will do.
        dtype: `float` (any floating dtype), or `mask` (bool or whole numbers, 0 where nothing is to be seen).
        optional: whether a batch may lack it.
    """

    shape: tuple[int | None, ...]
    dtype: Literal["float", "mask"] = "float"
    optional: bool = False

    def check(self, name: str, value: object, size: int) -> None:
        """Raise ValueError unless `value` is a tensor of `size` such examples."""
        if isinstance(value, Tensor):
            fits = fits_shape(value.shape, (size, *self.shape))
            if fits and value.is_floating_point() == (self.dtype == "float"):
                return
        got = f"{value.dtype} {shape_text(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        kind = "a float tensor" if self.dtype == "float" else "a tensor of bool or whole numbers"
        raise ValueError(f"{name} must be {kind} of shape {shape_text((size, *self.shape))}, got {got}")


def fits_shape(shape: tuple[int, ...], pattern: tuple[int | None, ...]) -> bool:
    """Whether a shape fits a pattern, of which None is any size of at least 1."""
    pairs = zip(shape, pattern, strict=False)
    return len(shape) == len(pattern) and all(s >= 1 if e is None else s == e for s, e in pairs)


def shape_text(shape: tuple[int | None, ...]) -> str:
    """A shape for a message: (2, any, 4096)."""
    sizes = ["any" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


class ImageTarget(Target):
    """The image, video or latent itself as the target of a diffusion model; label or text, if any, are the input.

    Args:
        shape: (channels, height, width), of a video (channels, frames, height, width); None where any size will do.
        num_classes: number of labels; 0 for an unconditional model. Label `num_classes` is the null class.
        label_dropout: share of the training samples whose label is replaced by the null class, in [0, 1].
        conditions: what else the model reads, by the names of batch entries.
        multiples: of which each size after the channels must be a multiple; default 1 each.
    """

    names = ("pixel_values",)
    optional = ("labels",)  # images often have some; an unconditional model passes over them

    def __init__(
        self,
        shape: tuple[int | None, ...],
        *,
        num_classes: int,
        label_dropout: float,
        conditions: Mapping[str, Condition] | None = None,
        multiples: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.conditions = dict(conditions or {})
        self.multiples = multiples or (1,) * (len(shape) - 1)
        self.num_classes = num_classes
        self.label_dropout = label_dropout

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label; None where the model has never seen one."""
        return self.num_classes if self.num_classes and self.label_dropout > 0 else None

    def check_guidance(self, guidance: float, name: str = "guidance") -> None:
        """Raise ValueError for guidance other than 1 where there is no null class, saying why there is none."""
        if guidance == 1 or self.null_class is not None or self.conditions:  # these have inputs to lead away from
            return
        why = "was trained with label_dropout = 0" if self.num_classes else "is unconditional"
        raise ValueError(f"{name} = {guidance} needs a null class, but the model {why}; set {name} to 1")

    def encode(self, batch: Batch) -> Tensor:
        """`pixel_values` (batch, channels, height, width), with a standard deviation of about sigma_data."""
        return batch["pixel_values"].float()

    def tokens_of(self, shape: tuple[int, ...]) -> int:
        """Patches of each image or video of a batch (batch, channels, ...)."""
        return math.prod(shape[2:]) // math.prod(self.multiples)

    def training_inputs(self, inputs: Batch, generator: torch.Generator | None) -> Batch:
        """Drop labels at random."""
        if self.null_class is None:
            return inputs
        labels = inputs["labels"]
        drop = torch.rand(labels.shape, generator=generator, device=labels.device) < self.label_dropout
        return {**inputs, "labels": torch.where(drop, self.null_class, labels)}

    def loss(self, output: Tensor, batch: Batch, z: Tensor | None = None) -> Tensor:
        """Mean squared error over the image's elements (EDM eq. 3)."""
        return (output.float() - batch["pixel_values"].float()).square().flatten(1).mean(dim=1)

    def check(self, batch: Batch, size: int) -> None:
        """Refuse images of another number, shape or dtype than the model's, and conditions that are not its own."""
        Condition(self.shape).check("pixel_values", batch["pixel_values"], size)
        self.check_size("pixel_values", batch["pixel_values"].shape[2:])
        if self.num_classes:
            check_labels(batch["labels"], size, self.num_classes, null_class=True)
        self.check_conditions(batch, size)

    def check_size(self, name: str, sizes: tuple[int, ...]) -> None:
        """Raise ValueError unless each size after the channels is a multiple of the patch."""
        if any(size % multiple for size, multiple in zip(sizes, self.multiples, strict=True)):
            raise ValueError(
                f"{name} has sizes {'x'.join(map(str, sizes))}, which must be multiples of "
                f"{'x'.join(map(str, self.multiples))}: the model reads patches of these"
            )

    def check_conditions(self, batch: Batch, size: int) -> None:
        """Raise ValueError for a condition of another number, shape or dtype."""
        for name, condition in self.conditions.items():
            if name in batch or not condition.optional:
                condition.check(name, batch.get(name), size)

    def chain_shape(self, sizes: tuple[int, ...] | None) -> tuple[int, ...]:
        """The shape of one sample: the model's own, or of these sizes where it takes any.

        Raises:
            ValueError: sizes are missing, or are not the model's.
        """
        channels, *own = self.shape
        if sizes is None:
            if None in self.shape:
                names = ("frames, " if len(own) == 3 else "") + "height, width"
                raise ValueError(f"this model takes images of any size: give sizes = ({names})")
            return tuple(size for size in self.shape if size is not None)
        if not fits_shape(sizes, tuple(own)):
            raise ValueError(f"sizes = {tuple(sizes)}: the model's are {shape_text(tuple(own))}")
        self.check_size("sizes", tuple(sizes))
        assert channels is not None
        return (channels, *sizes)
