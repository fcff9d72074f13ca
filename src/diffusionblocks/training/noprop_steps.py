"""NoProp's own training (arXiv 2503.24322, discrete time): every network denoises one step of T, without the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..noise.discrete_steps import DiscreteSteps
from ..targets import check_entries, label_losses
from .units import OneModel, Unit


class _Step(nn.Module):
    """What trains on one level of the schedule: z = sqrt(abar) u + sqrt(1 - abar) eps, of the one-hot label u.

    The level is a buffer: units of one shape share a module, to which each binds its tensors.

    Args:
        abar: of the level that z has.
        num_labels: length of z.
    """

    abar: Tensor

    def __init__(self, abar: float, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.register_buffer("abar", torch.tensor(abar), persistent=False)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Losses of each sample, float32, shape (batch,).

        Args:
            batch: `pixel_values` and `labels`.
            generator: source of the noise.

        Raises:
            ValueError: an entry that nothing reads.
        """
        check_entries(batch, ("pixel_values", "labels"), type(self).__name__)
        labels = batch["labels"]
        noise = torch.randn(len(labels), self.num_labels, generator=generator, device=labels.device)
        losses: Tensor = self(batch["pixel_values"], labels, noise)
        assert losses.shape == labels.shape
        return losses

    def heaviest_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As `loss`: every step takes as much memory."""
        return self.loss(batch)

    def noised(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(u, z), each (batch, num_labels), of labels (batch,) and normal noise."""
        u = (labels[:, None] == torch.arange(self.num_labels, device=labels.device)).to(noise.dtype)
        return u, self.abar.sqrt() * u + (1 - self.abar).sqrt() * noise


class DenoisingStep(_Step):
    """One network of a `NoPropCNN`, which predicts the label's embedding from the z before its step.

    Args:
        layer: the network.
        abar: of the level before its step.
        weight: (T / 2) eta (SNR_t - SNR_(t-1)), of the squared error.
        num_labels: length of z.
    """

    weight: Tensor

    def __init__(self, layer: nn.Module, abar: float, weight: float, num_labels: int) -> None:
        super().__init__(abar, num_labels)
        self.layer = layer
        self.register_buffer("weight", torch.tensor(weight), persistent=False)

    def forward(self, pixel_values: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """The weighted squared error of the predicted embedding, (batch,)."""
        u, z = self.noised(labels, noise)
        prediction = self.layer(pixel_values, z).float().softmax(dim=-1)
        errors: Tensor = (prediction - u).square().sum(dim=-1)
        return self.weight * errors


class ReadOut(_Step):
    """The linear read-out of a `NoPropCNN`, trained on the last level of the schedule.

    Args:
        classifier: the linear layer.
        abar: of the last level.
        num_labels: length of z.
    """

    def __init__(self, classifier: nn.Module, abar: float, num_labels: int) -> None:
        super().__init__(abar, num_labels)
        self.classifier = classifier

    def forward(self, pixel_values: Tensor, labels: Tensor, noise: Tensor) -> Tensor:
        """The cross-entropy of the label read off z, (batch,); no image is looked at."""
        _, z = self.noised(labels, noise)
        logits: Tensor = self.classifier(z)
        return label_losses(logits, labels)


class NoProp(OneModel):
    """A `NoPropCNN` under NoProp's own loss. Each network is a unit, and so is the read-out.

    The embeddings are one-hot and fixed. So the divergence of z_0 is a constant, and no gradient goes from one unit to
    another: together their losses are the paper's objective, each with an optimizer of its own.

    Args:
        model: the `NoPropCNN`; it is trained in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        layers: Any = model.layers
        steps = DiscreteSteps.cosine(len(layers))
        self.denoising_steps = nn.ModuleList(
            DenoisingStep(layer, steps.abar[t - 1], steps.loss_weight(t, self.config.eta), self.config.num_labels)
            for t, layer in enumerate(layers, 1)
        )
        classifier: Any = model.classifier
        self.read_out = ReadOut(classifier, steps.abar[-1], self.config.num_labels)
        self.to(next(model.parameters()).device)

    def units(self, blocks: Sequence[int] | None = None) -> list[Unit]:
        """Each network, and the read-out; ValueError: blocks are named."""
        if blocks is not None:
            raise ValueError(f"train.blocks = {list(blocks)}: method noprop trains all networks; leave it out")
        networks = [Unit(index, f"network {index}", step) for index, step in enumerate(self.denoising_steps)]
        return [*networks, Unit(len(networks), "read-out", self.read_out)]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> logits (batch, num_labels), by all steps."""
        return self.model(pixel_values=pixel_values).logits  # type: ignore[no-any-return]
