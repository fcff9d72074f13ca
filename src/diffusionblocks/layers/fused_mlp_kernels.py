"""Triton kernels of `fused_mlp`: a two-layer MLP with exact GELU that never writes its hidden activation.

x (rows, dim) -> gelu(x W1' + b1) W2', with the weights as `nn.Linear` has them: W1 (hidden, dim), W2 (dim, hidden).
dim is so small that a tile holds whole rows. Sums over what several programs share are left to the caller, as slices
of a leading dimension: so every sum has one order, and results are the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it
    triton = tl = None


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _upper_tail(a):  # type: ignore[no-untyped-def]
    """1 - Phi(a) of a >= 0, with Phi the normal distribution: an exponential of a polynomial, exact to 2.5e-7."""
    p = -6.04085415e-07
    p = p * a + 1.01404421e-05
    p = p * a - 3.33935495e-05
    p = p * a - 0.000544757233
    p = p * a + 0.00765565597
    p = p * a - 0.0529564247
    p = p * a - 0.459034324
    p = p * a - 1.15112984
    return tl.exp2(p * a - 0.999999523)


@_jit
def _gelu(v):  # type: ignore[no-untyped-def]
    a = tl.abs(v)
    return tl.maximum(v, 0.0) - a * _upper_tail(a)


@_jit
def _gelu_and_slope(v):  # type: ignore[no-untyped-def]
    a = tl.abs(v)
    tail = _upper_tail(a)
    density = tl.exp2(v * v * -0.72134752) * 0.39894228
    return tl.maximum(v, 0.0) - a * tail, tl.where(v >= 0, 1.0 - tail, tail) + v * density


@_jit
def _forward(  # type: ignore[no-untyped-def]
    x_at, w1_at, b1_at, w2_at, out_at, rows,
    HIDDEN: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[part] = gelu(x W1' + b1) W2' of one part of the hidden units, for a tile of rows."""
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    inside = (row < rows)[:, None]
    x = tl.load(x_at + row[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    total = tl.zeros([ROWS, DIM], tl.float32)
    for start in tl.range(0, PART, CHUNK):
        unit = part * PART + start + tl.arange(0, CHUNK)
        w1 = tl.load(w1_at + unit[:, None] * DIM + dim[None, :])
        w2 = tl.load(w2_at + dim[:, None] * HIDDEN + unit[None, :])
        b1 = tl.load(b1_at + unit).to(tl.float32)
        hidden = _gelu(tl.dot(x, tl.trans(w1)) + b1[None, :])
        total = tl.dot(hidden.to(x.dtype), tl.trans(w2), total)
    place = part.to(tl.int64) * rows * DIM
    tl.store(out_at + place + row[:, None] * DIM + dim[None, :], total, mask=inside)


@_jit
def _backward_input(  # type: ignore[no-untyped-def]
    x_at, g_at, w1_at, b1_at, w2_at, dx_at, rows,
    HIDDEN: tl.constexpr, DIM: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dx[part] of one part of the hidden units, for a tile of rows."""
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    inside = (row < rows)[:, None]
    x = tl.load(x_at + row[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    g = tl.load(g_at + row[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    total = tl.zeros([ROWS, DIM], tl.float32)
    for start in tl.range(0, PART, CHUNK):
        unit = part * PART + start + tl.arange(0, CHUNK)
        w1 = tl.load(w1_at + unit[:, None] * DIM + dim[None, :])
        w2 = tl.load(w2_at + dim[:, None] * HIDDEN + unit[None, :])
        b1 = tl.load(b1_at + unit).to(tl.float32)
        before = tl.dot(g, w2) * _gelu_and_slope(tl.dot(x, tl.trans(w1)) + b1[None, :])[1]
        total = tl.dot(before.to(x.dtype), w1, total)
    place = part.to(tl.int64) * rows * DIM
    tl.store(dx_at + place + row[:, None] * DIM + dim[None, :], total, mask=inside)


@_jit
def _backward_weights(  # type: ignore[no-untyped-def]
    x_at, g_at, w1_at, b1_at, w2_at, dw1_at, dw2_at, db1_at, rows,
    HIDDEN: tl.constexpr, DIM: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dW1, dW2 and db1 of a chunk of hidden units, over one share of the rows."""
    unit = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    part = tl.program_id(1)
    dim = tl.arange(0, DIM)
    w1 = tl.load(w1_at + unit[:, None] * DIM + dim[None, :])
    w2 = tl.trans(tl.load(w2_at + dim[:, None] * HIDDEN + unit[None, :]))
    b1 = tl.load(b1_at + unit).to(tl.float32)
    dw1 = tl.zeros([CHUNK, DIM], tl.float32)
    dw2 = tl.zeros([CHUNK, DIM], tl.float32)
    db1 = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, SHARE, ROWS):
        row = part * SHARE + start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        x = tl.load(x_at + row[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        g = tl.load(g_at + row[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        hidden, slope = _gelu_and_slope(tl.dot(w1, tl.trans(x)) + b1[:, None])
        before = tl.dot(w2, tl.trans(g)) * slope  # 0 in rows that are not there
        dw2 = tl.dot(hidden.to(x.dtype), g, dw2)
        dw1 = tl.dot(before.to(x.dtype), x, dw1)
        db1 += tl.sum(before, 1)
    place = part.to(tl.int64) * HIDDEN * DIM
    tl.store(dw1_at + place + unit[:, None] * DIM + dim[None, :], dw1)
    tl.store(dw2_at + place + dim[None, :] * HIDDEN + unit[:, None], dw2)
    tl.store(db1_at + part * HIDDEN + unit, db1)


def _tiles(rows: int, tile: int) -> int:
    return -(-rows // tile)


def forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, tiles: Any) -> Tensor:
    """Slices (parts, rows, dim), float32, whose sum is gelu(x W1' + b1) W2'."""
    (rows, dim), hidden = x.shape, len(w1)
    out = torch.empty(tiles.parts, rows, dim, dtype=torch.float32, device=x.device)
    _forward[_tiles(rows, tiles.rows), tiles.parts](
        x, w1, b1, w2, out, rows, hidden, dim, hidden // tiles.parts, tiles.rows, tiles.chunk,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def backward_input(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, tiles: Any) -> Tensor:
    """dx as slices (parts, rows, dim), float32."""
    (rows, dim), hidden = x.shape, len(w1)
    dx = torch.empty(tiles.parts, rows, dim, dtype=torch.float32, device=x.device)
    _backward_input[_tiles(rows, tiles.rows), tiles.parts](
        x, g, w1, b1, w2, dx, rows, hidden, dim, hidden // tiles.parts, tiles.rows, tiles.chunk,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dx


def backward_weights(
    x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, tiles: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """dW1 (parts, hidden, dim), dW2 (parts, dim, hidden) and db1 (parts, hidden) as slices, float32."""
    (rows, dim), hidden = x.shape, len(w1)
    share = _tiles(_tiles(rows, tiles.rows), tiles.parts) * tiles.rows
    make: Any = {"dtype": torch.float32, "device": x.device}
    dw1, dw2 = torch.empty(tiles.parts, hidden, dim, **make), torch.empty(tiles.parts, dim, hidden, **make)
    db1 = torch.empty(tiles.parts, hidden, **make)
    _backward_weights[hidden // tiles.chunk, tiles.parts](
        x, g, w1, b1, w2, dw1, dw2, db1, rows, hidden, dim, share, tiles.rows, tiles.chunk,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dw1, dw2, db1
