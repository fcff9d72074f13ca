"""Units: what the trainer steps. A block is a unit; so is a whole unconverted model, the end-to-end control."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import adapter_for
from ..model import DiffusionBlocks
from ..sampling import Prediction


class EndToEnd(nn.Module):
    """The control: an unconverted classifier of transformers, with the interface of a block.

    Args:
        model: the model; it is trained in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images -> logits (batch, num_classes)."""
        return self.model(pixel_values=pixel_values).logits  # type: ignore[no-any-return]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile layer by layer: all layers share one compiled graph, so it takes seconds at any depth."""
        layers = self.model.get_submodule(adapter_for(self.model).layers_path(self.model))
        for layer in layers.children():
            layer.compile(*args, **kwargs)

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy of each sample, float32, shape (batch,)."""
        loss = F.cross_entropy(self(batch["pixel_values"]).float(), batch["labels"], reduction="none")
        assert loss.shape == batch["labels"].shape
        return loss

    def predict(self, pixel_values: Tensor, **_: Any) -> Prediction:
        """Class probabilities of one forward pass; denoising options do not apply and are ignored."""
        with torch.no_grad():
            logits = self(pixel_values).float()
        return Prediction(logits.softmax(-1), logits.log_softmax(-1), levels=())


@dataclass(frozen=True)
class Unit:
    """Something that is trained on its own.

    Attributes:
        name: for logs and messages.
        module: has `loss(batch, generator) -> (batch,)`; its call runs the network.
        own: the trainable parameters that only this unit moves.
    """

    name: str
    module: nn.Module
    own: list[nn.Parameter]


def units_of(model: nn.Module) -> tuple[list[Unit], list[nn.Parameter]]:
    """The units of a model, and the trainable parameters that several units move (the `joint` policy).

    Raises:
        TypeError: neither a `DiffusionBlocks` nor an `EndToEnd`.
        ValueError: nothing to train.
    """
    if isinstance(model, EndToEnd):
        units = [Unit("end-to-end", model, trainable(model))]
        shared: list[nn.Parameter] = []
    elif isinstance(model, DiffusionBlocks):
        shared = [p for p in model.shared_parameters() if p.requires_grad]
        common = {id(p) for p in shared}
        units = [
            Unit(f"block {i}", block, [p for p in trainable(block) if id(p) not in common])
            for i, block in enumerate(model.blocks)
        ]
    else:
        raise TypeError(f"cannot train a {type(model).__name__}: wrap it in EndToEnd, or convert it first")
    for unit in units:
        if not unit.own and not shared:
            raise ValueError(f"{unit.name} has no trainable parameter")
    return units, shared


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]
