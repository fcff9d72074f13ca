"""Rotary positions that blocks can follow."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_rotary(model: nn.Module) -> None:
    """Refuse a model whose rotary positions change with the text's length.

    Raises:
        ValueError: they do; the message names their kind.
    """
    config: Any = model.config
    values = getattr(config, "rope_parameters", None) or {}
    # Some have one for each kind of layer.
    each = [part for part in values.values() if isinstance(part, dict)] or [values]
    for kind in (part.get("rope_type", "default") for part in each):
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"{type(model).__name__} has rotary positions of rope_type {kind}, which change with the text's length"
            )
