"""Families: the only code that knows the attributes of foreign models, one file a family.

A user's own package registers a family by `register_family`, as ours do: see docs/extending.md.
"""

from . import (  # noqa: F401 - they register their families
    bert,
    causal_lm,
    causal_lm_variants,
    dit,
    masked_lm,
    mean_pooled,
    noprop,
    recurrent,
    text_to_image,
    text_to_video,
    vit,
)
from .family import TRUNK, BlockCall, Family, register_family
from .kinds import ClassifierFamily, DenoiserFamily, ImageFamily, MaskedTextFamily, NextTokenFamily, TextFamily
from .libraries import DIFFUSERS, TRANSFORMERS, CannotReadInParts, Diffusers, Library, Transformers, check_attention
from .lookup import (
    check_convertible,
    checkpoint,
    class_name_of,
    config_fields,
    config_file_values,
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
    with_fewest_layers,
    with_layers,
)
from .ordinary import OrdinaryModel

__all__ = [
    "DIFFUSERS",
    "TRANSFORMERS",
    "TRUNK",
    "BlockCall",
    "CannotReadInParts",
    "ClassifierFamily",
    "DenoiserFamily",
    "Diffusers",
    "Family",
    "ImageFamily",
    "Library",
    "MaskedTextFamily",
    "NextTokenFamily",
    "OrdinaryModel",
    "TextFamily",
    "Transformers",
    "check_attention",
    "check_convertible",
    "checkpoint",
    "class_name_of",
    "config_fields",
    "config_file_values",
    "config_values",
    "family_for",
    "family_named",
    "instantiate",
    "model_class_named",
    "outline",
    "pretrained",
    "rebuild_config",
    "register_family",
    "restored",
    "supported_classes",
    "with_depth",
    "with_fewest_layers",
    "with_layers",
]
