"""Prose uses the field's words, each for one thing: pages, recipes' comments, and messages of the code.

One row a word: what is looked for, what to write instead, and the phrases in which it is right. Names between backticks
are not prose.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: word (a regular expression, whole words) -> (instead, allowed phrases)
WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    r"adapters?": ("family", ("PEFT", "peft", "LoRA", "merge_and_unload")),
    r"rivals?": ("baseline, or alternative", ()),
    r"savers?": ("memory optimisation", ("extra: savers", "[savers]")),
    r"bridges?": ("feedback", ()),
    r"dwells?": ("steps per switch", ("former name",)),
    r"luggage|occupants?|skeletons?|mounts?|mounted": (
        "host buffer, active unit, shared module, bind",
        ("disk is mounted",),
    ),
    r"(?:at|from|go(?:es)?|their|its) home": ("host buffer", ()),
    r"honest (?:rival|control|baseline)s?": ("baseline", ()),
    r"mass": ("probability, or quantile", ("point mass",)),
    r"in nats a token|nats a character|a token's nats": ("nats per token, NLL", ()),
    r"controls?": ("baseline", ("control character", "positive control")),
    r"shared parts?": ("shared parameters", ()),
    r"(?:bits|characters|steps|calls|time|ms|share) a (?:character|token|step|block|unit|chain)": ("per", ()),
    r"(?:the |our )house|(?:one|the) road": ("code base, function", ()),
}


def _prose() -> Iterator[tuple[str, int, str]]:
    """Yield (file, line, text) of every line of prose."""
    pages = [ROOT / "README.md", ROOT / "findings" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        if page.name == "recipes.md":  # made of docstrings
            continue
        yield from _lines(page, page.read_text())
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        comments = [line.partition("#")[2] for line in recipe.read_text().splitlines()]
        yield from _lines(recipe, "\n".join(comments))
    for module in sorted((ROOT / "src").rglob("*.py")):
        yield from _messages(module)


def _lines(path: Path, text: str) -> Iterator[tuple[str, int, str]]:
    text = re.sub(r"```.*?```", lambda code: "\n" * code[0].count("\n"), text, flags=re.S)
    for number, line in enumerate(text.splitlines(), 1):
        yield str(path.relative_to(ROOT)), number, re.sub(r"`[^`]*`", "", line)


def _messages(module: Path) -> Iterator[tuple[str, int, str]]:
    """Yield the strings of a module that are sentences, but for its docstrings."""
    tree = ast.parse(module.read_text())
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, places) and _has_docstring(node)
    }
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.search(r"\w \w", text) and id(node) not in docstrings:
            yield str(module.relative_to(ROOT)), node.lineno, re.sub(r"`[^`]*`", "", text)


def _has_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _found(word: str, allowed: tuple[str, ...], prose: list[tuple[str, int, str]]) -> list[str]:
    pattern = re.compile(rf"\b(?:{word})\b", re.I)
    lines = [line for line in prose if pattern.search(line[2])]
    return [f"{where}:{number}: {text.strip()}" for where, number, text in lines if not any(a in text for a in allowed)]


@pytest.fixture(scope="module")
def prose() -> list[tuple[str, int, str]]:
    return list(_prose())


@pytest.mark.parametrize("word", WORDS)
def test_prose_has_the_fields_word(word: str, prose: list[tuple[str, int, str]]) -> None:
    instead, allowed = WORDS[word]
    found = _found(word, allowed, prose)
    assert not found, f"write {instead} for {word}:\n" + "\n".join(found)


def test_a_word_would_be_found(prose: list[tuple[str, int, str]]) -> None:
    assert len(prose) > 1000
    assert _found("mass", (), [("page", 1, "levels of equal mass")]) == ["page:1: levels of equal mass"]
    assert _found("mass", ("mass of",), [("page", 1, "the mass of a star")]) == []
