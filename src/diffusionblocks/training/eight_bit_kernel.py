"""8-bit AdamW whose step is one kernel over all parameters of a unit, where torchao's is one for each parameter.

State, quantisation and arithmetic are torchao's (`torchao.optim.AdamW8bit`): moments in codes of one byte, a scale for
every 256 elements, and the 256 values of Dettmers et al. (arXiv 2110.02861) that codes stand for; parameters too small
for that have moments in float32. Only the count of steps is on the device, so no step reads it off the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit

from .adamw_kernel import logs2
from .address_table import HAS_TRITON, AddressTables, jit, row_of

if HAS_TRITON:
    import triton.language as tl

#: Elements that share a scale.
_BLOCK = 256
#: Such blocks of a program, and its warps of 32 threads.
_ROWS, _WARPS = 1, 2
#: Of a tensor's row: its first program, addresses of parameter, gradient, both moments, their scales and the count of
#: steps, the number of elements, and again where the moments are in 8 bits, else 0.
_COLUMNS = 10


@jit()
def _codes_of(x, values_at, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The code whose value is nearest to x in [-1, 1], of 256 ascending values.

    Values are spread evenly over each of seven decades, twice as many in each as in the one below. So which is near is
    arithmetic; the values themselves decide among it and its neighbours. That is torchao's binary search, to the bit,
    with half as many reads, most of which need not wait for one another.
    """
    size = tl.abs(x)
    scaled = size
    count = tl.full(x.shape, 64 if SIGNED else 128, tl.int32)  # values of the decade
    for decade in tl.static_range(6):
        below = size < 10.0 ** -(decade + 1)
        scaled = tl.where(below, size * 10.0 ** (decade + 1), scaled)
        count = tl.where(below, (32 if SIGNED else 64) >> decade, count)
    place = ((scaled - 0.1) / 0.9 * count).to(tl.int32)
    place = tl.minimum(tl.maximum(place, 0), count - 1)
    near = tl.where(x < 0, 127 - count - place, 127 + count + place) if SIGNED else count - 1 + place
    # At most one off: `code` is the last whose value is not above x.
    code = near - 2
    code += tl.where(x >= tl.load(values_at + tl.maximum(near - 1, 0)), 1, 0)
    code += tl.where(x >= tl.load(values_at + near), 1, 0)
    code += tl.where(x >= tl.load(values_at + near + 1), 1, 0)
    code = tl.maximum(code, 0)
    above = tl.minimum(code + 1, 255)
    low = tl.load(values_at + code)
    high = tl.load(values_at + above)
    return tl.where(x - low >= (high - low) * 0.5, above, code)


@jit("tensors")
def _adamw_8bit(  # type: ignore[no-untyped-def]
    table_at, lr_at, signed_at, unsigned_at, tensors, log_beta1, log_beta2, rest1, rest2, decay, eps,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, number = row_of(table_at, tensors, COLUMNS)
    start = number.to(tl.int64) * ROWS * BLOCK
    parameter_at = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient_at = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(row + 6).to(tl.pointer_type(tl.float32))).to(tl.float64)
    size = tl.load(row + 7)
    size_in_codes = tl.load(row + 8)  # all elements or none
    lines = tl.arange(0, ROWS)
    place = start + lines[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < size
    lr = tl.load(lr_at)
    correction1 = 1.0 - tl.exp2(step * log_beta1).to(tl.float32)  # in float32, as torchao's
    correction2 = 1.0 - tl.exp2(step * log_beta2).to(tl.float32)
    parameter = tl.load(parameter_at + place, mask=inside, other=0.0)
    gradient = tl.load(gradient_at + place, mask=inside, other=0.0)
    first32_at = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    second32_at = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    first8_at = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    second8_at = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
    scale_place = start // BLOCK + lines
    first_scale_at = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    second_scale_at = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    in_codes = place < size_in_codes
    plain = place < size - size_in_codes
    with_scale = scale_place * BLOCK < size_in_codes
    first_code = tl.load(first8_at + place, mask=in_codes, other=0).to(tl.int32)
    second_code = tl.load(second8_at + place, mask=in_codes, other=0).to(tl.int32)
    first_scale = tl.load(first_scale_at + scale_place, mask=with_scale, other=0.0)
    second_scale = tl.load(second_scale_at + scale_place, mask=with_scale, other=0.0)
    first = tl.load(first32_at + place, mask=plain, other=0.0)
    second = tl.load(second32_at + place, mask=plain, other=0.0)
    first = tl.where(in_codes, tl.load(signed_at + first_code) * first_scale[:, None], first)
    second = tl.where(in_codes, tl.load(unsigned_at + second_code) * second_scale[:, None], second)

    parameter -= lr * decay * parameter
    first += rest1 * (gradient - first)
    second += rest2 * (gradient * gradient - second)
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.sqrt_rn(correction2 + tl.zeros_like(second))) + eps
    parameter -= tl.div_rn(lr * tl.div_rn(first, correction1 + tl.zeros_like(first)), denominator)
    tl.store(parameter_at + place, parameter, mask=inside)

    tl.store(first32_at + place, first, mask=plain)
    tl.store(second32_at + place, second, mask=plain)
    first_scale = tl.maximum(tl.max(tl.abs(first), axis=1), 1e-12)
    second_scale = tl.maximum(tl.max(tl.abs(second), axis=1), 1e-12)
    first_code = _codes_of(tl.div_rn(first, first_scale[:, None] + tl.zeros_like(first)), signed_at, True)
    second_code = _codes_of(tl.div_rn(second, second_scale[:, None] + tl.zeros_like(second)), unsigned_at, False)
    tl.store(first8_at + place, first_code.to(tl.uint8), mask=in_codes)
    tl.store(second8_at + place, second_code.to(tl.uint8), mask=in_codes)
    tl.store(first_scale_at + scale_place, first_scale, mask=with_scale)
    tl.store(second_scale_at + scale_place, second_scale, mask=with_scale)


class OneKernelAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """torchao's 8-bit AdamW for float32 parameters, contiguous and on one GPU, in one kernel.

    Args:
        parameters: what it moves.
        options: of `torchao.optim.AdamW8bit`; `lr` is a float32 tensor on the device.
    """

    def __init__(self, parameters: Sequence[Tensor], **options: Any) -> None:
        super().__init__(parameters, **options)
        self._tables = AddressTables(_ROWS * _BLOCK)
        self.reserve()

    def reserve(self) -> None:
        """Be ready for a step that is captured in a CUDA graph."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if parameters[0].is_cuda:
            self._tables.reserve(len(parameters), _COLUMNS)

    @staticmethod
    def takes(parameters: Sequence[Tensor], *, on_gpu: bool = True) -> bool:
        """Whether it can move these parameters here.

        Args:
            parameters: they.
            on_gpu: ask for a GPU's; Triton's interpreter takes a CPU's as well.
        """
        return HAS_TRITON and all(
            p.is_cuda >= on_gpu and p.dtype == torch.float32 and p.is_contiguous() for p in parameters
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; with no host sync, and in a CUDA graph that is captured too."""
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        if closure is not None or not parameters or not all(self.state.get(p) for p in parameters):
            result = super().step(
                closure
            )  # which makes the state, and counts on the host: no captured step comes there
            for p in parameters:
                self.state[p]["step"] = self.state[p]["step"].to(p.device)
            return result
        update([(p, p.grad, self.state[p]) for p in parameters], group, self._tables)
        return None


def update(rows: Sequence[tuple[Tensor, Any, dict[str, Any]]], group: dict[str, Any], tables: AddressTables) -> None:
    """8-bit AdamW's step of (parameter, gradient, state) triples.

    Args:
        rows: the triples; a state has `step`, `exp_avg` and `exp_avg_sq`, as torchao's.
        group: settings, as of an optimizer's group.
        tables: whose memory a captured step takes.
    """
    device = rows[0][0].device
    torch._foreach_add_([state["step"] for *_, state in rows], 1.0)
    gradients = [gradient.contiguous() for _, gradient, _ in rows]  # they live until the kernel is launched
    entries: list[list[int]] = []
    for (p, _, state), gradient in zip(rows, gradients, strict=True):
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        in_codes = hasattr(moments[0], "codes")
        data = [moment.codes if in_codes else moment for moment in moments]
        scales = [moment.scale if in_codes else moment for moment in moments]
        tensors = [p, gradient, *data, *scales, state["step"]]
        entries.append([*(tensor.data_ptr() for tensor in tensors), p.numel(), p.numel() if in_codes else 0])
    table, programs = tables.on(device, entries, [p.numel() for p, *_ in rows])
    _adamw_8bit[(programs,)](
        table, group["lr"], *_values(device), len(rows), *logs2(group["betas"]),
        *(1 - beta for beta in group["betas"]), group["weight_decay"], group["eps"],
        _COLUMNS, _ROWS, _BLOCK, num_warps=_WARPS,
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _values(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the codes of a first and of a second moment stand for."""
    from torchao.optim.quant_utils import create_dynamic_map

    signed, unsigned = (torch.tensor(create_dynamic_map(signed=signed), device=device) for signed in (True, False))
    return signed, unsigned
