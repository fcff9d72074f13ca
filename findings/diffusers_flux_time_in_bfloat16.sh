#!/usr/bin/env bash
# A Flux transformer in bfloat16 is told the time in steps of up to 4 (of 1,000): neighbouring steps of a schedule become one.
#
# Libraries: diffusers 0.42.1 (`FluxTransformer2DModel`), torch 2.13.0.
# Expected: the time is a float32 tensor in the call and is embedded in float32, as SD3's is: precision is a matter of the weights.
# What happens: `forward` casts the time to the dtype of the hidden states before it is multiplied by 1,000. Between 0.5 and 1 bfloat16 has 128
#   values, so of 500 different times in that range 129 are left. SD3Transformer2DModel embeds all 500.
# Why it matters: levels of noise are drawn and placed finely in training; who routes by time, or compares a bfloat16 sampler with a
#   float32 one, sees differences that no rounding of weights explains. Schedules of more steps at high noise call it at equal times.
# Way round: a hook on `time_text_embed` that gives it the time of the call in float32 (run below), or the model in float32.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$dir/venv/bin/python" - <<'PY'
import warnings
from importlib.metadata import version

import torch

warnings.filterwarnings("ignore")
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

print("torch", torch.__version__, "diffusers", version("diffusers"))
torch.set_num_threads(1)
TIMES = [0.5 + i / 1000 for i in range(500)]
torch.manual_seed(0)
sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "joint_attention_dim": 24}
flux = FluxTransformer2DModel(
    in_channels=16, num_single_layers=1, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6), **sizes
)
sd3 = SD3Transformer2DModel(sample_size=4, patch_size=2, in_channels=4, pooled_projection_dim=20, caption_projection_dim=32, **sizes)


def told(model: torch.nn.Module, *, exact: bool = False, **inputs: torch.Tensor) -> int:
    """Of 500 different times, how many the sinusoids are told."""
    model.to(torch.bfloat16)
    times: list[float] = []
    hooks = [model.time_text_embed.time_proj.register_forward_hook(lambda module, args, out: times.append(args[0].item()))]
    scale = 1000.0 if model is sd3 else 1.0
    for time in TIMES:
        at = torch.tensor([time * scale])
        if exact:  # the way round
            give = lambda module, args, at=at: (at * 1000, *args[1:])  # noqa: E731
            hooks.append(model.time_text_embed.register_forward_pre_hook(give))
        with torch.no_grad():
            model(timestep=at, **inputs)
        if exact:
            hooks.pop().remove()
    hooks[0].remove()
    return len(set(times))


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


text = {"encoder_hidden_states": half(1, 3, 24), "pooled_projections": half(1, 20)}
of_flux = {"hidden_states": half(1, 4, 16), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), **text}
counts = {
    "Flux": told(flux, **of_flux),
    "SD3": told(sd3, hidden_states=half(1, 4, 4, 4), **text),
    "Flux, with the hook": told(flux, exact=True, **of_flux),
}
for name, count in counts.items():
    print(f"{name:20s}: {count} of {len(TIMES)} times between 0.5 and 1")
assert counts["Flux"] < 140 and counts["SD3"] == counts["Flux, with the hook"] == len(TIMES)
print("as described")
PY
