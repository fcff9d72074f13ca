#!/usr/bin/env bash
# Activation checkpointing with noise from an explicit torch.Generator: the backward pass sees other noise. No error.
#
# Library: torch 2.13.0.
# Expected: checkpoint(..., preserve_rng_state=True, the default) recomputes what the forward pass computed, or its check of
#   the recomputed tensors complains.
# What happens: only the global generators are restored. A generator of one's own goes on from where it was, so the
#   recomputed segment draws new noise. Outputs are right, shapes and dtypes agree, so the check passes; gradients belong to
#   a forward pass that never happened. Here they are off by most of their length.
# Why it matters: those who want noise to be reproducible pass a Generator, as every pipeline of diffusers does. Put the
#   noising or a stochastic layer inside the checkpointed segment and training goes on, wrongly.
# Way round: draw outside the segment and pass the noise as an argument (or make the generator afresh, from a seed, inside).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

print("torch", torch.__version__)
layer = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))


def gradient(draw: str, recompute: bool) -> tuple[Tensor, Tensor]:
    """Return a denoiser's loss and the gradient of its first weight."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(32, 16)
    given = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))

    def denoise(clean: Tensor, given: Tensor) -> Tensor:
        if draw == "own generator":
            noise = torch.randn(clean.shape, generator=generator)
        elif draw == "global generator":
            noise = torch.randn(clean.shape)
        else:
            noise = given
        return (layer(clean + noise) - noise).square().mean()

    layer.zero_grad()
    loss = checkpoint(denoise, clean, given, use_reentrant=False) if recompute else denoise(clean, given)
    loss.backward()
    return loss.detach(), layer[0].weight.grad.clone()


torch.manual_seed(3)
for module in layer:
    if isinstance(module, nn.Linear):
        module.reset_parameters()
off = {}
for draw in ("global generator", "noise as an argument", "own generator"):
    (loss, plain), (loss_again, checkpointed) = gradient(draw, False), gradient(draw, True)
    off[draw] = ((checkpointed - plain).norm() / plain.norm()).item()
    print(f"{draw:21s} same loss: {torch.equal(loss, loss_again)}, gradient off by {off[draw]:.0%}")
    assert torch.equal(loss, loss_again)
assert off["global generator"] == off["noise as an argument"] == 0
assert off["own generator"] > 0.2
print("as described")
PY
