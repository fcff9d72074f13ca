"""YAML is read strictly: numbers are numbers, and what is ambiguous or too large is refused with its line and field."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusionblocks.common.yaml_values import MOST_BYTES, read_yaml
from diffusionblocks.experiments.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_ship_read_as_the_library_reads_them(path: Path) -> None:
    assert read_yaml(path.read_bytes(), "here") == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-12", 1e-12),
        ("5e4", 5e4),
        ("-1.E3", -1000.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-0", 0),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("2001-01-01", "2001-01-01"),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("'1e3'", "1e3"),
        ('"007"', "007"),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("1.2.3", "1.2.3"),
        ("tRUE", "tRUE"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("&x [1, 2]", [1, 2]),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    assert read_yaml(text, "here") == value
    assert type(read_yaml(text, "here")) is type(value)
    assert read_yaml(f"a: {text}".encode(), "here") == {"a": value}


def test_aliases_and_merged_sections_are_written_out() -> None:
    text = b"base: &b {x: 1, y: 2}\nc: *b\nd: {<<: *b, y: 3}\ne: {<<: [{x: 4}, *b], z: 5}"
    merged = {"c": {"x": 1, "y": 2}, "d": {"x": 1, "y": 3}, "e": {"x": 4, "y": 2, "z": 5}}
    assert read_yaml(text, "here") == {"base": {"x": 1, "y": 2}} | merged


def nested(start: bytes, line: str) -> bytes:
    """Ten lines, each of which repeats the one before nine times."""
    lines = [b"a0: &a0 " + start]
    lines += [line.format(i=i, rest=", ".join([f"*a{i - 1}"] * 9)).encode() for i in range(1, 10)]
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: 1\nb: 2\na: 3", ("line 3, a:", "twice", "line 1")),
        (b"train: {lr: 1, steps: 2, lr: 3}", ("line 1, train.lr:", "twice")),
        (b"a: 010", ("line 1, a:", "010", "write 10")),
        (b"x:\n  y: [1, 0_7]", ("line 2, x.y.1:", "0_7")),
        (b"a: " + b"9" * 5000, ("line 1, a:", "5,000 digits")),
        (b"a: !!python/object:os.system x", ("line 1, a:", "!!python/object:os.system")),
        (b"a: !!int '3'", ("line 1, a:", "!!int")),
        (b"? [1, 2]\n: 3", ("line 1", "name")),
        (b"a: 1\n---\nb: 2", ("line 2", "second document")),
        (b"a:\n\t- x: 2", ("line 2", "tab", "spaces")),
        (b"a: b: c", ("line 1", "colon", "quotes")),
        (b"a: [1, 2", ("line 1", "not YAML")),
        (b"a: *nope", ("line 1", "nope")),
        (b"a: &x [*x]", ("line 1", "alias")),
        (b"a: 1\nb: \xff", ("line 2", "0xff", "UTF-8")),
        ("a: é".encode("utf-16"), ("line 1", "UTF-8")),
        (b"a: \x00", ("0x00",)),
        (b'a: "\\0"', ("line 1, a:", "null character")),
        (b"a: " + b"[" * 50_000, ("line 1", "nested more than 20 deep")),
        (b"- " * 50_000, ("line 1", "nested more than 20 deep")),
        (b"a: [" + b"x, " * 20_001 + b"]", ("line 1", "more than 20,000 values")),
        (b"#" * (MOST_BYTES + 1), ("262,145 bytes",)),
        (nested(b"[x, x]", "a{i}: &a{i} [{rest}]"), ("aliases",)),
        (nested(b"{k: v}", "a{i}: &a{i} {{<<: [{rest}]}}"), ("aliases",)),
    ],
    ids=lambda case: repr(case[:24]) if isinstance(case, bytes) else "",
)
def test_refused_in_one_line_with_line_and_field(text: bytes, words: tuple[str, ...]) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"^r\.yaml") as error:
        read_yaml(text, "r.yaml")
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message.splitlines()) == 1
    assert (
        time.process_time() - started < 30
    )  # seconds of this process; an alias written out nine to the ninth is for ever


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr=[1", ("--set train.lr", "not YAML")),
        ("train.lr={a: 1, a: 2}", ("--set train.lr: a: given twice",)),
        ("train.seed=010", ("--set train.seed", "010")),
        ("train.lr=!!python/name:os.system", ("--set train.lr", "!!python/name:os.system")),
        ("train.steps=yes", ("train.steps", "number", "true")),
        ("train.steps=1:30", ("train.steps", "1:30")),
        ("train.stepz=3", ("train.stepz", "did you mean steps")),
        ("train.lr.x=3", ("--set train.lr.x", "lr is 0.001", "not a section")),
        ("=3", ("--set", "field.name=value")),
        ("train..lr=3", ("--set", "field.name=value")),
    ],
)
def test_overrides_are_read_as_strictly(override: str, words: tuple[str, ...]) -> None:
    path = next(path for path in RECIPES if path.match("vit/digits.yaml"))
    with pytest.raises(ValueError, match=r".") as error:
        load_recipe(path, ["train.lr=1e-3", override])
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    assert len(message.splitlines()) <= 2


def test_a_section_that_is_null_can_be_given_by_an_override() -> None:
    path = next(path for path in RECIPES if path.match("vit/digits.yaml"))
    recipe = load_recipe(path, ["fit=null", "train.epochs=null", "train.steps=6", "fit.steps=6"])
    assert recipe.fit is not None
    assert recipe.fit.steps == 6


@pytest.mark.parametrize(("text", "words"), [(b"", "is empty"), (b"[1]", "[1]"), (b"word", "'word'")])
def test_what_is_no_mapping_is_no_recipe(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=r"sections") as error:
        load_recipe(tmp_path / "r.yaml")
    assert words in str(error.value)
