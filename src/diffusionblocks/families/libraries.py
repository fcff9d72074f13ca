"""The libraries that foreign models come from: how a class of theirs is imported, described and made."""

from __future__ import annotations

import abc
import contextlib
import copy
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import nn
from typing_extensions import override

from ..common.formats import read_json
from .generation_config import rebuilt_generation_config

#: Attention implementations that a recipe or a saved model may ask for. Others can make transformers fetch kernels.
_EVERYWHERE = ("eager", "sdpa", "flex_attention")
#: and those that are in packages of their own, with what tells whether they can be used
_FLASH = {"flash_attention_2": "is_flash_attn_2_available", "flash_attention_3": "is_flash_attn_3_available"}
ATTENTION = (*_EVERYWHERE, *_FLASH)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


#: What classes of these libraries raise where values do not go together. Memory is not among them.
_WRONG_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """What a library raises of a wrong value becomes a ValueError in one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        if not isinstance(error, (*_WRONG_VALUES, StrictDataclassError)):
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def check_attention(config: Any, where: str = "", device: torch.device | None = None) -> None:
    """Refuse, before work, an attention implementation that a config asks for and that cannot be had here.

    It counts what the config says, however that got there: a value, an attribute that was set, a part's config.

    Args:
        config: of a model of transformers; others say nothing of it.
        where: how the message begins.
        device: where the model is to be trained, where that is known.

    Raises:
        ValueError: a name that is not in `ATTENTION` (of a repository, say, whose code would be run), a package that is
            not installed, or one that cannot train on the device.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())):
        name = getattr(part, "_attn_implementation", None)
        if name is None:
            continue
        if name not in ATTENTION:
            raise ValueError(f"{where}attn_implementation = {name!r}; allowed: {', '.join(ATTENTION)}")
        if name in _FLASH:
            from transformers import utils

            if not getattr(utils, _FLASH[name])():
                raise ValueError(
                    f"{where}attn_implementation = {name!r}: there is no GPU here, or its package is not installed; "
                    f"without it: {', '.join(_EVERYWHERE)}"
                )
        if device is not None and device.type == "cpu" and name not in ("eager", "sdpa"):
            raise ValueError(f"{where}attn_implementation = {name!r} cannot train on a CPU; there: eager, sdpa")


class CannotReadInParts(ValueError):
    """Weights that only the library's own `from_pretrained` can read; says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained model as it lies in its files: everything but the weights.

    Attributes:
        config: the model's config object.
        dtype: in which the library would load it.
        places: parameter's name in the model -> file and name there. Tied parameters, of which files hold one, have
            the same place; parameters that the files lack are left out.
        missing: the names of those.
        generation_config: of a language model, where its files have one.
    """

    config: Any
    dtype: torch.dtype
    places: dict[str, tuple[Path, str]]
    missing: frozenset[str]
    generation_config: Any = None


class Library(abc.ABC):
    """A library of models with a config.

    Args:
        module: where its public classes are imported from.
        package: the module or package in which they are defined; default the top-level package of `module`.
    """

    #: name of a pretrained model's safetensors file
    weights: ClassVar[str]
    #: config values that follow from the number of layers
    depth_dependent: ClassVar[frozenset[str]] = frozenset()
    #: the argument of `from_pretrained` that is a dtype
    dtype_option: ClassVar[str] = "torch_dtype"

    def __init__(self, module: str, package: str | None = None) -> None:
        self.module = module
        self.package = package or module.partition(".")[0]

    def defines(self, model_class: type) -> bool:
        """Whether a class is the library's own, and not another of the same name."""
        return f"{model_class.__module__}.".startswith(f"{self.package}.")

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
    def config_file(self, model_class: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The values of `config.json`, as the library's own `save_pretrained` of a model of `dtype` writes them."""

    @abc.abstractmethod
    def values(self, model_class: Any, config: Any) -> dict[str, Any]:
        """The plain JSON values of a config object: the inverse of `config`."""

    @abc.abstractmethod
    def _create(self, model_class: Any, config: Any) -> nn.Module: ...

    def create(self, model_class: Any, config: Any) -> nn.Module:
        """A freshly initialised instance; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            return self._create(model_class, copy.deepcopy(config))

    def outline(self, model_class: Any, config: Any) -> nn.Module:
        """An instance on the meta device: its structure, names and shapes, without memory and without draws."""
        with torch.device("meta"), _refusing(f"{model_class.__name__} cannot be built from this model.config"):
            return self._create(model_class, copy.deepcopy(config))

    def pretrained(
        self, model_class: Any, path: str | Path, values: dict[str, Any], dtype: torch.dtype | None = None
    ) -> nn.Module:
        """An instance with the weights of a folder or hub name; `values` override its config.

        Its dtype is the given one; None leaves it to the library.
        """
        options = {} if dtype is None else {self.dtype_option: dtype}
        return model_class.from_pretrained(path, **(values | options))  # type: ignore[no-any-return]

    def restored(self, model_class: Any, path: Path) -> nn.Module:
        """An instance with the weights of a folder, which must hold exactly these.

        Raises:
            ValueError: tensors are missing, unexpected or of another shape, or the library cannot read them.
        """
        try:
            model, info = model_class.from_pretrained(path, output_loading_info=True, use_safetensors=True)
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} holds no {model_class.__name__}: {' '.join(str(error).split())}") from error
        for kind, what in (
            ("missing_keys", "lacks"),
            ("unexpected_keys", "has unknown"),
            ("mismatched_keys", "has other"),
        ):
            if names := sorted(str(name) for name in info.get(kind) or ()):
                raise ValueError(
                    f"{path} {what} tensors {names[:3]}, {len(names)} in all: it is not what a {model_class.__name__} "
                    "of the config beside them saves; save the model again"
                )
        return model  # type: ignore[no-any-return]

    def checkpoint(
        self, model_class: Any, path: str | Path, values: dict[str, Any], dtype: torch.dtype | None = None
    ) -> Checkpoint:
        """Where a folder or hub name has each weight that `pretrained` would load.

        Raises:
            CannotReadInParts: there are no safetensors files, or what is in them is not as the model has it.
        """
        files = safetensors_keys(path, self.weights)
        dtypes, shapes = _headers(files)
        config, dtype = self._pretrained_config(model_class, path, values, set(dtypes.values()), dtype)
        model = self.outline(model_class, config)
        tensors = model.state_dict()
        places: dict[str, tuple[Path, str]] = {}
        for key, name in self._names(model, files).items():
            if name not in tensors:
                continue  # the library reads over it, too
            if name in places or shapes[key] != tensors[name].shape:
                raise CannotReadInParts(f"{key} does not fit {name}")
            places[name] = files[key], key
        for names in self._tied(model):
            stored = next((places[name] for name in names if name in places), None)
            if stored is not None:
                places |= {name: stored for name in names if name not in places}
        missing = frozenset(tensors.keys() - places.keys())
        return Checkpoint(config, dtype, places, missing, self.generation_config(path))

    def generation_config(self, path: str | Path) -> Any:
        """What a folder or hub name says of how its model generates; None where it says nothing.

        Raises:
            ValueError: the file is damaged, or no library takes it.
        """
        return None

    @abc.abstractmethod
    def _pretrained_config(
        self, model_class: Any, path: str | Path, values: dict[str, Any], stored: set[str], dtype: torch.dtype | None
    ) -> tuple[Any, torch.dtype]:
        """Config and dtype as `from_pretrained` finds them, where no dtype is asked for; `stored` are the safetensors
        names of the files' dtypes."""

    def _tied(self, model: nn.Module) -> list[tuple[str, str]]:
        """Pairs of parameters that this very model has as one."""
        return []

    @abc.abstractmethod
    def _names(self, model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
        """Names in the files -> names in the model, where the library has renamed its parameters since."""


class Transformers(Library):
    """transformers: a config class beside each model class."""

    # The stages of a model that can serve as a backbone (DINOv2), the kinds of layers (Qwen): one a layer.
    depth_dependent = frozenset({"stage_names", "out_features", "out_indices", "layer_types"})
    dtype_option = "dtype"
    weights = "model.safetensors"

    @override
    def fields(self, model_class: Any) -> set[str]:
        return set(model_class.config_class().to_dict()) | {"num_labels", "attn_implementation"}

    @override
    def config(self, model_class: Any, values: dict[str, Any]) -> Any:
        """The config object of a class from plain values. ValueError: what `check_attention` refuses."""
        values = dict(values)
        attention = values.pop("attn_implementation", None)
        with _refusing(f"model.config of {model_class.__name__}"):
            config = model_class.config_class.from_dict(values)
        if attention is not None:
            config._attn_implementation = attention
        check_attention(config)
        return config

    @override
    def values(self, model_class: Any, config: Any) -> dict[str, Any]:
        return dict(config.to_dict()) | {"attn_implementation": config._attn_implementation}

    @override
    def config_file(self, model_class: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        values = json.loads(config.to_json_string())
        for name in ("auto_map", "_name_or_path"):  # code beside the weights, and a place on this machine
            values.pop(name, None)
        of_model = {"architectures": [model_class.__name__], "dtype": str(dtype).removeprefix("torch.")}
        return dict(sorted((values | of_model).items()))

    @override
    def _create(self, model_class: Any, config: Any) -> nn.Module:
        check_attention(config)
        return model_class(config)  # type: ignore[no-any-return]

    @override
    def pretrained(
        self, model_class: Any, path: str | Path, values: dict[str, Any], dtype: torch.dtype | None = None
    ) -> nn.Module:
        """An instance with the weights of a folder or hub name; `values` override its config.

        ValueError: a `generation_config.json` that the library does not take, or an attention implementation that
        `check_attention` refuses.
        """
        self.generation_config(path)
        self._config_of(model_class, path, values)
        return super().pretrained(model_class, path, values, dtype)

    @override
    def restored(self, model_class: Any, path: Path) -> nn.Module:
        self._config_of(model_class, path, {})
        return super().restored(model_class, path)

    def _config_of(self, model_class: Any, path: str | Path, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The config object of a folder or hub name, with other values, and the values that are none of its own."""
        with _refusing(f"{path}/config.json"):
            config, unused = model_class.config_class.from_pretrained(path, return_unused_kwargs=True, **values)
        if "attn_implementation" in values:
            config._attn_implementation = values["attn_implementation"]
        check_attention(config, f"{path}/config.json: ")
        return config, unused

    @override
    def generation_config(self, path: str | Path) -> Any:
        file = cached_file(path, "generation_config.json")
        return None if file is None else rebuilt_generation_config(read_json(file), str(file))

    @override
    def _pretrained_config(
        self, model_class: Any, path: str | Path, values: dict[str, Any], stored: set[str], dtype: torch.dtype | None
    ) -> tuple[Any, torch.dtype]:
        config, unused = self._config_of(model_class, path, values)
        special = {"dtype", "torch_dtype"} & values.keys()
        special |= {n for n in ("quantization_config", "transformers_weights") if getattr(config, n, None) is not None}
        special |= unused.keys() - {"attn_implementation"}
        if special:
            raise CannotReadInParts(f"only the library knows what to do with {sorted(special)}")
        dtype = dtype or config.dtype
        if dtype is None:  # the library then takes that of the first tensor
            if len(stored) != 1 or not stored <= _DTYPES.keys():
                raise CannotReadInParts(f"its config names no dtype, and its files hold {sorted(stored)}")
            dtype = _DTYPES[next(iter(stored))]
        if dtype != torch.float32 and (model_class._keep_in_fp32_modules or model_class._keep_in_fp32_modules_strict):
            raise CannotReadInParts(f"the library keeps parts of a {dtype} model in float32")
        config.dtype, config.name_or_path = dtype, str(path)
        return config, dtype

    @override
    def _tied(self, model: nn.Module) -> list[tuple[str, str]]:
        return list(model.all_tied_weights_keys.items())  # type: ignore[union-attr, operator]

    @override
    def _names(self, model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

            mapping: list[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
            renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
            prefix, tensors = str(model.base_model_prefix), model.state_dict()
            names = {}
            for key in keys:
                name, changed = rename_source_key(key, renamings, converters, prefix, tensors)
                if changed is not None:
                    raise CannotReadInParts(f"the library changes {key} when it loads it, not only its name")
                names[key] = key if name not in tensors and key in tensors else name
        except (ImportError, AttributeError, TypeError) as error:
            raise CannotReadInParts(f"this version of transformers renames weights in another way: {error}") from error
        return names


class Diffusers(Library):
    """diffusers: the config is the mapping of the constructor's arguments."""

    weights = "diffusion_pytorch_model.safetensors"

    @override
    def fields(self, model_class: Any) -> set[str]:
        return set(model_class._get_init_keys(model_class)) - {"self", "kwargs"}

    @override
    def config(self, model_class: Any, values: dict[str, Any]) -> Any:
        unknown = sorted(set(values) - self.fields(model_class))
        if unknown:
            raise ValueError(f"{model_class.__name__} takes no {unknown}")
        # Only an instance knows the defaults; on the meta device it costs nothing.
        with torch.device("meta"), _refusing(f"model.config of {model_class.__name__}"):
            return model_class(**values).config

    @override
    def values(self, model_class: Any, config: Any) -> dict[str, Any]:
        # Configs of older files also have values that the class of today does not take; the library passes over them.
        fields = self.fields(model_class)
        return {name: value for name, value in config.items() if name in fields}

    @override
    def config_file(self, model_class: Any, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        from diffusers import __version__

        names = {"_class_name": model_class.__name__, "_diffusers_version": __version__}
        return names | dict(sorted(self.values(model_class, config).items()))

    @override
    def _create(self, model_class: Any, config: Any) -> nn.Module:
        return model_class(**self.values(model_class, config))  # type: ignore[no-any-return]

    @override
    def _pretrained_config(
        self, model_class: Any, path: str | Path, values: dict[str, Any], stored: set[str], dtype: torch.dtype | None
    ) -> tuple[Any, torch.dtype]:
        values_there = model_class.load_config(path)
        if values_there.get("quantization_config") is not None:
            raise CannotReadInParts("it is quantised")
        with torch.device("meta"):
            return model_class.from_config(values_there, **values).config, dtype or torch.float32

    @override
    def _names(self, model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
        names = {key: key for key in keys}
        unknown = sorted(names.keys() - model.state_dict().keys())
        if unknown:
            raise CannotReadInParts(f"the model knows no {', '.join(unknown[:3])}")
        return names


def safetensors_keys(path: str | Path, weights: str) -> dict[str, Path]:
    """Every name in the safetensors file or shards of a folder or hub name, and the file that has it."""
    single, index = cached_file(path, weights), cached_file(path, f"{weights}.index.json")
    if (single is None) == (index is None):
        raise CannotReadInParts(f"it must have one of {weights} and {weights}.index.json")
    if index is not None:
        shards = read_json(index).get("weight_map", {})
        files = {name: cached_file(path, name) for name in set(shards.values())}
        if None in files.values():
            raise CannotReadInParts(f"it lacks {sorted(name for name, file in files.items() if file is None)}")
        return {key: file for key, name in shards.items() if (file := files[name]) is not None}
    assert single is not None
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def cached_file(path: str | Path, name: str) -> Path | None:
    """A file of a folder, or of a hub repository (in the cache, or downloaded); None where there is none."""
    from transformers.utils import cached_file as cached

    try:
        file = cached(str(path), name)
    except OSError:
        return None
    return None if file is None else Path(file)


def cached_folder(path: str | Path, names: Iterable[str]) -> Path | None:
    """The folder of those of the named files that a folder, or a hub repository, has; None where it lacks the first.

    The others are not asked for then: without a network each would take the hub's client half a minute.
    """
    if Path(path).is_dir():
        return Path(path)
    first, *others = names
    file = cached_file(path, first)
    if file is None:
        return None
    for name in others:
        cached_file(path, name)
    return file.parent


def _headers(keys: dict[str, Path]) -> tuple[dict[str, str], dict[str, torch.Size]]:
    """Dtype (its safetensors name) and shape of every tensor, from the files' headers."""
    dtypes, shapes = {}, {}
    for path in set(keys.values()):
        with safe_open(path, "pt") as file:
            for key in set(file.keys()) & {key for key, file_of_key in keys.items() if file_of_key == path}:
                part = file.get_slice(key)
                dtypes[key], shapes[key] = part.get_dtype(), torch.Size(part.get_shape())
    if missing := sorted(keys.keys() - shapes.keys()):
        raise CannotReadInParts(f"its files lack {', '.join(missing[:3])}")
    return dtypes, shapes


TRANSFORMERS = Transformers("transformers")
DIFFUSERS = Diffusers("diffusers")
OURS = Diffusers("diffusionblocks.models", "diffusionblocks.models")
#: ours that are models of transformers
OURS_OF_TRANSFORMERS = Transformers("diffusionblocks.models", "diffusionblocks.models")
