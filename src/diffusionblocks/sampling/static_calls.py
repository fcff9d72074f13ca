"""Work from memory that stays in place, for a GPU to replay: CUDA graphs of network calls, and of whole steps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

#: Calls before a capture: they load kernels, and torch.compile compiles in the first.
_WARM_UP = 3


class _Capture:
    """A stream beside the current one of a GPU, where functions are warmed up and captured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """Run what is inside on the stream, behind the current one's work and before what follows there."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.device(self._device), _autocast(), torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def graph(self, function: Callable[[], Tensor], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A function as a graph, which has not run, and the memory where each replay leaves its result."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), _autocast(), torch.cuda.graph(graph, pool=pool, stream=self._stream):
            output = function()
        return graph, output


def _autocast() -> torch.autocast:
    """The autocast that is on, without its cache: weights cast until its end would be gone at a later replay."""
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)


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
        if self.z.device.type != "cuda":
            return function
        capture = _Capture(self.z.device)
        with capture.warm_up():
            for _ in range(_WARM_UP):
                function()
        # Kinds take turns, and each result is copied at once: their graphs may use the same memory.
        graph, output = capture.graph(function, self._pool)
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class SideBySide:
    """Runs functions of which none needs what another gives; on a GPU each on a stream of its own.

    Args:
        count: most functions of a call.
        device: that they run on.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(count)] if device.type == "cuda" else []

    def __call__(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """What each returns. Work that follows on the current stream comes behind theirs."""
        if not self._streams:
            return [function() for function in functions]
        current, outputs = torch.cuda.current_stream(self._device), []
        for stream, function in zip(self._streams, functions, strict=False):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs.append(function())
        # Memory that is free goes back to its own stream, which waits for the current one before it is used again.
        for stream in self._streams[: len(functions)]:
            current.wait_stream(stream)
        return outputs


def global_state(device: torch.device) -> tuple[Any, ...]:
    """What a captured step holds fast of torch's state: autocast, precision of products, mode."""
    kind = device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return (*autocast, torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled())


class StaticSteps:
    """Runs a step of a loop, which changes state of its own: the first times as it is, then as one CUDA graph.

    On a device without CUDA graphs it runs the step itself, from the same memory.

    Args:
        step: reads its arguments, and state that stays in place; writes that state, and returns a tensor. It may not
            wait for the device.

    Attributes:
        calls_to_prepare: the first calls, which warm up, and the one that captures.
    """

    calls_to_prepare: ClassVar[int] = _WARM_UP + 1

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._inputs: list[Tensor] = []
        self._capture: _Capture | None = None
        self._count = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the next step; nothing waits for the device.

        Args:
            inputs: of the same shapes each time.

        Returns:
            What the step returns, in memory of its own.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        if not self._inputs:
            with torch.inference_mode(False):
                self._inputs = [torch.empty_like(value) for value in inputs]
        for memory, value in zip(self._inputs, inputs, strict=True):
            memory.copy_(value)
        if inputs[0].device.type != "cuda":
            return self._step(*self._inputs)
        self._count += 1
        self._capture = self._capture or _Capture(inputs[0].device)
        if self._count <= _WARM_UP:  # these are steps like others: what they change is wanted
            with self._capture.warm_up():
                output = self._step(*self._inputs)
            return output.clone()
        if self._graph is None:
            self._graph, self._output = self._capture.graph(lambda: self._step(*self._inputs))
        assert self._output is not None
        self._graph.replay()
        return self._output.clone()
