"""The bytes that live tensors hold while a step runs on fake tensors: a step without memory and without a device.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes and lifetimes but no values. A dispatch mode sees every
tensor that comes to life, in forward, backward and recomputation alike, and a weak reference tells when its storage
dies. So nothing is tabulated: what autograd saves, and what autocast or checkpointing does, is what these really do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What stands for the GPU's flash attention on fake CPU tensors: it saves and returns the same.
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


#: Examples of the batch that a step is followed with. Fake tensors have no memory, so there can be so many that every
#: tensor with a batch in it has at least as many bytes, and every other one fewer: a `StepLog` scales the first.
TRACED_BATCH = 2**33


@dataclass(frozen=True)
class Moment:
    """Bytes alive at one moment of a step, beside what is there before it: gradients, and all the rest."""

    activations: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return self.activations + self.gradients


@dataclass(frozen=True)
class StepMoments:
    """The two candidates for a step's peak, beside what is there before the step.

    Attributes:
        early: the moment of most bytes until half of the gradients are made: the forward pass and the first layers of
            the backward pass, where (almost) all saved activations live.
        late: the one after that, where most gradients live.
    """

    early: Moment
    late: Moment

    @property
    def peak(self) -> Moment:
        """The one of more bytes."""
        return max(self.early, self.late, key=lambda moment: moment.total)


class _What(Enum):
    """What happens to bytes."""

    THERE = auto()  # before the step begins
    NEW = auto()
    GRADIENT = auto()  # they count as a gradient from now on
    ACTIVATION_GONE = auto()
    GRADIENT_GONE = auto()
    WORK = auto()  # a kernel works with them, at this moment alone
    FORWARD = auto()  # a forward pass begins
    LAYER = auto()  # the forward pass comes to a layer, whose number stands for the bytes
    LAYER_BACK = auto()  # the backward pass comes to one


@dataclass(frozen=True)
class StepLog:
    """A step's storages as they come and go, for a batch of any size.

    Attributes:
        events: what happens, and to how many bytes: of a storage with `TRACED_BATCH` examples, or without any.
        gradient_bytes: of all gradients of the step.
        times: (number of a layer, how often it stands there), of layers that stand several times, one behind the
            other: what comes and goes in such a layer comes and goes as often, in the forward and in the backward pass.
            Its neighbours are layers of its kind.
    """

    events: tuple[tuple[_What, int], ...]
    gradient_bytes: int
    times: tuple[tuple[int, int], ...] = ()

    def with_more(self, times: Mapping[int, int]) -> StepLog:
        """The log of a block in which layers stand so often: a layer's number -> how often."""
        return dataclasses.replace(self, times=tuple(times.items()))

    def at(self, batch: int) -> StepMoments:
        """The worst moments with so many examples."""
        kinds, _ = self._columns
        sizes = self._sizes(batch)

        def of(*what: _What) -> NDArray[Any]:
            return np.where(np.isin(kinds, [each.value for each in what]), sizes, 0)

        gradients = of(_What.GRADIENT)
        came, went = of(_What.THERE, _What.NEW), of(_What.ACTIVATION_GONE) + gradients
        alive = np.cumsum(came - went) + of(_What.WORK), np.cumsum(gradients - of(_What.GRADIENT_GONE))
        # What comes is early until half of the gradients since the last forward pass are made.
        so_far = np.cumsum(gradients)
        before = np.maximum.accumulate(np.where(kinds == _What.FORWARD.value, so_far, 0))
        is_early = 2 * (so_far - before) <= self.gradient_bytes
        comes = np.isin(kinds, [what.value for what in (_What.NEW, _What.GRADIENT, _What.WORK)])

        def worst(where: NDArray[Any]) -> Moment:
            totals = np.where(where, sum(alive), 0)
            if totals.max(initial=0) <= 0:
                return Moment()
            most = totals.argmax()
            return Moment(*(int(kind[most]) for kind in alive))

        return StepMoments(worst(comes & is_early), worst(comes & ~is_early))

    def _sizes(self, batch: int) -> NDArray[Any]:
        """The events' bytes with so many examples, rounded up."""
        _, traced = self._columns
        examples, rest = np.divmod(traced, TRACED_BATCH)
        # Sums of bytes beyond 64 bits, of a batch beyond all use, are Python's numbers.
        most = (examples.sum(dtype=float) + TRACED_BATCH) * batch + len(traced) * TRACED_BATCH
        dtype = np.int64 if most < 2**61 else object
        examples, rest = examples.astype(dtype), rest.astype(dtype)
        return np.where(examples > 0, examples * batch - (-rest * batch // TRACED_BATCH), rest)

    @functools.cached_property
    def _columns(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """What happens, and to how many bytes, of all layers."""
        events = self._of_all_layers()
        return np.array([what.value for what, _ in events]), np.array([size for _, size in events], dtype=np.int64)

    def _of_all_layers(self) -> Sequence[tuple[_What, int]]:
        times = dict(self.times)
        events: list[tuple[_What, int]] = []
        begins = [i for i, (what, _) in enumerate(self.events) if what in (_What.LAYER, _What.LAYER_BACK)]
        end = 0
        for begin, after in itertools.pairwise([*begins, len(self.events)]):
            events += self.events[end:begin]
            events += self.events[begin:after] * times.get(self.events[begin][1], 1)
            end = after
        return [*events, *self.events[end:]]

    def to_values(self) -> dict[str, Any]:
        """As JSON values."""
        events = [[what.name, size] for what, size in self.events]
        return {"events": events, "gradient_bytes": self.gradient_bytes, "times": [list(pair) for pair in self.times]}

    @classmethod
    def from_values(cls, values: Any) -> StepLog:
        """The inverse of `to_values`.

        Raises:
            ValueError: other values.
        """
        try:
            events = tuple((_What[name], size) for name, size in values["events"])
            times = tuple((number, often) for number, often in values["times"])
            gradient_bytes = values["gradient_bytes"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"no log of a step: {error}") from None
        numbers = [gradient_bytes, *(size for _, size in events), *itertools.chain.from_iterable(times)]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError("no log of a step: its numbers must be whole, >= 0 and below 2**63")
        return cls(events, gradient_bytes, times)


class Timeline(TorchDispatchMode):
    """Follows the storages of fake tensors that are made while it is active.

    Args:
        gradient_bytes: of all gradients of the step.
        on_gpu: count the working memory of the GPU's attention kernel.
    """

    # Dynamo runs under infrastructure modes, and would fall back to eager under others.
    supports_higher_order_operators = True

    def __init__(self, gradient_bytes: int, *, on_gpu: bool) -> None:
        super().__init__()
        self._all_gradients = gradient_bytes
        self._on_gpu = on_gpu
        self._events: list[tuple[_What, int]] = []
        self._live: dict[int, tuple[Any, bool, int]] = {}  # reference, whether it is a gradient, bytes
        self._persistent: set[int] = set()
        self._layer_back: int | None = None  # the last to which the backward pass came

    @property
    def log(self) -> StepLog:
        """What was seen since the last `restart`."""
        return StepLog(tuple(self._events), self._all_gradients)

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Say that torch.compile may run under this mode (see the comment above)."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._watch(tensor)
        if func is CPU_ATTENTION_BACKWARD:
            self.work(attention_workspace(args[1]))
        return result

    def is_persistent(self, tensors: Iterable[Tensor]) -> None:
        """Never count these, which are there before the step and outlive it: views of them show their storage."""
        self._persistent |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live and key not in self._persistent:
            size = storage.nbytes()
            self._live[key] = (weakref.ref(storage, lambda _: self._died(key)), False, size)
            self._events.append((_What.NEW, size))

    def _died(self, key: int) -> None:
        _, is_gradient, size = self._live.pop(key)
        self._events.append((_What.GRADIENT_GONE if is_gradient else _What.ACTIVATION_GONE, size))

    def is_gradient(self, tensor: Tensor) -> None:
        """From now on this tensor counts as a gradient."""
        key = tensor.untyped_storage()._cdata
        if key in self._live and not self._live[key][1]:
            reference, _, size = self._live[key]
            self._live[key] = (reference, True, size)
            self._events.append((_What.GRADIENT, size))

    def forward_begins(self) -> None:
        """A forward pass begins: what comes is early until half of its gradients are made."""
        self._events.append((_What.FORWARD, 0))
        self._layer_back = None

    def layer_begins(self, number: int) -> None:
        """The forward pass comes to a layer; one that is computed again in the backward pass is of that."""
        if self._layer_back is None:
            self._events.append((_What.LAYER, number))

    def layer_goes_back(self, number: int) -> None:
        """The gradient of something that a layer gave is there: of the first, the backward pass comes to the layer."""
        if self._layer_back is None or number < self._layer_back:
            self._layer_back = number
            self._events.append((_What.LAYER_BACK, number))

    def work(self, size: int) -> None:
        """Note that a kernel of the GPU works with so many bytes of its own, at this moment."""
        if self._on_gpu:
            self._events.append((_What.WORK, size))

    def restart(self) -> None:
        """Forget what happened so far, not what is alive."""
        self._events = [(_What.THERE, size) for _, _, size in self._live.values()]


def attention_workspace(query: Tensor) -> int:
    """Bytes that flash attention's backward kernel works with on a GPU: dq in float32 and a sum for each query.

    It rounds tokens up to 128 and the size of a head up to 32 (FlashAttention-2, as in torch's `flash_api.cpp`).

    Args:
        query: (batch, heads, tokens, size).
    """
    batch, heads, tokens, size = query.shape
    if query.dtype == torch.float32:  # the memory-efficient kernel: a float32 sum for each query
        return 4 * batch * heads * tokens
    rows = -(-tokens // 128) * 128
    return 4 * batch * heads * rows * (-(-size // 32) * 32 + 1)
