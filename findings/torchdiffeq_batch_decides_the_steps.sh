#!/usr/bin/env bash
# torchdiffeq's adaptive solvers: a sample's result depends on the other samples of its batch, and its error grows with it.
#
# Library: torchdiffeq 0.2.5 (torch 2.13.0); the integrator of flow_matching's ODESolver.
# Expected: rtol and atol bound the error of each sample; integrating it alone or in a batch gives about the same.
# What happens: the whole batch is one state, and a step is accepted by the root mean square of its errors. A hard sample
#   among easy ones is averaged away. Here, with dopri5 and tolerance 1e-3, its error is 6 % alone, 14 % among 64, and more
#   than 600 % among 4,096.
# Why it matters: samples of a flow change with the batch size of the sampler, so figures do (Frechet distances are computed
#   with large batches), and likelihoods are worst for the rare samples that one asks about. A tolerance found at
#   batch 1 says nothing about batch 256.
# Way round: options={"norm": lambda error: error.abs().max()} (the worst element decides; the step then depends on the batch, but no
#   sample's error is averaged away), or a fixed-step solver, whose samples do not see each other.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 scipy==1.17.1 torchdiffeq==0.2.5
"$dir/venv/bin/python" - <<'PY'
import math
from importlib.metadata import version

import torch
from torch import Tensor
from torchdiffeq import odeint

print("torchdiffeq", version("torchdiffeq"), "torch", torch.__version__)


def velocity(t: Tensor, y: Tensor) -> Tensor:
    """Return dy/dt for rows (value, rate): value' = rate * sin(12 * rate * t) * value, the rate stays."""
    value, rate = y.unbind(dim=1)
    return torch.stack([rate * torch.sin(12 * rate * t) * value, torch.zeros_like(rate)], dim=1)


exact = math.exp((1 - math.cos(36)) / 12)  # for rate 3, at t = 1
solvers = {
    "dopri5, 1e-3": dict(method="dopri5", rtol=1e-3, atol=1e-3),
    "dopri5, 1e-3, largest error": dict(
        method="dopri5", rtol=1e-3, atol=1e-3, options={"norm": lambda error: error.abs().max()}
    ),
    "midpoint, 100 steps": dict(method="midpoint", options={"step_size": 0.01}),
}
error = {}
for name, options in solvers.items():
    for batch in (1, 64, 4096):
        start = torch.ones(batch, 2)
        start[:, 1] = 0.01  # easy: almost constant
        start[0, 1] = 3.0  # the sample that is looked at
        end = odeint(velocity, start, torch.tensor([0.0, 1.0]), **options)[-1][0, 0].item()
        error[name, batch] = abs(end / exact - 1)
        print(f"{name:28s} among {batch:4d}: {end:.4f}, exact {exact:.4f}, error {error[name, batch]:.1%}")
assert error["dopri5, 1e-3", 1] < 0.1 < error["dopri5, 1e-3", 64] and error["dopri5, 1e-3", 4096] > 3
for name in ("dopri5, 1e-3, largest error", "midpoint, 100 steps"):  # the ways round
    assert abs(error[name, 4096] - error[name, 1]) < 1e-5 and error[name, 1] < 0.05
print("as described")
PY
