"""Adapters: the only code that knows the attributes of foreign models, one file a family."""

from .base import Adapter
from .libraries import CannotReadInParts, check_attention
from .registry import (
    adapter_for,
    adapter_named,
    check_convertible,
    checkpoint,
    class_name_of,
    config_fields,
    config_values,
    instantiate,
    model_class_named,
    outline,
    pretrained,
    rebuild_config,
    restored,
    supported_classes,
    with_depth,
)

__all__ = [
    "Adapter",
    "CannotReadInParts",
    "adapter_for",
    "adapter_named",
    "check_attention",
    "check_convertible",
    "checkpoint",
    "class_name_of",
    "config_fields",
    "config_values",
    "instantiate",
    "model_class_named",
    "outline",
    "pretrained",
    "rebuild_config",
    "restored",
    "supported_classes",
    "with_depth",
]
