"""NoProp's convolutional classifier (Li, Teh and Pascanu, arXiv 2503.24322), the smallest faithful module.

T networks of one shape, each with its own view of the image, turn noise into the label's embedding step by step. Each
can be trained without the others (`training.noprop_steps`), all by backpropagation, or each as a denoiser of a range of
levels, as DiffusionBlocks. It is an ordinary diffusers model (`save_pretrained`, `from_pretrained`,
`config`), so it is converted like any other.

What is from where. The paper: the layers of a network and their widths, dropout 0.2, one-hot embeddings, ten steps on a
cosine schedule. Chosen here, where it says nothing: padding that keeps the size of a convolution's output, dropout of
single elements, the schedule's offset (`noise.discrete_steps`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ..common.seeds import of_batch
from ..noise.discrete_steps import DiscreteSteps


class Logits(NamedTuple):
    """What a classifier returns: logits (batch, num_labels)."""

    logits: Tensor


class LabelFeatures(nn.Module):
    """Features of a noised label: z (batch, num_labels) -> (batch, dim), with a residual step."""

    def __init__(self, num_labels: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(num_labels, dim), nn.BatchNorm1d(dim), nn.ReLU())
        self.second = nn.Sequential(
            nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        )

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        h = self.first(z)
        return h + self.second(h)  # type: ignore[no-any-return]


class NoPropLayer(nn.Module):
    """One denoising network: image and noised label in, logits of the label out.

    Args:
        image_size: height and width, at least 4.
        num_channels: of the images.
        num_labels: size of the one-hot embedding, and number of logits.
        hidden_size: width of the fully connected layers; even.
        num_filters: of the first convolution; the second and third have twice and four times as many.
        dropout: after each convolution, of single elements.
    """

    def __init__(
        self, image_size: int, num_channels: int, num_labels: int, hidden_size: int, num_filters: int, dropout: float
    ) -> None:
        super().__init__()
        n, side = num_filters, image_size // 2 // 2
        self.image = nn.Sequential(
            *(nn.Conv2d(num_channels, n, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
            *(nn.Conv2d(n, 2 * n, 3, padding=1), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Conv2d(2 * n, 4 * n, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)),
            *(nn.Flatten(), nn.Linear(4 * n * side * side, hidden_size), nn.BatchNorm1d(hidden_size)),
        )
        self.label = LabelFeatures(num_labels, hidden_size)
        self.join = nn.Linear(2 * hidden_size, hidden_size)
        half = hidden_size // 2
        self.fuse = nn.Sequential(
            *(nn.BatchNorm1d(hidden_size), nn.ReLU()),
            *(nn.Linear(hidden_size, half), nn.BatchNorm1d(half), nn.ReLU(), nn.Linear(half, num_labels)),
        )

    def forward(self, pixel_values: Tensor, z: Tensor, level: Tensor | None = None) -> Tensor:
        """Logits (batch, num_labels).

        Args:
            pixel_values: images (batch, num_channels, image_size, image_size).
            z: noised labels (batch, num_labels).
            level: what is added of the noise level where the features are joined (batch, hidden_size), as a linear map
                of further features would be; None: nothing.
        """
        dtype = self.join.weight.dtype
        images = pixel_values.to(dtype).contiguous(memory_format=torch.channels_last)
        joint = self.join(torch.cat([self.image(images), self.label(z.to(dtype))], dim=1))
        return self.fuse(joint if level is None else joint + level)  # type: ignore[no-any-return]


class NoPropCNN(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """NoProp's classifier of small images: `num_layers` networks from noise to the label, and a linear read-out.

    Args:
        image_size: height and width of the images, at least 4.
        num_channels: of the images.
        num_labels: number of labels, >= 2; the embedding of a label is one-hot.
        num_layers: T, the number of networks.
        hidden_size: width of the fully connected layers; even.
        num_filters: of the first of three convolutions; the others have twice and four times as many.
        dropout: after each convolution, in [0, 1).
        eta: of NoProp's own training: the weight of the squared errors.

    Raises:
        ValueError: a value out of range.
    """

    _no_split_modules = ["NoPropLayer"]  # type: ignore[assignment]  # noqa: RUF012 - the library's

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 3,
        num_labels: int = 100,
        num_layers: int = 10,
        hidden_size: int = 256,
        num_filters: int = 32,
        dropout: float = 0.2,
        eta: float = 0.1,
    ) -> None:
        super().__init__()
        least = {"image_size": (image_size, 4), "num_channels": (num_channels, 1), "num_labels": (num_labels, 2)}
        least |= {"num_layers": (num_layers, 1), "num_filters": (num_filters, 1), "hidden_size": (hidden_size, 2)}
        for name, (value, lowest) in least.items():
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if hidden_size % 2:
            raise ValueError(f"hidden_size must be even, got {hidden_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if not eta > 0:
            raise ValueError(f"eta must be > 0, got {eta}")
        self.layers = nn.ModuleList(
            NoPropLayer(image_size, num_channels, num_labels, hidden_size, num_filters, dropout)
            for _ in range(num_layers)
        )
        self.classifier = nn.Linear(num_labels, num_labels)
        self.num_labels, self.steps = num_labels, DiscreteSteps.cosine(num_layers)

    def forward(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Logits:
        """Denoise from noise to the label, one network after the other, and read the label off.

        Args:
            pixel_values: images (batch, num_channels, image_size, image_size).
            generator: source of the noise. By default that of training is torch's global one; that of evaluation
                follows from the images.
        """
        device = pixel_values.device
        if generator is None and not self.training:
            generator = of_batch(0, {"pixel_values": pixel_values}, device)
        shape = (len(pixel_values), self.num_labels)

        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        z = draw()
        for t, layer in enumerate(self.layers, 1):
            a, b, c = self.steps.coefficients(t)
            z = a * layer(pixel_values, z).float().softmax(dim=-1) + b * z + c**0.5 * draw()
        return Logits(self.classifier(z.to(self.classifier.weight.dtype)))
