"""Families: the only code that knows the attributes of foreign models, one file a family."""

from .family import Family
from .libraries import CannotReadInParts, check_attention
from .lookup import (
    check_convertible,
    checkpoint,
    class_name_of,
    config_fields,
    config_values,
    family_for,
    family_named,
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
    "CannotReadInParts",
    "Family",
    "check_attention",
    "check_convertible",
    "checkpoint",
    "class_name_of",
    "config_fields",
    "config_values",
    "family_for",
    "family_named",
    "instantiate",
    "model_class_named",
    "outline",
    "pretrained",
    "rebuild_config",
    "restored",
    "supported_classes",
    "with_depth",
]
