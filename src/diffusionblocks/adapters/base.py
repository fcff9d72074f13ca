"""What an adapter tells about its family, and the module tree that holds a part of a foreign model."""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..conditioning import AdaptiveNorms


class Adapter(abc.ABC):
    """Knows one family of foreign models: where its parts are and how one block's forward runs. Stateless.

    All paths are dotted module names in the original model, so parameters keep their original names.
    """

    #: names of the public classes the adapter converts -> how to import them (module path)
    classes: ClassVar[dict[str, str]]
    #: the batch entries that are the input x
    input_names: tuple[str, ...]

    @abc.abstractmethod
    def layers_path(self, model: nn.Module) -> str:
        """Path of the model's one list of layers."""

    @abc.abstractmethod
    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the parts that are no layer, in data-flow order: before the layers (stem), then after (head)."""

    @abc.abstractmethod
    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """The subset of `shared_paths` that comes after the layers."""

    @abc.abstractmethod
    def layer_norms(self, layer: nn.Module) -> list[nn.Module]:
        """The norms of one layer that are to be made adaptive."""

    @abc.abstractmethod
    def final_norms(self, network: nn.Module) -> list[nn.Module]:
        """The norms of the head that are to be made adaptive."""

    @abc.abstractmethod
    def hidden_size(self, model: nn.Module) -> int:
        """Width of the residual stream."""

    @abc.abstractmethod
    def num_classes(self, model: nn.Module) -> int:
        """Number of labels the head predicts."""

    @abc.abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise ValueError if this very model cannot be converted, saying why."""

    @abc.abstractmethod
    def add_parts(self, model: nn.Module, config: Any) -> nn.ModuleDict:
        """New shared modules the family needs (for example the position of an extra token)."""

    @abc.abstractmethod
    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Tensor],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run stem and layers on the input and the scaled target c_in * z.

        Returns:
            (hidden states, F): F has the shape of z and is what EDM preconditioning combines with z.
        """

    @abc.abstractmethod
    def readout(
        self, network: nn.Module, final: AdaptiveNorms, hidden: Tensor, denoised: Tensor, condition: Tensor
    ) -> Tensor:
        """Run the head on the denoised target: logits (batch, num_classes)."""


class Namespace(nn.Module):
    """A module that only holds children, so that a part of a model can keep the whole model's parameter names."""

    def attach(self, path: str, part: nn.Module | nn.Parameter) -> None:
        """Register a module or parameter at a dotted path below this one."""
        *parents, name = path.split(".")
        place: nn.Module = self
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, Namespace())
            place = place.get_submodule(parent)
        if isinstance(part, nn.Parameter):
            place.register_parameter(name, part)
        else:
            place.add_module(name, part)


def extract(model: nn.Module, paths: Iterable[str], *, memo: dict[int, Any]) -> Namespace:
    """Copy the modules (or bare parameters) at the dotted `paths` into a tree of the same names.

    Args:
        model: the foreign model; it is not changed.
        paths: dotted names in it.
        memo: `copy.deepcopy`'s memo: what it already holds (a config, say) is shared instead of copied.
    """
    root = Namespace()
    for path in paths:
        parent, _, name = path.rpartition(".")
        root.attach(path, copy.deepcopy(getattr(model.get_submodule(parent), name), memo))
    return root
