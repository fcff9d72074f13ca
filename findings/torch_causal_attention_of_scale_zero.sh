#!/usr/bin/env bash
# Causal attention with a scale of 0 or below is NaN on a CPU, where the same attention with its mask written out is right.
#
# Library: torch 2.13.0 (`scaled_dot_product_attention`).
# Expected: softmax(scale * q @ k + mask) @ v for every finite `scale`. At 0 each position takes the mean of those up to it; below 0 it prefers
#   keys that differ. Nothing in the documentation asks for a positive scale.
# What happens: with is_causal=True every row but the last is NaN, and so are the gradients. What the mask set to minus infinity is multiplied
#   by the scale: 0 times infinity is NaN, and -1 times it is plus infinity. No error.
# Why it matters: a uniform causal mean is the baseline of attention experiments and where a learned temperature starts or passes through. Which
#   implementation runs depends on arguments that look alike, so the fault comes and goes with a mask or a `sdpa_kernel`.
# Way round: the mask as a tensor, or SDPBackend.MATH (both run below); for a negative scale, the positive one with -q.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - 2>/dev/null <<'PY'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

print("torch", torch.__version__)
torch.manual_seed(0)
length = 8
visible = torch.ones(length, length).tril().bool()


def attend(scale: float, **how) -> tuple[float, bool, torch.Tensor]:
    """The share of outputs that are NaN, whether a gradient is, and the outputs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, **how)
    out.sum().backward()
    return out.isnan().float().mean().item(), bool(q.grad.isnan().any() or v.grad.isnan().any()), out.detach()


def exact(scale: float) -> torch.Tensor:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    return (scale * q @ k.mT).masked_fill(~visible, -torch.inf).softmax(-1) @ v


for scale in (0.25, 0.0, -0.25):
    share, in_gradients, out = attend(scale, is_causal=True)
    masked = attend(scale, attn_mask=visible)[2]
    with sdpa_kernel(SDPBackend.MATH):
        plain = attend(scale, is_causal=True)[2]
    errors = [round(float((o - exact(scale)).abs().max()), 6) for o in (masked, plain)]
    print("scale", scale, ": share of NaN", share, "NaN in gradients", in_gradients, "; error with a mask, with MATH", errors)
    assert max(errors) < 1e-4
    assert (share, in_gradients) == ((0.0, False) if scale > 0 else (1 - 1 / length, True))
assert not attend(-0.25)[2].isnan().any()  # without the mask all is well
print("as described")
PY
