"""The ordinary model that a recipe names: its config, checked, and its initial weights, fresh or pretrained."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.formats import read_json
from ..common.messages import near
from ..common.processing_files import PROCESSING_FILES
from ..common.seeds import seed_global
from ..core.weights import Fresh, WeightSource, cast_weights, pretrained_source
from ..families import (
    config_fields,
    family_named,
    instantiate,
    outline,
    pretrained,
    rebuild_config,
    supported_classes,
    with_depth,
)
from ..families.libraries import cached_file, cached_folder
from ..families.sizes import SIZES, check_shape, check_sizes
from .recipe import ModelConfig, Recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Original:
    """The ordinary model of a recipe.

    Attributes:
        options: the recipe's `model` section.
        seed: of fresh weights.
        new_head: whether a pretrained model may have another number of labels, with a classifier drawn afresh.
    """

    options: ModelConfig
    seed: int
    new_head: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.options.dtype]

    def build(self) -> nn.Module:
        """The whole model: fresh (seeded) or pretrained.

        Raises:
            ValueError: a class that is not supported, or config values that the class does not take.
        """
        config = model_config(self.options)
        if self.options.pretrained is not None:
            return self._build_pretrained(self.options.pretrained)
        with torch.random.fork_rng(devices=[]):
            seed_global(self.seed)
            # `instantiate` forks from here, so the weights depend on this seed alone.
            return cast_weights(instantiate(self.options.type, config), self.dtype)

    def weights(self) -> WeightSource:
        """Where blocks get their initial weights: fresh (seeded) or pretrained.

        Raises:
            ValueError: a class that is not supported, or config values that the class does not take.
        """
        options = self.options
        config = model_config(options)
        if options.pretrained is None:
            return Fresh(options.type, config, seed=self.seed, dtype=self.dtype)
        source = pretrained_source(
            options.type, options.pretrained, self._without_labels(), seed=self.seed, dtype=self.dtype
        )
        if not self._has_other_labels(source.model_config):
            return source
        config = copy.deepcopy(source.model_config)
        config.num_labels = options.config.get("num_labels", config.num_labels)
        return NewHead(source, config, seed=self.seed)

    def _build_pretrained(self, name: str) -> nn.Module:
        """The pretrained model, with a new classifier where there are other labels: the one that the blocks get."""
        whole = pretrained(self.options.type, name, self._without_labels(), self.dtype)
        if not self._has_other_labels(whole.config):
            return whole
        source = self.weights()
        assert isinstance(source, NewHead)
        fresh = instantiate(self.options.type, source.model_config)
        state = {name: tensor for name, tensor in whole.state_dict().items() if name not in source.new}
        fresh.load_state_dict(state | dict(source.tensors(0, range(1), sorted(source.new))))
        return cast_weights(fresh, source.dtype)

    def _without_labels(self) -> dict[str, Any]:
        """The config values that a pretrained model is loaded with: its classifier is the folder's then."""
        return {name: value for name, value in self.options.config.items() if name != "num_labels"}

    def _has_other_labels(self, config: Any) -> bool:
        number = self.options.config.get("num_labels", config.num_labels) if self.new_head else None
        return self.new_head and (self.options.new_head or number != config.num_labels)


class NewHead(WeightSource):
    """Another source's weights but for what depends on the number of labels, which is drawn afresh.

    Args:
        source: of the weights.
        model_config: its config, with the number of labels.
        seed: of the new classifier.
    """

    def __init__(self, source: WeightSource, model_config: Any, *, seed: int) -> None:
        super().__init__(source.model_class, model_config, source.dtype)
        other = copy.deepcopy(model_config)
        other.num_labels += 1  # what changes with it is the head, also where the source has as many labels
        now = self.outline().state_dict()
        others = [each.state_dict() for each in (source.outline(), outline(source.model_class, other))]
        self.new = frozenset(n for n in now if any(n not in each or each[n].shape != now[n].shape for each in others))
        self._source, self._fresh = source, Fresh(source.model_class, model_config, seed=seed, dtype=source.dtype)
        self._quiet = False  # a plan or a check makes a source too, and draws nothing from it

    def tensors(self, block: int, layers: range, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the pretrained model, and a head drawn afresh for the recipe's labels."""
        yield from self._source.tensors(block, layers, [name for name in names if name not in self.new])
        fresh = [name for name in names if name in self.new]
        if fresh:
            if not self._quiet:
                names_of_new, seed = " and ".join(sorted(self.new)), self._fresh.seed
                _log.warning("%s drawn afresh for other labels, from seed %d", names_of_new, seed)
                self._quiet = True
            yield from self._fresh.tensors(block, layers, fresh)


# ---- recipes ---------------------------------------------------------------------------------------------------


def complete(recipe: Recipe) -> Recipe:
    """A recipe with what its data leave to the pretrained model written out: see `DataSection.of_pretrained`.

    Raises:
        ValueError: what is left out is not in the model's folder, or what is said does not suit the model.
    """
    name = recipe.model.pretrained
    folder = None if name is None else cached_folder(name, ("config.json", *PROCESSING_FILES))
    if name is not None and folder is None:  # refused where the model is read, if it is: a trained one needs it no more
        return recipe
    data = recipe.data.of_pretrained(folder)
    return recipe if data is recipe.data else recipe.model_copy(update={"data": data})


# ---- configs ---------------------------------------------------------------------------------------------------


def model_config(options: ModelConfig) -> Any:
    """The config object of a recipe's model: of its own values, or a pretrained model's own.

    Raises:
        ValueError: a class that is not supported; a name that its config does not have; a size that is out of range,
            does not go with the others, or contradicts the pretrained model.
    """
    model_class, values, name = options.type, options.config, options.pretrained
    fields = config_fields(model_class)
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"model.config.{unknown[0]}: {model_class} knows no {unknown}{near(unknown[0], fields)}")
    for field in sorted(values.keys() & {"dtype", "torch_dtype"}):
        raise ValueError(f"model.config.{field} = {values[field]!r}: the weights' dtype is model.dtype; leave it out")
    check_sizes(values)
    config = _rebuild(model_class, values, "model.config")
    if name is None:
        check_shape(family_named(model_class).sizes(config))
        try:
            outline(model_class, with_depth(model_class, config, 1))
        except Exception as error:  # as an activation function that the library has not
            raise ValueError(f"model.config: {model_class} refuses it: {_one_line(error)}") from None
        return config
    own_config = described_config(model_class, name)
    part = family_named(model_class).config_part
    if part in values:
        raise ValueError(
            f"model.config.{part}: {name} has its own, and its weights are of its sizes: leave model.config.{part} out"
        )
    for field in sorted(values.keys() & SIZES.keys() - {"num_labels"}):
        own = getattr(own_config, field)
        if own != values[field]:
            raise ValueError(
                f"model.config.{field} = {values[field]}, but {name} has {own}, and its weights are of that size: "
                f"leave model.config.{field} out, or train afresh, with all its sizes in model.config: --set "
                "model.pretrained=null"
            )
    return own_config


def described_config(model_class: str, name: str) -> Any:
    """The config object of a pretrained model.

    Args:
        model_class: the supported class that it is to be.
        name: a folder, or a name on the hub.

    Raises:
        ValueError: no model is there, or one of another class, or with sizes out of range.
    """
    file = cached_file(name, "config.json")
    if file is None:
        raise ValueError(
            f"model.pretrained = {name}: no model is there, or the hub cannot be reached; give a folder with "
            "config.json and safetensors files, or a name on the hub"
        )
    values = read_json(file)
    own_class = (values.get("architectures") or [values.get("_class_name")])[0]
    family, classes = family_named(model_class), supported_classes()
    if isinstance(own_class, str) and own_class not in (model_class, *family.older_names):
        fix = f"--set model.type={own_class}" if own_class in classes else "docs/models.md lists the classes that work"
        raise ValueError(
            f"model.pretrained = {name} holds a {own_class}, the recipe has model.type: {model_class}; {fix}"
        )
    check_sizes(values, f"{name}/config.json: ")
    fields = config_fields(model_class)
    return _rebuild(model_class, {n: v for n, v in values.items() if n in fields and n != "attn_implementation"}, name)


def _rebuild(model_class: str, values: dict[str, Any], where: str) -> Any:
    try:
        return rebuild_config(model_class, values)
    except Exception as error:  # whatever a library's class makes of values that are the user's
        raise ValueError(f"{where}: {model_class} refuses it: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
