#!/usr/bin/env bash
# The same scheduler, converted with from_config, samples at other timesteps after it has once been saved and loaded.
#
# Library: diffusers 0.42.1 (torch 2.13.0).
# Expected: EulerDiscreteScheduler.from_config(s.config) does not depend on whether s was made in memory or read from
#   the folder that s.save_pretrained wrote.
# What happens: in memory, the config remembers which of its values were defaults, and gives way to the defaults of the
#   new class; the JSON file has the values only, and they win. DDIM's default spacing is "leading", Euler's
#   "linspace": of five steps, one starts at timestep 999, the other at 800. Nothing is said.
# Why it matters: the sampler that was tuned in the training script is not the one that a user of the saved pipeline
#   gets with the same line of code. Starting at 800 from pure noise is wrong in level, and a model split by noise
#   level runs its highest block for other steps.
# Way round: name `timestep_spacing` (and every other field that matters) in the call of from_config.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - "$dir/saved" <<'PY'
import sys

import diffusers
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__)
folder = sys.argv[1]
trained = DDIMScheduler()
trained.save_pretrained(folder)
loaded = DDIMScheduler.from_pretrained(folder)
assert trained.config.timestep_spacing == loaded.config.timestep_spacing == "leading"

steps = {}
for name, source in {"in memory": trained, "saved and loaded": loaded}.items():
    euler = EulerDiscreteScheduler.from_config(source.config)
    euler.set_timesteps(5)
    steps[name] = euler.timesteps.tolist()
    print(f"{name:17s} {euler.config.timestep_spacing:9s} {steps[name]} first sigma {euler.sigmas[0].item():.2f}")
assert steps["in memory"] == [999.0, 749.25, 499.5, 249.75, 0.0]
assert steps["saved and loaded"] == [800.0, 600.0, 400.0, 200.0, 0.0]

for source in (trained, loaded):  # the way round
    euler = EulerDiscreteScheduler.from_config(source.config, timestep_spacing="trailing")
    euler.set_timesteps(5)
    assert euler.timesteps.tolist() == [999.0, 799.0, 599.0, 399.0, 199.0]
print("as described")
PY
