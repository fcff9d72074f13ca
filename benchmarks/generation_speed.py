"""Tokens a second of generation: a Llama of 12 layers by transformers, and the same layers as blocks that vote.

    python benchmarks/generation_speed.py --out generation_speed.json
    python benchmarks/generation_speed.py --out generation_speed.json --tiny    # on a CPU, to see that it runs

All rows sample from fresh weights in bfloat16, a text of `--tokens` after a prompt of `--prompt`. transformers runs its
own `generate`: with the cache that grows (its default), and with a static cache, whose steps it compiles and captures
itself. A row's figure is the median of its calls after the first, which compiles; each call of ours captures anew.
"""

from __future__ import annotations

import argparse
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

#: Generates texts and waits for them.
Run = Callable[[], Any]


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


def by_transformers(options: argparse.Namespace, prompts: torch.Tensor, **cache: Any) -> Run:
    """`generate` of the whole model."""
    model = llama(options).to(options.device, torch.bfloat16).eval()
    many = {"min_new_tokens": options.tokens, "max_new_tokens": options.tokens}
    return lambda: model.generate(prompts, do_sample=True, top_k=0, pad_token_id=0, **many, **cache)


def by_blocks(options: argparse.Namespace, prompts: torch.Tensor, *, graph: bool, noise_input: bool) -> Run:
    """`generate` of its blocks, each of which says once what it thinks of a token."""
    target = db.NextTokenTargetConfig(noise_input=noise_input)
    blocks = db.convert(llama(options), db.BlocksConfig(num_blocks=options.blocks, target=target))
    blocks = blocks.to(options.device, torch.bfloat16).eval()
    rows = list(prompts)
    return lambda: blocks.generate(rows, options.tokens, stop_tokens=[], cuda_graph=graph)


#: name -> what makes a row's run
WAYS: dict[str, Callable[[argparse.Namespace, torch.Tensor], Run]] = {
    "transformers": by_transformers,
    "transformers, static cache": lambda o, p: by_transformers(o, p, cache_implementation="static"),
    "blocks": lambda o, p: by_blocks(o, p, graph=False, noise_input=True),
    "blocks, CUDA graph": lambda o, p: by_blocks(o, p, graph=True, noise_input=True),
    "blocks without noise input, CUDA graph": lambda o, p: by_blocks(o, p, graph=True, noise_input=False),
}


def seconds(run: Run) -> float:
    """Seconds of a call, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure every way at every batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 384, "layers": 12, "blocks": 4, "vocabulary": 16_384}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--prompt", type=int, default=50, help="tokens")
    parser.add_argument("--tokens", type=int, default=256, help="that are generated")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--calls", type=int, default=4, help="of which the first is not timed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy, on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.tiny:
        options.width, options.vocabulary, options.tokens, options.calls, options.device = 64, 64, 6, 2, "cpu"
        options.layers, options.batches = 4, [2]
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        prompts = torch.randint(options.vocabulary, (batch, options.prompt), device=options.device)
        for name, way in WAYS.items():
            run = way(options, prompts)
            first, *times = [seconds(run) for _ in range(options.calls)]
            setting = {key: getattr(options, key) for key in ("width", "layers", "prompt", "tokens")}
            speeds = [batch * options.tokens / taken for taken in times]
            row = {"name": name, "batch": batch, "tokens_per_second": statistics.median(speeds)}
            row |= {"slowest": min(speeds), "fastest": max(speeds), "first_call_seconds": first, **setting}
            print(format_table([row]), flush=True)
            rows.append(row)
            write_results(options.out, rows)


if __name__ == "__main__":
    main()
