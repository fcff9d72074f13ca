"""Time steps of 8-bit AdamW over one block's parameters: torchao's, torchao's compiled once, and one kernel for all.

    PYTHONPATH=src python benchmarks/eight_bit_step.py --out eight_bit_step.json
    TRITON_INTERPRET=1 PYTHONPATH=src python benchmarks/eight_bit_step.py --tiny --device cpu

All of them start from equal weights and see equal gradients; before a clock starts the codes of their moments are
compared after one step. Windows take turns in one process; a row has the median of its windows and the peak beside what
is there between steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.optim import AdamW8bit

from diffusionblocks.reports.results import write_results
from diffusionblocks.training import TrainConfig
from diffusionblocks.training.eight_bit_kernel import OneKernelAdamW8bit
from diffusionblocks.training.optim import way_to_step

SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01}
WAYS = ("torchao", "compiled once", "one kernel")


def parameters(layers: int, width: int, device: str) -> list[nn.Parameter]:
    """Those of DiT layers: attention, MLP, and the projection of its adaptive norms."""
    shapes = [(width, width), (width,)] * 4
    shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,), (6 * width, width), (6 * width,)]
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.randn(shape, generator=generator, device=device) * 0.02 for _ in range(layers) for shape in shapes]
    return [nn.Parameter(tensor) for tensor in made]


def optimizer_of(way: str, weights: list[nn.Parameter], lr: torch.Tensor) -> torch.optim.Optimizer:
    """AdamW in 8 bits, as the way says."""
    if way == "torchao":
        return AdamW8bit(weights, lr=lr, **SETTINGS)  # type: ignore[no-any-return]
    if way == "one kernel":
        return OneKernelAdamW8bit(weights, lr=lr, **SETTINGS)
    return way_to_step(weights, TrainConfig(steps=1, optimizer="adamw-8bit", fused_kernels=(), **SETTINGS)).make(
        weights, lr=lr
    )


class Contestant:
    """An optimizer with weights of its own.

    Args:
        way: of `WAYS`.
        options: of the command line.
    """

    def __init__(self, way: str, options: argparse.Namespace) -> None:
        self.way, self.device = way, options.device
        self.weights = parameters(options.layers, options.width, options.device)
        self.lr = torch.tensor(1e-4, device=options.device)
        self.optimizer = optimizer_of(way, self.weights, self.lr)
        self.milliseconds: list[float] = []
        self.peak = 0
        generator = torch.Generator(options.device).manual_seed(1)
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, generator=generator, device=options.device)
        self.optimizer.step()

    def codes(self) -> list[torch.Tensor]:
        """Codes and scales of all moments that are in 8 bits."""
        moments = [self.optimizer.state[w][name] for w in self.weights for name in ("exp_avg", "exp_avg_sq")]
        return [part for m in moments if hasattr(m, "codes") for part in (m.codes, m.scale)]

    def window(self, steps: int) -> None:
        """Time some steps, and note what they allocate at their peak."""
        on_gpu = self.device != "cpu"
        if on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(steps):
            self.optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)
        self.milliseconds.append(1000 * (time.perf_counter() - start) / steps)


def main() -> None:
    """Measure all ways side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--windows", type=int, default=9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.width, options.steps, options.windows = 1, 32, 1, 1
    ways = [way for way in WAYS if not (options.tiny and way == "compiled once" and options.device == "cpu")]
    contestants = [Contestant(way, options) for way in ways]
    first, *others = contestants
    for other in others:
        pairs = list(zip(first.codes(), other.codes(), strict=True))
        differing = sum(int((a != b).sum()) for a, b in pairs)
        print(f"{other.way}: {differing} of {sum(a.numel() for a, _ in pairs)} codes and scales differ after a step")
    for turn in range(options.windows + 1):
        for contestant in contestants:
            contestant.window(options.steps)
            if turn == 0:  # which loads kernels
                contestant.milliseconds.clear()
    before = statistics.median(contestants[-2].milliseconds)
    rows = [
        {
            "way": each.way,
            "layers": options.layers,
            "width": options.width,
            "milliseconds": statistics.median(each.milliseconds),
            "milliseconds_before": before if each.way == "one kernel" else None,
            "spread": [min(each.milliseconds), max(each.milliseconds)],
            "peak_bytes_beside_state": each.peak,
        }
        for each in contestants
    ]
    for row in rows:
        print(row)
    if options.out is not None:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()
