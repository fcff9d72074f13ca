"""Prose and names use the field's words, each for one thing: pages, recipes' comments, messages, docstrings and code.

One row a word: what is looked for, what to write instead, and the phrases in which it is right. Names between backticks
are not prose. In code no name is a bare participle or a word of dialect, and docstrings say what a thing does.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: word (a regular expression, whole words) -> (instead, allowed phrases)
WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    r"adapters?": ("family", ("PEFT", "peft", "LoRA", "merge_and_unload", "state, prelude", "the adapter")),
    r"rivals?": ("baseline, or alternative", ()),
    r"savers?": ("memory optimisation", ("extra: savers", "[savers]")),
    r"bridges?": ("feedback", ()),
    r"dwells?": ("steps per switch", ("former name",)),
    r"luggage|occupants?|skeletons?|mounts?|mounted": (
        "host buffer, active unit, shared module, bind",
        ("disk is mounted", "mounted disk", "is a mount"),
    ),
    r"(?:at|from|go(?:es)?|their|its) home": ("host buffer", ()),
    r"honest (?:rival|control|baseline)s?": ("baseline", ()),
    r"mass": ("probability, or quantile", ("point mass",)),
    r"in nats a token|nats a character|a token's nats": ("nats per token, NLL", ()),
    r"controls?": ("baseline", ("control character", "positive control", "control group")),
    r"shared parts?": ("shared parameters", ()),
    r"(?:bits|characters|steps|calls|time|ms|share) a (?:character|token|step|block|unit|chain)": (
        "per",
        ("Time a step", "evaluation calls", "how often  calls", "steps a unit makes"),
    ),
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
    """Yield the strings of a module that are sentences, docstrings among them, and its comments, line by line."""
    source = module.read_text()
    strings = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    texts = [(node.lineno, node.value) for node in strings if isinstance(node.value, str)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts += [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    for start, text in texts:
        for number, line in enumerate(text.splitlines(), start):
            if re.search(r"\w \w", line):
                yield str(module.relative_to(ROOT)), number, re.sub(r"`[^`]*`", "", line)


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


# ---- names in code ---------------------------------------------------------------------------------------------

SRC = ROOT / "src" / "diffusionblocks"

#: Rooms that are not held: local names in `core` are still participles (found, saved, chosen).
_LEFT = ("core",)

#: Rooms whose names and docstrings are held.
ROOMS = tuple(
    sorted(room.name for room in SRC.iterdir() if (room / "__init__.py").is_file() and room.name not in _LEFT)
)

_PARTICIPLES = """
    added allowed asked born bought branched brought built called caught checked chosen collected copied counted
    described done drawn ended expected fed fitted forgotten found given gone heard held joined kept known led lent
    loaded lost made meant measured merged met moved named needed paid parsed passed planned printed proven refused
    removed resolved rounded said saved seen sent shown sold sought spent spread started stopped stuck taken thrown told
    torn trained tried understood used wanted won written
"""

#: Bare participles: a name says what is found, kept or made.
PARTICIPLES = frozenset(_PARTICIPLES.split())

#: word in a name -> what the field calls it
DIALECT = {
    "adapter": "family",
    "bridge": "feedback",
    "dwell": "steps_per_switch",
    "home": "host buffer",
    "luggage": "unit memory",
    "mount": "bind",
    "nats": "token loss, NLL",
    "occupant": "active unit",
    "rival": "baseline, or alternative",
    "saver": "memory optimisation",
    "seam": "boundary",
    "skeleton": "shared module",
}

#: (file, name): why it is right there
NAMES_ALLOWED: dict[tuple[str, str], str] = {
    ("models/recurrent_depth.py", "adapter"): "the paper's part of the model; saved weights have the name",
}


def _modules(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield (path below the package, syntax tree) of the modules in rooms."""
    for room in rooms:
        for module in sorted((SRC / room).rglob("*.py")):
            yield str(module.relative_to(SRC)), ast.parse(module.read_text())


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of everything that code gives a name to."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def _is_dialect(name: str) -> bool:
    words = name.strip("_").lower().split("_")
    return any(word.removesuffix("s") in DIALECT or word in DIALECT for word in words)


def _bad_names(where: str, tree: ast.AST) -> list[str]:
    bad = []
    for line, name in _names(tree):
        if (name.strip("_").lower() in PARTICIPLES or _is_dialect(name)) and (where, name) not in NAMES_ALLOWED:
            bad.append(f"{where}:{line}: {name}")
    return bad


@pytest.mark.parametrize("room", ROOMS)
def test_names_say_what_they_are(room: str) -> None:
    bad = [line for where, tree in _modules(room) for line in _bad_names(where, tree)]
    assert not bad, "name the thing, in the field's words:\n" + "\n".join(bad)


def test_a_bad_name_would_be_found() -> None:
    code = "def f(wanted):\n    self._homes = 1\n    for kept in []: pass\n    nats_sum = 2\n    try: pass\n"
    code += "    except E as stopped: pass\nclass Saver: pass\nchosen_block = named_rows = 3"
    assert [line.split(": ")[1] for line in sorted(_bad_names("x.py", ast.parse(code)))] == [
        "wanted",
        "_homes",
        "kept",
        "nats_sum",
        "stopped",
        "Saver",
    ]


# ---- docstrings ------------------------------------------------------------------------------------------------


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, places) and ast.get_docstring(node):
            yield node.body[0].lineno, ast.get_docstring(node) or ""


def _bad_docstring(text: str) -> str:
    """What is wrong with a docstring, or ""."""
    first = text.strip().split("\n\n")[0].strip()
    if not first:
        return "is empty"
    if first[-1] not in ".:!?)`":
        return "its first sentence has no end"
    if re.fullmatch(r"See `[^`]*`\.?", first):
        return "says nothing of its own"
    words = re.findall(r"[a-z]+", first.lower())
    return "starts with a word of dialect" if words and words[0].removesuffix("s") in DIALECT else ""


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_say_what_a_thing_does(room: str) -> None:
    bad = [
        f"{where}:{line}: {fault}"
        for where, tree in _modules(room)
        for line, text in _docstrings(tree)
        if (fault := _bad_docstring(text))
    ]
    assert not bad, "\n".join(bad)


def test_a_bad_docstring_would_be_found() -> None:
    assert _bad_docstring("") == "is empty"
    assert _bad_docstring("See `Family`.") == "says nothing of its own"
    assert _bad_docstring("Rivals of the blocks.") == "starts with a word of dialect"
    assert _bad_docstring("Count the layers") == "its first sentence has no end"
    assert _bad_docstring("Count the layers.\n\nSee `Family`.") == ""
