#!/usr/bin/env bash
# add_noise of DPM-Solver, DEIS and UniPC in diffusers adds the noise of timestep 999 - t, unless a schedule of sampling was set before.
#
# Libraries: diffusers 0.42.1 (`DPMSolverMultistepScheduler`, `DPMSolverSinglestepScheduler`, `DEISMultistepScheduler`,
#   `UniPCMultistepScheduler`), torch 2.13.0; DDPM, DDIM and Euler as the control.
# Expected: add_noise(images, noise, t) is what a network is trained on at t: little noise at 100, much at 900, the same in all
#   classes of one schedule. It can be called on a fresh scheduler, as in training.
# What happens: the four classes begin with levels in rising order and timesteps in falling order, and look one up by the place of the other.
#   So t = 100 gets the noise of 899, and 900 that of 99. After set_timesteps(20) the 20 timesteps of the schedule are right, and
#   all others, which training draws, get the noise of the last step. No error, no warning; Euler stops with an error there.
#   With `use_flow_sigmas` (UniPC is the scheduler of Wan) a fresh one multiplies the image by -59 at t = 100.
# Why it matters: who trains with `pipeline.scheduler` teaches a network to find much noise where it is told of little. The loss is finite and
#   falls. Split by timestep, the block of high noise is trained on nearly clean images, and the other way round.
# Way round: DDPMScheduler.from_config(scheduler.config) adds the noise in training (run below); on a flow, (1 - t) * image + t * noise by hand.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 scipy==1.17.1
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import diffusers
import torch

print("torch", torch.__version__, "diffusers", diffusers.__version__)
beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
TIMES = torch.tensor([100, 300, 500, 700, 900])
abar = diffusers.DDPMScheduler(**beta).alphas_cumprod.double()
level = ((1 - abar) / abar).sqrt()  # noise over signal, by timestep


def added(scheduler, times: torch.Tensor) -> list[int]:
    """Of which timestep the noise is that is added at some timesteps: the one whose noise over signal is nearest."""
    ones, zeros = torch.ones(len(times), 1, dtype=torch.float64), torch.zeros(len(times), 1, dtype=torch.float64)
    ratio = scheduler.add_noise(zeros, ones, times) / scheduler.add_noise(ones, zeros, times)
    return (ratio.log() - level.log()).abs().argmin(dim=1).tolist()


print("asked for:", TIMES.tolist())
for name in ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"):
    seen = added(getattr(diffusers, name)(**beta), TIMES)
    print("noise of", seen, name)
    assert seen == TIMES.tolist()

for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"):
    scheduler = getattr(diffusers, name)(**beta)
    seen = added(scheduler, TIMES)
    print("noise of", seen, name)
    assert seen == (999 - TIMES).tolist()
    scheduler.set_timesteps(20)
    of_schedule = scheduler.timesteps[[2, 9, 15]]
    assert added(scheduler, of_schedule) == of_schedule.tolist()
    others = added(scheduler, TIMES + 1)
    print("   after set_timesteps(20):", others, "for", (TIMES + 1).tolist(), "; last timestep", int(scheduler.timesteps[-1]))
    assert not set((TIMES + 1).tolist()) & set(scheduler.timesteps.tolist())
    assert others == [int(scheduler.timesteps[-1])] * len(TIMES)
    assert added(diffusers.DDPMScheduler.from_config(scheduler.config), TIMES) == TIMES.tolist()
flow = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
one, zero = torch.ones(3, 1), torch.zeros(3, 1)
shares = [flow.add_noise(*pair, torch.tensor([100, 500, 900])).flatten() for pair in ((one, zero), (zero, one))]
print("UniPC of a flow at 100, 500 and 900: image times", [round(v, 1) for v in shares[0].tolist()], "noise times", [round(v, 1) for v in shares[1].tolist()])
assert shares[0][0] < -50 and shares[0][2] > 0.5
print("as described; DDPMScheduler.from_config of each adds the right noise")
PY
