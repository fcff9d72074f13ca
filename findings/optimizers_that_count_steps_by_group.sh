#!/usr/bin/env bash
# Several third-party optimizers count steps for a group, not a parameter: a block that starts later gets another optimizer.
#
# Libraries: schedulefree 1.4.1, pytorch-optimizer 4.1.0; torch.optim.AdamW (torch 2.13.0) as the control.
# Expected: a parameter whose gradient was None so far starts at its own step 1, as it does in torch.optim.AdamW.
# What happens: bias correction (and schedule-free averaging, rectification, clipping of the first steps) uses the step of the
#   group. If other blocks trained for 1,000 steps before, the first update of a new one is
#   40 times too small (AdamWScheduleFree, the averaged weights), 2.5 to 2.8 times too large (AdamP, AdaBelief, AdEMAMix), ten times too
#   small (StableAdamW); after 100 steps of its own, RAdam has moved it 18 times as far.
# Why it matters: training block after block, unfreezing layer by layer, or sparse use of experts all leave gradients None.
#   The learning rate that was tuned end to end means something else for every block but the first. No warning.
# Way round: one optimizer for each block (a parameter group is not enough: its step advances without gradients).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1 pytorch-optimizer==4.1.0
"$dir/venv/bin/python" - <<'PY'
from importlib.metadata import version

import pytorch_optimizer
import schedulefree
import torch
from torch import nn

print(*(f"{name} {version(name)}" for name in ("schedulefree", "pytorch-optimizer", "torch")))


def moved(make, earlier: int, steps: int, apart: bool = False) -> float:
    """Return how far `steps` equal gradients move a block, after `earlier` steps of another block."""
    first, second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizers = [make([first]), make([second])] if apart else [make([first, second])] * 2
    for optimizer in optimizers:
        if hasattr(optimizer, "train"):
            optimizer.train()
    for _ in range(earlier):
        first.grad = torch.ones(4)
        optimizers[0].step()
    first.grad = None
    for _ in range(steps):
        second.grad = torch.ones(4)
        optimizers[1].step()
    if hasattr(optimizers[1], "eval"):
        optimizers[1].eval()  # schedule-free: to the weights that are evaluated and saved
    return -second[0].item()


def of(cls, **options):
    """Return a constructor with learning rate 1e-3 and no decay."""
    return lambda parameters: cls(parameters, lr=1e-3, weight_decay=0.0, **options)


rows = {
    "torch AdamW": (of(torch.optim.AdamW), 1, (0.99, 1.01)),
    "AdamWScheduleFree": (of(schedulefree.AdamWScheduleFree), 1, (0.0, 0.05)),
    "AdamP": (of(pytorch_optimizer.AdamP), 1, (2.0, 4.0)),
    "AdaBelief": (of(pytorch_optimizer.AdaBelief), 1, (2.0, 4.0)),
    "AdEMAMix": (of(pytorch_optimizer.AdEMAMix), 1, (2.0, 4.0)),
    "StableAdamW": (of(pytorch_optimizer.StableAdamW), 1, (0.0, 0.2)),
    "RAdam": (of(pytorch_optimizer.RAdam), 100, (10.0, 30.0)),
}
print(f"{'':18s} {'steps':>5s} {'alone':>9s} {'after 1000 of another':>22s} {'ratio':>6s}")
for name, (make, steps, (lowest, highest)) in rows.items():
    alone, late, apart = moved(make, 0, steps), moved(make, 1000, steps), moved(make, 1000, steps, apart=True)
    print(f"{name:18s} {steps:5d} {alone:9.2e} {late:22.2e} {late / alone:6.3g}")
    assert lowest <= late / alone <= highest
    assert apart == alone  # the way round
print("as described")
PY
