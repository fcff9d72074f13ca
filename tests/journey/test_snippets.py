"""The Python snippets of the README and of the pages on Python, trainers and export run as they stand."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from hub_server import this_process_at

ROOT = Path(__file__).parents[2]


def _snippets() -> list[tuple[str, str]]:
    pages = ("README.md", "docs/python.md", "docs/trainers.md", "docs/export.md")
    found = [(page, re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)) for page in pages]
    return [(f"{page}-{place}", code) for page, codes in found for place, code in enumerate(codes)]


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in _snippets()])
def test_a_snippet_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in re.findall(r"^import (trl|lightning)$", code, re.M):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with this_process_at(tmp_path, "user") if "push_to_hub" in code else contextlib.nullcontext():
        exec(compile(code, "snippet", "exec"), {})


def test_there_is_one_a_family_and_one_each_of_a_soup_the_hub_three_trainers_and_an_export() -> None:
    assert len(_snippets()) == 13


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
