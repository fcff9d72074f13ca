"""Rooms import only rooms above them in the table of docs/design.md, and no two modules have one name."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "diffusionblocks"
TOP = ("__init__", "__main__")  # they import what they please


def _rooms() -> list[str]:
    section = (ROOT / "docs" / "design.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.M)


def _imports(module: Path) -> Iterator[str]:
    """Yield the rooms that a module imports from, its own among them."""
    folders = module.relative_to(SOURCE).parts[:-1]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            path = [*folders[: len(folders) - node.level + 1], *(node.module or "").split(".")]
            path = [part for part in path if part]
            yield from path[:1] or [alias.name for alias in node.names]


def test_imports_go_down() -> None:
    rooms = _rooms()
    wrong = []
    for module in SOURCE.rglob("*.py"):
        room = module.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room not in TOP:
            above = rooms[: rooms.index(room) + 1]
            wrong += [
                f"{module.relative_to(SOURCE)}: {name}" for name in _imports(module) if name in set(rooms) - {*above}
            ]
    assert not wrong


def test_no_module_is_named_like_another() -> None:
    names = Counter(module.stem for module in SOURCE.rglob("*.py") if not module.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def test_an_import_upwards_would_be_found() -> None:
    found = set(_imports(SOURCE / "core" / "block.py"))
    assert {"common", "families"} <= found
    assert "experiments" not in found
    assert len(_rooms()) > 15


def test_modules_of_core_import_one_another_one_way() -> None:
    order = [
        *(
            "partition",
            "block",
            "one_at_a_time",
            "image_sampler",
            "token_network",
            "inference",
            "output",
            "model",
            "conversion",
            "weights",
            "materialise",
        ),
        *(
            "branching",
            "soup",
            "model_card",
            "saved_model",
            "saving",
            "exporting",
            "pipelines",
            "loading",
            "hub",
            "merging",
            "end_to_end",
            "ensembles",
            "local_modules",
        ),
    ]
    folder = SOURCE / "core"
    assert {module.stem for module in folder.glob("*.py")} == {*order, "__init__"}
    upwards = []
    for module in folder.glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                upwards += [(module.stem, node.module)] * (order.index(node.module) >= order.index(module.stem))
    types = [("image_sampler", "model"), ("inference", "model"), ("token_network", "model")]
    assert sorted(upwards) == types, "for a type alone; and a model saves itself by a late import of saving"
