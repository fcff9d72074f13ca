"""The libraries that foreign models come from: how a class of theirs is imported, described and made."""

from __future__ import annotations

import abc
import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Attention implementations that a recipe or a saved model may ask for. Others can make transformers fetch kernels.
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


class Library(abc.ABC):
    """A library of models with a config.

    Args:
        module: where its public classes are imported from.
        packages: prefixes of the modules that define them.
    """

    def __init__(self, module: str, packages: tuple[str, ...]) -> None:
        self.module = module
        self.packages = packages

    def model_class(self, name: str) -> Any:
        """The public class of that name."""
        return getattr(importlib.import_module(self.module), name)

    @abc.abstractmethod
    def fields(self, model_class: Any) -> set[str]:
        """Names of the config values that a class takes."""

    @abc.abstractmethod
    def config(self, model_class: Any, values: dict[str, Any]) -> Any:
        """The config object of a class from plain values."""

    @abc.abstractmethod
    def values(self, config: Any) -> dict[str, Any]:
        """The plain JSON values of a config object: the inverse of `config`."""

    @abc.abstractmethod
    def _create(self, model_class: Any, config: Any) -> nn.Module: ...

    def create(self, model_class: Any, config: Any) -> nn.Module:
        """A freshly initialised instance; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            return self._create(model_class, copy.deepcopy(config))

    def pretrained(self, model_class: Any, path: str | Path, values: dict[str, Any]) -> nn.Module:
        """An instance with the weights of a folder or hub name; `values` override its config."""
        return model_class.from_pretrained(path, **values)  # type: ignore[no-any-return]


class Transformers(Library):
    """transformers: a config class beside each model class."""

    def fields(self, model_class: Any) -> set[str]:
        """See `Library`."""
        return set(model_class.config_class().to_dict()) | {"num_labels", "attn_implementation"}

    def config(self, model_class: Any, values: dict[str, Any]) -> Any:
        """See `Library`. ValueError: an attention implementation that is not in `ATTENTION`."""
        values = dict(values)
        attention = values.pop("attn_implementation", None)
        if attention is not None and attention not in ATTENTION:
            raise ValueError(f"attn_implementation = {attention!r}; allowed: {', '.join(ATTENTION)}")
        config = model_class.config_class.from_dict(values)
        if attention is not None:
            config._attn_implementation = attention
        return config

    def values(self, config: Any) -> dict[str, Any]:
        """See `Library`."""
        return dict(config.to_dict()) | {"attn_implementation": config._attn_implementation}

    def _create(self, model_class: Any, config: Any) -> nn.Module:
        return model_class(config)  # type: ignore[no-any-return]


class Diffusers(Library):
    """diffusers: the config is the mapping of the constructor's arguments."""

    def fields(self, model_class: Any) -> set[str]:
        """See `Library`."""
        return set(model_class._get_init_keys(model_class)) - {"self", "kwargs"}

    def config(self, model_class: Any, values: dict[str, Any]) -> Any:
        """See `Library`."""
        unknown = sorted(set(values) - self.fields(model_class))
        if unknown:
            raise ValueError(f"{model_class.__name__} takes no {unknown}")
        # Only an instance knows the defaults; on the meta device it costs nothing.
        with torch.device("meta"):
            return model_class(**values).config

    def values(self, config: Any) -> dict[str, Any]:
        """See `Library`."""
        return {name: value for name, value in config.items() if not name.startswith("_")}

    def _create(self, model_class: Any, config: Any) -> nn.Module:
        return model_class(**self.values(config))  # type: ignore[no-any-return]


TRANSFORMERS = Transformers("transformers", ("transformers.",))
DIFFUSERS = Diffusers("diffusers", ("diffusers.",))
OURS = Diffusers("diffusionblocks.models", ("diffusionblocks.models.",))
