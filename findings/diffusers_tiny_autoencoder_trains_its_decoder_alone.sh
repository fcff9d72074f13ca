#!/usr/bin/env bash
# Training a tiny autoencoder of diffusers through its forward trains the decoder alone: the latents are rounded to bytes on the way.
#
# Libraries: diffusers 0.42.1 (`AutoencoderTiny`, the class of TAESD), torch 2.13.0; `AutoencoderKL` as the control.
# Expected: model(images).sample is decode(encode(images)), and its loss trains encoder and decoder, as with diffusers' other autoencoders.
# What happens: `forward` clamps the latents to [-3, 3] and rounds them to 8 bits, as if they were kept as a PNG. A byte has no
#   gradient: every parameter of the encoder keeps `grad` None, and the optimizer passes it by. No error; the loss falls, as the decoder learns.
# Why it matters: tiny autoencoders are fine-tuned to other data and to other latents. The encoder stays what it was; weight decay and clipping see
#   half of the model; a fresh one is trained on random projections. The loss is also not that of `encode` and `decode`, which a pipeline calls.
# Way round: model.decode(model.encode(images).latents).sample (run below).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

print("torch", torch.__version__, "diffusers", diffusers.__version__)
torch.manual_seed(0)
images = torch.rand(4, 3, 32, 32) * 2 - 1


def share_trained(model, reconstruct) -> dict[str, str]:
    """How many parameters of each half a step of Adam moves."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (reconstruct(model) - images).square().mean().backward()
    optimizer.step()
    moved = {name: not torch.equal(before[name], parameter) for name, parameter in model.named_parameters()}
    return {half: f"{sum(m for n, m in moved.items() if n.startswith(half))} of {sum(n.startswith(half) for n in moved)}"
            for half in ("encoder", "decoder")}


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)


forward = share_trained(tiny(), lambda model: model(images).sample)
both = share_trained(tiny(), lambda model: model.decode(model.encode(images).latents).sample)
control = share_trained(AutoencoderKL(block_out_channels=(32,)), lambda model: model(images).sample)
print("AutoencoderTiny, forward:          parameters moved", forward)
print("AutoencoderTiny, encode and decode: parameters moved", both)
print("AutoencoderKL, forward:            parameters moved", control)
count = {half: text.split(" of ") for half, text in forward.items()}
assert count["encoder"][0] == "0" and int(count["encoder"][1]) > 50 and int(count["decoder"][0]) > 50
assert int(both["encoder"].split()[0]) > 50 and int(control["encoder"].split()[0]) > 10

with torch.no_grad():
    model = tiny()
    z = model.encode(images).latents * 100  # of the size of trained latents, some beyond 3
    model.encode = lambda x: type("Output", (), {"latents": z})()
    apart = (model(images).sample - model.decode(z).sample).abs().max()
print("largest difference of forward from decode, latents up to", round(float(z.abs().max()), 1), ":", round(float(apart), 3))
assert apart > 1e-4
print("as described")
PY
