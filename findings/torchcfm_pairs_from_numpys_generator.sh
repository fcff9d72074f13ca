#!/usr/bin/env bash
# torchcfm draws its optimal-transport pairs from NumPy's global generator, with replacement.
#
# Library: torchcfm 1.0.7 (POT 0.9.7.post1, torch 2.13.0, numpy 2.4.6).
# Expected: torch.manual_seed fixes a step of flow matching that works on tensors, and a batch of 64 data points trains
#   on 64 data points.
# What happens: 1. the pairs come from np.random.choice: the same torch seed gives other pairs and another loss, and a resumed
#   run goes on with other pairs unless NumPy's state was saved too.
#   2. The pairs are drawn with replacement: about a third of the batch is left out at each step, other points count
#   twice or more. The size of the batch does not say so.
# Why it matters: "bit-equal after resumption" and "blocks in any order give the same weights" hold only if this generator is part
#   of the state; and a labelled batch must be permuted with the pairs, so labels are repeated and dropped as well.
# Way round: np.random.seed (or save np.random.get_state()) where torch's is set; sample_plan(x0, x1, replace=False).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 scipy==1.17.1 POT==0.9.7.post1
# What torchcfm's flow matchers import is installed above; its other requirements are for its examples.
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check --no-deps torchcfm==1.0.7
"$dir/venv/bin/python" - <<'PY'
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor
from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher

print(*(f"{name} {version(name)}" for name in ("torchcfm", "POT", "torch", "numpy")))
noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
data = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
matcher = ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)


def step(numpy_seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return time, point and velocity of one training step, with torch's generator always at the same place."""
    torch.manual_seed(0)
    if numpy_seed is not None:
        np.random.seed(numpy_seed)
    return matcher.sample_location_and_conditional_flow(noise, data)


np.random.seed(7)
(t, _, flow), (t_again, _, flow_again) = step(None), step(None)
print(f"1. same torch seed twice: same times {torch.equal(t, t_again)}, same velocities {torch.equal(flow, flow_again)},"
      f" mean square {flow.square().mean():.3f} and {flow_again.square().mean():.3f}")
assert torch.equal(t, t_again) and not torch.equal(flow, flow_again)

used = [len(matcher.ot_sampler.sample_plan(noise, data)[1].unique(dim=0)) for _ in range(20)]
print(f"2. data points used of 64, in 20 steps: {min(used)} to {max(used)}")
assert max(used) < 56

# The way round.
assert torch.equal(step(3)[2], step(3)[2])
assert len(matcher.ot_sampler.sample_plan(noise, data, replace=False)[1].unique(dim=0)) == 64
print("as described")
PY
