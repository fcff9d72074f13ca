"""A learnable factor on the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LogitScale(nn.Module):
    """A learnable factor on the logits, stored as its logarithm."""

    def __init__(self, start: float) -> None:
        super().__init__()
        # One value, not none of a dimension: sharded parameters (FSDP2) must have a first dimension.
        self.log = nn.Parameter(torch.tensor([float(start)]).log())

    def forward(self, logits: Tensor) -> Tensor:
        """Same shape and dtype."""
        return logits * self.log.exp().to(logits.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any) -> None:
        name = f"{prefix}log"
        if name in state_dict and state_dict[name].dim() == 0:  # version 0.1.0 saved it without a dimension
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
