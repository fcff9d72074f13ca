"""Processes that train side by side (torchrun): who is who, what they tell one another, and groups that share a batch.

Ranks that train different blocks have nothing to say to each other. They tell the first rank through torchrun's
key-value store that they have ended, and no more. A process group is made only for ranks that train one block together.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

#: Elements of gradients that travel together: bounds the memory of their copy.
TOGETHER = 2**25

#: Seconds between two signs of life, at most; and between two looks for what a rank waits for, at first and later.
_BEAT, _FIRST_LOOK, _LOOK = 5.0, 0.001, 0.1

#: Seconds for which the first rank waits for the others at the end: where it failed, and where all is done.
_AFTER_FAILURE, _FAREWELL = 2.0, 30.0

#: Bytes that the key-value store takes in one value.
_VALUE = 2**22


class RankLost(RuntimeError):
    """Another rank died, or its machine did: what this one waits for will not come."""

    exit_status = 1


class StoppedWithOthers(RuntimeError):
    """Another rank failed, and says so itself."""

    exit_status = 1
    quiet = True


@dataclass(frozen=True)
class Place:
    """What torchrun tells a process of itself.

    Attributes:
        rank: its number among all.
        world: how many there are.
        local_rank: its number on its machine.
        local_world: how many there are on its machine.
        restarts: how often torchrun has started all of them again.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> Place | None:
        """Read torchrun's variables; None in a process that it did not start."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return None
        names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
        names["restarts"] = "TORCHELASTIC_RESTART_COUNT"
        return cls(**{field: int(os.environ.get(name, "0")) for field, name in names.items()})

    def device(self, name: str) -> str:
        """The device of this rank, where a recipe says `auto`, `cpu` or `cuda`.

        A process that sees one GPU has that one: Slurm's `--gpus-per-task=1` shows each process its own.
        `Ranks.device` checks that it is no other rank's.

        Raises:
            ValueError: one GPU is named for all ranks, or a machine has several GPUs, and fewer than ranks.
        """
        if name == "cpu" or not torch.cuda.is_available():  # where a GPU is asked for, the experiment refuses it
            return "cpu" if name == "auto" else name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device: {name} is one GPU for {self.world} ranks; use device: cuda or auto")
        gpus = torch.cuda.device_count()
        if gpus == 1:
            return "cuda:0"
        if max(self.local_rank + 1, self.local_world) > gpus:
            raise ValueError(
                f"{self.local_world} ranks on a machine with {gpus} GPUs: start torchrun with --nproc-per-node {gpus}"
            )
        return f"cuda:{self.local_rank}"


def gpu_identity(device: str) -> str:
    """What tells a GPU from all others, of any machine: its UUID, or under MIG its part's; empty of a CPU."""
    if not device.startswith("cuda"):
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible if visible.startswith("MIG-") else str(torch.cuda.get_device_properties(device).uuid)


class Ranks:
    """The processes of a run: tells the others of one, and waits for what they tell, but not for the dead.

    Args:
        place: of this process.
        timeout: seconds without a sign of life after which a rank counts as dead.

    Raises:
        RankLost: some of them did not come.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.place = place
        self.timeout = timeout
        with _translated("the ranks did not all start"):
            from torch.distributed.rendezvous import rendezvous

            store, *_ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
        # torchrun may keep the store when it starts all again, and what was told then is not so now.
        self._rendezvous = _below(f"start-{place.restarts}", store)
        self._store = self._messages = _below("told", self._rendezvous)
        self._is_over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def leads(self) -> bool:
        """Whether this rank checks, announces, joins and evaluates for all."""
        return self.place.rank == 0

    def device(self, name: str) -> str:
        """As `Place.device`; every rank calls it, for no two may have the same GPU.

        Raises:
            ValueError: what `Place.device` refuses, or a GPU that is another rank's.
            RankLost, StoppedWithOthers: see `wait_for`.
        """
        device, own = self.place.device(name), self.place.rank
        gpu = gpu_identity(device)
        self.tell(f"gpu {own}", gpu)
        for rank in range(own if gpu else 0):
            if self.wait_for(f"gpu {rank}", rank) == gpu:
                raise ValueError(
                    f"ranks {rank} and {own} have one GPU between them: start one rank for each GPU (torchrun "
                    "--nproc-per-node), or show each process a GPU of its own (srun --gpus-per-task=1)"
                )
        return device

    def below(self, name: str) -> Ranks:
        """The same ranks, who tell under a name of their own: several runs of one process do not mix."""
        other = copy.copy(self)
        other._messages = _below(name, self._messages)
        return other

    def tell(self, name: str, value: str = "") -> None:
        """Let other ranks read a value."""
        with _translated("the first rank is gone"):
            self._messages.set(name, value)

    def wait_for(self, name: str, rank: int) -> str:
        """Read what a rank tells, once it does.

        Raises:
            RankLost: it died.
            StoppedWithOthers: some rank failed.
        """
        last, since, pause = None, time.monotonic(), _FIRST_LOOK
        with _translated("the first rank is gone"):
            while not self._messages.check([name]):
                if self._store.check(["failure"]) and not self._messages.check(
                    [name]
                ):  # it may be told before the failure
                    raise StoppedWithOthers("another rank failed")
                beats = self._store.add(f"beats/{rank}", 0)
                if beats != last:
                    last, since = beats, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    raise RankLost(
                        f"rank {rank} gave no sign of life for {self.timeout:g} s, its process or machine died: run "
                        "the same command again to go on from the checkpoints"
                    )
                time.sleep(pause)
                pause = min(_LOOK, 1.5 * pause)
            return str(self._messages.get(name).decode())

    def hand(self, name: str, content: bytes) -> None:
        """Give the first rank bytes, which it will `take`.

        Raises:
            RankLost: it died.
            StoppedWithOthers: some rank failed.
        """
        with _translated("the first rank is gone"):
            if self._store.check(["failure"]):
                raise StoppedWithOthers("another rank failed")
            starts = range(0, len(content), _VALUE)
            for number, start in enumerate(starts):
                self._messages.set(f"{name}/{number}", content[start : start + _VALUE])
            self._messages.set(name, str(len(starts)))

    def take(self, name: str, rank: int) -> bytes:
        """Wait for the bytes that a rank hands over; see `wait_for`."""
        pieces = [f"{name}/{number}" for number in range(int(self.wait_for(name, rank)))]
        with _translated("the first rank is gone"):
            content = b"".join(self._messages.get(piece) for piece in pieces)
            for key in (*pieces, name):  # the store is memory of one machine
                self._messages.delete_key(key)
            return content

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let the ranks that wait know when this one fails, and leave the others at the end."""
        farewell = _FAREWELL
        try:
            yield
        except BaseException as error:
            farewell, is_told = _AFTER_FAILURE, False
            with contextlib.suppress(RuntimeError):
                is_told = self._store.check(["failure"])
                self._store.set("failure", str(self.place.rank))
            if is_told and isinstance(error, RankLost):  # the one that failed says why it is gone
                raise StoppedWithOthers("another rank failed") from error
            raise
        else:
            if _uses_nccl():
                self._destroy_together()
        finally:
            self._is_over.set()
            self._leave(farewell)
            if torch.distributed.is_initialized() and not _uses_nccl():  # NCCL's is let go when the process ends
                torch.distributed.destroy_process_group()

    def groups(self, device: torch.device, blocks: int, *, shard: bool = False) -> Group | None:
        """The group of this rank in a mesh of (block, data): ranks of one row train one block together.

        Every rank calls it, or none.

        Args:
            device: of this rank.
            blocks: rows of the mesh; they divide the number of ranks.
            shard: whether the ranks of a row share the block itself out, too.

        Returns:
            None where a row is one rank.
        """
        if blocks == self.place.world:
            return None
        if not torch.distributed.is_initialized():
            with _translated("the ranks did not all come to the process group"):
                torch.distributed.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    store=_below("groups", self._rendezvous),
                    rank=self.place.rank,
                    world_size=self.place.world,
                    timeout=timedelta(seconds=self.timeout),
                )
        from torch.distributed.device_mesh import init_device_mesh  # takes a second

        mesh = init_device_mesh(device.type, (blocks, self.place.world // blocks), mesh_dim_names=("block", "data"))
        return (ShardGroup if shard else Group)(mesh["data"], device)

    def _destroy_together(self) -> None:
        """Destroy NCCL's process group, once all ranks have come to their end.

        One that destroyed it alone would wait for the others: where they evaluate, long, and where they failed, for
        ever, before it could say what is the matter.
        """
        with contextlib.suppress(RankLost, StoppedWithOthers):
            self.tell(f"end {self.place.rank}")
            for rank in range(self.place.world):
                self.wait_for(f"end {rank}", rank)
            torch.distributed.destroy_process_group()

    def _leave(self, seconds: float) -> None:
        """Leave the others; the first rank last, if they are not long: its process may hold what they still read."""
        end = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            count = self._store.add("left", 1)
            while self.leads and count < self.place.world and time.monotonic() < end:
                time.sleep(_LOOK / 10)
                count = self._store.add("left", 0)

    def _beat(self) -> None:
        """Give signs of life, until the process ends or nobody takes them any more."""
        with contextlib.suppress(RuntimeError):
            while not self._is_over.wait(min(_BEAT, self.timeout / 4)):
                self._store.add(f"beats/{self.place.rank}", 1)


class Group:
    """Ranks that train one unit together: each computes some rows of every batch, and gradients are summed.

    Each has the whole unit.

    Attributes:
        mesh: torch's mesh of them, of one dimension.
        device: of this rank.
        size: how many ranks.
        rank: number of this one in the group.
        shards: whether the unit itself is shared out.
    """

    shards = False

    def __init__(self, mesh: Any, device: torch.device) -> None:
        self.mesh = mesh
        self._group = process_group = mesh.get_group()
        self.device = device
        self.size = torch.distributed.get_world_size(process_group)
        self.rank = torch.distributed.get_rank(process_group)
        self._first = torch.distributed.get_global_rank(process_group, 0)

    @property
    def leads(self) -> bool:
        """Whether this rank writes the files of the group."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that this rank computes: no other rank has them, and together they are all."""
        return slice(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of a device by their sums over the group, in a few flat pieces."""
        for piece in _pieces(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in piece])
            with _translated(_PARTNER_IS_GONE):
                torch.distributed.all_reduce(flat, group=self._group)
            parts = flat.split([tensor.numel() for tensor in piece])
            torch._foreach_copy_(piece, [part.view(tensor.shape) for part, tensor in zip(parts, piece, strict=True)])

    def add_up_step(self, gradients: Sequence[Tensor], loss: Tensor) -> None:
        """Replace gradients and loss, of which each rank has its share, by their sums over the group."""
        self.add_up([*gradients, loss])

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients of the unit."""
        return nn.utils.get_total_norm(gradients)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Within it, steps are computed."""
        yield

    def largest(self, values: Sequence[int]) -> list[int]:
        """Of each value the largest in the group. Waits for the device."""
        together = torch.tensor(values, dtype=torch.int64, device=self.device)
        with _translated(_PARTNER_IS_GONE):
            torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, group=self._group)
            return together.tolist()  # type: ignore[no-any-return]

    def of_first(self, values: Sequence[float]) -> list[float]:
        """The values of the rank that leads. Waits for the device."""
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _translated(_PARTNER_IS_GONE):
            torch.distributed.broadcast(together, self._first, group=self._group)
            return together.tolist()  # type: ignore[no-any-return]


class ShardGroup(Group):
    """As `Group`, of ranks each of which has some rows of every weight: see `shards.py`."""

    shards = True

    def add_up_step(self, gradients: Sequence[Tensor], loss: Tensor) -> None:
        """Replace the loss by its sum over the group: gradients were summed in the backward pass."""
        self.add_up([loss])

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients of the unit, of which each rank has its rows."""
        square = nn.utils.get_total_norm(gradients).float().square()
        self.add_up([square])
        return square.sqrt()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Let errors of collectives that FSDP starts say what is the matter."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower():
                raise RankLost(_reason(_PARTNER_IS_GONE, error)) from error
            raise

    def gather_rows(self, rows: Tensor, like: Any) -> Tensor:
        """All rows of a tensor, on the device.

        Args:
            rows: of this rank.
            like: a tensor of torch's DTensor that is cut alike.
        """
        from torch.distributed.tensor import DTensor

        cut: Any = DTensor.from_local(rows, self.mesh, like.placements, shape=like.shape, stride=like.stride())
        with _translated(_PARTNER_IS_GONE):
            return cut.full_tensor()  # type: ignore[no-any-return]

    def scatter_rows(self, whole: Tensor, like: Any) -> Tensor:
        """This rank's rows of a tensor that the rank that leads has, on the device.

        Args:
            whole: of the rank that leads; of the others only shape and dtype count.
            like: a tensor of torch's DTensor that is cut alike.
        """
        from torch.distributed.tensor import distribute_tensor

        values = whole.to(self.device) if self.leads else torch.empty_like(whole, device=self.device)
        with _translated(_PARTNER_IS_GONE):
            cut: Any = distribute_tensor(values, self.mesh, like.placements)
        return cut.to_local()  # type: ignore[no-any-return]


def _uses_nccl() -> bool:
    """Whether there is a process group of NCCL."""
    return torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"


def _below(name: str, store: Any) -> Any:
    """A store within a store."""
    from torch.distributed.distributed_c10d import PrefixStore

    return PrefixStore(name, store)


_PARTNER_IS_GONE = "a rank that trains the same block is gone"


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, at most so many elements together where they are several."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        piece: list[Tensor] = []
        size = 0
        for tensor in tensors:
            if tensor.dtype == dtype:
                if piece and size + tensor.numel() > TOGETHER:
                    yield piece
                    piece, size = [], 0
                piece.append(tensor)
                size += tensor.numel()
        if piece:
            yield piece


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Let errors of a connection say what is the matter."""
    try:
        yield
    except (RankLost, StoppedWithOthers):
        raise
    except RuntimeError as error:
        raise RankLost(_reason(what, error)) from error


def _reason(what: str, error: RuntimeError) -> str:
    return f"{what} ({' '.join(str(error).split())[:200]}): run the same command again"
