"""DINOv3's vision transformer with a linear classifier, of which transformers has the first alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, DINOv3ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel):
    """DINOv3 (arXiv 2508.10104) with a linear head on [CLS] and the mean of the patches.

    The head is that of DINOv2's classifier in transformers. `from_pretrained` also takes a folder or hub name of a
    `DINOv3ViTModel`; then the head is fresh.

    Args:
        config: that of `DINOv3ViTModel`, with `num_labels`.
    """

    base_model_prefix = "backbone"

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(config)
        self.backbone = DINOv3ViTModel(config)
        labels = config.num_labels
        self.classifier = nn.Linear(2 * config.hidden_size, labels) if labels else nn.Identity()
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **options: Any) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,), for the output's `loss`.
            options: of `DINOv3ViTModel`.

        Returns:
            `logits` (batch, num_labels), and `loss` where labels are given.
        """
        output = self.backbone(pixel_values, **options)
        tokens = output.last_hidden_state
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        logits = self.classifier(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)
