"""One block as an ordinary model: what a family makes of its weights, for a public class to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class OrdinaryModel:
    """A block on its way into an ordinary model; `Family.fold` changes it in place.

    Attributes:
        model_class: name of the class that it becomes an instance of; a family may name another that is registered.
        values: config values that differ from those of the whole model, beside depth and kinds of layers.
        layers: weights of each layer, by their names in it.
        shared: the other weights, by their names in the whole model.
        differences: what of the block the class has no place for, each as a part of a sentence; it is left out.
    """

    model_class: str
    layers: list[dict[str, Tensor]]
    shared: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def weights(self, layer_paths: Sequence[str]) -> dict[str, Tensor]:
        """All weights under the names of a model whose layers are at these paths."""
        pairs = zip(layer_paths, self.layers, strict=True)
        of_layers = {f"{path}.{n}": t for path, layer in pairs for n, t in layer.items()}
        return self.shared | of_layers

    def rename(self, old: str, new: str) -> None:
        """Let shared weights whose names start with `old` start with `new`."""
        self.shared = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in self.shared.items()}
