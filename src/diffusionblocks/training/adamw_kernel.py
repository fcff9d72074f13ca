"""AdamW whose step is one kernel over all parameters, a Triton program for every thousand elements.

torch's fused step gives each program 65,536 elements: a model of a few million parameters keeps a fraction of a GPU
busy. State, settings and arithmetic are torch's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for a CPU comes without it
    triton = tl = None

#: Elements of a program.
_BLOCK = 1024
#: More parameters than these torch's own step spreads over the whole GPU.
_MOST = 2**24
#: What the table says of a tensor: addresses of parameter, gradient, moments and step, and the number of elements.
_COLUMNS = 6


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _adamw(  # type: ignore[no-untyped-def]
    table_at, lr_at, tensors, log_beta1, log_beta2, rest1, rest2, decay, eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    work = tl.load(table_at + tensors * COLUMNS + tl.program_id(0))
    row = table_at + (work >> 32) * COLUMNS
    parameter_at = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient_at = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    first_at = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    second_at = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
    place = (work & 0xFFFFFFFF) + tl.arange(0, BLOCK)
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
        self._tables: list[Tensor] = []
        self._spare: Tensor | None = None
        self.reserve()

    def reserve(self) -> None:
        """Have page-locked memory ready for a step that is captured: none can be had meanwhile."""
        if self._spare is None:
            sizes = [p.numel() for group in self.param_groups for p in group["params"]]
            length = len(sizes) * _COLUMNS + len(_work(tuple(sizes)))
            self._spare = torch.empty(length, dtype=torch.int64, pin_memory=True)

    @staticmethod
    def takes(parameters: Sequence[Tensor]) -> bool:
        """Whether it can move these parameters here."""
        if triton is None or sum(p.numel() for p in parameters) > _MOST:
            return False
        return all(p.is_cuda and p.dtype == torch.float32 and p.is_contiguous() for p in parameters)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; with no host sync, and in a CUDA graph that is captured too."""
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        if closure is not None or not parameters or not all(self.state.get(p) for p in parameters):
            return super().step(closure)  # which makes the state
        rows = [(p, p.grad, self.state[p]) for p in parameters]
        if torch.cuda.is_current_stream_capturing():
            assert self._spare is not None, "`reserve` comes before a capture"
            self._tables.append(self._spare)  # the graph reads it at every replay
            self._spare = None
            update(rows, group, self._tables[-1])
        else:
            update(rows, group)
        return None


def update(
    rows: Sequence[tuple[Tensor, Any, dict[str, Tensor]]], group: dict[str, Any], memory: Tensor | None = None
) -> None:
    """AdamW's step of (parameter, gradient, state) triples.

    Args:
        rows: the triples.
        group: settings, as of an optimizer's group.
        memory: int64, for the table that the kernel goes by, on the host; None takes some.
    """
    torch._foreach_add_([state["step"] for *_, state in rows], 1.0)
    device = rows[0][0].device
    gradients = [gradient.contiguous() for _, gradient, _ in rows]  # they live until the kernel is launched
    addresses = [
        address
        for (p, _, state), gradient in zip(rows, gradients, strict=True)
        for address in (
            *(p.data_ptr(), gradient.data_ptr(), state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr()),
            *(state["step"].data_ptr(), p.numel()),
        )
    ]
    work = _work(tuple(p.numel() for p, *_ in rows))
    values = torch.tensor([*addresses, *work])
    if memory is not None:
        values = memory[: len(values)].copy_(values)
    elif device.type == "cuda":
        values = values.pin_memory()
    (beta1, beta2), lr = group["betas"], group["lr"]
    logs = (math.log2(beta) if beta else -math.inf for beta in (beta1, beta2))
    _adamw[(len(work),)](
        values.to(device, non_blocking=True), lr, len(rows), *logs, 1 - beta1, 1 - beta2,
        group["weight_decay"], group["eps"], _COLUMNS, _BLOCK, num_warps=4,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _work(sizes: tuple[int, ...]) -> list[int]:
    """For each program, which tensor (the upper 32 bits) and from which element."""
    return [i << 32 | start for i, size in enumerate(sizes) for start in range(0, size, _BLOCK)]
