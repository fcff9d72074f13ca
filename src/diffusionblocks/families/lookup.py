"""Look-up by class name: family, public class, config and weights. An unknown class is an error, never a guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.finite import DIVERGED, require_finite
from ..common.messages import perhaps
from .family import FAMILIES, Family
from .inspection import check_plain, check_unwrapped
from .libraries import Checkpoint, Library
from .unsupported import MISSING


def supported_classes() -> Mapping[str, Family]:
    """Class name -> family, for every class that can be converted."""
    return FAMILIES


def family_for(model: nn.Module) -> Family:
    """The family of a model's class.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: no family knows the class; the message lists those that are known. Or it is wrapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert needs a torch.nn.Module, got {type(model).__name__}")
    check_unwrapped(model)
    if (name := _registered_name(model)) is not None:
        family = FAMILIES[name]
        family.check(model)
        return family
    name = type(model).__name__
    if heads := _with_a_head(name):
        raise ValueError(
            f"cannot convert {name}: it has no head that says what is denoised; use {' or '.join(heads)} of "
            f"{FAMILIES[heads[0]].library.module}"
        )
    raise ValueError(
        f"cannot convert {name}: {MISSING.get(name, 'no family knows this class')}; supported: "
        f"{', '.join(sorted(FAMILIES))}. To register one, see docs/extending.md, 'A family'."
    )


def _with_a_head(name: str) -> list[str]:
    """The supported classes that put a head on a class of transformers without one: `ViTModel` is a trunk of theirs."""
    trunk = name.removesuffix("Model")
    return [head for head in FAMILIES if trunk != name and head.startswith((f"{trunk}For", f"{trunk}LMHead"))]


def _registered_name(model: nn.Module) -> str | None:
    """The name of the registered class that a model is an instance of: a user's subclass keeps its structure."""
    for ancestor in type(model).__mro__:
        family = FAMILIES.get(ancestor.__name__)
        if family is not None and family.library.defines(ancestor):
            return ancestor.__name__
    return None


def class_name_of(model: nn.Module) -> str:
    """The name of the supported class that a model is an instance of."""
    family_for(model)
    name = _registered_name(model)
    assert name is not None
    return name


def check_convertible(model: nn.Module) -> None:
    """Refuse a model of which conversion would drop something: see `inspection.check_plain`."""
    family: Any = family_for(model)
    reference = outline(class_name_of(model), model.config)
    check_plain(model, reference, [*family.layer_paths(reference), *family.shared_paths(reference)])


def family_named(model_class: str) -> Family:
    """The family of the class of that name.

    Raises:
        ValueError: the name is not registered.
    """
    if model_class not in FAMILIES:
        raise ValueError(
            f"unknown model class {model_class!r}{perhaps(str(model_class), FAMILIES)}; supported: "
            f"{', '.join(sorted(FAMILIES))}. Of a class of your own, "
            "first import the package that registers its family (diffusionblocks.register_family)"
        )
    return FAMILIES[model_class]


def _imported(model_class: str) -> tuple[Library, Any]:
    library = family_named(model_class).library
    return library, library.model_class(model_class)


def model_class_named(name: str) -> Any:
    """The public class of a registered name, imported from its library; nothing else is imported."""
    return _imported(name)[1]


def config_fields(model_class: str) -> set[str]:
    """Names of the config values that a supported class takes."""
    library, imported = _imported(model_class)
    return library.fields(imported)


def rebuild_config(model_class: str, values: dict[str, Any]) -> Any:
    """The config object of a supported class from its plain values.

    Raises:
        ValueError: a class that is not in the registry, or a value that is not allowed.
    """
    if not isinstance(model_class, str) or not isinstance(values, dict):
        raise ValueError(f"a model is described by a class name and a mapping, got {model_class!r}, {values!r}")
    library, imported = _imported(model_class)
    return library.config(imported, values)


def config_values(model_class: str, config: Any) -> dict[str, Any]:
    """The plain JSON values of a config: the inverse of `rebuild_config`."""
    library, imported = _imported(model_class)
    return library.values(imported, config)


def config_file_values(model_class: str, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The JSON values of a `config.json` from which the class's own library reads the config.

    Args:
        model_class: its name.
        config: its config object.
        dtype: of the weights.
    """
    library, imported = _imported(model_class)
    return library.config_file(imported, config, dtype)


def instantiate(model_class: str, model_config: Any) -> nn.Module:
    """A freshly initialised instance of a supported class; the global random state is left as it was."""
    library, imported = _imported(model_class)
    return library.create(imported, model_config)


def outline(model_class: str, model_config: Any) -> nn.Module:
    """An instance of a supported class on the meta device: no memory, and no random draws."""
    library, imported = _imported(model_class)
    return library.outline(imported, model_config)


def with_depth(model_class: str, model_config: Any, layers: int) -> Any:
    """The config with another number of layers: the model's first, or all of them over and over."""
    depth = family_named(model_class).depth(model_config)
    return with_layers(model_class, model_config, [i % depth for i in range(layers)])


def with_layers(model_class: str, model_config: Any, layers: Sequence[int]) -> Any:
    """The config of a model that has these of its layers, each of the kind that it was."""
    library, imported = _imported(model_class)
    family = family_named(model_class)
    values = {n: v for n, v in library.values(imported, model_config).items() if n not in library.depth_dependent}
    values |= family.values_of_layers(model_config, layers)
    return library.config(imported, family.with_depth(values, len(layers)))


def with_fewest_layers(model_class: str, model_config: Any) -> Any:
    """The config with one layer; with one of each kind, where the model's shared modules differ with the kinds."""
    library, imported = _imported(model_class)
    family = family_named(model_class)
    if family.kinds_field is None:
        return with_depth(model_class, model_config, 1)
    kinds = list(dict.fromkeys(getattr(model_config, family.kinds_field)))
    fewest = {family.depth_field: len(kinds), family.kinds_field: kinds}
    return library.config(imported, library.values(imported, model_config) | fewest)


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
    library, imported = _imported(model_class)
    model = library.pretrained(imported, path, values, dtype)
    require_finite(model.state_dict().items(), str(path), DIVERGED)
    return model


def restored(model_class: str, path: Path) -> nn.Module:
    """An instance of a supported class with the weights of a folder that holds exactly these.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape, or the library cannot read them.
    """
    library, imported = _imported(model_class)
    return library.restored(imported, path)


def checkpoint(
    model_class: str, path: str | Path, values: dict[str, Any], dtype: torch.dtype | None = None
) -> Checkpoint:
    """Where a folder or hub name has each weight that `pretrained` would load.

    Raises:
        CannotReadInParts: only the library itself can read it; the message says why.
    """
    library, imported = _imported(model_class)
    return library.checkpoint(imported, path, values, dtype)
