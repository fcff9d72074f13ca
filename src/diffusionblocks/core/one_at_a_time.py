"""Running a model whose blocks do not fit on a device together: they take turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.modules import places_of
from .block import Block


class OneAtATime:
    """Lets blocks take turns on a device: each comes when it is called, and the one before it makes room.

    The weights stay where they were and are copied, never moved: what leaves is forgotten. So this is for evaluation
    and sampling; training has `resident: active`. The added shared parameters, which are small, stay on the device.
    A block is copied into the memory of the one before it, and what both have in common stays there.

    Args:
        blocks: of one model; no other code may call them meanwhile.
        device: where they run.
        in_place: no tensor may change its memory, as somebody else relies on it: shared parameters are copied too, and
            what is on the device already is used where it is (on a CPU everything is copied).
    """

    def __init__(self, blocks: Iterable[Block], device: torch.device, *, in_place: bool = False) -> None:
        self.device = device
        self._in_place = in_place
        self._present: Block | None = None
        self._originals: dict[tuple[int, str], tuple[dict[str, Any], Tensor]] = {}  # by place, while copies are there
        self._copies: dict[int, Tensor] = {}  # on the device, by identity of what they are copies of
        self._ahead: torch.cuda.Stream | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: list[Future[None]] = []
        self._hooks: list[Any] = []
        self._calls = []
        for block in blocks:
            if not in_place:
                block.shared.to(device)
            self._calls.append(block.register_forward_pre_hook(self._before_call))

    def _before_call(self, block: nn.Module, args: Any) -> None:
        assert isinstance(block, Block)
        self.bring(block)

    def bring(self, block: Block, following: Block | None = None) -> None:
        """Copy a block to the device, in place of the one before it.

        Args:
            block: the one that is called next.
            following: the one that will be called after that: as soon as a layer of the former has run, that of the
                latter is copied into its memory, while other layers run. Where something else is called instead, what
                it needs is copied again.
        """
        self._settle()
        if self._present is not block:
            self._exchange(block)
        if following is not None and following is not block:
            if self.device.type == "cuda" and self._ahead is None:
                self._ahead = torch.cuda.Stream(self.device)
                # What is not page-locked is copied by the host: a thread of its own leaves this one to the network.
                self._thread = ThreadPoolExecutor(1, "next-block")
            self._hooks = [
                layer.register_forward_hook(partial(self._after_layer, layer, next_layer))
                for layer, next_layer in zip(block.layers(), following.layers(), strict=False)
            ]

    def _settle(self) -> None:
        """Wait until what was copied ahead is there."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for job in self._under_way:
            job.result()
        self._under_way = []
        if self._ahead is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._ahead)

    def rest(self, *, forget: bool = False) -> None:
        """Let no block compute with copies, until one is called: then blocks share what they own together.

        Args:
            forget: free the copies, for what they are copies of will change.
        """
        self._settle()
        self._put_back()
        if forget:
            self._copies = {}

    def end(self) -> None:
        """Let blocks be as they were before, without copies and without turns."""
        self.rest()
        for hook in self._calls:
            hook.remove()
        if self._thread is not None:
            self._thread.shutdown()

    def _put_back(self) -> None:
        for (_, name), (entries, tensor) in self._originals.items():
            entries[name] = tensor
        self._present, self._originals = None, {}

    def _exchange(self, block: Block) -> None:
        """Let a block compute with copies; those of others are freed, or overwritten."""
        self._put_back()
        self._present = block
        parts = (block.network, block.adaptive, *([block.shared] if self._in_place else []))
        places = [(entries, name) for part in parts for entries, name in places_of(part) if self._moves(entries[name])]
        tensors = {id(entries[name]): entries[name] for entries, name in places}  # one with two places stays one
        free = [copy for identity, copy in self._copies.items() if identity not in tensors]
        self._copies = {
            identity: self._copies[identity] if identity in self._copies else self._copy(tensor, free)
            for identity, tensor in tensors.items()
        }
        for entries, name in places:
            tensor = entries[name]
            self._originals[id(entries), name] = entries, tensor
            entries[name] = self._as(tensor, self._copies[id(tensor)])

    def _moves(self, tensor: Tensor) -> bool:
        return not self._in_place or self.device.type == "cpu" or tensor.device.type != self.device.type

    def _copy(self, tensor: Tensor, free: list[Tensor]) -> Tensor:
        """A copy on the device, in memory that is free where some fits."""
        for i, memory in enumerate(free):
            if _alike(memory, tensor):
                return free.pop(i).copy_(tensor.detach())
        with torch.inference_mode(False):  # what is made there could not be overwritten elsewhere
            return tensor.detach().to(self.device, copy=True)

    @staticmethod
    def _as(tensor: Tensor, copy: Tensor) -> Tensor:
        return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy

    def _after_layer(self, layer: nn.Module, following: nn.Module, *_: Any) -> None:
        """Overwrite the copies of a layer, which has run, by those of the layer that will run in its place."""
        self._present = None
        has_run = torch.cuda.current_stream(self.device).record_event() if self._ahead is not None else None
        places = list(places_of(layer))
        within = Counter(id(self._originals[id(entries), name][1]) for entries, name in places)
        everywhere = Counter(id(tensor) for _, tensor in self._originals.values())
        copied: list[tuple[Tensor, Tensor]] = []
        for (entries, name), (next_entries, next_name) in zip(places, places_of(following), strict=False):
            tensor, next_tensor = self._originals[id(entries), name][1], next_entries[next_name]
            old = id(tensor)
            # What other layers hold too, or the following block does, is left where it is.
            if old not in self._copies or within[old] < everywhere[old] or next_tensor is tensor:
                continue
            if id(next_tensor) in self._copies or not _alike(self._copies[old], next_tensor):
                continue
            memory = self._copies[id(next_tensor)] = self._copies.pop(old)
            copied.append((memory, next_tensor.detach()))

        def copy() -> None:
            if self._ahead is None:
                for memory, tensor in copied:
                    memory.copy_(tensor)
                return
            with torch.cuda.stream(self._ahead):
                self._ahead.wait_event(has_run)  # type: ignore[arg-type]
                for memory, tensor in copied:
                    memory.copy_(tensor, non_blocking=True)

        if self._thread is None:
            copy()
        else:
            self._under_way.append(self._thread.submit(copy))


def _alike(memory: Tensor, tensor: Tensor) -> bool:
    return memory.shape == tensor.shape and memory.dtype == tensor.dtype
