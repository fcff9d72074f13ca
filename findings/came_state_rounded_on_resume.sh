#!/usr/bin/env bash
# Loading the state of an optimizer that keeps float32 moments for bfloat16 weights rounds the moments to bfloat16.
#
# Libraries: came-pytorch 0.1.3 on torch 2.13.0.
# Expected: state_dict, torch.save, load_state_dict give back what was saved; training goes on as if uninterrupted.
# What happens: torch's Optimizer.load_state_dict casts every floating state but `step` to the dtype of its parameter. CAME keeps its
#   moments and factors in float32. The checkpoint holds float32, the resumed optimizer bfloat16, for the rest
#   of the run: the resumed weights differ from the uninterrupted ones. With float32 weights
#   all is well, so a test on a small float32 model passes.
# Why it matters: bfloat16 weights with float32 state is how large transformers are fine-tuned in little memory; block-wise
#   training writes and reads optimizer state at every switch of blocks, so it would round at every switch.
# Way round: after load_state_dict put the saved tensors into optimizer.state[parameter] by hand. Compare the dtypes of the state
#   before and after a resumption, once, on bfloat16 weights.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 came-pytorch==0.1.3
"$dir/venv/bin/python" - "$dir/state.pt" <<'PY'
import sys
from importlib.metadata import version

import torch
from came_pytorch import CAME
from torch import nn

print("came-pytorch", version("came-pytorch"), "torch", torch.__version__)


def train(weight: nn.Parameter, optimizer: CAME, first: int, last: int) -> None:
    """Run steps `first` to `last` with gradients that depend on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


def moments(optimizer: CAME) -> dict[str, torch.Tensor]:
    """Return the moments and their factors, by name."""
    return {name: value for state in optimizer.state.values() for name, value in state.items() if name.startswith("exp_avg")}


for dtype in (torch.float32, torch.bfloat16):
    weight = nn.Parameter(torch.ones(64, 128, dtype=dtype))
    optimizer = CAME([weight], lr=1e-3)
    train(weight, optimizer, 0, 20)
    torch.save(optimizer.state_dict(), sys.argv[1])
    resumed = {}
    for name in ("load_state_dict", "copied back"):
        saved = torch.load(sys.argv[1], weights_only=True)
        copy = nn.Parameter(weight.detach().clone())
        again = CAME([copy], lr=1e-3)
        again.load_state_dict(saved)
        if name == "copied back":  # the way round
            again.state[copy].update(saved["state"][0])
        dtypes = {value.dtype for value in moments(again).values()}
        resumed[name] = copy, dtypes
        train(copy, again, 20, 40)
    before = {value.dtype for value in moments(optimizer).values()}
    train(weight, optimizer, 20, 40)
    for name, (copy, after) in resumed.items():
        differing = (copy != weight).float().mean().item()
        print(f"{dtype} weights, {name:15s}: state {before} -> {after}; {differing:.0%} of the weights differ after 20 more steps")
        rounded = dtype == torch.bfloat16 and name == "load_state_dict"
        assert before == {torch.float32} and after == ({torch.bfloat16} if rounded else {torch.float32})
        assert torch.equal(copy, weight) != rounded
print("as described")
PY
