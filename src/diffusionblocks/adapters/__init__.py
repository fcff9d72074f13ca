"""Adapters: the only code that knows the attributes of foreign models, one file a family."""

from .base import Adapter
from .registry import adapter_for, instantiate, model_class_named, rebuild_config, supported_classes
from .vit import ViTAdapter

__all__ = [
    "Adapter",
    "ViTAdapter",
    "adapter_for",
    "instantiate",
    "model_class_named",
    "rebuild_config",
    "supported_classes",
]
