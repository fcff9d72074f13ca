"""Counts what collectives send, by the ranks that take part: whether blocks train without a word to each other.

    with Traffic() as traffic:
        trainer.train()
    traffic.by_group                    {(0, 1): 81920}: bytes that this rank sent within the group of ranks 0 and 1
    traffic.between([(0, 1), (2, 3)])   0: bytes sent in groups that hold ranks of both

Steps that are compiled or captured must run eagerly to be counted. Gathers, sums and all else that goes through
torch.distributed is counted, whoever starts it (this package, FSDP, DDP). What ranks tell one another through
torchrun's key-value store is not: a few words when a block has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: How often each rank of a ring passes on, of n ranks, the bytes of the largest tensor: by what a collective's name
#: says, times (n - 1) / n. Names of torch's two sets of operations (`c10d`, `_c10d_functional`) are alike.
_PASSES = (("allreduce", 2), ("all_reduce", 2))

#: Operations that move nothing.
_WAITS = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


class Traffic(TorchDispatchMode):
    """Counts bytes of collectives within the context, on this rank.

    Attributes:
        by_group: bytes that this rank sends, by the ranks of the group; of ring collectives.
        calls: how many collectives, by the ranks of the group and the operation's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_group: Counter[tuple[int, ...]] = Counter()
        self.calls: Counter[tuple[tuple[int, ...], str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a collective, and run whatever it is."""
        options = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # which then comes here with the ordinary tensors that it is made of
        result = func(*args, **options)
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._note(func._opname, [*args, *options.values()], result)
        return result

    def between(self, groups: Iterable[Sequence[int]]) -> int:
        """Bytes that this rank sent to ranks of other groups than its own.

        Args:
            groups: of ranks; each trains a block.
        """
        inside = [set(group) for group in groups]
        return sum(size for ranks, size in self.by_group.items() if not any(set(ranks) <= group for group in inside))

    def _note(self, name: str, values: list[Any], result: Any) -> None:
        if name in _WAITS:
            return
        ranks = _ranks_of(name, values)
        size = max((sum(_bytes_in(value)) for value in (*values, result)), default=0)
        passes = next((count for part, count in _PASSES if part in name), 1)
        self.calls[ranks, name] += 1
        self.by_group[ranks] += passes * size * (len(ranks) - 1) // len(ranks)


def _bytes_in(value: Any) -> Iterable[int]:
    """Bytes of the tensors in an argument: a tensor, or lists of some."""
    if isinstance(value, Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _bytes_in(part)


def _ranks_of(name: str, values: list[Any]) -> tuple[int, ...]:
    """The ranks of the process group among an operation's arguments: the group itself, or its name."""
    from torch.distributed import ProcessGroup, distributed_c10d, get_process_group_ranks

    of_name: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    for value in reversed(values):
        if isinstance(value, torch.ScriptObject):
            try:
                return tuple(get_process_group_ranks(ProcessGroup.unbox(value)))
            except RuntimeError:
                continue  # an operator of a sum, say
        if isinstance(value, str):
            try:
                return tuple(get_process_group_ranks(of_name(value)))
            except (RuntimeError, ValueError, LookupError):
                continue  # the name of an operator
    raise ValueError(f"{name} names no group, so its bytes cannot be counted by group")
