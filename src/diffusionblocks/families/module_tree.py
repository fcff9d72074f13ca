"""The module tree that holds a part of a model under the whole model's parameter names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn


class Namespace(nn.Module):
    """A module that only holds children, so that a part of a model can have the whole model's parameter names."""


def attach(tree: nn.Module, path: str, part: nn.Module | nn.Parameter) -> None:
    """Register a module or parameter at a dotted path of a tree; parents that are not there become a `Namespace`."""
    *parents, name = path.split(".")
    place = tree
    for parent in parents:
        if parent not in place._modules:
            place.add_module(parent, Namespace())
        place = place.get_submodule(parent)
    if isinstance(part, nn.Parameter):
        place.register_parameter(name, part)
    else:
        place.add_module(name, part)


def part_at(tree: nn.Module, path: str) -> Any:
    """The module or bare parameter at a dotted path."""
    parent, _, name = path.rpartition(".")
    return getattr(tree.get_submodule(parent), name)


def extract(
    model: nn.Module, paths: Iterable[str], *, memo: dict[int, Any], take: bool = False, root: nn.Module | None = None
) -> nn.Module:
    """Copy the modules (or bare parameters) at the dotted `paths` into a tree of the same names.

    Args:
        model: the foreign model; it is not changed.
        paths: dotted names in it.
        memo: `copy.deepcopy`'s memo: what it already holds (a config, say) is shared instead of copied.
        take: put the model's own modules into the tree, without a copy.
        root: the tree, to which they are added; None makes a `Namespace`.
    """
    root = Namespace() if root is None else root
    for path in paths:
        part = part_at(model, path)
        attach(root, path, part if take else copy.deepcopy(part, memo))
    return root


def shell_of(
    model: nn.Module, lists: Sequence[str], *, memo: dict[int, Any], kind: type[nn.Module] | None = None
) -> nn.Module:
    """An instance of a model's class with its attributes, but without its modules, parameters, buffers and hooks.

    Args:
        model: the foreign model; it is not changed.
        lists: names of its lists of layers, which the instance has, empty.
        memo: as of `extract`.
        kind: the class of the instance, a subclass of the model's; None takes that.
    """
    kind = type(model) if kind is None else kind
    shell: nn.Module = kind.__new__(kind)
    nn.Module.__init__(shell)
    rest = {name: value for name, value in vars(model).items() if name not in vars(shell)}
    vars(shell).update({name: copy.deepcopy(value, memo) for name, value in rest.items()})
    for name in lists:
        shell.add_module(name, nn.ModuleList())
    return shell


def parts_in(tree: nn.Module) -> list[nn.Module]:
    """The model's own modules in a tree that `extract` made: its layers, and what it has of stem and head."""
    parts: list[nn.Module] = []
    trees = [tree]
    while trees:
        for child in trees.pop().children():
            (trees if isinstance(child, (Namespace, nn.ModuleList)) else parts).append(child)
    return parts


def layer_of(name: str, layer_paths: Sequence[str]) -> tuple[int, str] | None:
    """Which of some layers a tensor is of, and its name in the layer; None: it is of none of them.

    Args:
        name: of the tensor in the model.
        layer_paths: dotted names of the layers.
    """
    parts = name.split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        if path in layer_paths:
            return layer_paths.index(path), ".".join(parts[end:])
    return None
