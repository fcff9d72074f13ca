"""A linear layer with the tanh form of GELU behind it, as one product: for inference, one pass over memory less.

The product's own epilogue (cuBLASLt's) applies bias and GELU to float32 sums, before anything is rounded or written. It
has no backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W' + b), in its tanh form.

    Args:
        x: (..., dim), of the dtype of the others.
        weight: (out, dim), as of `nn.Linear`.
        bias: (out,).

    Returns:
        (..., out).
    """
    return torch.ops.diffusionblocks.linear_gelu(x, weight, bias)  # type: ignore[no-any-return]


@torch.library.custom_op("diffusionblocks::linear_gelu", mutates_args=(), device_types="cuda")
def _joint(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # On a CPU this function of torch has the exact GELU.
    rows = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], len(weight))


@_joint.register_kernel("cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh").to(x.dtype)


@_joint.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
