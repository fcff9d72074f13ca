"""What a training step of recurrent depth costs: the original, which iterates its core, beside the one denoiser.

    python benchmarks/text_recurrent_cost.py --hidden-size 512 --length 256 --batch-size 64 --precision bfloat16

Two kinds of figures. Layer passes are counted: of the original their mean over drawn depths, of the conversion those of
one pass. Seconds and peak bytes are measured of whole steps (forward, backward, AdamW) on tokens drawn at random. The
original's depth is random, and what it takes is all but affine in it beyond the iterations that keep a gradient; so
its seconds are measured at two depths, best of several, and read off at the mean one. Its memory is that of any depth
beyond those iterations.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.evaluation.memory import size_of, transient_peak
from diffusionblocks.evaluation.tables import format_table, write_results
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.models.recurrent import draw_depth, layer_passes
from diffusionblocks.training import trainable

#: A backward pass is counted as two forward passes.
_BACKWARD = 2


def mean_passes(model: RecurrentDepth, draws: int) -> tuple[float, float, float]:
    """Of the original's step: mean depth, and mean layer passes (forward, backward)."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    depths = [draw_depth(model.mean_recurrence, generator) for _ in range(draws)]
    sizes = config.num_prelude_layers, config.num_core_layers, config.num_coda_layers
    passes = [layer_passes(*sizes, depth, model.backprop_depth) for depth in depths]
    forward, backward = zip(*passes, strict=True)
    return statistics.fmean(depths), statistics.fmean(forward), statistics.fmean(backward)


def step_of(module: torch.nn.Module, loss: Callable[[], Tensor], bfloat16: bool) -> Callable[[], None]:
    """A training step of a module, which has AdamW's state already when this returns."""
    parameters = trainable(module)
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            losses = loss()
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def best_seconds(steps: dict[int, Callable[[], None]], device: torch.device, repeats: int) -> dict[int, float]:
    """Least seconds of each step, taken in turns, so that whatever else the machine does falls on all of them.

    Of a CPU it is the processor time of all threads: other processes lengthen that least.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            wait(device)
            start = clock()
            step()
            wait(device)
            best[name] = min(best[name], clock() - start)
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held(module: torch.nn.Module) -> int:
    """Bytes of the weights and AdamW's state between two steps."""
    return size_of([*module.parameters(), *module.buffers()]) + 2 * size_of(trainable(module))


def measured(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row of the original and one of the conversion."""
    torch.manual_seed(0)
    model = RecurrentDepth(
        vocab_size=options.vocab_size,
        sequence_length=options.length,
        hidden_size=options.hidden_size,
        num_attention_heads=options.heads,
        mlp_size=4 * options.hidden_size,
        mean_recurrence=options.mean_recurrence,
        backprop_depth=options.backprop_depth,
    )
    block = db.convert(model, db.BlocksConfig(num_blocks=1)).block(0).to(device).train()
    torch.nn.Module.to(model, device).train()  # diffusers overrides `to`
    tokens = torch.randint(options.vocab_size, (options.batch_size, options.length), device=device)
    generator = torch.Generator(device).manual_seed(0)
    bfloat16 = options.precision == "bfloat16"

    mean, forward, backward = mean_passes(model, options.draws)
    shallow, deep = options.backprop_depth, max(round(mean), options.backprop_depth + 1)
    steps = {
        depth: step_of(model, functools.partial(model.loss_after, depth, tokens, generator), bfloat16)
        for depth in (shallow, deep)
    }
    # 0 stands for the conversion
    steps[0] = step_of(block, functools.partial(block.loss, {"input_ids": tokens}, generator), bfloat16)
    seconds = best_seconds(steps, device, options.repeats)
    config = model.config
    once, back = layer_passes(config.num_prelude_layers, config.num_core_layers, config.num_coda_layers, 1, 1)
    rows: list[dict[str, Any]] = [
        {
            "name": "original",
            "iterations": mean,
            "forward_passes": forward,
            "backward_passes": backward,
            "passes": forward + _BACKWARD * backward,
            "seconds": seconds[shallow] + (seconds[deep] - seconds[shallow]) / (deep - shallow) * (mean - shallow),
            "measured_seconds": {n: seconds[n] for n in (shallow, deep)},
            "held_bytes": held(model),
            "step_bytes": transient_peak(steps[deep], device),
        },
        {
            "name": "diffusionblocks",
            "iterations": 1.0,
            "forward_passes": float(once),
            "backward_passes": float(back),
            "passes": float(once + _BACKWARD * back),
            "seconds": seconds[0],
            "measured_seconds": {1: seconds[0]},
            "held_bytes": held(block),
            "step_bytes": transient_peak(steps[0], device),
        },
    ]
    for row in rows:
        row["peak_bytes"] = row["held_bytes"] + row["step_bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden-size": 128,
        "heads": 8,
        "length": 64,
        "batch-size": 8,
        "vocab-size": 8192,
        "mean-recurrence": 32,
        "backprop-depth": 8,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--draws", type=int, default=20_000, help="depths whose mean is counted")
    parser.add_argument("--repeats", type=int, default=7, help="steps of which the fastest counts")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_recurrent.json"))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    rows = measured(options, torch.device(options.device))
    original, blocks = rows
    ratios = {name: original[name] / blocks[name] for name in ("forward_passes", "passes", "seconds", "peak_bytes")}
    setting = {name: value for name, value in vars(options).items() if name != "out"}
    write_results(options.out, rows, setting=setting, original_over_diffusionblocks=ratios)
    print(format_table(rows))
    print("original / diffusionblocks:", json.dumps(ratios))


if __name__ == "__main__":
    main()
