"""diffusionblocks ablate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import RUNS
from ..common.yaml_values import read_yaml
from .command import takes_quiet, takes_recipe

if TYPE_CHECKING:
    from ..experiments.ablation import Setting
    from ..experiments.experiment import Experiment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ablate`."""
    takes_recipe(parser, run)
    parser.add_argument("--out", type=Path, help="folder (default runs/<name>-ablation)")
    parser.add_argument(
        "--preset", nargs="+", default=[], metavar="NAME", help="the paper's tables: partition, block-count, overlap"
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="a.b=v,w",
        help="a field of the recipe and the values that it takes, in YAML; repeatable: all combinations",
    )
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="the recipe as it is, then each value of each field alone"
    )
    parser.add_argument("--seeds", metavar="N,N", help="values of train.seed to average over (default the recipe's)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, for example overlap=0.05")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and train nothing")
    parser.add_argument("--restart", action="store_true", help="train the rows anew")
    takes_quiet(parser)


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Train a recipe with other values in some of its fields; print the table whenever a row is finished."""
    from ..experiments.ablation import ablate, settings
    from ..experiments.shipped_recipes import ENDINGS

    over = dict(_field_and_values(text) for text in options.over)
    rows = settings(experiment.recipe, over, options.preset, one_at_a_time=options.one_at_a_time)
    seeds = None if options.seeds is None else _seeds(options.seeds)
    if options.list:
        print("\n".join(row.key for row in rows))
        return
    if not (over or options.preset):
        _refuse_in_vain(options.set or [], [row for row in rows if options.rows is None or row.key in options.rows])
    options.folder = folder = options.out or RUNS / f"{experiment.recipe.name}{ENDINGS['ablate']}"

    def show(table: str) -> None:
        print(f"{table}\n", flush=True)

    resume, progress = not options.restart, not options.quiet
    ablate(experiment, folder, rows, only=options.rows, seeds=seeds, resume=resume, progress=progress, show=show)
    print(f"table: {folder / 'table.json'}")


def _field_and_values(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not equals or not all(name.split(".")):
        raise ValueError(f"--over wants field.name=value,value, got {text}")
    return name, read_yaml(f"[{values}]", f"--over {name}")


def _refuse_in_vain(overrides: list[str], rows: list[Setting]) -> None:
    """Refuse to override a field that a row of the recipe sets itself: the row's value would stay, without a word."""
    from ..common.formats import leaves

    for override in overrides:
        field, _, text = override.partition("=")
        for name, value in leaves({field: read_yaml(text, f"--set {field}")}):
            for row in rows:
                if name in row.values and row.values[name] != value:
                    plain = not {".", "="} & set(row.key)  # else --set would read another name
                    fix = f"write --set rows.{row.key}.{override}" if plain else "change it in the recipe's rows"
                    raise ValueError(
                        f"--set {override}: row {row.key} sets {name} = {row.values[name]} itself, which stays; {fix}, "
                        "or name other rows with --rows"
                    )


def _seeds(text: str) -> list[int]:
    seeds = read_yaml(f"[{text}]", "--seeds")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"--seeds {text}: must be whole numbers from 0, as in 0,1,2")
    return seeds  # type: ignore[no-any-return]
