#!/usr/bin/env bash
# Muon's steps on GPT-2 are up to twice too small in one projection of an MLP and twice too large in the other: its layers are stored transposed.
#
# Libraries: torch 2.13.0 (`torch.optim.Muon`), transformers 5.23.0 (`Conv1D` of GPT-2).
# Expected: an update depends on what a layer computes. A `Conv1D` and an `nn.Linear` of the same weights, inputs and gradients go the same way.
# What happens: the orthogonalised step is multiplied by sqrt(max(1, rows / columns)), the default, where rows are taken for outputs. `Conv1D` stores
#   (inputs, outputs). So the layer from 64 to 256 is moved half as far as it should be, the one from 256 to 64 twice as far: a factor of 4 between the two.
# Why it matters: GPT-2 is where Muon is tried, in comparisons with AdamW, which does not care. Nothing fails; the learning rate found is that
#   of the transposed layers, and does not carry over to the same model written with nn.Linear.
# Way round: adjust_lr_fn="match_rms_adamw", which is the same for a matrix and its transpose (run below); or nn.Linear layers.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
from importlib.metadata import version

import torch
from transformers.pytorch_utils import Conv1D

print("torch", torch.__version__, "transformers", version("transformers"))


def ratio(inputs: int, outputs: int, adjust: str | None) -> float:
    """How far a step of Muon moves a Conv1D, in parts of how far it moves the nn.Linear that computes the same."""
    torch.manual_seed(0)
    linear, transposed = torch.nn.Linear(inputs, outputs), Conv1D(outputs, inputs)
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.T)
        transposed.bias.copy_(linear.bias)
    x, target = torch.randn(32, inputs), torch.randn(32, outputs)
    assert torch.allclose(linear(x), transposed(x), atol=1e-5)
    steps = []
    for layer in (linear, transposed):
        before = layer.weight.detach().clone()
        (layer(x) - target).square().mean().backward()
        torch.optim.Muon([layer.weight], lr=0.01, weight_decay=0, adjust_lr_fn=adjust).step()
        steps.append(layer.weight.detach() - before)
    along = torch.nn.functional.cosine_similarity(steps[0].flatten(), steps[1].T.flatten(), dim=0)
    assert along > 0.99  # the same direction, up to bfloat16
    return float(steps[1].norm() / steps[0].norm())


seen = {adjust: [round(ratio(*shape, adjust), 2) for shape in ((64, 256), (256, 64), (64, 64))] for adjust in (None, "match_rms_adamw")}
for adjust, ratios in seen.items():
    print("adjust_lr_fn =", adjust, ": steps of Conv1D / nn.Linear, 64 to 256, 256 to 64, 64 to 64:", ratios)
assert all(abs(a - b) < 0.05 for a, b in zip(seen[None], [0.5, 2.0, 1.0], strict=True))
assert all(abs(a - 1) < 0.05 for a in seen["match_rms_adamw"])
print("as described")
PY
