"""Gathers runs of a recipe of recipes/vit into one results file, to which later runs can be added.

The runs are long and made apart, on whatever machine, one process a GPU:

    diffusionblocks train recipes/vit/cifar100.yaml --out runs/ours --set train.concurrent=true
    diffusionblocks train recipes/vit/cifar100.yaml --out runs/ensemble --set method=ensemble
    python benchmarks/cifar100_vit.py runs/ours runs/ensemble --commit ff4ebe4 --device "NVIDIA H200" --torch 2.11.0
    python benchmarks/cifar100_vit.py runs/tiny --recipe recipes/vit/tiny-imagenet.yaml --out tiny_imagenet_vit.json

A folder is one of `train`, or of a row of `compare` or `ablate`: it has recipe.json and result.json. Rows of a run that
is in the file already are replaced.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusionblocks.common.formats import read_json
from diffusionblocks.reports.results import results_header, write_results
from diffusionblocks.reports.tables import format_table

#: What tells runs apart.
RUN = ("name", "layers", "blocks", "epochs", "seed", "changes")


def rows_of(folder: Path, made: dict[str, Any], changes: str | None) -> list[dict[str, Any]]:
    """The measured rows of a run, each with what the run was."""
    recipe, result = read_json(folder / "recipe.json"), read_json(folder / "result.json")
    train, method = recipe["train"], recipe["method"]
    if method == "diffusionblocks" and recipe["blocks"]["target"]["likelihood"] == "learned":
        method = "diffusionblocks-released"
    run = {
        "name": recipe["local"]["objective"] if method == "local" else method,
        "layers": recipe["model"]["config"]["num_hidden_layers"],
        "blocks": 1 if method == "end-to-end" else recipe["blocks"]["num_blocks"],
        "epochs": train["epochs"],
        "seed": train["seed"],
        "changes": changes,
        "iterations": result["iterations"],
        "seconds": result["train_seconds"],
    }
    return [run | row | made for row in result["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for name in ("commit", "device", "torch"):
        parser.add_argument(f"--{name}", help=f"{name} of the runs, where it is not this process's")
    parser.add_argument("--recipe", default="recipes/vit/cifar100.yaml", help="of the runs")
    parser.add_argument("--changes", help="what the runs changed in the recipe beside method, epochs and seed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar100_vit.json"))
    options = parser.parse_args()
    header = results_header()
    made = {name: getattr(options, name) or header[name] for name in ("commit", "device", "torch")}
    new = [row for folder in options.runs for row in rows_of(folder, made, options.changes)]
    before = read_json(options.out)["rows"] if options.out.is_file() else []
    runs = {tuple(row.get(name) for name in RUN) for row in new}
    rows = [row for row in before if tuple(row.get(name) for name in RUN) not in runs] + new
    write_results(options.out, rows, {"command": f"diffusionblocks train {options.recipe} (see the rows)"})
    print(format_table(new))


if __name__ == "__main__":
    main()
