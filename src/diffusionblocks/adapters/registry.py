"""Which adapter serves which class. Discovery proposes, never guesses: an unknown class is an error."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import nn

from .base import Adapter
from .vit import ViTAdapter

_ADAPTERS: tuple[Adapter, ...] = (ViTAdapter(),)


def supported_classes() -> dict[str, Adapter]:
    """Class name -> adapter, for every class that can be converted."""
    return {name: adapter for adapter in _ADAPTERS for name in adapter.classes}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's class.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no adapter knows the class; the message lists those that are known.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    known = supported_classes()
    for ancestor in type(model).__mro__:  # a user's subclass of a known class keeps its structure
        if ancestor.__name__ in known and ancestor.__module__.startswith(("transformers.", "diffusers.")):
            adapter = known[ancestor.__name__]
            adapter.check(model)
            return adapter
    raise ValueError(
        f"cannot convert {type(model).__name__}: no adapter knows this class; supported: {', '.join(sorted(known))}. "
        "See docs/design.md, 'Adding a family'."
    )


def model_class_named(name: str) -> type[nn.Module]:
    """The public class of that name, imported from its library; only names in the registry are imported.

    Raises:
        ValueError: the name is not in the registry.
    """
    known = supported_classes()
    if name not in known:
        raise ValueError(f"unknown model class {name!r}; supported: {', '.join(sorted(known))}")
    module = importlib.import_module(known[name].classes[name])
    model_class: type[nn.Module] = getattr(module, name)
    return model_class


#: Attention implementations that a recipe or a saved model may ask for. Others can make transformers fetch kernels.
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def rebuild_config(model_class: str, values: dict[str, Any]) -> Any:
    """The config object of a supported class from its plain values.

    Raises:
        ValueError: a class that is not in the registry, or an attention implementation that is not in `ATTENTION`.
    """
    if not isinstance(model_class, str) or not isinstance(values, dict):
        raise ValueError(f"a model is described by a class name and a mapping, got {model_class!r}, {values!r}")
    values = dict(values)
    attention = values.pop("attn_implementation", None)
    if attention is not None and attention not in ATTENTION:
        raise ValueError(f"attn_implementation = {attention!r}; allowed: {', '.join(ATTENTION)}")
    original: Any = model_class_named(model_class)
    config = original.config_class.from_dict(values)
    if attention is not None:
        config._attn_implementation = attention
    return config


def instantiate(model_class: str, model_config: Any) -> nn.Module:
    """A freshly initialised instance of a supported class; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return model_class_named(model_class)(copy.deepcopy(model_config))
