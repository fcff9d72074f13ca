"""The table by which one kernel steps many tensors: their addresses, and which program does what of which."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: torch for a CPU comes without it.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def jit(*unspecialised: str) -> Callable[[Any], Any]:
    """`triton.jit`, or nothing where Triton is missing.

    Args:
        unspecialised: integer arguments whose values make no kernel of their own.
    """
    if not HAS_TRITON:
        return lambda kernel: kernel
    import triton

    return triton.jit(do_not_specialize=list(unspecialised))  # type: ignore[no-any-return]


class AddressTables:
    """Brings tables to the device; with memory that is ready for a step in a CUDA graph, where none can be had.

    A table has a row for each tensor, then an entry for each program: the tensor (upper 32 bits) and where in it the
    program begins.

    Args:
        block: elements of a program.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._captured: list[Tensor] = []  # which graphs read at every replay
        self._spare: Tensor | None = None

    def reserve(self, sizes: Sequence[int], columns: int) -> None:
        """Have page-locked memory ready for a step that is captured.

        Args:
            sizes: elements of each tensor.
            columns: entries of a row.
        """
        if self._spare is None:
            length = len(sizes) * columns + len(_programs(tuple(sizes), self._block))
            self._spare = torch.empty(length, dtype=torch.int64, pin_memory=True)

    def on(self, device: torch.device, rows: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, int]:
        """The table on a device, without a wait for it, and the number of programs.

        Args:
            device: where the tensors are.
            rows: of all tensors, one after another.
            sizes: elements of each.
        """
        programs = _programs(tuple(sizes), self._block)
        table = torch.tensor([*rows, *programs])
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            assert self._spare is not None, "`reserve` comes before a capture"
            table = self._spare[: len(table)].copy_(table)
            self._captured.append(table)
            self._spare = None
        elif device.type == "cuda":
            table = table.pin_memory()
        return table.to(device, non_blocking=True), len(programs)


@functools.lru_cache(maxsize=64)
def _programs(sizes: tuple[int, ...], block: int) -> list[int]:
    return [i << 32 | start for i, size in enumerate(sizes) for start in range(0, size, block)]
