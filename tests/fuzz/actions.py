"""What a child of the sandbox can be asked to do: run a command line or a function, and read what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

#: measured anew each time
_TIMES = {"images_per_second", "tokens_per_second", "seconds", "train_seconds", "evaluation_seconds"}
#: entries of a described model that may differ between two saves of one model
_OF_A_SAVE = {"blocks", "transformers_version", "_name_or_path", "_diffusers_version", "architectures"}

Result = tuple[int, Any]


def preload() -> None:
    """Import what commands import, so that no child has to."""
    from diffusionblocks.cli.commands import _quieten_libraries

    _quieten_libraries()  # as a command does before it imports them
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    from diffusers import AutoencoderKL, DiTTransformer2DModel  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, ViTForImageClassification  # noqa: F401

    torch.set_num_threads(1)


def command(arguments: list[str]) -> Result:
    """A command line, as the console script runs it."""
    from diffusionblocks.cli import main

    return main(arguments), None


def load(folder: str) -> Result:
    """`diffusionblocks.load`: what it may raise is told in a line, as a script would."""
    import diffusionblocks

    try:
        diffusionblocks.load(folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2, None
    return 0, None


def build(folder: str, name: str) -> Result:
    """Make the sound inputs of one name."""
    import sound

    sound.BUILDERS[name](Path(folder))
    return 0, None


def product(models: list[str] = [], rows: list[str] = [], files: list[str] = []) -> Result:  # noqa: B006
    """What a command gave, to be compared with what it gives for sound input.

    Args:
        models: folders of saved models: what they describe, and a hash of all tensors.
        rows: JSON files of results, without what is measured by the clock.
        files: folders whose files count by their bytes.
    """
    found: dict[str, Any] = {}
    for folder in models:
        found[folder] = _model(Path(folder))
    for file in rows:
        found[file] = _timeless(json.loads(Path(file).read_text()))
    for folder in files:
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        found[folder] = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return 0, found


def _model(folder: Path) -> dict[str, Any]:
    import torch

    import diffusionblocks
    from diffusionblocks.core.saved_model import INDEX, describe

    described: dict[str, Any] = {}
    if (folder / INDEX).exists():
        model = diffusionblocks.load(folder)
        described = describe(model)
        tensors = model.state_dict()
    else:
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        classes = {
            "ViTForImageClassification": AutoModelForImageClassification,
            "LlamaForCausalLM": AutoModelForCausalLM,
        }
        tensors = classes.get(kind, AutoModel).from_pretrained(folder).state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"described": _without(described, _OF_A_SAVE), "tensors": digest.hexdigest()}


def _without(values: Any, names: set[str]) -> Any:
    if isinstance(values, dict):
        return {name: _without(value, names) for name, value in values.items() if name not in names}
    return values


def _timeless(values: Any) -> Any:
    if isinstance(values, list):
        return [_timeless(value) for value in values]
    return {k: _timeless(v) for k, v in values.items() if k not in _TIMES} if isinstance(values, dict) else values


def recipe_says(file: str, sets: list[str] = []) -> Result:  # noqa: B006
    """Check that an accepted recipe holds the values that its text shows, and survives being written and read."""
    import yaml

    from diffusionblocks.experiments.recipe import load_recipe, parse_recipe

    recipe = load_recipe(file, sets)
    read = recipe.model_dump(mode="json")
    again = parse_recipe(json.loads(json.dumps(read)), "the recipe as written").model_dump(mode="json")
    assert json.dumps(again) == json.dumps(read), f"written and read again it is another: {again} for {read}"
    shown = yaml.load(Path(file).read_bytes(), Loader=yaml.BaseLoader)
    changed = [override.partition("=") for override in sets]
    for name, _, text in changed:
        *parents, last = name.split(".")
        place = shown
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.load(text, Loader=yaml.BaseLoader)
    _same_values(shown, read, "")
    return 0, None


def _same_values(shown: Any, read: Any, where: str) -> None:
    if isinstance(shown, dict) and isinstance(read, dict):
        for name, value in shown.items():
            if name in read:  # else an older name of a field
                _same_values(value, read[name], f"{where}.{name}")
    elif isinstance(shown, list) and isinstance(read, list):
        assert len(shown) == len(read), f"{where}: {shown} was read as {read}"
        for index, (one, other) in enumerate(zip(shown, read, strict=True)):
            _same_values(one, other, f"{where}[{index}]")
    else:
        assert _says(shown, read), f"{where}: the text {shown!r} was read as {read!r}"


def _says(text: Any, value: Any) -> bool:
    """Whether a scalar of YAML, as it stands there, is the value that a reader expects."""
    if not isinstance(text, str):
        return False
    lower = text.lower()
    if isinstance(value, bool):
        return lower in (("true", "yes", "on") if value else ("false", "no", "off"))
    if value is None:
        return lower in ("", "~", "null", ".inf", "-.inf", ".nan")  # JSON has no name for what is not finite
    if isinstance(value, str):
        return text == value
    for reading in (float, lambda t: int(t, 0)):
        try:
            if reading(text) == value:
                return True
        except ValueError:
            continue
    return False


class _Cells(HTMLParser):
    """The cells of the tables of a page, row by row, and the texts by which its charts are read aloud."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.charts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._inside = True
        elif tag == "svg":
            self.charts.append(dict(attrs).get("aria-label") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data


def page_says(page: str, folder: str) -> Result:
    """Check that a page shows the numbers that the files of runs hold, as they are now."""
    cells = _Cells()
    cells.feed(Path(page).read_text())
    rows = [dict(zip(table[0], row, strict=False)) for table in cells.tables if table for row in table[1:]]
    words = " ".join([*(cell for row in rows for cell in row.values()), *cells.charts]).lower().split()
    assert not {"nan", "inf", "-inf"} & set(words), "a number that is none"
    top = Path(folder)
    single = (top / "recipe.json").is_file() or (top / "log.jsonl").is_file()
    runs = [top] if single else [path.parent for name in ("*", "*/*") for path in top.glob(f"{name}/recipe.json")]
    for run in runs:
        for line in _last_lines(run / "log.jsonl"):
            text = f"{line['loss']:.4g} at step {line['step']:,}"
            assert any(text in chart for chart in cells.charts), f"{run}: no chart ends with {text}"
    files = {"result.json": "rows", "levels.json": "by_level"} if single and not (top / "table.json").is_file() else {}
    for name, entry in files.items():
        values = json.loads((top / name).read_bytes()) if (top / name).is_file() else {}
        for row in values.get(entry, []):
            assert any(_shows(shown, row) for shown in rows), f"{name}: no row of the page shows {row}"
    if (top / "table.json").is_file():
        for row in json.loads((top / "table.json").read_bytes())["rows"]:
            known = {name: row[name] for name in ("layers", "blocks", "iterations")}
            assert any(_shows(shown, known) for shown in rows), f"no row of the page shows {known}"
    return 0, None


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last record of each unit; each line but the last must be one."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    records = [json.loads(line) for line in lines[:-1]]
    return list({record["unit"]: record for record in records}.values())


def _shows(shown: dict[str, str], row: dict[str, Any]) -> bool:
    """Whether the cells of a row of a page say the values that have columns there, and each value has one."""
    values = {name.replace("_", " "): value for name, value in row.items() if name != "by_level"}
    return values.keys() <= shown.keys() and all(_is_shown(shown[name], value) for name, value in values.items())


def _is_shown(cell: str, value: Any) -> bool:
    if value is None:
        return cell == "-"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return math.isclose(float(cell.replace(",", "")), value, rel_tol=1e-3)
    return not isinstance(value, bool | str) or not str(value).isprintable() or cell == str(value)


def facts(file: str) -> Result:
    """Write what inputs are drawn from: the schema of recipes, the fields of models, the options of commands."""
    import argparse

    from diffusionblocks.cli.commands import parser
    from diffusionblocks.experiments.recipe import Recipe
    from diffusionblocks.families import config_fields, supported_classes

    options: dict[str, Any] = {}

    def walk(parser: argparse.ArgumentParser, name: str) -> None:
        options[name] = []
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner, subparser in action.choices.items():
                    walk(subparser, f"{name} {inner}".strip())
            elif action.option_strings and action.dest != "help":
                choices = None if action.choices is None else [str(choice) for choice in action.choices]
                options[name].append({"flag": action.option_strings[-1], "choices": choices, "nargs": action.nargs})

    walk(parser(), "")
    models = {name: sorted(config_fields(name)) for name in supported_classes()}
    values = {"schema": Recipe.model_json_schema(), "models": models, "options": options}
    Path(file).write_text(json.dumps(values))
    return 0, None


_REFUSALS = {
    "write and refuse": ("out", "error: x"),
    "change and refuse": ("recipe.yaml", "error: x"),
    "refuse at length": (".lock", "error: " + "x" * 5000),
    "refuse in two lines": (".lock", "error: x\ny"),
    "refuse in silence": (".lock", ""),
}


def misbehave(how: str) -> Result:
    """What no input may do, for the test that the sandbox and the contract notice it."""
    if how == "hang":
        while True:
            pass
    if how == "wait":
        import threading

        threading.Event().wait()
    if how == "take memory":
        print(len(bytearray(1 << 32)))
    if how == "crash":
        import os

        os.abort()
    if how == "leave a temporary":
        Path(".model-x").mkdir()
    if how in _REFUSALS:
        name, text = _REFUSALS[how]
        Path(name).write_text("x")
        print(text, file=sys.stderr)
        return 2, None
    if how == "warn":
        print("Warning of a library", file=sys.stderr)
    if how == "exit with 7":
        return 7, None
    return 0, {"answer": how}


ACTIONS: dict[str, Callable[..., Result]] = {
    "command": command,
    "load": load,
    "build": build,
    "product": product,
    "recipe_says": recipe_says,
    "page_says": page_says,
    "facts": facts,
    "misbehave": misbehave,
}
