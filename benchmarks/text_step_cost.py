"""What a training step of a text model costs beside an ordinary one: of recurrent depth, and of two streams.

    python benchmarks/text_step_cost.py recurrent --hidden-size 512 --length 256 --batch-size 64 --precision bfloat16
    python benchmarks/text_step_cost.py two-streams --hidden-size 384 768 --kernel sdpa flex_attention --layers 3 \
        --vocab-size 8192 --batch-size 64 --precision bfloat16 --compile --out two-streams.json

`recurrent`: the original, which iterates its core, beside the one denoiser. Layer passes are counted: of the original
their mean over drawn depths, of the conversion those of one pass. The original's depth is random, and what it takes is
all but affine in it beyond the iterations that keep a gradient; so its seconds are measured at two depths and read off
at the mean one. Its memory is that of any depth beyond those iterations.

`two-streams`: a Llama's next-token step beside that of the same layers as one block, which sees every sequence twice,
for each width, number of layers and kernel; heads have 64 channels. `flops` are those of the products, attention's
among them, counted on one text; the file is written row by row.

Seconds and peak bytes are of whole steps (forward, backward, AdamW) on tokens drawn at random; the seconds are the best
of several.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import LlamaConfig, LlamaForCausalLM

import diffusionblocks as db
from diffusionblocks.common.modules import bytes_of
from diffusionblocks.evaluation.memory import transient_peak
from diffusionblocks.layers.two_streams import KERNELS
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.models.recurrent_depth import draw_depth, layer_passes
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table
from diffusionblocks.training import EndToEnd, TrainConfig, trainable
from diffusionblocks.training.compilation import Compiler

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


def best_seconds(steps: dict[Any, Callable[[], None]], device: torch.device, repeats: int) -> dict[Any, float]:
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
    return bytes_of([*module.parameters(), *module.buffers()]) + 2 * bytes_of(trainable(module))


def random_tokens(options: argparse.Namespace, device: torch.device) -> Tensor:
    return torch.randint(options.vocab_size, (options.batch_size, options.length), device=device)


def recurrent(options: argparse.Namespace, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row of the original and one of the conversion, and their ratios."""
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
    tokens = random_tokens(options, device)
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
    names = ("forward_passes", "passes", "seconds", "peak_bytes")
    return rows, {"original_over_diffusionblocks": {name: rows[0][name] / rows[1][name] for name in names}}


#: Rows of a block: what its target adds to that of the tables of docs/results.md.
_BLOCKS: dict[str, dict[str, Any]] = {
    "block": {"likelihood": "learned"},
    "block, likelihood added": {"likelihood": "added"},
    "block with clean_weight": {"likelihood": "learned", "clean_weight": 1.0},
}


def two_streams(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """For each width and number of layers a plain row, and of each kernel those of `--rows`."""
    for width, layers in itertools.product(options.hidden_size, options.layers):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=options.vocab_size,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=options.length,
            attn_implementation="sdpa",
        )
        plain = EndToEnd(LlamaForCausalLM(config))
        size = {"hidden_size": width, "layers": layers}
        first = measured(plain, options, device) | {"over_plain": 1.0, "flops_over_plain": 1.0}
        yield {"name": "plain", **size, "kernel": "sdpa", **first}
        for kernel, name in itertools.product(options.kernel, options.rows):
            original = LlamaForCausalLM(config)
            target = {"kind": "next-token", **_BLOCKS[name]}
            block = db.convert(original, db.BlocksConfig(num_blocks=1, target=target)).block(0)
            flops = flops_of(block, options)  # of which FlexAttention tells nothing
            original.config._attn_implementation = kernel
            block = db.convert(original, db.BlocksConfig(num_blocks=1, target=target)).block(0)
            row = measured(block, options, device, flops)
            over = {f"{what}over_plain": row[of] / first[of] for what, of in (("", "seconds"), ("flops_", "flops"))}
            yield {"name": name, **size, "kernel": kernel, **row, **over}


def measured(
    module: torch.nn.Module, options: argparse.Namespace, device: torch.device, flops: int | None = None
) -> dict[str, Any]:
    """FLOPs of the step of a module on the CPU, its seconds on the device, compiled as the trainer does, and memory."""
    flops = flops_of(module, options) if flops is None else flops
    module = module.to(device).train()
    if options.compile:
        Compiler(TrainConfig(steps=1, compile=True), device, dynamic=False).compile([module])
    batch, generator = {"input_ids": random_tokens(options, device)}, torch.Generator(device).manual_seed(0)
    step = step_of(module, functools.partial(module.loss, batch, generator), options.precision == "bfloat16")
    seconds = best_seconds({"": step}, device, options.repeats)[""]
    held_bytes, step_bytes = held(module), transient_peak(step, device)
    return {"seconds": seconds, "flops": flops, "held_bytes": held_bytes, "peak_bytes": held_bytes + step_bytes}


def flops_of(module: torch.nn.Module, options: argparse.Namespace) -> int:
    """FLOPs of the products of a training step, of attention those of the keys that are seen; on one text."""
    tokens = torch.zeros(1, options.length, dtype=torch.int64)

    def forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, key) // 2  # causal

    def backward(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
        return 5 * forward(query, key) // 2  # the scores again, and four products

    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        module.train().loss({"input_ids": tokens}, torch.Generator().manual_seed(0)).mean().backward()
    module.zero_grad(set_to_none=True)
    return counter.get_total_flops() * options.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    settings = {
        "recurrent": {"hidden-size": 128, "heads": 8, "length": 64, "vocab-size": 8192},
        "two-streams": {"hidden-size": [256], "length": 256, "vocab-size": 2048},
    }
    for what, sizes in settings.items():
        command = commands.add_parser(what)
        for name, default in (sizes | {"batch-size": 8}).items():
            several = {"nargs": "+"} if isinstance(default, list) else {}
            command.add_argument(f"--{name}", type=int, default=default, **several)
        command.add_argument("--repeats", type=int, default=7, help="steps of which the fastest counts")
        command.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--out", type=Path, required=True, help="JSON file of the results")
        if what == "recurrent":
            command.add_argument("--mean-recurrence", type=int, default=32)
            command.add_argument("--backprop-depth", type=int, default=8)
            command.add_argument("--draws", type=int, default=20_000, help="depths whose mean is counted")
        else:
            command.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
            command.add_argument("--kernel", choices=KERNELS, nargs="+", default=["sdpa"])
            command.add_argument("--rows", choices=_BLOCKS, nargs="+", default=["block"])
            command.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device)
    setting = {name: value for name, value in vars(options).items() if name not in ("out", "what")}
    ratios: dict[str, Any] = {}
    if options.what == "recurrent":
        rows, ratios = recurrent(options, device)
        write_results(options.out, rows, setting=setting, **ratios)
        print(format_table(rows))
    else:
        rows = []
        for row in two_streams(options, device):
            rows.append(row)
            write_results(options.out, rows, setting=setting)
            print(format_table([row]), flush=True)
    for name, values in ratios.items():
        print(f"{name}: {json.dumps(values)}")


if __name__ == "__main__":
    main()
