#!/usr/bin/env bash
# DiTTransformer2DModel embeds the timestep with other frequencies than the published DiT.
#
# Library: diffusers 0.42.1 (torch 2.13.0).
# Expected: the class carries the name and the shapes of DiT, so weights of a DiT that was trained elsewhere, copied
#   tensor by tensor, compute the same. DiT's frequencies are 10000^(-k / 128), k = 0 to 127.
# What happens: the class fixes downscale_freq_shift=1, which makes them 10000^(-k / 127). At small timesteps nobody
#   sees it; at timestep 999 the phases are off by more than a radian and the embedding has cosine 0.49 with the
#   published one. No option of the class changes it.
# Why it matters: whoever converts own DiT weights, or compares an own DiT with this class, gets a silent error that
#   grows with the noise level: the block of the highest noise is told another level, the lowest one is fine, so a
#   test at a small timestep passes.
# Way round: set `downscale_freq_shift = 0` on the `time_proj` of every layer's `norm1.emb`, or fine-tune after copying.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'PY'
import diffusers
import torch
from diffusers import DiTTransformer2DModel

print("diffusers", diffusers.__version__, "torch", torch.__version__)
model = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=4, num_embeds_ada_norm=10
)
embed = model.transformer_blocks[0].norm1.emb.time_proj


def published(t: torch.Tensor) -> torch.Tensor:
    """DiT's sinusoids in closed form: 128 cosines, then 128 sines."""
    angle = t.double()[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


t = torch.tensor([1, 10, 100, 500, 999])
cosine = torch.cosine_similarity(embed(t).double(), published(t))
for step, value in zip(t.tolist(), cosine.tolist(), strict=True):
    print(f"timestep {step:3d}: cosine with the published embedding {value:.4f}")
assert cosine[0] > 0.9999, "small timesteps hide it"
assert cosine[-1] < 0.6
assert all(layer.norm1.emb.time_proj.downscale_freq_shift == 1 for layer in model.transformer_blocks)

embed.downscale_freq_shift = 0  # the way round
assert (embed(t).double() - published(t)).abs().max() < 1e-3
print("as described")
PY
