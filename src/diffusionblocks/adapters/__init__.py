"""Adapters: the only code that knows the attributes of foreign models, one file a family."""

from .base import Adapter
from .registry import (
    adapter_for,
    adapter_named,
    config_fields,
    config_values,
    instantiate,
    model_class_named,
    pretrained,
    rebuild_config,
    supported_classes,
)

__all__ = [
    "Adapter",
    "adapter_for",
    "adapter_named",
    "config_fields",
    "config_values",
    "instantiate",
    "model_class_named",
    "pretrained",
    "rebuild_config",
    "supported_classes",
]
