"""Where the weights of an original model come from, block by block: drawn afresh, or read from files."""

from __future__ import annotations

import abc
import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..common.finite import DIVERGED, require_finite
from ..common.seeds import seed_from, seed_global
from ..families import (
    CannotReadInParts,
    Family,
    checkpoint,
    family_named,
    instantiate,
    outline,
    pretrained,
    with_layers,
)
from ..families.module_tree import layer_of

_log = logging.getLogger(__name__)


class WeightSource(abc.ABC):
    """Gives the original model's tensors to one block after another.

    Attributes:
        model_class: name of the original class.
        model_config: its config object.
        dtype: of the blocks.
        generation_config: of a language model, where it is not what the class makes of the config.
    """

    generation_config: Any = None

    def __init__(self, model_class: str, model_config: Any, dtype: torch.dtype) -> None:
        self.model_class = model_class
        self.model_config = model_config
        self.dtype = dtype

    def outline(self) -> nn.Module:
        """The original model on the meta device, in the source's dtype: structure, names and shapes, without memory."""
        model: Any = cast_weights(outline(self.model_class, self.model_config), self.dtype)
        if self.generation_config is not None:
            model.generation_config = copy.deepcopy(self.generation_config)
        return model  # type: ignore[no-any-return]

    @abc.abstractmethod
    def tensors(self, block: int, layers: range, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors of the original model, on the CPU, each in memory of its own.

        Args:
            block: index of the block that they are for.
            layers: its layers.
            names: names in the original model, of these layers and of shared parameters; each comes once, in any order.
        """


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Bring what files hold of a model to a dtype, in place; buffers that follow from its config keep their digits."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


class Fresh(WeightSource):
    """Weights as the original class initialises them, most often without ever making a whole model of it.

    A block's layers are those of an instance with as many layers, seeded by (seed, block); its shared parameters those
    of an instance of one layer, seeded by the seed alone, so they are equal in all blocks. This needs an initialisation
    that does not depend on a layer's place in the model, and on its depth by a factor at most
    (`Family.initial_scale`, GPT-2). So it is for all supported classes but some: ViT, DeiT, DINOv2 and language models
    draw with `initializer_range`, our DiT with fixed gains, diffusers' DiT with torch's defaults, and DINOv2's layer
    scale and drop path are the same in all layers. One is our `RecurrentDepth`, which has one block: its shared
    parameters are those of an instance of full depth. The others have layers that differ with their place
    (`Family.layers_alike`: ModernBERT, SD3, Flux): a block's layers, too, are those of an instance of full depth. Where
    a class makes layers that differ in their attributes, these are right all the same, because the modules are those of
    the model at its full depth.

    Args:
        model_class: name of a supported class.
        model_config: its config object.
        seed: of all draws.
        dtype: of the blocks; weights are drawn in float32.
    """

    def __init__(self, model_class: str, model_config: Any, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model_class, model_config, dtype)
        self.seed = seed

    @functools.cached_property
    def _layers_and_shared(self) -> tuple[list[str], tuple[str, ...]]:
        """The paths of the layers, and of the shared parameters."""
        original = outline(self.model_class, self.model_config)
        return self._family.layer_paths(original), self._family.shared_paths(original)

    def tensors(self, block: int, layers: range, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Draw layers and shared parameters afresh, each from a seed of its own."""
        shared = [name for name in names if self._is_shared(name)]
        if shared:
            values = self._draw(self._whole or range(1), "shared")
            pointers: set[int] = set()
            for name in shared:
                tensor = values[name]
                # A tied parameter has several names, and blocks that untie it train each by itself.
                yield name, tensor.clone() if tensor.data_ptr() in pointers else tensor
                pointers.add(tensor.data_ptr())
            del values
        drawn = layers if self._family.layers_alike else self._whole
        assert drawn is not None
        of_layers = {self._name_in(drawn, name): name for name in names if not self._is_shared(name)}
        if of_layers:
            values = self._draw(drawn, f"block {block}")
            for name, tensor in values.items():
                if name in of_layers:
                    scale = self._family.initial_scale(name, self.model_config, len(drawn))
                    yield of_layers[name], tensor if scale == 1 else tensor * scale

    @property
    def _family(self) -> Family:
        return family_named(self.model_class)

    @property
    def _whole(self) -> range | None:
        """All layers, where weights depend on their number or place."""
        depends = self._family.depth_dependent_weights or not self._family.layers_alike
        return range(self._family.depth(self.model_config)) if depends else None

    def _is_shared(self, name: str) -> bool:
        _, shared = self._layers_and_shared
        return any(name == path or name.startswith(f"{path}.") for path in shared)

    def _name_in(self, drawn: range, name: str) -> str:
        """The name of a layer's tensor in a model that has these of the layers."""
        paths, _ = self._layers_and_shared
        if len(drawn) == len(paths):
            return name
        place = layer_of(name, paths)
        assert place is not None, name
        index, rest = place
        return f"{paths[0].rpartition('.')[0]}.{index - drawn.start}.{rest}"

    def _draw(self, layers: range, purpose: str) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            seed_global(seed_from(f"{self.seed}/{purpose}"))
            # `instantiate` forks from here, so the weights depend on this seed alone.
            return instantiate(self.model_class, with_layers(self.model_class, self.model_config, layers)).state_dict()


class InFiles(WeightSource):
    """A pretrained model's weights, read from its safetensors files as they are asked for.

    Files are mapped into memory. What they lack of the head (a new classifier) is drawn afresh.

    Args:
        model_class: name of a supported class.
        path: the folder or hub name of a model of its library.
        values: config values to override.
        seed: of what is drawn afresh.
        dtype: of the blocks; None takes the library's choice.

    Raises:
        CannotReadInParts: only the library itself can read it; the message says why.
        ValueError: from `tensors`, for weights that are not finite; the message names file and tensor.
    """

    def __init__(
        self,
        model_class: str,
        path: str | Path,
        values: dict[str, Any],
        *,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = checkpoint(model_class, path, values, dtype)
        super().__init__(model_class, layout.config, layout.dtype)
        family = family_named(model_class)
        head = tuple(f"{part}." for part in family.head_paths(outline(model_class, layout.config)))
        absent = sorted(name for name in layout.missing if not f"{name}.".startswith(head))
        if absent:
            raise CannotReadInParts(f"its files lack {', '.join(absent[:3])}")
        self.generation_config = layout.generation_config
        self._places = layout.places
        self._fresh = Fresh(model_class, layout.config, seed=seed)

    def tensors(self, block: int, layers: range, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors from the files that hold them; draw what they lack."""
        stored: dict[Path, dict[str, str]] = {}
        for name in names:
            if name in self._places:
                file, key = self._places[name]
                stored.setdefault(file, {})[name] = key
        for path, keys in stored.items():
            with safe_open(path, "pt") as file:
                for name, key in keys.items():
                    tensor = file.get_tensor(key)
                    require_finite([(key, tensor)], str(path), DIVERGED)
                    yield name, tensor.clone()  # what is mapped would be shared by blocks
        yield from self._fresh.tensors(block, layers, [name for name in names if name not in self._places])


class InMemory(WeightSource):
    """A pretrained model that is loaded whole on the host, by its own library.

    Args:
        model_class: name of a supported class.
        path: the folder or hub name of a model of its library.
        values: config values to override.
        seed: of what the library draws afresh.
        dtype: of the blocks; None takes the library's choice.
    """

    def __init__(
        self,
        model_class: str,
        path: str | Path,
        values: dict[str, Any],
        *,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            seed_global(seed)
            model: Any = pretrained(model_class, path, values, dtype)
        super().__init__(model_class, model.config, next(model.parameters()).dtype)
        self.generation_config = getattr(model, "generation_config", None)
        self._tensors: dict[str, Tensor] = model.state_dict()

    def tensors(self, block: int, layers: range, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Copy the tensors of the model at hand."""
        yield from ((name, self._tensors[name].clone()) for name in names)


def pretrained_source(
    model_class: str,
    path: str | Path,
    values: dict[str, Any],
    *,
    seed: int,
    dtype: torch.dtype | None = torch.float32,
) -> WeightSource:
    """The weights of a folder or hub name: read in parts where possible, else loaded whole on the host by the library.

    Which road was taken is logged.

    Args:
        model_class: name of a supported class.
        path: the folder or hub name of a model of its library.
        values: config values to override.
        seed: of weights that the model has and the files have not.
        dtype: of the blocks, whatever the files have; None takes the library's choice: what the config says or, where
            it says nothing, the files have (transformers), or float32 (diffusers).

    Raises:
        OSError, ValueError: what the library's `from_pretrained` refuses.
    """
    try:
        source = InFiles(model_class, path, values, seed=seed, dtype=dtype)
    except (CannotReadInParts, OSError, ValueError) as reason:
        # Whatever is wrong, the library reads it in its own way, or says it in its own words.
        _log.info("%s is loaded whole on the host: %s", path, reason)
        return InMemory(model_class, path, values, seed=seed, dtype=dtype)
    _log.info("%s is read block by block from its safetensors files", path)
    return source
