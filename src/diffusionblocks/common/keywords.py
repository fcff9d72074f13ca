"""Keyword arguments under a new name: the old one is accepted for a version, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def older_keywords(**names: str) -> Callable[[_Function], _Function]:
    """Accept older names of keyword arguments.

    Args:
        names: old name = new name.

    Returns:
        A decorator. A call by an old name raises a DeprecationWarning; one by both names raises TypeError.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            for old, new in names.items():
                if old in keywords:
                    if new in keywords:
                        raise TypeError(f"{function.__name__} got {new} twice: {old} is its older name")
                    message = f"{function.__name__}({old}=...) is now {new}=...; the older name goes in a later version"
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return call  # type: ignore[return-value]

    return decorate
