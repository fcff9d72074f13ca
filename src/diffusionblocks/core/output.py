"""What `DiffusionBlocks.forward` returns. Imported when it is first returned: transformers takes long to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class BlocksOutput(ModelOutput):
    """Output of `DiffusionBlocks.forward`: `loss`, scalar; `logits` (batch, num_classes) of a classifier.

    It is a `ModelOutput` of transformers: entries by attribute, by name or by index, without those that are None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __getitem__(self, k: Any) -> Any:
        """An entry by name or index; KeyError says why a model has no logits."""
        if k == "logits" and self.logits is None:
            raise KeyError(
                "logits: blocks give a loss alone, but for a classifier in evaluation mode (label_smoothing_factor of "
                "transformers.Trainer reads them; diffusionblocks.BlocksTrainer does not)"
            )
        return super().__getitem__(k)
