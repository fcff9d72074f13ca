#!/usr/bin/env bash
# Moving averages of bfloat16 weights stay near where they began: the average of a trained model is mostly the untrained one.
#
# Libraries: torch 2.13.0 (`AveragedModel` with `get_ema_multi_avg_fn`), diffusers 0.42.1 (`EMAModel`), torch-ema 0.3.
# Expected: after 3,000 steps at a decay of 0.9995 an average has made 78 % of the way to where the weights went.
# What happens: all three keep the average in the dtype of the weights, and say nothing. In bfloat16 a step of 0.0005 times what is left
#   is less than half a unit in the last place once the average is a few hundred times that step, so it is rounded away. The average
#   stops at 12 % of the way, and is the same in all three, for the rest of training.
# Why it matters: diffusion models are sampled from the average. Weights in bfloat16 halve the memory, and a run whose average stands still
#   has a fine loss and poor samples. Decays in use are nearer to 1 than this one (0.9999): there the average moves even less.
# Way round: give the library float32 copies of the weights, at the start and at each step: EMAModel([p.float() for p in ...]). They must
#   require a gradient, as these do outside of torch.no_grad(): others `EMAModel` copies, and does not average.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 torch-ema==0.3
"$dir/venv/bin/python" - <<'PY'
import warnings
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

warnings.filterwarnings("ignore")
from diffusers.training_utils import EMAModel
from torch_ema import ExponentialMovingAverage

print("torch", torch.__version__, "diffusers", version("diffusers"), "torch-ema", version("torch-ema"))
STEPS, DECAY = 3000, 0.9995


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 64, bias=False).to(torch.bfloat16)


def wander(model: nn.Linear, after_each: Callable[[], None]) -> None:
    """Weights go to about 1 at once, and stay there but for some noise."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        with torch.no_grad():
            model.weight.copy_(1 + 0.01 * torch.randn(64, 64, generator=generator))
        after_each()


def of_torch(model: nn.Linear) -> torch.Tensor:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.update_parameters(model)  # the first call copies
    wander(model, lambda: average.update_parameters(model))
    return average.module.weight


def of_torch_ema(model: nn.Linear) -> torch.Tensor:
    average = ExponentialMovingAverage(model.parameters(), decay=DECAY, use_num_updates=False)
    wander(model, average.update)
    return average.shadow_params[0]


def of_diffusers(model: nn.Linear, cast: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight) -> torch.Tensor:
    average = EMAModel([cast(model.weight)], decay=DECAY)
    average.optimization_step = 10**9  # past its warm-up
    wander(model, lambda: average.step([cast(model.weight)]))
    return average.shadow_params[0]


start, exact = model().weight.detach().double(), model()
expected = start.clone()
wander(exact, lambda: expected.lerp_(exact.weight.detach().double(), 1 - DECAY))
ways = {
    "torch": of_torch,
    "torch-ema": of_torch_ema,
    "diffusers": of_diffusers,
    "diffusers, float32 copies": lambda model: of_diffusers(model, torch.Tensor.float),  # the way round
}
share = ((expected - start) / (1 - start)).mean().item()
print(f"{'in double precision':26s}: {share:.0%} of the way")
for name, average in ways.items():
    moved = ((average(model()).detach().double() - start) / (1 - start)).mean().item()
    print(f"{name:26s}: {moved:.0%} of the way")
    assert moved < 0.2 if name in ("torch", "torch-ema", "diffusers") else abs(moved - share) < 0.001
print("as described")
PY
