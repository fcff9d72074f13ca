"""Attention of each position to the keys before it and to one of its own, without a mask.

Queries from the second on see the keys up to the one before them: causal attention, for which kernels are fastest. The
own key joins its softmax by log-sum-exp. The gradient is the causal kernel's as well, given the joint output and
log-sum-exp, from which it makes the weights again (as ring attention does over devices, arXiv 2310.01889).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_HALVES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
aten: Any = torch.ops.aten


def has_kernel(query: Tensor, *, on_gpu: bool) -> bool:
    """Whether `past_and_own` has a kernel for such queries (batch, heads, length, dim).

    Args:
        query: in the dtype of the computation.
        on_gpu: whether a GPU's kernel is meant, wherever the tensor is.
    """
    length, dim = query.shape[2:]
    if length < 2:
        return False
    if not on_gpu:  # in float32 it is no faster, and what older versions computed shall come out bit for bit
        return query.dtype != torch.float32
    if query.dtype not in _HALVES or dim > _LARGEST_HEAD or dim % 8:
        return False
    return query.device.type != "cuda" or _has_flash_attention()


def _has_flash_attention() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


# What torch.compiler.assume_constant_result sets; it would import the compiler, which takes seconds, with this module.
_has_flash_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def past_and_own(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, scale: float | None = None
) -> Tensor:
    """softmax over keys before a position and its own, times their values: all (batch, heads, length, dim).

    Args:
        query: of the positions.
        key, value: position i sees those of 0 to i - 1.
        own_key, own_value: position i sees those of i.
        scale: of the scores; None is 1 / sqrt(dim).

    Returns:
        (batch, heads, length, dim).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Called directly, torch's kernels do not look how the numbers of a head lie, and read others.
    past = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    return _PastAndOwn.apply(*past, own_key, own_value, scale)  # type: ignore[no-any-return, no-untyped-call]


class _PastAndOwn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, scale: float
    ) -> Tensor:
        past, log_sum, *random = _causal(query[:, :, 1:], key[:, :, :-1], value[:, :, :-1], scale)
        score = _own_score(query, own_key, scale)
        log_sum = F.pad(log_sum.to(score.dtype), (1, 0), value=-torch.inf)  # the first position has no past
        joint = torch.logaddexp(log_sum, score)
        own = (score - joint).exp()[..., None] * own_value
        out = (F.pad(past, (0, 0, 1, 0)) * (log_sum - joint).exp()[..., None] + own).to(query.dtype)
        ctx.save_for_backward(query, key, value, own_key, own_value, out, joint, *random)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, own_key, own_value, out, joint, *random = ctx.saved_tensors
        gradient, scale, wide = gradients[0], ctx.scale, joint.dtype
        weight = (_own_score(query, own_key, scale) - joint).exp()[..., None]
        slope = (gradient * (own_value.to(wide) - out)).sum(-1, keepdim=True) * weight * scale
        of_past = _causal_backward(
            gradient[:, :, 1:],
            (query[:, :, 1:], key[:, :, :-1], value[:, :, :-1]),
            out[:, :, 1:],
            joint[:, :, 1:].contiguous(),
            random,
            scale,
        )
        places = ((0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 1))
        of_query, of_key, of_value = (F.pad(part, place) for part, place in zip(of_past, places, strict=True))
        of_query = (of_query + slope * own_key).to(query.dtype)
        of_own_key, of_own_value = (slope * query).to(own_key.dtype), (weight * gradient).to(own_value.dtype)
        return of_query, of_key, of_value, of_own_key, of_own_value, None


def _own_score(query: Tensor, own_key: Tensor, scale: float) -> Tensor:
    """(batch, heads, length), float32 or better."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return (query.to(wide) * own_key).sum(-1) * scale


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Output and log-sum-exp (batch, heads, length); then, of a GPU, what its kernel has of random numbers."""
    if query.device.type != "cuda":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)  # type: ignore[no-any-return]
    out, log_sum, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, scale=scale
    )
    return out, log_sum, seed, offset


def _causal_backward(
    gradient: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    log_sum: Tensor,
    random: list[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    if gradient.device.type != "cuda":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            gradient, *inputs, out, log_sum, 0.0, True, scale=scale
        )
    length = gradient.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
        gradient, *inputs, out, log_sum, None, None, length, length, 0.0, True, *random, scale=scale
    )
