"""The work of an evaluation, in pieces that the ranks of a run share: whole batches, each computed by one of them.

A batch is the same computation whoever does it, and the results are used in the order of the batches. So what ranks
measure together has the bits of what one process measures on one type of device.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn
from typing_extensions import override

from ..common.finite import FiniteCheck
from ..common.seeds import seed_from
from ..training.ranks import Ranks

T = TypeVar("T")
Results = Mapping[str, Tensor]


class Work:
    """The whole work, done by this process.

    Attributes:
        rank: number of this process.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process sees the results, and tells of them."""
        return self.rank == 0

    def in_order(
        self,
        pieces: Iterable[T],
        compute: Callable[[T], Results],
        *,
        skip: Callable[[T], object] | None = None,
        checks: Sequence[FiniteCheck] = (),
    ) -> Iterator[Results]:
        """Compute each piece once; the results come in the order of the pieces, to the first rank alone.

        Every rank goes through all pieces, and must go through the iterator.

        Args:
            pieces: the same ones on every rank.
            compute: gives the results of a piece, by their names.
            skip: called for the pieces of other ranks, to make the same draws from a generator.
            checks: read before results leave a rank, so that none go on that cannot be used.
        """
        return map(compute, pieces)

    def joins(self) -> bool:
        """Wait until the first rank has begun, with all that it checks before; whether there is anything to share."""
        return True

    def first(self, action: Callable[[], T]) -> T:
        """Do something on the first rank, and then on the others, which find the files that it left."""
        return action()

    def decides(self, action: Callable[[], object]) -> bool:
        """Whether an action of the first rank gives something; the other ranks hear it, and do not act."""
        return bool(action())

    def check_same(self, value: str, what: str) -> None:
        """Refuse a rank for which a value is another one than for the first rank; `what` says what it is of."""

    def seconds(self, seconds: Sequence[float]) -> float:
        """How long pieces took, of the seconds of each: as long as the rank that worked longest."""
        return max(sum(seconds[rank :: self.size]) for rank in range(self.size))


#: What one process does by itself.
ALONE = Work()


class SharedWork(Work):
    """The part of the work that a rank does: pieces r, r + N, ... of rank r of N.

    Args:
        ranks: who is there.
        device: where the first rank has its results.

    Raises:
        RankLost: of all methods that wait: another rank died.
        StoppedWithOthers: likewise: another rank failed.
        ValueError: of `check_same`: this rank has another value.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.rank, self.size = ranks.place.rank, ranks.place.world
        self._ranks, self._device = ranks, device
        self._names = (f"work {number}" for number in itertools.count())  # all ranks make the same calls
        self._begun = False

    @override
    def in_order(
        self,
        pieces: Iterable[T],
        compute: Callable[[T], Results],
        *,
        skip: Callable[[T], object] | None = None,
        checks: Sequence[FiniteCheck] = (),
    ) -> Iterator[Results]:
        of_call = next(self._names)
        if self.leads:
            self._ranks.tell(_BEGUN, "yes")
            self._begun = True
        for number, piece in enumerate(pieces):
            name, rank = f"{of_call}/{number}", number % self.size
            if rank != self.rank:
                if skip is not None:
                    skip(piece)
                if self.leads:
                    yield self._unpack(self._ranks.take(name, rank))
                continue
            results = compute(piece)
            if self.leads:
                yield results
                continue
            for check in checks:
                check.read()
            self._ranks.hand(name, _pack(results))

    @override
    def joins(self) -> bool:
        return self.leads or bool(self._ranks.wait_for(_BEGUN, 0))

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Let ranks that wait to join know where the first one had nothing to share."""
        try:
            yield
        finally:
            if self.leads and not self._begun:
                self._ranks.tell(_BEGUN)

    @override
    def first(self, action: Callable[[], T]) -> T:
        name = next(self._names)
        if self.leads:
            result = action()
            self._ranks.tell(name)
            return result
        self._ranks.wait_for(name, 0)
        return action()

    @override
    def decides(self, action: Callable[[], object]) -> bool:
        name = next(self._names)
        if not self.leads:
            return bool(self._ranks.wait_for(name, 0))
        answer = "yes" if action() else ""
        self._ranks.tell(name, answer)
        return bool(answer)

    @override
    def check_same(self, value: str, what: str) -> None:
        name = next(self._names)
        if self.leads:
            self._ranks.tell(name, value)
        elif self._ranks.wait_for(name, 0) != value:
            raise ValueError(
                f"rank {self.rank} has other {what} than rank 0: machines that measure together need the same files; "
                "name a folder on a disk that they share, or measure on one machine"
            )

    def _unpack(self, content: bytes) -> Results:
        tensors = safetensors.torch.load(content)
        return {name[1:]: x.to(self._device) if name[0] == _DEVICE else x for name, x in tensors.items()}


_BEGUN = "work begins"

_DEVICE, _HOST = "d", "h"  # before a name: where the tensor was


def _pack(results: Results) -> bytes:
    where = {name: _HOST if tensor.device.type == "cpu" else _DEVICE for name, tensor in results.items()}
    content: bytes = safetensors.torch.save({where[name] + name: x.contiguous() for name, x in results.items()})
    return content


def digest_of(module: nn.Module) -> str:
    """What tells the weights of a model apart: the sum of the bytes of each tensor, by name. Waits for the device."""
    sums = {name: _sum_of_bytes(tensor) for name, tensor in module.state_dict().items() if not tensor.is_meta}
    return f"{seed_from(str({name: int(total) for name, total in sums.items()})):x}"


def _sum_of_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).sum()
