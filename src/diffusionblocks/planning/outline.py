"""A recipe's model without its weights: structure, names and shapes on the meta device."""

from __future__ import annotations

from torch import nn

from ..adapters import adapter_named, config_fields, outline, rebuild_config
from ..convert import convert
from ..recipes import Recipe
from ..sources import build_original
from ..training import EndToEnd


def outline_of(recipe: Recipe) -> nn.Module:
    """What `sources.build_model` makes of the recipe, on the meta device. Pretrained weights are read for their shapes.

    Raises:
        ValueError: a class that is not supported, or config values that the class does not take.
    """
    original = _original(recipe)
    if recipe.method == "diffusionblocks":
        return convert(original, recipe.blocks)
    if adapter_named(recipe.model.type).target == "label":
        return EndToEnd(original)
    return convert(original, recipe.blocks.as_one_block())


def _original(recipe: Recipe) -> nn.Module:
    if recipe.model.pretrained is not None:
        return nn.Module.to(build_original(recipe), device="meta")
    model_class, values = recipe.model.type, recipe.model.config
    unknown = sorted(set(values) - config_fields(model_class))
    if unknown:
        raise ValueError(
            f"model.config: {model_class} knows no {unknown}; it takes {sorted(config_fields(model_class))}"
        )
    return outline(model_class, rebuild_config(model_class, values))
