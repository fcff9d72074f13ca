"""A two-layer MLP with exact GELU whose hidden activation is in no tensor: it is computed again in the backward pass.

Wide MLPs on a narrow residual stream are bound by reading and writing the hidden activation, not by arithmetic. On a
GPU the kernels are Triton's (`fused_mlp_kernels`); elsewhere the same operators are plain torch, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tiles:
    """How a kernel's work is cut.

    Attributes:
        parts: slices that the caller sums: of the hidden units, or of the rows where weights' gradients are computed.
        rows: of a tile.
        chunk: hidden units at a time.
        warps: of a program.
        stages: of its software pipeline.
    """

    parts: int
    rows: int
    chunk: int
    warps: int
    stages: int


#: Measured on an H200 at 8,448 rows, width 128 and 3,072 hidden units.
FORWARD = Tiles(parts=2, rows=64, chunk=64, warps=4, stages=3)
BACKWARD_INPUT = Tiles(parts=2, rows=128, chunk=64, warps=8, stages=3)
BACKWARD_WEIGHTS = Tiles(parts=5, rows=64, chunk=128, warps=8, stages=3)


def supported(dim: int, hidden: int, out: int) -> bool:
    """Whether the kernels take an MLP of these widths, and are faster at it than separate products."""
    return dim == out == 128 and hidden >= 2048 and hidden % 512 == 0


def fused_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """gelu(x W1' + b1) W2' + b2, computed in bfloat16 with float32 sums; gradients are exact, and not rounded.

    Args:
        x: (..., dim), floating point.
        w1: (hidden, dim), as of `nn.Linear`.
        b1: (hidden,).
        w2: (dim, hidden).
        b2: (dim,).

    Returns:
        (..., dim), bfloat16.
    """
    return _FusedMLP.apply(x, w1, b1, w2, b2, torch.bfloat16)  # type: ignore[no-any-return, no-untyped-call]


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dtype: torch.dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        operands = (rows, w1.to(dtype).contiguous(), b1, w2.to(dtype).contiguous())
        ctx.save_for_backward(*operands)
        ctx.like = (x.dtype, w1.dtype, b1.dtype, w2.dtype, b2.dtype)
        out = torch.ops.diffusionblocks.mlp_forward(*operands).sum(0) + b2
        return out.to(dtype).view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, w1, b1, w2 = ctx.saved_tensors
        shape = gradients[0].shape
        g = gradients[0].reshape(x.shape).to(x.dtype).contiguous()
        dx = torch.ops.diffusionblocks.mlp_backward_input(x, g, w1, b1, w2)
        dw1, dw2, db1 = torch.ops.diffusionblocks.mlp_backward_weights(x, g, w1, b1, w2)
        values = (dx.sum(0).view(shape), dw1.sum(0), db1.sum(0), dw2.sum(0), _wide(g).sum(0))
        return (*(gradient.to(dtype) for gradient, dtype in zip(values, ctx.like, strict=True)), None)


# ---- operators: torch.compile and CUDA graphs take them as they are ----------------------------------------------


def _kernels() -> Any:
    from . import fused_mlp_kernels  # Triton takes a moment, and is not there on a machine without a GPU

    return fused_mlp_kernels


@torch.library.custom_op("diffusionblocks::mlp_forward", mutates_args=(), device_types="cuda")
def mlp_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Slices (parts, rows, dim), float32, whose sum is gelu(x W1' + b1) W2'."""
    return _kernels().forward(x, w1, b1, w2, FORWARD)  # type: ignore[no-any-return]


@torch.library.custom_op("diffusionblocks::mlp_backward_input", mutates_args=(), device_types="cuda")
def mlp_backward_input(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """Slices (parts, rows, dim), float32, whose sum is the gradient of x."""
    return _kernels().backward_input(x, g, w1, b1, w2, BACKWARD_INPUT)  # type: ignore[no-any-return]


@torch.library.custom_op("diffusionblocks::mlp_backward_weights", mutates_args=(), device_types="cuda")
def mlp_backward_weights(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slices, float32, whose sums are the gradients of W1, W2 and b1."""
    return _kernels().backward_weights(x, g, w1, b1, w2, BACKWARD_WEIGHTS)  # type: ignore[no-any-return]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@mlp_forward.register_kernel("cpu")
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return _wide(F.gelu(_wide(x @ w1.t()) + b1).to(x.dtype) @ w2.t())[None]


def _plain_backward(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    before = _wide(x @ w1.t()) + b1
    density = (-before.square() / 2).exp() * (2 * torch.pi) ** -0.5
    slope = torch.special.ndtr(before) + before * density
    gradient = _wide(g @ w2) * slope
    return F.gelu(before).to(x.dtype), gradient, _wide(gradient.to(x.dtype) @ w1)[None]


@mlp_backward_input.register_kernel("cpu")
def _(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return _plain_backward(x, g, w1, b1, w2)[2]


@mlp_backward_weights.register_kernel("cpu")
def _(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, gradient, _ = _plain_backward(x, g, w1, b1, w2)
    dw1, dw2 = gradient.to(x.dtype).t() @ x, g.t() @ hidden
    return _wide(dw1)[None], _wide(dw2)[None], gradient.sum(0)[None]


def _parts(x: Tensor, tiles: Tiles) -> int:
    return 1 if x.device.type == "cpu" else tiles.parts


def _slices(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


@mlp_forward.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return _slices(x, _parts(x, FORWARD), *x.shape)


@mlp_backward_input.register_fake
def _(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return _slices(x, _parts(x, BACKWARD_INPUT), *x.shape)


@mlp_backward_weights.register_fake
def _(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = _parts(x, BACKWARD_WEIGHTS)
    return _slices(x, parts, *w1.shape), _slices(x, parts, *w2.shape), _slices(x, parts, len(w1))
