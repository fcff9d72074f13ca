"""The module tree that holds a part of a model under the whole model's parameter names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn


class Namespace(nn.Module):
    """A module that only holds children, so that a part of a model can have the whole model's parameter names."""

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


def extract(model: nn.Module, paths: Iterable[str], *, memo: dict[int, Any], take: bool = False) -> Namespace:
    """Copy the modules (or bare parameters) at the dotted `paths` into a tree of the same names.

    Args:
        model: the foreign model; it is not changed.
        paths: dotted names in it.
        memo: `copy.deepcopy`'s memo: what it already holds (a config, say) is shared instead of copied.
        take: put the model's own modules into the tree, without a copy.
    """
    root = Namespace()
    for path in paths:
        parent, _, name = path.rpartition(".")
        part = getattr(model.get_submodule(parent), name)
        root.attach(path, part if take else copy.deepcopy(part, memo))
    return root


def parts_in(tree: nn.Module) -> list[nn.Module]:
    """The model's own modules in a tree that `extract` made: its layers, and what it has of stem and head."""
    parts: list[nn.Module] = []
    trees = [tree]
    while trees:
        for child in trees.pop().children():
            (trees if isinstance(child, (Namespace, nn.ModuleList)) else parts).append(child)
    return parts
