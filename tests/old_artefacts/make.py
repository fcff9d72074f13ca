"""Makes the files in this folder with the code of commit 0910420: see README.md. Run it in this folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden import machine, outputs

import diffusionblocks as db
from diffusionblocks.recipes import Recipe, load_recipe

HERE = Path(__file__).parent
#: Options of `sample` by text model.
TEXT = {"masked": [], "llama": ["--prompt", "the work", "--bridge", "sampled"]}
START = [sys.executable, "-c", "import sys; from diffusionblocks.cli import main; sys.exit(main())"]


def train(kind: str, out: str) -> list[str]:
    return [*START, "train", f"recipes/{kind}.yaml", "--out", out, "--quiet"]


def stopped(kind: str) -> None:
    """A run that a user stops by Ctrl-C after its first checkpoint, midway through its blocks."""
    folder = HERE / "runs" / f"{kind}-stopped"
    running = subprocess.Popen(train(kind, f"runs/{folder.name}"), cwd=HERE, stderr=subprocess.PIPE, text=True)
    while not any((folder / "checkpoints").glob("iteration-*/state.json")):
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    said = running.communicate()[1]
    assert running.returncode == 128 + signal.SIGINT, said
    (state,) = (folder / "checkpoints").glob("iteration-*/state.json")
    print(folder.name, json.loads(state.read_text())["iteration"])


def check_recipes() -> None:
    """Every key and every allowed word of that commit's recipes is in one of every_key/, and all are valid there."""
    names, values = set[str](), set[object]()

    def note(value: object) -> None:
        if isinstance(value, dict):
            names.update(value)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            note(part)
        if not isinstance(value, (dict, list)):
            values.add(value)

    for path in sorted((HERE / "recipes").rglob("*.yaml")):
        load_recipe(path)
        if path.parent.name == "every_key":
            note(yaml.safe_load(path.read_text()))
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["properties"].keys() <= names, section["properties"].keys() - names
        for field in section["properties"].values():
            for part in (field, field.get("items", {}), *field.get("anyOf", [])):
                assert values.issuperset(part.get("enum", [])), part


def main() -> None:
    check_recipes()
    torch.set_num_threads(1)
    for name in ("runs", "models"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / "models").mkdir()
    for kind in ("vit", "dit", "masked", "llama"):
        subprocess.run(train(kind, f"runs/{kind}"), cwd=HERE, check=True)
        model = db.load(HERE / "runs" / kind / "model")
        values = {name: value.contiguous() for name, value in outputs(kind, model).items()}
        save_file(values, HERE / f"{kind}.safetensors")
        if kind in TEXT:
            write = ["sample", f"recipes/{kind}.yaml", "--model", f"runs/{kind}/model", "--out", f"samples-{kind}"]
            more = ["--count", "2", "--seed", "3", "--quiet", *TEXT[kind]]
            subprocess.run([*START, *write, *more], cwd=HERE, check=True)
            shutil.move(HERE / f"samples-{kind}" / "samples.txt", HERE / f"{kind}-samples.txt")
            (HERE / f"samples-{kind}").rmdir()
        if kind != "masked":  # of which the whole folder stays: a run that has ended
            shutil.move(HERE / "runs" / kind / "model", HERE / "models" / kind)
            shutil.copy(HERE / "runs" / kind / "result.json", HERE / "models" / f"{kind}-result.json")
            shutil.rmtree(HERE / "runs" / kind)
    stopped("vit")
    stopped("dit")
    (HERE / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")


main()
