"""Network calls from memory that stays in place, so that a GPU can replay them: CUDA graphs, one a kind of call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

#: Calls before a capture: they load kernels, and torch.compile compiles in the first.
_WARM_UP = 3


class StaticCalls:
    """Runs denoisers on samples of one shape, each kind of call captured once and then replayed.

    A CUDA graph repeats kernels on the same addresses, without Python and at the cost of one launch. So every call
    copies z and level to the place where the first call of its kind had them, and runs from there. On a device without
    CUDA graphs it runs the function itself, from the same memory.

    Args:
        z: of the calls (n, ...): its shape, dtype and device count.
        inputs: groups of what the network reads beside it, by name, such as `labels` (n,); None is an absent group.

    Attributes:
        z: (n, ...), what a function is to read.
        level: (2n,), the level for each row of a guided call; one of n rows reads the first n.
        inputs: the groups, in memory that stays.
    """

    def __init__(self, z: Tensor, *inputs: Mapping[str, Tensor] | None) -> None:
        with torch.inference_mode(False):  # memory of that mode could not be written to outside of it
            self.z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
            dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
            self.level = torch.empty(2 * len(z), dtype=dtype, device=z.device)
            self.inputs = [
                None if group is None else {name: torch.empty_like(value) for name, value in group.items()}
                for group in inputs
            ]
        self._calls: dict[Hashable, Callable[[], Tensor]] = {}
        self._pool: Any = None

    def set_inputs(self, *inputs: Mapping[str, Tensor] | None) -> None:
        """Let the next calls read these inputs, of the same groups, names and shapes."""
        for memory, group in zip(self.inputs, inputs, strict=True):
            for name, value in (group or {}).items():
                assert memory is not None
                memory[name].copy_(value)

    def run(self, kind: Hashable, function: Callable[[], Tensor], z: Tensor, level: float) -> Tensor:
        """Call a function on z at a level; nothing waits for the device.

        Args:
            kind: tells functions apart: of one kind only the first is ever called.
            function: reads `z`, `level` and `inputs`, and returns D. It may not wait for the device.
            z: (n, ...).
            level: of all rows.

        Returns:
            D in memory of its own, which later calls leave alone.
        """
        self.z.copy_(z)
        self.level.fill_(level)
        if kind not in self._calls:
            self._calls[kind] = self._prepared(function)
        return self._calls[kind]().clone()

    def _prepared(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        device = self.z.device
        if device.type != "cuda":
            return function
        current = torch.cuda.current_stream(device)
        side = torch.cuda.Stream(device)
        side.wait_stream(current)
        # Weights that autocast keeps cast until its end would be gone when the graph is replayed after it.
        autocast = torch.autocast(
            "cuda",
            torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.cuda.device(device), autocast:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    function()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Kinds take turns, and each result is copied at once: their graphs may use the same memory.
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                output = function()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
