"""Odd values, texts and words: what people write where something else is meant, and what a careless reader takes."""

from __future__ import annotations

from typing import Any

#: scalars that are easily taken for others, and sizes that are easily allocated
SCALARS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 10**3, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9),
    0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-12, 1e-320, 1e30, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "0", "1", "true", "null", "auto", "cpu", "none", "x", "\n", "a\nb\rc", "\x00", "\x1b[31m", "\u2028", "é",
    "../../outside", "/etc/hostname", "~", ".", "a/b", "x" * 3000, "%s{}", "model", "[1, 2]",
]  # fmt: skip

CONTAINERS: list[Any] = [
    [], {}, [None], [0], [1, 2], [1, 1], [[]], [0.5] * 3, ["x"], {"x": 1}, {"kind": "x"}, {"": {}},
]  # fmt: skip

#: names of entries that JSON values do not have
NAMES = ["x", "", "kind", "format", "__class__", "../x", "auto_map", "_name_or_path", "dtype", "blocks", "a\nb"]

#: scalars of YAML, as they stand in a file or behind --set
YAML_SCALARS = [
    "1:30", "190:20:30", "0x10", "010", "0o10", "0b11", "1_000", "1e-3", "1e-12", "1e3", ".5", "5.", "+3", "1.0e+400",
    "-.inf", ".nan", "yes", "no", "on", "off", "y", "True", "TRUE", "~", "null", "Null", "", "''", '"1"', "'1'",
    "2020-01-01", "!!str 1", "!!int '3'", "!!float 1", "!!binary aGk=", "!!set {a}", "!!timestamp 2020-01-01",
    "!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!x 1", "&a 1", "*a", "&a [*a]", "[1, 2", "{a: 1",
    "[]", "{}", "[[[[1]]]]", "{a: {b: {c: 1}}}", "|", ">", "? a", "- 1", "a: b: c", "@x", "`x`", "%x", "#", "'",
    "\t1", "1 # x", "\u00a01", "\x00", "\x85", "\ud7ff", "x" * 5000, "9" * 5000, "[" * 3000, "[" * 500 + "]" * 500,
    "<<", "=", "1.", "\u0661", "\uff11", "0.1e", "- - 1", "[1, 2, 3]", "[1.5]", "1000000000", "-1", "0", "1.5",
    "9" * 20, "1" + "0" * 400,
]  # fmt: skip

_MANY_ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)

#: lines of YAML
YAML_LINES = [
    "name: again", "train: {steps: 3}", "device: cpu", "---", "...", "- 1", "x", "x: 1", "? [1]\n: 2", "1: 2",
    "null: 1", "true: 1", "<<: {name: b}", "%YAML 1.1", "!!set {a}", "\t", "    x: 1", "[1]: 2", "{}: 1",
    "evaluate: &e {steps: [1]}", "*a", "train: *t", _MANY_ALIASES, "x: " + "[" * 2000, "name: |\n  a\n  b",
    "name: >-\n  a", "model: ~", "blocks:", "'': 1",
]  # fmt: skip

#: names of fields that a recipe does not have
FIELD_NAMES = [
    "", ".", "x", "train", "train.", ".train", "train..lr", "train.lr.x", "name.x", "model.config.x", "a" * 3000,
]  # fmt: skip

#: arguments of a command line
WORDS = [
    "", "0", "1", "2", "3", "-1", "9", "10", "100", "1000000", "1000000000", "9" * 20, "1.5", "0.5", "-0.5", "nan",
    "inf", "-inf", "1e-320", "1e308", "1e400", "x", "model", "out", "recipe.yaml", "nowhere", ".", "..", "~",
    "/dev/null", "/dev/full", "a/b/c", "data", "apart-0", "the ___ fox", "_____", "the fox", "é", "\n", " ",
    "x" * 300, "x" * 5000, "the " * 3000, "12GiB", "0GiB", "-1GiB", "1e30GiB", "nanGiB", "GiB", "1 GiB", "[1]", "null",
    "true", "--", "-", "--help", "--out", "%s", "{}", "\u2028",
]  # fmt: skip

#: whole contents of files that no reader expects
CONTENTS = {
    "nothing": b"",
    "a space": b" ",
    "a line": b"\n",
    "null": b"null",
    "a list": b"[]",
    "a mapping": b"{}",
    "a number": b"1",
    "not a number": b"NaN",
    "text": b"x",
    "zeros": bytes(64),
    "no text": b"\xff\xfe\xfd",
    "deep": b"[" * 100_000,
    "deep mapping": b'{"a":' * 50_000,
    "a long number": b'{"format": ' + b"9" * 6000 + b"}",
    "a marked text": b"\xef\xbb\xbf{}",
    "a huge header": b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    "an empty header": bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}",
}

#: names of files that were left, copied or renamed
FILE_NAMES = [
    "block-07.safetensors", "block-00.safetensors.bak", ".block-00.safetensors.123.tmp", "diffusionblocks.json~",
    "iteration-999999999", "iteration-000000001", ".iteration-000000003-abc123", "model", ".model-old-abc123",
    "state.json", "config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json", "shared.safetensors",
    "train.json", "train-2.parquet", "train-2.txt", "train-0.txt.bak", "train-0.txt.gz", "train-0.parquet.part",
    "generation_config.json", "adapter_config.json", "a\nb", "x" * 200, ".lock", "train-00002.safetensors",
]  # fmt: skip
