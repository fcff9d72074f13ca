"""A wheel holds what the package reads beside its code, and the quick start."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "diffusionblocks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _without_place(patterns: list[str]) -> set[Path]:
    """Files of the package that are no code, and that no pattern of its data matches."""
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    return files - {path for pattern in patterns for path in PACKAGE.glob(pattern)}


def test_all_files_of_the_package_are_in_the_wheel() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["diffusionblocks"]
    assert _without_place(patterns) == set()
    missing = _without_place([pattern for pattern in patterns if "recipes" not in pattern])
    assert PACKAGE / "recipes" / "dit" / "digits.yaml" in missing, "a file that no pattern matches would be seen"


def test_the_page_of_the_package_has_the_quick_start() -> None:
    assert "diffusionblocks train dit/digits" in (ROOT / PROJECT["project"]["readme"]).read_text()


def test_each_python_that_is_named_is_allowed() -> None:
    versions = [line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}"
