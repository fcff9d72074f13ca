"""Experts of a pretrained flow DiT beside its continued training, at equal layer-updates: a queue of jobs.

    python benchmarks/experts.py --out runs/experts                                  # every row, seed 0, then 1, then 2
    python benchmarks/experts.py --out runs/experts --rows continued experts-lora-3 --seeds 0 1
    python benchmarks/experts.py --out runs/experts --set evaluate.features=classifier    # without extra: efficientnet

The first job trains the "pretrained" model, a DiT on CIFAR-10 by flow matching, and exports it. Each other job starts
from it, is a row of `ablate` with a seed, and leaves its result in a folder of its own. A command that is given again
goes on where the last one ended; commands with other `--rows` or `--seeds` may share the folder. Every finished job
rewrites the results. To try it at toy size on a CPU:

    python benchmarks/experts.py --recipe dit/digits-flow --out runs/toy --results runs/toy/experts.json \
        --pretrain-steps 300 --steps 60 --set evaluate.samples=200 --set train.log_every=60
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from diffusionblocks import load
from diffusionblocks.common.formats import read_json
from diffusionblocks.core.exporting import export_facts, write_export
from diffusionblocks.experiments.ablation import ablate, settings
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.run import TABLE
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table
from diffusionblocks.training.run_log import LOG

RESULTS = Path("benchmarks/results/experts.json")

#: What is changed of `recipes/dit/cifar10.yaml`: DiT-S/4 by flow matching, on pixels of unit variance.
FLOW_CIFAR10 = (
    "model.config.patch_size=4",
    "blocks.noise={kind: flow}",
    "data.mean=[0.491, 0.482, 0.447]",
    "data.std=[0.247, 0.243, 0.262]",
    "evaluate.samples=10000",
    "evaluate.grid=[uniform]",
    "evaluate.guidance=[1.5]",
    "evaluate.features=efficientnet-lite0",
    "train.checkpoint_every=1000",
    "train.log_every=100",
)

_COLUMNS = ("seed", "fd_test", "fd_train", "features", "seconds", "layer_updates", "blocks", "parameters_trained")

#: A trunk that trains nothing: a measured partition looks at the pretrained model.
_STANDING_TRUNK = {"steps": 1, "lr": 1e-12, "optimizer": "fresh", "warmup": "again"}


def rows_of(steps: int, rank: int, lora_lr: float) -> dict[str, dict[str, Any]]:
    """Rows by name, in the order in which they run; each moves as many layers as `steps` of the whole model do."""
    lora = {"rank": rank}

    def experts(many: int, **blocks: Any) -> dict[str, Any]:
        split = {"num_blocks": many, "split": "experts", **blocks}
        rate = {"lr": lora_lr} if "lora" in blocks else {}
        return {"blocks": split, "train": {"steps": steps // many, **rate}}

    measured = {
        f"experts-3-{monitor}": experts(3, partition=monitor) | {"trunk": _STANDING_TRUNK}
        for monitor in ("acceleration", "loss", "energy")
    }
    return {
        "continued": {"blocks": {"num_blocks": 1}, "train": {"steps": steps}},
        "experts-3": experts(3),
        "experts-lora-3": experts(3, lora=lora),
        "continued-lora": {"blocks": {"num_blocks": 1, "lora": lora}, "train": {"steps": steps, "lr": lora_lr}},
        "layers-3": {"blocks": {"num_blocks": 3}, "train": {"steps": steps}},
        **measured,
        "experts-lora-2": experts(2, lora=lora),
        "experts-lora-4": experts(4, lora=lora),
        "experts-lora-3-nf4": experts(3, lora=lora | {"base": "nf4"}),
        "experts-dora-3": experts(3, lora=lora | {"use_dora": True}),
    }


def pretrain(recipe: Recipe, steps: int, folder: Path) -> Path:
    """Train the model that the rows start from, where that is not done, and export it; return its folder."""
    rows = {"pretrained": {"train": {"steps": steps}}}
    length = recipe.train.model_copy(update={"steps": steps, "epochs": None})
    base = recipe.model_copy(update={"method": "end-to-end", "train": length, "trunk": None, "rows": rows})
    ablate(Experiment(base), folder, settings(base))
    exported = folder / "exported"
    if not exported.is_dir():
        model = load(folder / "pretrained" / f"seed-{recipe.train.seed}" / "model")
        write_export(model.export_block(0), exported, export_facts(model, 0), {})
    return exported


def job_rows(folder: Path) -> list[dict[str, Any]]:
    """What the finished jobs of a folder measured."""
    return [
        {"name": row["key"], "peak_bytes": row["peak_memory_bytes"], **{name: row[name] for name in _COLUMNS}}
        | {"milliseconds": milliseconds(folder / row["key"] / f"seed-{row['seed']}" / LOG)}
        for row in read_json(folder / TABLE)["rows"]
    ]


def milliseconds(log: Path) -> float | None:
    """The median time of a step, of the run's log but for its first part, in which torch compiles; None: too short."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    speeds = {record["iteration"]: record["iterations_per_second"] for record in records if "step" in record}
    return 1000 / statistics.median([*speeds.values()][1:]) if len(speeds) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="of the pretrained model (default dit/cifar10, as a DiT-S/4 by flow matching)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v", help="change it, as everywhere")
    parser.add_argument("--out", type=Path, default=Path("runs/experts"), help="folder of the jobs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pretrain-steps", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1200, help="of the whole model; other rows have equal updates")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--rows", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    changes = [*([] if options.recipe else FLOW_CIFAR10), *options.set]
    recipe = load_recipe(options.recipe or "dit/cifar10", changes)
    exported = pretrain(recipe, options.pretrain_steps, options.out / "start")

    rows = rows_of(options.steps, options.rank, options.lora_lr)
    model = recipe.model.model_copy(update={"pretrained": str(exported)})
    length = recipe.train.model_copy(update={"steps": options.steps, "epochs": None})
    base = recipe.model_copy(update={"model": model, "train": length, "trunk": None, "rows": rows})
    jobs = options.out / "jobs"

    def show(table: str) -> None:
        results = [*job_rows(options.out / "start"), *job_rows(jobs)]
        write_results(options.results, results)
        print(format_table(results), flush=True)

    for many in range(1, len(options.seeds) + 1):  # a whole table of one seed, before the next
        ablate(Experiment(base), jobs, settings(base), only=options.rows, seeds=options.seeds[:many], show=show)


if __name__ == "__main__":
    main()
