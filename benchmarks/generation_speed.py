"""Tokens a second of generation: a Llama of 12 layers by transformers, and the same layers as blocks that vote.

    python benchmarks/generation_speed.py --out generation_speed.json
    python benchmarks/generation_speed.py --out generation_speed.json --tiny    # on a CPU, to see that it runs

All rows sample from fresh weights in bfloat16, a text of `--tokens` after a prompt of `--prompt`. transformers runs its
own `generate`: with a static cache, whose steps it compiles and captures itself, and with the cache that grows (its
default). A row's figure is the median of its calls after the first, which compiles and captures; further calls use what
the first has left. The rows that matter most come first, both batch sizes of each, and are written as they come. After
`--budget` seconds no further row begins, and what is left out is printed. Rows without a graph generate fewer tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import diffusionblocks as db
from diffusionblocks.common.seeds import seed_global
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table

#: Generates so many tokens for prompts (batch, length), and returns the seconds that compiling and capturing took.
Run = Callable[[torch.Tensor, int], float]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to generate.

    Attributes:
        name: of its rows.
        options: of its `generate`.
        noise_input: of blocks, whether they are shown z; None: the whole model, by transformers.
        slow: whether it runs kernel by kernel.
    """

    name: str
    options: dict[str, Any]
    noise_input: bool | None = None
    slow: bool = False


_COMPILED = {"cuda_graph": True, "compile": True}

#: The most telling ones first.
WAYS = [
    Way("transformers, static cache", {"cache_implementation": "static"}),
    Way("blocks, compiled, CUDA graph", _COMPILED, noise_input=True),
    Way("blocks without noise input, compiled, CUDA graph", _COMPILED, noise_input=False),
    Way("blocks, CUDA graph", {"cuda_graph": True}, noise_input=True),
    Way("blocks without noise input, CUDA graph", {"cuda_graph": True}, noise_input=False),
    Way("transformers", {}, slow=True),
    Way("blocks", {}, noise_input=True, slow=True),
    Way("blocks without noise input", {}, noise_input=False, slow=True),
]


def llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """The model that is generated with, whole or as blocks."""
    seed_global(0)
    width = options.width
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3 // 64 * 64 or 64,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, width // 64),
        vocab_size=options.vocabulary,
        max_position_embeddings=options.prompt + options.tokens,
    )
    return LlamaForCausalLM(config)


def by_transformers(options: argparse.Namespace, way: Way) -> Run:
    """`generate` of the whole model."""
    model = llama(options).to(options.device, torch.bfloat16).eval()

    def run(prompts: torch.Tensor, tokens: int) -> float:
        many = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        model.generate(prompts, do_sample=True, top_k=0, pad_token_id=0, **many, **way.options)
        return 0.0  # it does not say

    return run


def by_blocks(options: argparse.Namespace, way: Way, blocks: db.DiffusionBlocks) -> Run:
    """`generate` of its blocks, each of which says once what it thinks of a token."""

    def run(prompts: torch.Tensor, tokens: int) -> float:
        return float(blocks.generate(list(prompts), tokens, stop_tokens=[], **way.options).preparation_seconds)

    return run


def converted(options: argparse.Namespace, noise_input: bool) -> db.DiffusionBlocks:
    """The model as blocks."""
    target = db.NextTokenTargetConfig(noise_input=noise_input)
    blocks = db.convert(llama(options), db.BlocksConfig(num_blocks=options.blocks, target=target))
    return blocks.to(options.device, torch.bfloat16).eval()


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of a call, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, way: Way, run: Run, batch: int) -> dict[str, Any]:
    """One row."""
    prompts = torch.randint(options.vocabulary, (batch, options.prompt), device=options.device)
    tokens = min(options.tokens, options.slow_tokens) if way.slow else options.tokens
    prepared: list[float] = []
    first, *times = [seconds(lambda: prepared.append(run(prompts, tokens))) for _ in range(options.calls)]
    setting = {key: getattr(options, key) for key in ("width", "layers", "prompt")}
    speeds = [batch * tokens / taken for taken in times]
    row = {"name": way.name, "batch": batch, "tokens_per_second": statistics.median(speeds)}
    row |= {"slowest": min(speeds), "fastest": max(speeds), "first_call_seconds": first}
    return row | {"preparation_seconds": prepared[0], **setting, "tokens": tokens}


def main() -> None:
    """Measure every way at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 384, "layers": 12, "blocks": 4, "vocabulary": 16_384}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt", type=int, default=50, help="tokens")
    parser.add_argument("--tokens", type=int, default=256, help="that are generated")
    parser.add_argument("--slow-tokens", type=int, default=48, help="that rows without a graph generate")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--calls", type=int, default=4, help="of which the first is not timed")
    parser.add_argument("--budget", type=float, default=140.0, help="seconds after which no further row begins")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy, on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.tiny:
        options.width, options.vocabulary, options.tokens, options.calls, options.device = 64, 64, 6, 2, "cpu"
        options.layers, options.blocks, options.batches, options.budget = 4, 2, [2], 600.0
        torch.compiler.set_default_backend("aot_eager")  # a C++ compiler would take minutes
    rows: list[dict[str, Any]] = []
    blocks_of = functools.cache(functools.partial(converted, options))
    start = time.perf_counter()
    for way in WAYS:
        blocks = None if way.noise_input is None else blocks_of(way.noise_input)
        run = by_transformers(options, way) if blocks is None else by_blocks(options, way, blocks)
        for batch in options.batches:
            if time.perf_counter() - start > options.budget:
                print(f"left out, the budget is spent: {way.name}, batch {batch}", flush=True)
                continue
            rows.append(measure(options, way, run, batch))
            print(format_table(rows[-1:]), flush=True)
            write_results(options.out, rows)
        del run
        if blocks is not None:
            blocks.release_graphs()
        gc.collect()
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
