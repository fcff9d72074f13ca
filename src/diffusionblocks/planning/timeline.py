"""The bytes that live tensors hold while a step runs on fake tensors: a step without memory and without a device.

Fake tensors (`torch._subclasses.fake_tensor`) have shapes and lifetimes but no values. A dispatch mode sees every
tensor that comes to life, in forward, backward and recomputation alike, and a weak reference tells when its storage
dies. So nothing is tabulated: what autograd saves, and what autocast or checkpointing does, is what these really do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What stands for the GPU's flash attention on fake CPU tensors: it saves and returns the same.
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Moment:
    """Bytes alive at one moment of a step, beside what is there before it: gradients, and all the rest."""

    activations: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return self.activations + self.gradients


class Timeline(TorchDispatchMode):
    """Follows the storages of fake tensors that are made while it is active.

    Attributes:
        early: the moment of most bytes until half of the gradients are made: the forward pass and the first layers of
            the backward pass, where (almost) all saved activations live.
        late: the one after that, where most gradients live.

    Args:
        gradient_bytes: of all gradients of the step.
        on_gpu: count the working memory of the GPU's attention kernel.
    """

    # Dynamo runs under infrastructure modes, and would fall back to eager under others.
    supports_higher_order_operators = True

    def __init__(self, gradient_bytes: int, *, on_gpu: bool) -> None:
        super().__init__()
        self.early = self.late = Moment()
        self._half = gradient_bytes / 2
        self._on_gpu = on_gpu
        self._bytes = {"activations": 0, "gradients": 0}
        self._gradient_bytes = 0  # of this forward pass, as they are made
        self._live: dict[int, tuple[Any, str, int]] = {}
        self._persistent: set[int] = set()

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
            self._live[key] = (weakref.ref(storage, lambda _: self._died(key)), "activations", size)
            self._bytes["activations"] += size
            self._note()

    def _died(self, key: int) -> None:
        _, kind, size = self._live.pop(key)
        self._bytes[kind] -= size

    def is_gradient(self, tensor: Tensor) -> None:
        """From now on this tensor counts as a gradient."""
        key = tensor.untyped_storage()._cdata
        if key in self._live and self._live[key][1] == "activations":
            reference, _, size = self._live[key]
            self._live[key] = (reference, "gradients", size)
            self._bytes["activations"] -= size
            self._bytes["gradients"] += size
            self._gradient_bytes += size
            self._note()

    def forward_begins(self) -> None:
        """A forward pass begins: what comes is early until half of its gradients are made."""
        self._gradient_bytes = 0

    def work(self, size: int) -> None:
        """Note that a kernel of the GPU works with so many bytes of its own, at this moment."""
        if self._on_gpu:
            self._note(size)

    def _note(self, extra: int = 0) -> None:
        now = Moment(self._bytes["activations"] + extra, self._bytes["gradients"])
        if self._gradient_bytes <= self._half:
            self.early = max(self.early, now, key=lambda moment: moment.total)
        else:
            self.late = max(self.late, now, key=lambda moment: moment.total)

    def restart(self) -> None:
        """Forget the moments seen so far, not what is alive."""
        self.early = self.late = Moment()


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
