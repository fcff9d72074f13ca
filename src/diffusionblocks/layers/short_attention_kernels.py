"""Triton kernels of `short_attention`: attention over so few tokens that one program holds all scores of a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it
    triton = tl = None

_WARPS = 8


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _probabilities(q, k, scale, tokens, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """softmax(scale q k'), with `scale` for powers of two; 0 at tokens that are not there."""
    scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where((tl.arange(0, SIZE) < tokens)[None, :], scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@_jit
def _keep(seed_at, limit, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which scores of this program dropout keeps: a hash of the seed and their place."""
    place = tl.program_id(0) * (SIZE * SIZE) + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    bits = place.to(tl.uint32) ^ tl.load(seed_at).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = bits ^ tl.load(seed_at + 1).to(tl.uint32)
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return (bits >> 8).to(tl.int32) >= limit


@_jit
def _forward(  # type: ignore[no-untyped-def]
    q_at, k_at, v_at, seed_at, out_at, scale, limit, factor, heads, tokens, by_batch, by_head, by_token,
    DIM: tl.constexpr, SIZE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    token, dim = tl.arange(0, SIZE)[:, None], tl.arange(0, DIM)[None, :]
    inside = token < tokens
    place = batch * by_batch + head * by_head + token * by_token + dim
    q = tl.load(q_at + place, mask=inside, other=0.0)
    k = tl.load(k_at + place, mask=inside, other=0.0)
    v = tl.load(v_at + place, mask=inside, other=0.0)
    p = _probabilities(q, k, scale, tokens, SIZE)
    if DROP:
        p = tl.where(_keep(seed_at, limit, SIZE), p * factor, 0.0)
    out = tl.dot(p.to(v.dtype), v)
    tl.store(out_at + ((batch * tokens + token) * heads + head) * DIM + dim, out.to(v.dtype), mask=inside)


@_jit
def _backward(  # type: ignore[no-untyped-def]
    q_at, k_at, v_at, g_at, seed_at, dq_at, dk_at, dv_at, scale, slope, limit, factor, heads, tokens,
    by_batch, by_head, by_token, DIM: tl.constexpr, SIZE: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    token, dim = tl.arange(0, SIZE)[:, None], tl.arange(0, DIM)[None, :]
    inside = token < tokens
    place = batch * by_batch + head * by_head + token * by_token + dim
    out = ((batch * tokens + token) * heads + head) * DIM + dim
    q = tl.load(q_at + place, mask=inside, other=0.0)
    k = tl.load(k_at + place, mask=inside, other=0.0)
    v = tl.load(v_at + place, mask=inside, other=0.0)
    g = tl.load(g_at + out, mask=inside, other=0.0)
    p = _probabilities(q, k, scale, tokens, SIZE)
    dp = tl.dot(g, tl.trans(v))
    if DROP:
        keep = _keep(seed_at, limit, SIZE)
        dp = tl.where(keep, dp * factor, 0.0)
        dv = tl.dot(tl.trans(tl.where(keep, p * factor, 0.0).to(v.dtype)), g)
    else:
        dv = tl.dot(tl.trans(p.to(v.dtype)), g)
    tl.store(dv_at + out, dv.to(v.dtype), mask=inside)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    ds = (ds * slope).to(v.dtype)
    tl.store(dq_at + out, tl.dot(ds, k).to(v.dtype), mask=inside)
    tl.store(dk_at + out, tl.dot(tl.trans(ds), q).to(v.dtype), mask=inside)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of the same strides, each feature behind the other."""
    if len({tensor.stride() for tensor in tensors}) == 1 and tensors[0].stride(-1) == 1:
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def _settings(q: Tensor, dropout: float, scale: float) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What both kernels are told: numbers, and constants."""
    _, heads, tokens, dim = q.shape
    factor, size = 1 / (1 - dropout), max(16, triton.next_power_of_2(tokens))
    numbers = (round(dropout * 2**24), factor, heads, tokens, *q.stride()[:3])
    return numbers, (dim, size, dropout > 0)


def forward(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, dropout: float, scale: float) -> Tensor:
    """(batch, heads, tokens, dim) each -> (batch, tokens, heads, dim)."""
    q, k, v = _alike(q, k, v)
    batch, heads, tokens, dim = q.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device)
    numbers, constants = _settings(q, dropout, scale)
    _forward[(batch * heads,)](q, k, v, seed, out, scale * 1.4426950408889634, *numbers, *constants, num_warps=_WARPS)
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, seed: Tensor, dropout: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, (batch, tokens, heads, dim) each, of that of the output."""
    (q, k, v), g = _alike(q, k, v), g.contiguous()
    dq = torch.empty(g.shape, dtype=q.dtype, device=q.device)
    dk, dv = torch.empty_like(dq), torch.empty_like(dq)
    numbers, constants = _settings(q, dropout, scale)
    _backward[(q.shape[0] * q.shape[1],)](
        q, k, v, g, seed, dq, dk, dv, scale * 1.4426950408889634, scale, *numbers, *constants, num_warps=_WARPS
    )
    return dq, dk, dv
