"""Level grids by name: the one place where a grid is called something."""

from __future__ import annotations

from typing import Any

#: Names of earlier versions, which recipes and callers may go on using.
_RENAMED = {"equal-mass": "equal-quantile"}


def grid_name(name: Any) -> Any:
    """The name of today for a level grid; whatever is no older name stays as it is."""
    return _RENAMED.get(name, name) if isinstance(name, str) else name
