"""The image or latent itself as the target of a diffusion model."""

from __future__ import annotations

from typing import ClassVar, Literal

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


class ImageTarget(Target):
    """The image (or latent) itself as the target of a diffusion model; the label, if any, is the input.

    Args:
        shape: (channels, height, width).
        num_classes: number of labels; 0 for an unconditional model. Label `num_classes` is the null class.
        label_dropout: share of the training samples whose label is replaced by the null class, in [0, 1].
    """

    names = ("pixel_values",)
    optional = ("labels",)  # images often have some; an unconditional model passes over them

    def __init__(self, shape: tuple[int, int, int], *, num_classes: int, label_dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.num_classes = num_classes
        self.label_dropout = label_dropout

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label; None where the model has never seen one."""
        return self.num_classes if self.num_classes and self.label_dropout > 0 else None

    def check_guidance(self, guidance: float, name: str = "guidance") -> None:
        """Raise ValueError for guidance other than 1 where there is no null class, saying why there is none."""
        if guidance == 1 or self.null_class is not None:
            return
        why = "was trained with label_dropout = 0" if self.num_classes else "is unconditional"
        raise ValueError(f"{name} = {guidance} needs a null class, but the model {why}; set {name} to 1")

    def encode(self, batch: Batch) -> Tensor:
        """`pixel_values` (batch, channels, height, width), with a standard deviation of about sigma_data."""
        return batch["pixel_values"].float()

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
        """Refuse images of another number, shape or dtype than the model's."""
        images = batch["pixel_values"]
        if not isinstance(images, Tensor) or images.shape != (size, *self.shape) or not images.is_floating_point():
            got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"pixel_values must be a float tensor of shape {(size, *self.shape)}, got {got}")
        if self.num_classes:
            check_labels(batch["labels"], size, self.num_classes, null_class=True)
