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
def _load(at, place, first, tokens, by_token, SIZE: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """SIZE tokens from the first, (SIZE, DIM), and 0 for those that are not there."""
    token = first + tl.arange(0, SIZE)[:, None]
    return tl.load(at + place + token * by_token + tl.arange(0, DIM)[None, :], mask=token < tokens, other=0.0)


@_jit
def _store(at, values, first, tokens, heads, SIZE: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store (SIZE, DIM) as tokens from the first, in (batch, tokens, heads, DIM)."""
    token = first + tl.arange(0, SIZE)[:, None]
    place = (tl.program_id(0) // heads * tokens + token) * heads + tl.program_id(0) % heads
    tl.store(at + place * DIM + tl.arange(0, DIM)[None, :], values.to(at.dtype.element_ty), mask=token < tokens)


@_jit
def _scores(q, k, first, tokens, scale, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    there = first + tl.arange(0, SIZE) < tokens
    return tl.where(there[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))


@_jit
def _dropped(p, seed_at, limit, factor, first, ROWS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values (ROWS, SIZE) after dropout, by a hash of the seed and of the scores' places."""
    column = first + tl.arange(0, SIZE)[None, :]
    bits = (tl.program_id(0) * (ROWS * ROWS) + tl.arange(0, ROWS)[:, None] * ROWS + column).to(tl.uint32)
    bits = bits ^ tl.load(seed_at).to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = bits ^ tl.load(seed_at + 1).to(tl.uint32)
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return tl.where((bits >> 8).to(tl.int32) >= limit, p * factor, 0.0)


@_jit
def _forward(  # type: ignore[no-untyped-def]
    q_at, k_at, v_at, seed_at, out_at, scale, limit, factor, heads, tokens, by_batch, by_head, by_token,
    DIM: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """softmax(q k') v of one head, with `scale` for powers of two; keys are MAIN and REST, which may be none."""
    place = tl.program_id(0) // heads * by_batch + tl.program_id(0) % heads * by_head
    q = _load(q_at, place, 0, tokens, by_token, ROWS, DIM)
    p = _scores(q, _load(k_at, place, 0, tokens, by_token, MAIN, DIM), 0, tokens, scale, MAIN)
    most = tl.max(p, 1)
    if REST > 0:
        rest = _scores(q, _load(k_at, place, MAIN, tokens, by_token, REST, DIM), MAIN, tokens, scale, REST)
        most = tl.maximum(most, tl.max(rest, 1))
        rest = tl.exp2(rest - most[:, None])
    p = tl.exp2(p - most[:, None])
    total = tl.sum(p, 1)
    if REST > 0:
        total += tl.sum(rest, 1)
    if DROP:
        p = _dropped(p, seed_at, limit, factor, 0, ROWS, MAIN)
    v = _load(v_at, place, 0, tokens, by_token, MAIN, DIM)
    out = tl.dot(p.to(v.dtype), v)
    if REST > 0:
        if DROP:
            rest = _dropped(rest, seed_at, limit, factor, MAIN, ROWS, REST)
        v = _load(v_at, place, MAIN, tokens, by_token, REST, DIM)
        out = tl.dot(rest.to(v.dtype), v, out)
    _store(out_at, out / total[:, None], 0, tokens, heads, ROWS, DIM)


@_jit
def _backward(  # type: ignore[no-untyped-def]
    q_at, k_at, v_at, g_at, seed_at, dq_at, dk_at, dv_at, scale, slope, limit, factor, heads, tokens,
    by_batch, by_head, by_token,
    DIM: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """The gradients of q, k and v of one head; all scores are computed again."""
    place = tl.program_id(0) // heads * by_batch + tl.program_id(0) % heads * by_head
    q = _load(q_at, place, 0, tokens, by_token, ROWS, DIM)
    k = _load(k_at, place, 0, tokens, by_token, MAIN, DIM)
    v = _load(v_at, place, 0, tokens, by_token, MAIN, DIM)
    out = tl.program_id(0) // heads * tokens * heads * DIM + tl.program_id(0) % heads * DIM
    g = _load(g_at, out, 0, tokens, heads * DIM, ROWS, DIM)
    p = _scores(q, k, 0, tokens, scale, MAIN)
    most = tl.max(p, 1)
    if REST > 0:
        k2 = _load(k_at, place, MAIN, tokens, by_token, REST, DIM)
        v2 = _load(v_at, place, MAIN, tokens, by_token, REST, DIM)
        p2 = _scores(q, k2, MAIN, tokens, scale, REST)
        most = tl.maximum(most, tl.max(p2, 1))
        p2 = tl.exp2(p2 - most[:, None])
    p = tl.exp2(p - most[:, None])
    total = tl.sum(p, 1)
    if REST > 0:
        total += tl.sum(p2, 1)
        p2 = p2 / total[:, None]
    p = p / total[:, None]
    dp = tl.dot(g, tl.trans(v))
    after = p
    if DROP:
        dp = _dropped(dp, seed_at, limit, factor, 0, ROWS, MAIN)
        after = _dropped(p, seed_at, limit, factor, 0, ROWS, MAIN)
    _store(dv_at, tl.dot(tl.trans(after.to(v.dtype)), g), 0, tokens, heads, MAIN, DIM)
    delta = tl.sum(p * dp, 1)
    if REST > 0:
        dp2 = tl.dot(g, tl.trans(v2))
        after = p2
        if DROP:
            dp2 = _dropped(dp2, seed_at, limit, factor, MAIN, ROWS, REST)
            after = _dropped(p2, seed_at, limit, factor, MAIN, ROWS, REST)
        _store(dv_at, tl.dot(tl.trans(after.to(v.dtype)), g), MAIN, tokens, heads, REST, DIM)
        delta += tl.sum(p2 * dp2, 1)
    ds = (p * (dp - delta[:, None]) * slope).to(v.dtype)
    dq = tl.dot(ds, k)
    _store(dk_at, tl.dot(tl.trans(ds), q), 0, tokens, heads, MAIN, DIM)
    if REST > 0:
        ds2 = (p2 * (dp2 - delta[:, None]) * slope).to(v.dtype)
        dq = tl.dot(ds2, k2, dq)
        _store(dk_at, tl.dot(tl.trans(ds2), q), MAIN, tokens, heads, REST, DIM)
    _store(dq_at, dq, 0, tokens, heads, ROWS, DIM)


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of the same strides, each feature behind the other."""
    if len({tensor.stride() for tensor in tensors}) == 1 and tensors[0].stride(-1) == 1:
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def _settings(q: Tensor, dropout: float, scale: float) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What both kernels are told: numbers, and constants."""
    _, heads, tokens, dim = q.shape
    rows = max(16, triton.next_power_of_2(tokens))
    # Few tokens beyond a power of two are keys of their own: 65 are 64 and 16, not 128.
    main, rest = (rows // 2, max(16, triton.next_power_of_2(tokens - rows // 2))) if tokens > 32 else (rows, 0)
    if main + rest > rows * 3 // 4:
        main, rest = rows, 0
    numbers = (round(dropout * 2**24), 1 / (1 - dropout), heads, tokens, *q.stride()[:3])
    return numbers, (dim, rows, main, rest, dropout > 0)


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
