"""Milliseconds an iteration of ViT training, end to end and a block, through the trainer itself, on real data.

    python benchmarks/speed_vit.py --recipe recipes/vit/cifar100.yaml --out benchmarks/results/speed_vit.json

Everything a run does is in the time: data order, gather, augmentation, noise, forward, backward, clipping, AdamW.
Each row is the median of several windows, timed by device events, in one process after warm-up; the rows "eager"
run the same mathematics without torch.compile and CUDA graphs. Rows "before" are without `train.fused_kernels`, rows
"after" with them, end to end as in the blocks.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.experiments.baselines import executed, variants
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.recipe_changes import with_train
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table
from diffusionblocks.training import TrainConfig


def measure(recipe: Recipe, data: Any, windows: int, iterations: int) -> dict[str, float]:
    trainer = Experiment(recipe, {"train": data}).trainer(progress=False)
    trainer.model.train()
    done = 0

    def run(count: int) -> None:
        nonlocal done
        for _ in range(count):
            trainer.step(done % len(trainer.units))
            done += 1

    with trainer.side_stream():
        run(8 * len(trainer.units))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(windows):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(iterations)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / iterations)
    assert trainer.stepper.first_bad_step() is None, "the timed run diverged"
    return {
        "ms_per_iteration": statistics.median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/vit/cifar100.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed_vit.json"))
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--iterations", type=int, default=99)
    parser.add_argument("--eager", action="store_true", help="also time the eager rows")
    parser.add_argument("--kernels", nargs="*", default=TrainConfig().fused_kernels, help="of the rows `after`")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.set)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    torch.set_float32_matmul_precision("high")
    data = recipe.data.load("train")
    rows: list[dict[str, Any]] = []
    kernels = {"before": (), "after": options.kernels, "eager": ()}
    for variant in variants(recipe):
        if "-x" in variant.key or variant.name == "ensemble":
            continue  # the same step, more of them
        for when in ("before", "after", "eager")[: 2 + options.eager]:
            fast = when != "eager"
            timed = executed(with_train(variant.recipe, fused_kernels=kernels[when]), fast=fast)
            rows.append(
                {
                    "name": variant.name,
                    "layers": variant.layers,
                    "blocks": variant.blocks,
                    "mode": "compile + CUDA graph" if fast else "eager",
                    "when": when,
                    "precision": recipe.train.precision,
                    "batch_size": recipe.train.batch_size,
                    **measure(timed, data, options.windows, options.iterations),
                }
            )
            torch.cuda.empty_cache()
            torch._dynamo.reset()
            print(format_table(rows[-1:]), flush=True)
    times = {(row["name"], row["layers"], row["when"]): row["ms_per_iteration"] for row in rows}
    after_over_before = {
        f"{name}, {layers} layers": times[name, layers, "after"] / ms
        for (name, layers, when), ms in times.items()
        if when == "before"
    }
    blocks_over_whole = {
        row["when"]: row["blocks"] * row["ms_per_iteration"] / times["end-to-end", row["layers"], row["when"]]
        for row in rows
        if row["name"] == "diffusionblocks"
    }
    write_results(
        options.out, rows, after_over_before=after_over_before, blocks_times_block_over_end_to_end=blocks_over_whole
    )
    print(format_table(rows))
    print("after / before:", after_over_before)
    print("B x block / end to end:", blocks_over_whole)


if __name__ == "__main__":
    main()
