"""Peak memory and time of a training step of Flux- and Wan-shaped models: whole, by layers swapped, and one block of B.

    python benchmarks/experts_memory.py --out experts-memory.json            # real width, random weights
    python benchmarks/experts_memory.py --out experts-memory.json --tiny     # on a CPU, to see that it runs

Rows are `continued` (all weights, end to end), `continued-lora`, `continued-lora-swap` (each layer's fixed weights come
from the host when it runs, forward and backward, as trainers with block swap do it), `layers-B`, `layers-B-lora` and
`experts-B-lora` (one block, alone on the device); those with `-nf4` keep fixed weights in 4 bits. All compute their
layers again in the backward pass. Peaks count weights, gradients, AdamW's state and activations; a row's time is the
median of its steps.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffusionblocks as db
from diffusionblocks.common.modules import places_of
from diffusionblocks.core.conversion import assemble
from diffusionblocks.core.materialise import materialise_added, materialise_buffers
from diffusionblocks.families import family_named, outline, rebuild_config
from diffusionblocks.layers.quantized import quantized_layers
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table

#: Without cuDNN's, whose backward pass fails at the shapes of this Flux on an H200 under torch 2.11.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

#: name -> class, config at real width, and sizes of an example after its channels
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "flux": ("FluxTransformer2DModel", {"num_layers": 3, "num_single_layers": 6}, (128, 128)),
    "wan": ("WanTransformer3DModel", {"num_layers": 9}, (5, 60, 104)),
}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TINY: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {**_HEADS, "num_layers": 1, "num_single_layers": 2, "in_channels": 16, "axes_dims_rope": (4, 6, 6)}
        | {"joint_attention_dim": 24, "pooled_projection_dim": 20},
        (8, 8),
    ),
    "wan": (
        "WanTransformer3DModel",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48, "num_layers": 3},
        (3, 8, 8),
    ),
}


def build(model: tuple[str, dict[str, Any], tuple[int, ...]], config: db.BlocksConfig, device: str) -> Any:
    """Blocks of which the first has random weights on the device, in bfloat16 (updates in float32)."""
    model_class, values, _ = model
    original = outline(model_class, rebuild_config(model_class, values)).to(torch.bfloat16)
    blocks = assemble(original, config, take=True)
    block = blocks.block(0)
    materialise_added(blocks, 0)
    for entries, key in places_of(block):
        tensor = entries[key]
        if tensor.is_meta and isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
            random = torch.randn(tensor.shape, device=device, dtype=tensor.dtype) * 0.02
            entries[key] = nn.Parameter(random, requires_grad=tensor.requires_grad)
    for _, linear in quantized_layers(block):  # random numbers are no codes
        weight = torch.randn(linear.out_features, linear.in_features, device=device, dtype=torch.bfloat16) * 0.02
        for name, part in linear.quantized(weight):
            setattr(linear, name, nn.Parameter(part, requires_grad=False))
    materialise_buffers(blocks, 0)
    block.to(device)
    block.activation_checkpointing = True
    return blocks


def batch_of(blocks: Any, sizes: tuple[int, ...], size: int, text: int, device: str) -> dict[str, Tensor]:
    family = family_named(blocks.model_class)
    batch = family.empty_batch(blocks.config, size, text)
    batch["pixel_values"] = torch.randn(size, batch["pixel_values"].shape[1], *sizes)
    return {name: value.to(device) for name, value in batch.items()}


def swap_layers(block: Any, device: str) -> None:
    """Let the fixed weights of each layer wait on the host, and come to the device while it runs."""
    for layer in block.layers():
        fixed = [p for p in layer.parameters() if not p.requires_grad]
        host = [p.data.to("cpu", copy=True) for p in fixed]
        if device == "cuda":
            host = [tensor.pin_memory() for tensor in host]
        runs = {"count": 0}

        def leave(fixed: list[nn.Parameter] = fixed, host: list[Tensor] = host) -> None:
            for parameter, tensor in zip(fixed, host, strict=True):
                parameter.data = tensor

        def come(*_: Any, fixed: Any = fixed, host: Any = host, runs: Any = runs) -> None:
            runs["count"] += 1
            for parameter, tensor in zip(fixed, host, strict=True):
                parameter.data = tensor.to(device, non_blocking=True)

        def after(*_: Any, leave: Callable[[], None] = leave, runs: Any = runs) -> None:
            if runs["count"] % 2:  # the second time is in the backward pass, which still needs them
                leave()

        leave()
        layer.register_forward_pre_hook(come)
        layer.register_forward_hook(after)
        layer.register_full_backward_hook(lambda *_, leave=leave: leave())


def measure(blocks: Any, batch: dict[str, Tensor], steps: int, device: str) -> dict[str, Any]:
    block = blocks.block(0)
    trainable = [p for p in block.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(_ATTENTION):
            block.loss(batch).mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "milliseconds": 1000 * statistics.median(seconds[2:]),
        "trained": sum(p.numel() for p in trainable),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--text", type=int, default=512, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    lora, many, noise = db.LoraConfig(rank=options.rank), options.blocks, db.FlowMatching(shift=3.0)
    nf4 = db.LoraConfig(rank=options.rank, base="nf4")
    ways: dict[str, dict[str, Any]] = {
        "continued": {"num_blocks": 1},
        "continued-lora": {"num_blocks": 1, "lora": lora},
        "continued-lora-swap": {"num_blocks": 1, "lora": lora},
        f"layers-{many}": {"num_blocks": many},
        f"layers-{many}-lora": {"num_blocks": many, "lora": lora},
        f"experts-{many}-lora": {"num_blocks": many, "split": "experts", "lora": lora},
        "continued-lora-nf4": {"num_blocks": 1, "lora": nf4},
        f"layers-{many}-lora-nf4": {"num_blocks": many, "lora": nf4},
    }
    rows = []
    for name, model in (TINY if options.tiny else MODELS).items():
        for way, values in ways.items():
            blocks = build(model, db.BlocksConfig(noise=noise, **values), device)
            if way.endswith("swap"):
                swap_layers(blocks.block(0), device)
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            batch = batch_of(blocks, model[2], options.batch, 7 if options.tiny else options.text, device)
            rows.append({"model": name, "name": way, **measure(blocks, batch, options.steps, device)})
            print(format_table(rows[-1:]))
            del blocks, batch
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    write_results(options.out, rows)


if __name__ == "__main__":
    main()
