"""AdamW whose step is one kernel over all parameters, a Triton program for every thousand elements.

torch's fused step gives each program 65,536 elements: a model of a few million parameters keeps a fraction of a GPU
busy. State, settings and arithmetic are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .address_table import HAS_TRITON, AddressTables, jit, row_of

if HAS_TRITON:
    import triton.language as tl

#: Elements of a program.
_BLOCK = 1024
#: More parameters than these torch's own step spreads over the whole GPU.
_MOST = 2**24
#: Of a tensor's row: its first program, addresses of parameter, gradient, moments and step, and the number of elements.
_COLUMNS = 7


@jit("tensors")
def _adamw(  # type: ignore[no-untyped-def]
    table_at, lr_at, tensors, log_beta1, log_beta2, rest1, rest2, decay, eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, number = row_of(table_at, tensors, COLUMNS)
    parameter_at = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient_at = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    first_at = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    second_at = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
    place = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.load(row + 5)
    lr = tl.load(lr_at)
    correction1 = (1.0 - tl.exp2(step * log_beta1)).to(tl.float32)
    correction2 = tl.sqrt(1.0 - tl.exp2(step * log_beta2)).to(tl.float32)
    parameter = tl.load(parameter_at + place, mask=inside, other=0.0)
    gradient = tl.load(gradient_at + place, mask=inside, other=0.0)
    first = tl.load(first_at + place, mask=inside, other=0.0)
    second = tl.load(second_at + place, mask=inside, other=0.0)
    parameter -= lr * decay * parameter
    first += rest1 * (gradient - first)
    second += rest2 * (gradient * gradient - second)
    parameter -= lr / correction1 * first / (tl.sqrt(second) / correction2 + eps)
    tl.store(parameter_at + place, parameter, mask=inside)
    tl.store(first_at + place, first, mask=inside)
    tl.store(second_at + place, second, mask=inside)


class OneKernelAdamW(torch.optim.AdamW):
    """torch's fused AdamW for float32 parameters, contiguous and on one GPU, in one kernel.

    Args:
        parameters: what it moves.
        options: of `torch.optim.AdamW`; `lr` is a tensor on the device.
    """

    def __init__(self, parameters: Sequence[Tensor], **options: Any) -> None:
        super().__init__(parameters, **options)
        self._tables = AddressTables(_BLOCK)
        self.reserve()

    def reserve(self) -> None:
        """Be ready for a step that is captured in a CUDA graph."""
        self._tables.reserve(sum(len(group["params"]) for group in self.param_groups), _COLUMNS)

    @staticmethod
    def takes(parameters: Sequence[Tensor]) -> bool:
        """Whether it can move these parameters here."""
        if not HAS_TRITON or sum(p.numel() for p in parameters) > _MOST:
            return False
        return all(p.is_cuda and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; with no host sync, and in a CUDA graph that is captured too."""
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        if closure is not None or not parameters or not all(self.state.get(p) for p in parameters):
            return super().step(closure)  # which makes the state
        update([(p, p.grad, self.state[p]) for p in parameters], group, self._tables)
        return None


def update(
    rows: Sequence[tuple[Tensor, Any, dict[str, Tensor]]], group: dict[str, Any], tables: AddressTables | None = None
) -> None:
    """AdamW's step of (parameter, gradient, state) triples.

    Args:
        rows: the triples.
        group: settings, as of an optimizer's group.
        tables: whose memory a captured step takes; None: the step is not captured.
    """
    torch._foreach_add_([state["step"] for *_, state in rows], 1.0)
    gradients = [gradient.contiguous() for _, gradient, _ in rows]  # they live until the kernel is launched
    entries = [
        [t.data_ptr() for t in (p, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])] + [p.numel()]
        for (p, _, state), gradient in zip(rows, gradients, strict=True)
    ]
    sizes = [p.numel() for p, *_ in rows]
    table, programs = (tables or AddressTables(_BLOCK)).on(rows[0][0].device, entries, sizes)
    _adamw[(programs,)](
        table, group["lr"], len(rows), *logs2(group["betas"]), *(1 - beta for beta in group["betas"]),
        group["weight_decay"], group["eps"], _COLUMNS, _BLOCK, num_warps=4,
    )  # fmt: skip


def logs2(betas: Sequence[float]) -> list[float]:
    """Base-2 logarithms of decays, from which a kernel makes their powers."""
    return [math.log2(beta) if beta else -math.inf for beta in betas]
