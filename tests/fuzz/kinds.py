"""The kinds of input: what is drawn, and how it becomes a command in a workspace.

An input is a JSON value: it is printed where it fails, and `python tests/fuzz/long.py --input JSON` repeats it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contract
import sound
import yaml
from contract import Case, Verdict
from damage import VALUES, apply, few, folder_damage
from hypothesis import strategies as st
from odd import FIELD_NAMES, WORDS, YAML_LINES, YAML_SCALARS
from sandbox import Sandbox

Input = dict[str, Any]
FACTS = "facts.json"


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        bases: the sound workspaces that it needs.
        inputs: strategy of inputs, given the folder of all sound workspaces.
        case: lays an input out in a copy of its workspace.
        share: how many of the inputs of a long run, in relation to other kinds.
    """

    bases: tuple[str, ...]
    inputs: Callable[[Path], st.SearchStrategy[Input]]
    case: Callable[[Input, Path, Path], Case]
    share: int = 1


def command(*arguments: str) -> dict[str, Any]:
    """The action of a command line."""
    return {"do": "command", "arguments": list(arguments)}


# ---- saved models --------------------------------------------------------------------------------------------

_SAMPLE = ["sample", "recipe.yaml", "--model", "model", "--out", "out", "--count", "2", "--quiet"]
_MERGE_APART = [command("merge", "apart-0", "apart-1", "--out", "out"), {"do": "product", "models": ["out"]}]
_AVERAGE = ["average", "model", "--trunk", "trunk", "--out", "out", "--shares", "0.5", "0"]
#: name -> what is damaged, what is done
_USES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "load": ("model", [{"do": "load", "folder": "model"}, {"do": "product", "models": ["model"]}]),
    "evaluate": (
        "model",
        [command("evaluate", "recipe.yaml", "--model", "model", "--json", "out"), {"do": "product", "rows": ["out"]}],
    ),
    "sample": ("model", [command(*_SAMPLE), {"do": "product", "files": ["out"]}]),
    "prompt": ("model", [command(*_SAMPLE, "--prompt", "the fox"), {"do": "product", "files": ["out"]}]),
    "merge": ("model", [command("merge", "model", "--out", "out"), {"do": "product", "models": ["out"]}]),
    "merge-first": ("apart-0", _MERGE_APART),
    "merge-second": ("apart-1", _MERGE_APART),
    "branch": (
        "model",
        [command("branch", "model", "--blocks", "2", "--out", "out"), {"do": "product", "models": ["out"]}],
    ),
    "average": ("model", [command(*_AVERAGE), {"do": "product", "models": ["out"]}]),
    "average-trunk": ("trunk", [command(*_AVERAGE), {"do": "product", "models": ["out"]}]),
}
_MODELS = {
    "model-vit": ("other-vit", ("load", "evaluate", "merge", "merge-first", "merge-second")),
    "model-joint": (None, ("load", "evaluate", "merge")),
    "model-dit": ("other-dit", ("load", "sample", "merge-first")),
    "model-trunk": (None, ("load", "branch", "sample")),
    "model-branched": (None, ("average", "average-trunk")),
    "model-masked": (None, ("load", "evaluate", "sample")),
    "model-llama": ("other-llama", ("load", "evaluate", "sample", "prompt")),
    "model-tokens": (None, ("load", "evaluate", "prompt")),
    "model-recurrent": (None, ("load", "sample")),
    "model-control": ("other-control", ("evaluate",)),
    "model-language-control": (None, ("evaluate", "prompt")),
}
_CONTROLS = ("model-control", "model-language-control")


def _model_inputs(bases: tuple[str, ...], root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base in bases:
        other, uses = _MODELS[base]
        for use in uses:
            folder = _USES[use][0]
            strangers = [f"{other}/model"] if other else []
            damage = folder_damage(root / base / folder, strangers)
            fields = {"base": st.just(base), "use": st.just(use), "damage": damage}
            strategies.append(st.fixed_dictionaries(fields))
    return st.one_of(strategies)


def _model_case(given: Input, workspace: Path, root: Path) -> Case:
    folder, actions = _USES[given["use"]]
    for operation in given["damage"]:
        apply(operation, workspace / folder, root)
    inputs = ("model", "apart-0", "apart-1", "trunk", "recipe.yaml", "data")
    return Case(actions, inputs=inputs, outputs=("out",), same=True)


# ---- destinations --------------------------------------------------------------------------------------------

_DESTINATIONS = ["absent", "file", "link", "broken link", "pipe", "folder", "model", "below a file", "input", "above"]


def _destination_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base, (_, uses) in _MODELS.items():
        for use in uses:
            if use != "load":
                fields = {"base": st.just(base), "use": st.just(use), "out": st.sampled_from(_DESTINATIONS)}
                strategies.append(st.fixed_dictionaries(fields))
    return st.one_of(strategies)


def _destination_case(given: Input, workspace: Path, root: Path) -> Case:
    out = workspace / "out"
    name = {"below a file": "recipe.yaml/out", "input": _USES[given["use"]][0], "above": "."}.get(given["out"], "out")
    if given["out"] == "file":
        out.write_text("mine")
    elif given["out"] == "link":
        (workspace / "aim").mkdir()
        (workspace / "aim" / "mine").write_text("mine")
        out.symlink_to("aim")
    elif given["out"] == "broken link":
        out.symlink_to("nowhere")
    elif given["out"] == "pipe":
        os.mkfifo(out)
    elif given["out"] == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    elif given["out"] == "model":
        shutil.copytree(workspace / "model", out)
        (out / "mine").write_text("mine")
    actions = json.loads(json.dumps(_USES[given["use"]][1]).replace('"out"', json.dumps(name)))
    kept = ("out/mine", "aim", "model", "apart-0", "apart-1", "trunk", "recipe.yaml", "data")
    return Case(actions[:1], inputs=kept, outputs=("out",))


# ---- runs ----------------------------------------------------------------------------------------------------

_RUNS = ("run-plain", "run-joint", "run-fitted", "run-branched", "run-control")


def _run_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base in _RUNS:
        fields = {"base": st.just(base), "restart": st.sampled_from([False, False, False, True])}
        strategies.append(st.fixed_dictionaries(fields | {"damage": folder_damage(root / base / "run", [])}))
    return st.one_of(strategies)


def _run_case(given: Input, workspace: Path, root: Path) -> Case:
    for operation in given["damage"]:
        apply(operation, workspace / "run", root)
    restart = ["--restart"] if given["restart"] else []
    actions = [
        command("train", "recipe.yaml", "--out", "run", "--quiet", *restart),
        {"do": "product", "models": ["run/model"], "rows": ["run/result.json"]},
    ]
    # Whatever was damaged, a run ends with the model that an undisturbed one gives, or says why it cannot.
    return Case(actions, inputs=("run", "recipe.yaml"), same=True, seconds=15)


# ---- pages ---------------------------------------------------------------------------------------------------

_REPORTS = ("report-run", "report-samples", "report-comparison", "report-ablation")


def _report_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base in _REPORTS:
        fields = {"base": st.just(base), "damage": folder_damage(root / base / "run", [])}
        strategies.append(st.fixed_dictionaries(fields))
    return st.one_of(strategies)


def _report_case(given: Input, workspace: Path, root: Path) -> Case:
    for operation in given["damage"]:
        apply(operation, workspace / "run", root)
    actions = [
        command("report", "run", "--out", "page.html"),
        {"do": "page_says", "page": "page.html", "folder": "run"},
    ]
    return Case(actions, inputs=("run", "recipe.yaml"), outputs=("page.html",))


# ---- data ----------------------------------------------------------------------------------------------------

_DATA = ("data-text", "data-tokens", "data-images", "data-latents", "data-pictures")
_ENCODE = ["encode", "--source", "data", "--vae", "vae", "--out", "out", "--size", "8", "--check", "2"]


def _data_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base in _DATA:
        for folder in ("data", "cache", "vae"):
            if (root / base / folder).is_dir():
                fields = {"base": st.just(base), "folder": st.just(folder)}
                strategies.append(st.fixed_dictionaries(fields | {"damage": folder_damage(root / base / folder, [])}))
    return st.one_of(strategies)


def _data_case(given: Input, workspace: Path, root: Path) -> Case:
    for operation in given["damage"]:
        apply(operation, workspace / given["folder"], root)
    if given["base"] == "data-pictures":
        actions = [command(*_ENCODE), {"do": "product", "files": ["out"]}]
        return Case(actions, inputs=("data", "vae"), outputs=("out",), seconds=15)
    actions = [
        command("train", "recipe.yaml", "--out", "out", "--quiet"),
        {"do": "product", "models": ["out/model"], "rows": ["out/result.json"]},
    ]
    # Damaged data may be other data. A cache is not: it is made of the data beside it.
    same = given["folder"] == "cache"
    return Case(actions, inputs=("data", "recipe.yaml"), outputs=("out",), same=same, seconds=15)


# ---- recipes -------------------------------------------------------------------------------------------------

_RECIPES = tuple(name for name in sound.BUILDERS if name.startswith("recipe-"))
#: what would only take time: compilation on a CPU
_QUICK = ["--set", "train.compile=false", "--set", "device=cpu"]


@functools.cache
def facts(root: Path) -> dict[str, Any]:
    """What `actions.facts` wrote: schema, models, options."""
    return json.loads((root / FACTS).read_text())  # type: ignore[no-any-return]


def fields(values: dict[str, Any], known: dict[str, Any]) -> dict[tuple[str, ...], list[Any]]:
    """Every field of a recipe like `values`, and values at the edge of what its schema allows.

    Of sections that come in several kinds it is the one that the recipe has; sections that it lacks are there too.
    """
    found: dict[tuple[str, ...], list[Any]] = {}

    def walk(part: dict[str, Any], own: Any, path: tuple[str, ...]) -> None:
        for option in _members(part, known["schema"]["$defs"]):
            kind = option.get("properties", {}).get("kind", {}).get("const")
            if isinstance(own, dict) and kind is not None and kind != own.get("kind", kind):
                continue
            found.setdefault(path, []).extend(_edges(option))
            for name, inner in option.get("properties", {}).items():
                walk(inner, own.get(name) if isinstance(own, dict) else None, (*path, name))

    walk(known["schema"], values, ())
    for name in known["models"][values["model"]["type"]]:
        found[("model", "config", name)] = _near(values["model"]["config"].get(name))
    del found[()]
    return found


def _near(value: Any) -> list[Any]:
    """Values of a field without a schema that are like the one that it has."""
    if isinstance(value, bool) or value is None:
        return [True, False, 0, 1, 2, 0.5, "gelu", None]
    if isinstance(value, int | float):
        return [1, 2, 3, value - 1, value + 1, 2 * value, 16 * value, value / 2, float(value), 0, -1, 10**6, 10**9]
    return []


def _members(part: dict[str, Any], named: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "$ref" in part:
        part = named[part["$ref"].rpartition("/")[2]]
    members = part.get("anyOf") or part.get("oneOf")
    if not members:
        yield part
    for member in members or []:
        yield from _members(member, named)


def _edges(part: dict[str, Any]) -> list[Any]:
    edges: list[Any] = [*part.get("enum", []), *([part["const"]] if "const" in part else [])]
    for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
        if name in part:
            edges += [part[name], part[name] - 1, part[name] + 1, part[name] + 1e-9, float(part[name])]
    if part.get("type") == "boolean":
        edges += [True, False]
    if part.get("type") in ("integer", "number"):
        edges += [1, 2, 3, 4, 5, 7, 8, 16, 100, 1000, 10**5, 10**6, 10**9, 10**12]
    if part.get("type") == "number":
        edges += [0.1, 0.25, 0.5, 0.9, 1.5, 10.5, 1e-8, 1e-30, 1e30]
    if part.get("type") == "array":
        inner = _edges(part.get("items", {}))
        edges += [[], [1], [1, 2], [10**6], [10**9], *([edge] for edge in inner), *([edge, 2] for edge in inner)]
    if part.get("type") == "null":
        edges += [None]
    return edges


def _recipe_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base in _RECIPES:
        values = yaml.safe_load((root / base / "recipe.yaml").read_text())
        changes, odd = [], VALUES.map(lambda value: value)  # one choice among others, however many it has inside
        for path, edges in fields(values, facts(root)).items():
            value = st.one_of(*[st.sampled_from(edges)] * 4, odd) if edges else odd
            changes.append(st.tuples(st.just(list(path)), value).map(list))
        drawn = {
            "base": st.just(base),
            "verb": st.sampled_from(["inspect", "plan", "train", "train"]),
            "changes": few(st.one_of(changes)),
        }
        strategies.append(st.fixed_dictionaries(drawn))
    return st.one_of(strategies)


def _recipe_case(given: Input, workspace: Path, root: Path) -> Case:
    file = workspace / "recipe.yaml"
    values = yaml.safe_load(file.read_text())
    for path, value in given["changes"]:
        place = values
        for name in path[:-1]:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[path[-1]] = value
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return _verb(given["verb"], [])


def _verb(verb: str, sets: list[str]) -> Case:
    """A recipe that is inspected, planned or trained, and must say what it holds."""
    given = [part for one in sets for part in ("--set", one)]
    says = {"do": "recipe_says", "file": "recipe.yaml", "sets": sets}
    if verb != "train":
        return Case([command(verb, "recipe.yaml", *given), says], inputs=("recipe.yaml", "data"))
    says["sets"] = [*sets, *_QUICK[1::2]]
    train = command("train", "recipe.yaml", "--out", "out", "--quiet", *given, *_QUICK)
    return Case([train, says], inputs=("recipe.yaml", "data"), outputs=("out",), interrupt=True)


def _yaml_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base in _RECIPES:
        lines = (root / base / "recipe.yaml").read_text().splitlines()
        line = st.integers(0, len(lines) - 1)
        kinds = [
            st.fixed_dictionaries({"do": st.just("value"), "line": line, "text": st.sampled_from(YAML_SCALARS)}),
            st.fixed_dictionaries({"do": st.just("value"), "line": line, "text": st.sampled_from(YAML_SCALARS)}),
            st.fixed_dictionaries({"do": st.just("value"), "line": line, "text": st.text(max_size=6)}),
            st.fixed_dictionaries({"do": st.just("again"), "line": line, "text": st.sampled_from(["1", "x", "[1]"])}),
            st.fixed_dictionaries({"do": st.just("insert"), "line": line, "text": st.sampled_from(YAML_LINES)}),
            st.fixed_dictionaries({"do": st.just("delete"), "line": line}),
            st.fixed_dictionaries({"do": st.just("indent"), "line": line, "text": st.sampled_from([" ", "  ", "\t"])}),
            st.fixed_dictionaries({"do": st.just("whole"), "text": st.sampled_from(_WHOLE)}),
            st.fixed_dictionaries(
                {
                    "do": st.just("bytes"),
                    "at": st.integers(0, 2000),
                    "hex": st.binary(min_size=1, max_size=3).map(bytes.hex),
                }
            ),
        ]
        drawn = {"base": st.just(base), "edits": few(st.one_of(kinds))}
        strategies.append(st.fixed_dictionaries(drawn))
    return st.one_of(strategies)


_WHOLE = ["in a list", "twice", "two documents", "marked", "wide", "windows", "nothing", "number", "comment", "text"]


def _yaml_case(given: Input, workspace: Path, root: Path) -> Case:
    file = workspace / "recipe.yaml"
    content = file.read_bytes()
    for edit in given["edits"]:
        content = _edited(content, edit)
    file.write_bytes(content)
    return _verb("inspect", [])


def _edited(content: bytes, edit: Input) -> bytes:
    if edit["do"] == "bytes":
        at = edit["at"] % max(len(content), 1)
        return content[:at] + bytes.fromhex(edit["hex"]) + content[at + 1 :]
    text = content.decode(errors="surrogateescape")
    lines = text.split("\n")
    if edit["do"] == "whole":
        text = {
            "in a list": "- " + "\n  ".join(lines),
            "twice": text + text,
            "two documents": text + "---\n" + text,
            "marked": "\ufeff" + text,
            "wide": text,
            "windows": text.replace("\n", "\r\n"),
            "nothing": "",
            "number": "1",
            "comment": "# x\n",
            "text": "recipe",
        }[edit["text"]]
        if edit["text"] == "wide":
            return text.encode("utf-16", errors="surrogatepass")
        return text.encode(errors="surrogateescape")
    number = edit["line"] % len(lines)
    line = lines[number]
    if edit["do"] == "value":
        lines[number] = f"{line.split(':')[0]}: {edit['text']}"
    elif edit["do"] == "again":
        lines.insert(number + 1, f"{line.split(':')[0]}: {edit['text']}")
    elif edit["do"] == "insert":
        lines.insert(number, edit["text"])
    elif edit["do"] == "delete":
        del lines[number]
    else:
        lines[number] = edit["text"] + line
    return "\n".join(lines).encode(errors="surrogateescape")


def _set_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for base in _RECIPES:
        values = yaml.safe_load((root / base / "recipe.yaml").read_text())
        known = [".".join(path) for path in fields(values, facts(root))]
        name = st.one_of(
            st.sampled_from(known), st.sampled_from(known), st.sampled_from(FIELD_NAMES), st.text(max_size=5)
        )
        text = st.one_of(st.sampled_from(YAML_SCALARS), VALUES.map(lambda v: json.dumps(v)), st.text(max_size=6))
        one = st.one_of(
            st.builds(lambda n, t: f"{n}={t}", name, text), st.sampled_from(["", "=", "x", "a=b=c", "\x00"])
        )
        drawn = {
            "base": st.just(base),
            "verb": st.sampled_from(["inspect", "inspect", "plan", "train"]),
            "sets": few(one.map(_argument)),
        }
        strategies.append(st.fixed_dictionaries(drawn))
    return st.one_of(strategies)


def _argument(text: str) -> str:
    """What can be an argument of a process: it has no zero byte."""
    return text.replace("\x00", "0")


def _set_case(given: Input, workspace: Path, root: Path) -> Case:
    return _verb(given["verb"], given["sets"])


# ---- options of the command line -----------------------------------------------------------------------------

#: sound command lines: workspace, and arguments
_COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train": ("recipe-vit", ["train", "recipe.yaml", "--out", "out", "--quiet"]),
    "evaluate": ("model-vit", ["evaluate", "recipe.yaml", "--model", "model"]),
    "evaluate language": ("model-llama", ["evaluate", "recipe.yaml", "--model", "model"]),
    "sample images": ("model-dit", _SAMPLE),
    "sample masked text": ("model-masked", _SAMPLE),
    "sample text": ("model-llama", _SAMPLE),
    "sample recurrent": ("model-recurrent", _SAMPLE),
    "sample tokens": ("model-tokens", [*_SAMPLE, "--prompt", "the fox"]),
    "inspect": ("recipe-dit", ["inspect", "recipe.yaml"]),
    "plan": ("recipe-vit", ["plan", "recipe.yaml"]),
    "plan text": ("recipe-llama", ["plan", "recipe.yaml"]),
    "compare": ("recipe-vit", ["compare", "recipe.yaml", "--out", "out", "--quiet"]),
    "report": ("report-run", ["report", "run", "--out", "page.html"]),
    "ablate": ("recipe-vit", ["ablate", "recipe.yaml", "--out", "out", "--quiet", "--over", "blocks.overlap=0"]),
    "branch": ("model-trunk", ["branch", "model", "--blocks", "2", "--out", "out"]),
    "average": ("model-branched", _AVERAGE),
    "encode": ("data-pictures", _ENCODE),
    "merge": ("model-vit", ["merge", "apart-0", "apart-1", "--out", "out"]),
    "bench": ("recipe-vit", ["bench", "memory"]),
}


def _option_inputs(root: Path) -> st.SearchStrategy[Input]:
    strategies = []
    for name, (base, arguments) in _COMMANDS.items():
        known = facts(root)["options"]
        options = []
        for option in known.get(" ".join(arguments[:2]), known[arguments[0]]):
            words = st.one_of(st.sampled_from(WORDS), st.text(max_size=4).map(_argument))
            if option["choices"]:
                words = st.one_of(st.sampled_from(option["choices"]), words)
            least, most = (0, 3) if option["nargs"] in ("+", "*") else (0, 0) if option["nargs"] == 0 else (1, 1)
            many = st.lists(words, min_size=least, max_size=most)
            options.append(st.builds(lambda flag, given: [flag, *given], st.just(option["flag"]), many))
        options.append(st.lists(st.sampled_from(WORDS), min_size=1, max_size=1))
        where = st.integers(1, len(arguments))
        drawn = {
            "command": st.just(name),
            "base": st.just(base),
            "options": few(st.one_of(options)).map(lambda found: [word for words in found for word in words]),
            "replace": st.one_of(st.none(), st.none(), st.tuples(where, st.sampled_from(WORDS)).map(list)),
        }
        strategies.append(st.fixed_dictionaries(drawn))
    return st.one_of(strategies)


def _option_case(given: Input, workspace: Path, root: Path) -> Case:
    arguments = list(_COMMANDS[given["command"]][1])
    if given["replace"] is not None:
        place, word = given["replace"]
        arguments = [*arguments[:place], word, *arguments[place + 1 :]]
    arguments += given["options"]
    names = ("model", "apart-0", "apart-1", "trunk", "recipe.yaml", "data", "vae", "run")
    kept = tuple(name for name in names if name not in arguments)
    return Case([command(*arguments)], inputs=kept, outputs=("out", "page.html"), interrupt=True)


KINDS: dict[str, Kind] = {
    "models": Kind(
        tuple(name for name in _MODELS if name not in _CONTROLS),
        lambda root: _model_inputs(tuple(name for name in _MODELS if name not in _CONTROLS), root),
        _model_case,
        share=8,
    ),
    "controls": Kind(_CONTROLS, lambda root: _model_inputs(_CONTROLS, root), _model_case, share=3),
    "destinations": Kind(tuple(_MODELS), _destination_inputs, _destination_case, share=1),
    "runs": Kind(_RUNS, _run_inputs, _run_case, share=4),
    "reports": Kind(_REPORTS, _report_inputs, _report_case, share=3),
    "data": Kind(_DATA, _data_inputs, _data_case, share=4),
    "recipes": Kind(_RECIPES, _recipe_inputs, _recipe_case, share=6),
    "yaml": Kind(_RECIPES, _yaml_inputs, _yaml_case, share=4),
    "sets": Kind(_RECIPES, _set_inputs, _set_case, share=4),
    "options": Kind(tuple({base for base, _ in _COMMANDS.values()}), _option_inputs, _option_case, share=4),
}


# ---- all together --------------------------------------------------------------------------------------------


#: fields of an input that list what was done to it
_LISTS = ("damage", "changes", "edits", "sets")


class Bench:
    """The sound workspaces, and a sandbox in which inputs are tried.

    Args:
        folder: for all files.
        box: the sandbox.
        root: of the sound workspaces; default below `folder`, where they are made as they are needed.
    """

    def __init__(self, folder: Path, box: Sandbox, root: Path | None = None) -> None:
        self.box, self.root, self.work = box, root or folder / "sound", folder / "work"
        self.products: dict[str, Any] = {}

    def prepare(self, kind: str) -> Kind:
        """Make the sound workspaces of a kind."""
        if not (self.root / FACTS).exists():
            self.root.mkdir(parents=True, exist_ok=True)
            self._make([{"do": "facts", "file": str(self.root / FACTS)}], self.root)
        strangers = (
            [name for name in sound.BUILDERS if name.startswith("other-")] if kind in ("models", "controls") else []
        )
        for name in [*KINDS[kind].bases, *strangers]:
            folder = self.root / name
            if not folder.exists():
                folder.mkdir(parents=True)
                self._make([{"do": "build", "folder": str(folder), "name": name}], folder)
        return KINDS[kind]

    def _make(self, actions: list[dict[str, Any]], folder: Path) -> None:
        outcome = self.box.run(actions, folder, seconds=60)
        if outcome.code:
            shutil.rmtree(folder)
            raise RuntimeError(f"sound input cannot be made, {actions}: {outcome.err}")

    def judge(self, kind: str, given: Input) -> Verdict:
        """Try an input."""
        case, before, outcome, after = self._tried(kind, given)
        product = self._sound_product(given, case) if case.same and outcome.code == 0 else None
        original = contract.listing(self.root / given["base"], case.inputs)
        return contract.judge(outcome, case, before, after, product, original)

    def smallest(self, kind: str, given: Input, verdict: Verdict) -> tuple[Input, Verdict]:
        """The input with one operation of several, where that fails in the same way."""
        for name in _LISTS:
            for one in given.get(name, []) if len(given.get(name, [])) > 1 else []:
                smaller = given | {name: [one]}
                found = self.judge(kind, smaller)
                if found.fault == verdict.fault:
                    return smaller, found
        return given, verdict

    def _tried(self, kind: str, given: Input) -> tuple[Case, Any, Any, Any]:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.root / given["base"], self.work, symlinks=True)
        case = KINDS[kind].case(given, self.work, self.root)

        def seen() -> tuple[dict[str, str], dict[str, str], set[str]]:
            return (
                contract.listing(self.work, case.inputs),
                contract.listing(self.work, case.outputs),
                contract.hidden(self.work),
            )

        before = seen()
        outcome = self.box.run(case.actions, self.work, interrupt=case.interrupt, seconds=case.seconds)
        return case, before, outcome, seen()

    def _sound_product(self, given: Input, case: Case) -> Any:
        """What the same actions give in the sound workspace."""
        key = json.dumps([given["base"], case.actions])
        if key not in self.products:
            shutil.rmtree(self.work, ignore_errors=True)
            shutil.copytree(self.root / given["base"], self.work, symlinks=True)
            outcome = self.box.run(case.actions, self.work, seconds=case.seconds)
            if outcome.code:
                raise RuntimeError(f"sound input fails: {given['base']}, {case.actions}: {outcome.err}")
            self.products[key] = outcome.product
        return self.products[key]
