"""Which family serves which class. Discovery proposes, never guesses: an unknown class is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.finite import DIVERGED, require_finite
from .causal_lm import CausalLMFamily
from .dit import DiffusersDiTFamily, DiTFamily
from .family import Family
from .inspection import check_plain, check_unwrapped
from .libraries import Checkpoint, Library
from .masked_lm import MaskedTransformerFamily
from .recurrent import RecurrentDepthFamily
from .vit import ViTFamily

_FAMILIES: tuple[Family, ...] = (
    ViTFamily(),
    DiTFamily(),
    DiffusersDiTFamily(),
    MaskedTransformerFamily(),
    CausalLMFamily(),
    RecurrentDepthFamily(),
)


def supported_classes() -> dict[str, Family]:
    """Class name -> family, for every class that can be converted."""
    return {name: family for family in _FAMILIES for name in family.classes}


def family_for(model: nn.Module) -> Family:
    """The family of a model's class.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no family knows the class; the message lists those that are known. Or it is wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    check_unwrapped(model)
    known = supported_classes()
    for ancestor in type(model).__mro__:  # a user's subclass of a known class keeps its structure
        family = known.get(ancestor.__name__)
        if family is not None and ancestor.__module__.startswith(family.classes[ancestor.__name__].packages):
            family.check(model)
            return family
    raise ValueError(
        f"cannot convert {type(model).__name__}: no family knows this class; supported: {', '.join(sorted(known))}. "
        "See docs/design.md, 'Adding a family'."
    )


def class_name_of(model: nn.Module) -> str:
    """The name of the supported class that a model is an instance of."""
    family = family_for(model)
    return next(ancestor.__name__ for ancestor in type(model).__mro__ if ancestor.__name__ in family.classes)


def check_convertible(model: nn.Module) -> None:
    """Refuse a model of which conversion would drop something: see `inspection.check_plain`."""
    family: Any = family_for(model)
    reference = outline(class_name_of(model), model.config)
    layers = family.layers_path(reference)
    kept = [f"{layers}.{name}" for name, _ in reference.get_submodule(layers).named_children()]
    check_plain(model, reference, [*kept, *family.shared_paths(reference)])


def family_named(model_class: str) -> Family:
    """The family of the class of that name.

    Raises:
        ValueError: the name is not in the registry.
    """
    known = supported_classes()
    if model_class not in known:
        raise ValueError(f"unknown model class {model_class!r}; supported: {', '.join(sorted(known))}")
    return known[model_class]


def _found(model_class: str) -> tuple[Library, Any]:
    library = family_named(model_class).classes[model_class]
    return library, library.model_class(model_class)


def model_class_named(name: str) -> Any:
    """The public class of that name, imported from its library; only names in the registry are imported."""
    return _found(name)[1]


def config_fields(model_class: str) -> set[str]:
    """Names of the config values that a supported class takes."""
    library, found = _found(model_class)
    return library.fields(found)


def rebuild_config(model_class: str, values: dict[str, Any]) -> Any:
    """The config object of a supported class from its plain values.

    Raises:
        ValueError: a class that is not in the registry, or a value that is not allowed.
    """
    if not isinstance(model_class, str) or not isinstance(values, dict):
        raise ValueError(f"a model is described by a class name and a mapping, got {model_class!r}, {values!r}")
    library, found = _found(model_class)
    return library.config(found, values)


def config_values(model_class: str, config: Any) -> dict[str, Any]:
    """The plain JSON values of a config: the inverse of `rebuild_config`."""
    return _found(model_class)[0].values(config)


def instantiate(model_class: str, model_config: Any) -> nn.Module:
    """A freshly initialised instance of a supported class; the global random state is left as it was."""
    library, found = _found(model_class)
    return library.create(found, model_config)


def outline(model_class: str, model_config: Any) -> nn.Module:
    """An instance of a supported class on the meta device: no memory, and no random draws."""
    library, found = _found(model_class)
    return library.outline(found, model_config)


def with_depth(model_class: str, model_config: Any, layers: int) -> Any:
    """The config with another number of layers."""
    library, found = _found(model_class)
    values = {n: v for n, v in library.values(model_config).items() if n not in library.depth_dependent}
    return library.config(found, values | {family_named(model_class).depth_field: layers})


def pretrained(
    model_class: str, path: str | Path, values: dict[str, Any], dtype: torch.dtype | None = None
) -> nn.Module:
    """An instance of a supported class with the weights of a folder or hub name; `values` override its config.

    Args:
        model_class: its name.
        path: the folder or hub name.
        values: of the config.
        dtype: of the weights; None leaves it to the library, which takes its files' or float32.

    Raises:
        OSError, ValueError: what the library's `from_pretrained` refuses; or weights that are not finite.
    """
    library, found = _found(model_class)
    model = library.pretrained(found, path, values, dtype)
    require_finite(model.state_dict().items(), str(path), DIVERGED)
    return model


def restored(model_class: str, path: Path) -> nn.Module:
    """An instance of a supported class with the weights of a folder that holds exactly these.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape, or the library cannot read them.
    """
    library, found = _found(model_class)
    return library.restored(found, path)


def checkpoint(
    model_class: str, path: str | Path, values: dict[str, Any], dtype: torch.dtype | None = None
) -> Checkpoint:
    """Where a folder or hub name has each weight that `pretrained` would load.

    Raises:
        CannotReadInParts: only the library itself can read it; the message says why.
    """
    library, found = _found(model_class)
    return library.checkpoint(found, path, values, dtype)
