"""YAML, read strictly: plain values or one line that says where and why not.

Plain values are mappings with names as keys, lists, texts, numbers, true, false and null. Numbers are those of YAML
1.2, so `1e-12` is a number and `1:30` a text; `yes`, `no`, `on` and `off` are read as true and false, as in YAML 1.1.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml
from yaml.reader import ReaderError

#: A recipe has some fifty lines; what is larger is no recipe.
MOST_BYTES = 2**18
#: Values in a document, those that aliases repeat counted each time.
MOST_VALUES = 20_000
MOST_DEPTH = 20

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)")
_ZERO_FIRST = re.compile(r"[-+]?0[0-9_]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_WORDS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("null", "~", ""), None),
}
_MERGE = "<<"


class _Loader(yaml.SafeLoader):
    """Composes nodes of one document, not too many or too deep; every plain scalar keeps its text."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > MOST_DEPTH or self.count > MOST_VALUES:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            deep = self.depth > MOST_DEPTH
            what = f"nested more than {MOST_DEPTH} deep" if deep else f"more than {MOST_VALUES:,} values"
            raise ValueError(f"line {line}: {what}: it is no recipe")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def read_yaml(text: bytes | str, where: str) -> Any:
    """The plain values of one YAML document; None of an empty one.

    Args:
        text: the document, UTF-8.
        where: what messages call it: a file, or an option.

    Raises:
        ValueError: no UTF-8, no YAML, several documents, a name given twice, a tag, a key that is no name, a number
            that can be read in two ways, or more or deeper values than a recipe can have; in one line, with line and
            field.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{where} has {len(text):,} bytes, more than {MOST_BYTES:,}: it is no recipe")
    try:
        return _document(_decode(text))
    except yaml.MarkedYAMLError as error:
        reason = f"not YAML: {_reason(error)}"
    except ReaderError as error:
        reason = f"not YAML: character {error.position + 1} is 0x{_code(error.character):02x}, which no text has"
    except ValueError as error:
        reason = str(error)
    if isinstance(text, str) and "\n" not in text:
        reason = reason.replace("line 1: ", "").replace("line 1, ", "")  # there is but one
    raise ValueError(f"{where}: {reason}")


def _code(character: int | str | bytes) -> int:
    return character if isinstance(character, int) else ord(character)


def _decode(text: bytes | str) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: byte 0x{text[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _document(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()  # type: ignore[no-untyped-call]
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
    if node is None:
        return None
    _size(node, {}, ())
    return _value(node, "")


def _reason(error: yaml.MarkedYAMLError) -> str:
    """One line for what the library says in several."""
    mark = error.problem_mark or error.context_mark
    at = "" if mark is None else f"line {mark.line + 1}: "
    problem = " ".join(str(error.problem or error.context).split())
    if "'\\t'" in problem:
        return f"{at}a tab where YAML takes spaces only; put spaces in its place"
    if "single document" in str(error.context):
        return f"{at}a second document begins (---); give one"
    if "mapping values are not allowed" in problem:
        return f"{at}a second colon; put a text that holds ': ' in quotes"
    return f"{at}{problem}" + (f" {error.context}" if error.context and error.problem else "")


def _size(node: Any, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Number of values, those of aliases counted each time; refuses more than `MOST_VALUES`, and circles."""
    if id(node) in above:
        raise ValueError(f"{_line(node)}: an alias that is part of itself")
    if id(node) not in sizes:
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_size(part, sizes, (*above, id(node))) for part in inner)
    if sizes[id(node)] > MOST_VALUES:
        raise ValueError(f"{_line(node)}: more than {MOST_VALUES:,} values, aliases written out; use fewer aliases")
    return sizes[id(node)]


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _value(node: Any, path: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        _check_tag(node, "seq", path)
        return [_value(part, f"{path}.{i}" if path else str(i)) for i, part in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        _check_tag(node, "map", path)
        return _mapping(node, path)
    _check_tag(node, "str", path)
    if "\0" in node.value:
        raise ValueError(f"{_place(node, path)}: a text with a null character, which no name or path has")
    return node.value if node.style is not None or node.tag != f"{_TAG}str" else _plain(node, path)


def _check_tag(node: Any, kind: str, path: str) -> None:
    if node.tag != f"{_TAG}{kind}":
        tag = node.tag.replace(_TAG, "!!")
        raise ValueError(f"{_place(node, path)}: the tag {tag}; values have no tags, leave it out")


def _place(node: Any, path: str) -> str:
    return f"{_line(node)}, {path}" if path else _line(node)


def _mapping(node: yaml.MappingNode, path: str) -> dict[str, Any]:
    own: dict[str, Any] = {}
    lines: dict[str, int] = {}
    base: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{_place(key, path)}: a list or section in the place of a name")
        name = key.value
        inner = f"{path}.{name}" if path else name
        if name in lines:
            raise ValueError(f"{_place(key, inner)}: given twice, first in line {lines[name]}; leave one out")
        lines[name] = key.start_mark.line + 1
        if name == _MERGE and key.style is None:
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    raise ValueError(f"{_place(part, inner)}: only a section can be merged")
                base = _mapping(part, path) | base
        else:
            own[name] = _value(value, inner)
    return base | own


def _plain(node: yaml.ScalarNode, path: str) -> Any:
    """What a scalar without quotes means."""
    text = str(node.value)
    if text.lower() in _WORDS and text in (text.lower(), text.capitalize(), text.upper()):
        return _WORDS[text.lower()]
    if _ZERO_FIRST.fullmatch(text):
        raise ValueError(
            f"{_place(node, path)}: {_short(text)} begins with a zero, which some read as octal: write "
            f"{_short(text.replace('_', '').lstrip('+-').lstrip('0') or '0')}, or put a text in quotes"
        )
    if _INTEGER.fullmatch(text):
        if len(text) > 30:
            raise ValueError(f"{_place(node, path)}: a number of {len(text):,} digits: {_short(text)}")
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        digits = text.replace("_", "")
        return float(re.sub(r"\.(?=[a-zA-Z])", "", digits))  # .inf and .nan
    return text


def _short(text: str) -> str:
    return text if len(text) <= 20 else f"{text[:10]}..."
