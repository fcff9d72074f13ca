"""The table by which one kernel steps many tensors: their addresses, and from which program on each is worked on."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: torch for a CPU comes without it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton.language as tl


def jit(*unspecialised: str) -> Callable[[Any], Any]:
    """`triton.jit`, or nothing where Triton is missing.

    Args:
        unspecialised: integer arguments whose values make no kernel of their own.
    """
    if not HAS_TRITON:
        return lambda kernel: kernel
    import triton

    return triton.jit(do_not_specialize=list(unspecialised))  # type: ignore[no-any-return]


@jit()
def row_of(table_at, tensors, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """In a kernel: where the row of this program's tensor begins, and how many programs of that tensor come before."""
    program = tl.program_id(0)
    first, behind = 0, tensors
    while behind - first > 1:  # the last row whose first program is not behind this one
        middle = (first + behind) // 2
        if tl.load(table_at + middle * COLUMNS) <= program:
            first = middle
        else:
            behind = middle
    row = table_at + first * COLUMNS
    return row + 1, program - tl.load(row)


class AddressTables:
    """Brings tables to the device; with memory that is ready for a step in a CUDA graph, where none can be had.

    A table has a row for each tensor: the number of its first program, then what the kernel is told of it.

    Args:
        block: elements of a program.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._captured: list[Tensor] = []  # which graphs read at every replay
        self._spare: Tensor | None = None

    def reserve(self, tensors: int, columns: int) -> None:
        """Have page-locked memory ready for a step that is captured.

        Args:
            tensors: the most that step.
            columns: entries of a row, with its first.
        """
        if self._spare is None:
            self._spare = torch.empty(tensors, columns, dtype=torch.int64, pin_memory=True)

    def on(self, device: torch.device, rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> tuple[Tensor, int]:
        """The table on a device, without a wait for it, and the number of programs.

        Args:
            device: where the tensors are.
            rows: what the kernel is told of each tensor.
            sizes: elements of each.
        """
        *firsts, programs = itertools.accumulate((-(-size // self._block) for size in sizes), initial=0)
        table = torch.tensor([[first, *row] for first, row in zip(firsts, rows, strict=True)])
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            assert self._spare is not None, "`reserve` comes before a capture"
            table = self._spare[: len(table)].copy_(table)
            self._captured.append(table)
            self._spare = None
        elif device.type == "cuda":
            table = table.pin_memory()
        return table.to(device, non_blocking=True), programs
