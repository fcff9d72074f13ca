"""What stays out of graphs of torch.compile: what the host decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Marked:
    """A method that torch.compile is to leave alone, until `leave_to_host` sees to it."""

    def __init__(self, function: Callable[..., Any], *, recursive: bool) -> None:
        self.function = function
        self.recursive = recursive

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.function.__get__(instance, owner)  # type: ignore[attr-defined]


def on_host(function: _Function) -> _Function:
    """Decorate a method that is in no graph; what it calls has graphs of its own."""
    return _Marked(function, recursive=False)  # type: ignore[return-value]


def eager(function: _Function) -> _Function:
    """Decorate a method that is in no graph, and what it calls in none either."""
    return _Marked(function, recursive=True)  # type: ignore[return-value]


def leave_to_host(owner: type) -> None:
    """Keep dynamo from the marked methods of a class. Not done where they are defined: dynamo takes long to import."""
    for ancestor in owner.__mro__:
        for name, method in list(vars(ancestor).items()):
            if isinstance(method, _Marked):
                setattr(ancestor, name, torch.compiler.disable(method.function, recursive=method.recursive))
            elif hasattr(type(method), "leave_to_host"):  # a descriptor that does it by itself
                method.leave_to_host()
