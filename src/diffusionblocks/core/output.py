"""What `DiffusionBlocks.forward` returns. Imported when it is first returned: transformers takes long to import."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class BlocksOutput(ModelOutput):
    """Output of `DiffusionBlocks.forward`: `loss`, scalar; `logits` (batch, num_classes) of a classifier.

    It is a `ModelOutput` of transformers: entries by attribute, by name or by index, without those that are None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
