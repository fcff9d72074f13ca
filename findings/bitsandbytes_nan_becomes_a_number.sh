#!/usr/bin/env bash
# bitsandbytes: eight-bit blockwise quantisation on a CPU turns NaN into an ordinary number.
#
# Library: bitsandbytes 0.50.2 (torch 2.13.0), CPU kernels.
# Expected: a NaN stays visible after quantize_blockwise and dequantize_blockwise, as it does with the 4-bit kinds.
# What happens: a NaN takes code 0, the most negative number that its block can hold; the scale is the largest of the others. The
#   block looks healthy. So does optimizer state: after one NaN in a gradient all moments of AdamW8bit are finite, where
#   torch's AdamW holds NaN.
# Why it matters: checks of the kind "is every tensor of the checkpoint finite?" pass on 8-bit state and weights of a run that
#   diverged, and after the bad weight was reset the update goes on from an invented moment.
# Way round: test weights, gradients and averages before they are quantised; do not take finite 8-bit state for proof.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
"$dir/venv/bin/python" - <<'PY'
from importlib.metadata import version

import bitsandbytes
import torch
from bitsandbytes import functional as F
from torch import nn

print("bitsandbytes", version("bitsandbytes"), "torch", torch.__version__)
weights = torch.linspace(-1, 1, 4096)
weights[7] = float("nan")
codes, state = F.quantize_blockwise(weights)
back = F.dequantize_blockwise(codes, state)
print(f"8 bits: NaN becomes {back[7].item():.3f}; finite afterwards: {back.isfinite().all().item()}; scale of its block {state.absmax[0]:.3f}")
assert back.isfinite().all() and abs(back[7].item() + state.absmax[0].item()) < 0.01
four = F.dequantize_4bit(*F.quantize_nf4(weights))
print(f"4 bits (nf4): NaN stays visible: {four.isnan().any().item()}")
assert four.isnan().any()

moments = {}
for cls in (torch.optim.AdamW, bitsandbytes.optim.AdamW8bit):
    weight = nn.Parameter(torch.ones(8192))
    optimizer = cls([weight], lr=1e-3)
    for step in range(2):
        weight.grad = torch.randn(8192, generator=torch.Generator().manual_seed(step))
        if step == 1:
            weight.grad[5] = float("nan")
        optimizer.step()
    memory = optimizer.state[weight]
    moment = memory["exp_avg"] if "exp_avg" in memory else F.dequantize_blockwise(
        memory["state1"], absmax=memory["absmax1"], code=memory["qmap1"], blocksize=8192 // len(memory["absmax1"])
    )
    moments[cls.__name__] = moment
    print(f"{cls.__name__}: weight {weight[5].item()}, first moment {moment[5].item():.3f}, all moments finite: {moment.isfinite().all().item()}")
    assert weight[5].isnan()
assert moments["AdamW"][5].isnan() and moments["AdamW8bit"].isfinite().all()
print("as described")
PY
