"""Attention over few tokens with dropout, whose scores are in no tensor: one program computes a head's whole.

Kernels for long sequences work on tiles of 128 tokens in three passes backward; for 65 tokens most of that is idle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_short(tokens: int, dim: int) -> bool:
    """Whether one program holds so many tokens of a head of this size, faster than kernels for long sequences."""
    return 32 < tokens <= 96 and dim == 32


def short_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """dropout(softmax(scale q k')) v, without a mask.

    Args:
        q: (batch, heads, tokens, dim), as k and v.
        k: keys.
        v: values.
        dropout: share of the scores that are dropped, by torch's global generator.
        scale: default dim ** -0.5.

    Returns:
        (batch, heads, tokens, dim).
    """
    seed = torch.randint(2**31 - 1, (2,), device=q.device, dtype=torch.int32) if dropout > 0 else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _ShortAttention.apply(q, k, v, seed, dropout, scale)  # type: ignore[no-any-return, no-untyped-call]


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, dropout: float, scale: float) -> Tensor:
        if seed is None:
            seed = q.new_zeros(2, dtype=torch.int32)
        ctx.save_for_backward(q, k, v, seed)
        ctx.settings = dropout, scale
        return torch.ops.diffusionblocks.attention_forward(q, k, v, seed, dropout, scale).transpose(1, 2)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, seed = ctx.saved_tensors
        g = gradients[0].transpose(1, 2).contiguous()
        gradients = torch.ops.diffusionblocks.attention_backward(q, k, v, g, seed, *ctx.settings)
        return (*(gradient.transpose(1, 2) for gradient in gradients), None, None, None)


def _kernels() -> Any:
    from . import short_attention_kernels  # Triton takes a moment, and is not there on a machine without a GPU

    return short_attention_kernels


@torch.library.custom_op("diffusionblocks::attention_forward", mutates_args=(), device_types="cuda")
def attention_forward(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, dropout: float, scale: float) -> Tensor:
    """(batch, heads, tokens, dim) each -> (batch, tokens, heads, dim)."""
    return _kernels().forward(q, k, v, seed, dropout, scale)  # type: ignore[no-any-return]


@torch.library.custom_op("diffusionblocks::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, seed: Tensor, dropout: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, (batch, tokens, heads, dim) each, of that of the output."""
    return _kernels().backward(q, k, v, g, seed, dropout, scale)  # type: ignore[no-any-return]


# ---- on a CPU, for tests: the same function, and the same scores dropped ------------------------------------------


def _factors(q: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """What dropout multiplies scores (batch, heads, tokens, tokens) by."""
    batch, heads, tokens, _ = q.shape
    size = max(16, 1 << (tokens - 1).bit_length())
    i = torch.arange(tokens)
    places = torch.arange(batch * heads)[:, None, None] * size**2 + i[:, None] * size + i
    bits = places ^ int(seed[0])
    bits = ((bits ^ bits >> 16) * 0x85EBCA6B & 0xFFFFFFFF) ^ int(seed[1])
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    keep = (bits >> 8) >= round(dropout * 2**24)
    return keep.view(batch, heads, tokens, tokens) / (1 - dropout)


@attention_forward.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, dropout: float, scale: float) -> Tensor:
    p = (q @ k.mT * scale).softmax(-1)
    return ((p * _factors(q, seed, dropout).to(p)) @ v).transpose(1, 2).contiguous()


@attention_backward.register_kernel("cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, seed: Tensor, dropout: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    g = g.transpose(1, 2)
    p = (q @ k.mT * scale).softmax(-1)
    factors = _factors(q, seed, dropout).to(p)
    dp = g @ v.mT * factors
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds @ k, ds.mT @ q, (p * factors).mT @ g
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, dropout: float, scale: float) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim)


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, seed: Tensor, dropout: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)
