#!/usr/bin/env bash
# At 62 counts of steps "trailing" schedules of diffusers get one step more, at timestep -1, and it spoils the finished image.
#
# Libraries: diffusers 0.42.1 (`DDIMScheduler`; DDPM, Euler, Heun, DPM-Solver, DEIS and others share the formula), numpy 2.4.6.
# Expected: set_timesteps(n) gives n timesteps, from 999 down, none below 0. "trailing" is the spacing that starts at pure noise.
# What happens: they are counted down by 1000 / n to 0 in floating point, exclusive of 0. At 61, 103, 121 and 59 other counts up to 1,000 the last
#   sum is a rounding error above 0, so there is one more timestep, which is rounded to 0 and becomes -1. DDIM looks -1 up as an
#   index: the noisiest level of all. The finished image is taken for noise of that level and divided by 0.07.
#   Euler reads the level of timestep 0 there.
# Why it matters: samples at one count of steps are noise or saturated while its neighbours' are fine, and a sweep over counts shows a spike.
#   A network is told a time below all that it was trained on; code that maps timesteps to experts gets one outside of all intervals.
# Way round: drop what is below 0 (`scheduler.timesteps = scheduler.timesteps[:n]`, run below), or choose n with len(timesteps) == n.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import diffusers
import numpy
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

print("torch", torch.__version__, "diffusers", diffusers.__version__, "numpy", numpy.__version__)
beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's

counts = {}
for cls in (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler):
    scheduler, counts[cls.__name__] = cls(**beta, timestep_spacing="trailing"), []
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        if len(scheduler.timesteps) != n:
            assert len(scheduler.timesteps) == n + 1 and scheduler.timesteps[-1] == -1
            counts[cls.__name__].append(n)
    print(cls.__name__, "has a step at -1 for", len(counts[cls.__name__]), "of 1,000 counts:", counts[cls.__name__][:8], "...")
assert all(len(which) == 62 and which[:3] == [61, 103, 121] for which in counts.values())


def sample(n: int, way_round: bool = False) -> float:
    """The largest error of DDIM's image, with a network that knows the image: it tells the noise in z for the time it is told."""
    scheduler = DDIMScheduler(**beta, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(n)
    if way_round:
        scheduler.timesteps = scheduler.timesteps[:n]
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    z = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[max(t, 0)].double()  # told -1, as if told 0: there is no lower level
        z = scheduler.step((z - alpha_bar.sqrt() * image) / (1 - alpha_bar).sqrt(), t, z).prev_sample
    return float((z - image).abs().max())


errors = {n: sample(n) for n in (50, 61, 62, 100)}
print("largest error of an image in [-1, 1], by steps:", {n: round(e, 3) for n, e in errors.items()})
assert errors.pop(61) > 10 and max(errors.values()) < 0.05
assert sample(61, way_round=True) < 0.05
print("as described; without the last step the error is", round(sample(61, way_round=True), 3))
PY
