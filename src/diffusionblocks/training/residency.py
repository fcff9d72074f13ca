"""Residency: what of the model, its optimizer state and its averages is on the device, and where the rest waits.

A unit never computes in its own module. It computes in a `SharedModule`: a copy of the module without tensors, to which
the tensors of any unit of the same shape can be bound; so units of one shape share one compiled step.

- `all`: every unit's tensors are on the device, and bound in turn.
- `active`: on the device there is memory for the weights, optimizer state and averages of one unit, the largest; a
  `Slot` is how units of one shape use it. The other units wait in host buffers (`host_buffers.py`). At a switch both
  directions of the bus work at once: while one chunk of the next unit comes in, a chunk of the last one goes out, but
  for frozen weights, which the host still has. The
  next forward pass waits for the weights alone, where it can layer by layer (`Block.before_layer`); optimizer state and
  averages follow while it computes.

Ranks that train one unit together may share it out as well: see `shards.py`.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.modules import places_of, tensors_of
from ..core.block import Block
from ..core.model import DiffusionBlocks
from .arena import Arena, Layout
from .host_buffers import FileBuffers, HostBuffers, Layouts, MemoryBuffers, UnitMemory
from .optim import ParameterSet, Updater, average_dtype
from .schedules import lr_factor
from .shared_module import SharedModule, in_several, move_tensors, shape_of
from .train_config import TrainConfig
from .units import Unit

_CHUNK = 2**24  # bytes that move at once: while the first goes out, nothing can come in


@dataclass(frozen=True)
class ActiveUnit:
    """What a step of the active unit runs and moves.

    Attributes:
        module: the network, to which the unit's tensors are bound.
        updaters: of the unit's own parameters, and of those that all units move.
        sets: the state that each updater moves.
        parameters: of all updaters.
    """

    module: nn.Module
    updaters: list[Updater]
    sets: list[ParameterSet]
    parameters: list[nn.Parameter]

    def collect_gradients(self) -> None:
        """After the backward pass, let each of the parameters have its gradient: nothing to do where it has."""


@dataclass(frozen=True)
class Lengths:
    """Steps of a unit and how many of them warm up."""

    steps: int
    warmup: int


class Residency(abc.ABC):
    """Brings units to where they compute.

    Attributes:
        sets: what belongs to each unit, by its name, and to all together (`shared`, under `joint`), wherever it is.
        host_bytes: bytes of training state that it keeps in host memory.
    """

    host_bytes = 0

    def __init__(
        self,
        units: list[Unit],
        shared: list[nn.Parameter],
        lengths: Lengths,
        config: TrainConfig,
        device: torch.device,
        fill: Callable[[int], None] | None,
    ) -> None:
        self.units = units
        self.lengths = lengths
        self.config = config
        self.device = device
        self.sets: dict[str, ParameterSet] = {}
        self._shapes = [shape_of(unit) for unit in units]
        self._modules: dict[tuple[Any, ...], SharedModule] = {}
        for unit, shape in zip(units, self._shapes, strict=True):
            if shape not in self._modules:
                self._modules[shape] = SharedModule(unit, config)
        self._shared_parameters = shared
        self._shared_updaters: list[Updater] = []
        self._active: dict[int, ActiveUnit] = {}
        self._common = self._in_common()
        self._fill = fill
        if fill is not None and self._common:  # what they have in common is on the device before the first of them
            for unit in units:
                self._materialise(unit)
            self._common = self._in_common()

    @property
    def shared_modules(self) -> list[SharedModule]:
        """One for every shape of unit."""
        return list(self._modules.values())

    def _in_common(self) -> set[int]:
        """Identities of what several units hold, and none of them alone moves."""
        own = {id(parameter) for unit in self.units for parameter in unit.own}
        return in_several([unit.module for unit in self.units]) - own

    def common_tensors(self) -> list[Tensor]:
        """What several units hold: the shared parameters under `joint`."""
        common = {id(t): t for unit in self.units for t in tensors_of(unit.module) if id(t) in self._common}
        return list(common.values())

    def learning_rate(self, unit: int) -> float:
        """The rate of a unit's last step."""
        last = max(0, self.sets[self.units[unit].name].steps - 1)
        return self.config.lr * lr_factor(last, self.lengths.steps, self.lengths.warmup, self.config.lr_schedule)

    def _materialise(self, unit: Unit) -> None:
        """Give a unit that was never built its initial weights."""
        if self._fill is not None and any(tensor.is_meta for tensor in tensors_of(unit.module)):
            self._fill(unit.index)
            self._modules[self._shapes[self.units.index(unit)]].take_tables(unit)

    def _add_set(self, name: str, parameters: list[nn.Parameter], lengths: Lengths) -> Updater:
        """Make optimizer and averages of parameters on the device, and note what they keep under a name."""
        ema = [p.detach().to(average_dtype(p), copy=True) for p in parameters] if self.config.keeps_average else []
        updater = Updater(parameters, lengths.steps, lengths.warmup, self.config, ema)
        updater.allocate()
        self.sets[name] = ParameterSet(parameters, updater.moments(), ema)
        return updater

    def _add_shared_set(self) -> None:
        """As `_add_set`, of the shared parameters, which are on the device by now, always stay, and step every time."""
        if self._shared_parameters:
            of_all = Lengths(len(self.units) * self.lengths.steps, len(self.units) * self.lengths.warmup)
            self._shared_updaters = [self._add_set("shared", self._shared_parameters, of_all)]

    def _active_unit(self, unit: int, module: SharedModule, updater: Updater) -> ActiveUnit:
        if unit not in self._active:
            updaters = [updater, *self._shared_updaters]
            sets = [self.sets[name] for name in (self.units[unit].name, "shared")[: len(updaters)]]
            parameters = [p for each in updaters for p in each.parameters]
            self._active[unit] = ActiveUnit(module.module, updaters, sets, parameters)
        return self._active[unit]

    @abc.abstractmethod
    def activate(self, unit: int, following: int | None) -> ActiveUnit:
        """Make a unit ready to compute; no wait for the device.

        Args:
            unit: place of the unit in the list.
            following: the unit of the next iteration that is another one, where known.
        """

    def wait_for_state(self) -> None:  # noqa: B027 - nothing to wait for where all is there
        """Let what is enqueued from now on wait for the active unit's optimizer state and average."""

    def flush(self) -> None:  # noqa: B027
        """Bring the units' own tensors up to date."""

    def refresh(self) -> None:  # noqa: B027
        """Read the units' own tensors again before the next step, as they were changed from outside."""

    @contextlib.contextmanager
    def whole(self, unit: int) -> Iterator[nn.Module | None]:
        """A unit's module with all of its weights on the device, to be measured; None where another rank has it."""
        self.flush()
        yield self.units[unit].module

    def on_device(self, model: DiffusionBlocks) -> AbstractContextManager[Any]:
        """Let the model whose units these are compute on the device, as it is after `flush`; no weight is moved."""
        return contextlib.nullcontext()

    def settle(self) -> None:  # noqa: B027
        """Wait until no copy is under way (nothing else may use the device while a graph is captured)."""


class AllResident(Residency):
    """Keeps every unit on the device."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._updaters = []
        for unit in self.units:
            self._materialise(unit)
            unit.module.to(self.device)
            self._updaters.append(self._add_set(unit.name, unit.own, self.lengths))
        self._add_shared_set()
        self._tensors = [tensors_of(unit.module) for unit in self.units]

    def activate(self, unit: int, following: int | None) -> ActiveUnit:
        """Bind the unit's tensors to the module of its shape."""
        module = self._modules[self._shapes[unit]]
        if module.unit is not self.units[unit]:
            module.bind(self.units[unit], self._tensors[unit])
        return self._active_unit(unit, module, self._updaters[unit])


@dataclass(frozen=True)
class Slot:
    """How units of one shape use the memory on the device that all units share, one after another.

    Attributes:
        module: computes for the units of this shape.
        memory: the memory, as a unit of this shape uses it.
        updater: moves the parameters there.
        tensors: what is bound to the module, in the order of `tensors_of`.
        needs: bytes of the weights that must be there before the forward pass, and before each layer: all at first,
            where layers cannot wait.
    """

    module: SharedModule
    memory: UnitMemory
    updater: Updater
    tensors: list[Tensor]
    needs: list[int]


def layer_of_tensors(module: nn.Module) -> dict[int, int]:
    """The layers of a block that can wait for their weights one by one: identity of a tensor -> number of its layer.

    What is used outside of its layer is not among them, and nothing is of a family that does not say that it calls
    layers through the block (`Family.calls_layers`).
    """
    if not isinstance(module, Block) or not module.family.calls_layers:
        return {}
    groups = module.layer_groups()
    if len(groups) != len(module.layer_paths):
        return {}
    tensors = [[id(t) for part in parts for t in tensors_of(part)] for parts in groups]
    several = in_several([part for parts in groups for part in parts[-1:]])
    return {t: number for number, of_layer in enumerate(tensors) for t in of_layer if t not in several}


def bytes_needed(module: nn.Module, own: list[Tensor], layout: Layout) -> list[int]:
    """Bytes of a unit's weights that a forward pass needs before it begins, and before each layer.

    Args:
        module: the unit's.
        own: its tensors, which are named by their places here.
        layout: where they lie.
    """
    layers = layer_of_tensors(module)
    count = max(layers.values(), default=-1) + 1
    needs = [0] * (count + 1)
    for i, tensor in enumerate(own):
        start, size, *_ = layout.places[str(i)]
        place = layers.get(id(tensor), -1) + 1
        needs[place] = max(needs[place], start + size)
    return list(itertools.accumulate(needs, max))


def _wait(method: weakref.WeakMethod[Any], needs: list[int], layer: int) -> None:
    wait = method()
    if wait is not None:
        wait(needs, layer)


class ActiveResident(Residency):
    """Keeps only the active unit on the device, and what all units move together (under `joint`).

    Args:
        folder: where `offload: disk` keeps its files.
    """

    def __init__(self, *args: Any, folder: Path) -> None:
        super().__init__(*args)
        for unit in self.units:
            move_tensors(unit.module, self._common, self.device)
        self._add_shared_set()
        on_gpu = self.device.type == "cuda"
        self._out, self._into = (torch.cuda.Stream(self.device) if on_gpu else None for _ in range(2))
        self._state_is_there: Any = None  # an event, until `wait_for_state`
        self._arrivals: list[tuple[int, Any]] = []  # up to which byte weights are there after an event; likewise
        self._unit: int | None = None  # whose values the device has

        layouts = {shape: self._layouts_of(self.units[self._shapes.index(shape)]) for shape in self._modules}
        of_units = [layouts[shape] for shape in self._shapes]
        self._memory = [
            torch.zeros(max(both[part].bytes for both in of_units), dtype=torch.uint8, device=self.device)
            for part in range(2)
        ]
        self._buffers: HostBuffers
        if self.config.offload == "disk":
            self._buffers = FileBuffers(of_units, folder, pinned=on_gpu)
        else:
            self._buffers = MemoryBuffers(of_units, pinned=on_gpu)
        self.host_bytes = self._buffers.host_bytes
        self._slots: dict[tuple[Any, ...], Slot] = {}
        for shape, module in self._modules.items():
            alike = [place for place, other in enumerate(self._shapes) if other == shape]
            self._slots[shape] = slot = self._slot_of(self.units[alike[0]], module, layouts[shape])
            for place in alike:
                self._move_to_buffer(self.units[place], slot, self._buffers.of(place))

    # ---- making -------------------------------------------------------------------------------------------

    def _own_tensors(self, unit: Unit) -> list[Tensor]:
        """What only the unit holds, each once."""
        distinct = {id(t): t for t in tensors_of(unit.module) if id(t) not in self._common}
        return list(distinct.values())

    def _layouts_of(self, unit: Unit) -> Layouts:
        """Lay out what a unit of this shape has: its weights, and the state that the optimizer makes for them."""
        own, movable = self._own_tensors(unit), {id(p) for p in unit.own}
        # A frozen parameter is only read; a buffer may be written by a forward pass (statistics of batch norm).
        fixed = {str(i) for i, t in enumerate(own) if isinstance(t, nn.Parameter) and id(t) not in movable}
        layers = layer_of_tensors(unit.module)  # in the order in which a forward pass needs them
        order = sorted(range(len(own)), key=lambda i: layers.get(id(own[i]), -1))
        weights = Layout({str(i): own[i] for i in order}, fixed)
        trial = Arena(weights, torch.zeros(weights.bytes, dtype=torch.uint8, device=self.device))
        _, parameters = self._views(unit, trial)
        state: dict[str, Tensor] = {}

        def note(i: int, name: str, fresh: Tensor) -> Tensor:
            return state.setdefault(f"{i}.{name}", torch.empty_like(fresh, device="meta"))

        Updater(parameters, 1, 0, self.config, []).allocate(note)
        averages = parameters if self.config.keeps_average else []
        for i, p in enumerate(averages):
            state[f"{i}.ema"] = torch.empty_like(p, dtype=average_dtype(p), device="meta")
        return weights, Layout(state)

    def _views(self, unit: Unit, weights: Arena) -> tuple[list[Tensor], list[nn.Parameter]]:
        """The tensors to bind for a unit whose weights lie in an arena, and which of them are trained."""
        views: dict[int, Tensor] = {}
        for i, tensor in enumerate(self._own_tensors(unit)):
            # Without `.data`, a change of one (by a step, or of a batch norm's statistics in a forward pass) would
            # count as a change of all that lie in the same memory.
            view = weights[str(i)].data
            views[id(tensor)] = nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
        parameters = [p for p in (views[id(p)] for p in unit.own) if isinstance(p, nn.Parameter)]
        return [views.get(id(t), t) for t in tensors_of(unit.module)], parameters

    def _slot_of(self, unit: Unit, module: SharedModule, layouts: Layouts) -> Slot:
        weights, state = (
            Arena(layout, memory[: layout.bytes]) for layout, memory in zip(layouts, self._memory, strict=True)
        )
        tensors, parameters = self._views(unit, weights)
        module.bind(unit, tensors)
        ema = [state[f"{i}.ema"] for i in range(len(parameters))] if self.config.keeps_average else []
        updater = Updater(parameters, self.lengths.steps, self.lengths.warmup, self.config, ema)
        updater.allocate(lambda i, name, fresh: state[f"{i}.{name}"])
        needs = [weights.layout.bytes]
        by_parts = self.config.compile is not True or self.config.optimizer_in_backward
        if isinstance(module.module, Block) and self._into is not None and by_parts:
            needs = bytes_needed(unit.module, self._own_tensors(unit), weights.layout)
            # Weak: the modules must not keep what keeps them.
            module.module.before_layer = functools.partial(_wait, weakref.WeakMethod(self._wait_for_layer), needs)
        return Slot(module, UnitMemory(weights, state), updater, tensors, needs)

    def _move_to_buffer(self, unit: Unit, slot: Slot, buffer: UnitMemory) -> None:
        """Let the unit's own tensors lie in its host buffer, and start its optimizer state afresh."""
        self._materialise(unit)
        views = {}
        for i, tensor in enumerate(self._own_tensors(unit)):
            view = buffer.weights[str(i)]
            with torch.no_grad():
                view.copy_(tensor)
            views[id(tensor)] = view
        for entries, name in places_of(unit.module):
            tensor = entries[name]
            if id(tensor) not in views:
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = views[id(tensor)]
            else:
                entries[name] = views[id(tensor)]
        buffer.state.memory.copy_(slot.memory.state.memory)
        moments = [
            {name: buffer.state[f"{i}.{name}"] for name in names} for i, names in enumerate(slot.updater.moments())
        ]
        ema = [buffer.state[f"{i}.ema"] for i in range(len(slot.updater.ema))]
        for average, parameter in zip(ema, unit.own, strict=False):
            average.copy_(parameter.detach())
        self.sets[unit.name] = ParameterSet(unit.own, moments, ema)

    # ---- moving -------------------------------------------------------------------------------------------

    def activate(self, unit: int, following: int | None) -> ActiveUnit:
        """Bring the unit onto the device if it is not there, and let the next one be read ahead."""
        slot = self._slots[self._shapes[unit]]
        if self._unit != unit:
            self._switch(unit)
            slot.module.bind(self.units[unit], slot.tensors)
            if following is not None:
                self._buffers.prefetch(following)
        return self._active_unit(unit, slot.module, slot.updater)

    def _switch(self, unit: int | None) -> None:
        """Copy the unit on the device to its host buffer, and another one in; with None it only is copied."""
        last = self._unit
        incoming = None if unit is None else self._buffers.incoming(unit)
        outgoing = None if last is None else self._buffers.outgoing(last)
        if self._out is not None and self._into is not None:
            for stream in (self._out, self._into):  # after the last step of the unit that leaves
                stream.wait_stream(torch.cuda.current_stream(self.device))
        weights, state = self._memory
        self._arrivals = self._exchange(
            weights, outgoing.weights if outgoing else None, incoming.weights if incoming else None
        )
        if unit is not None:
            self._wait_for_weights(self._slots[self._shapes[unit]].needs[0])
        self._exchange(state, outgoing.state if outgoing else None, incoming.state if incoming else None)
        self._state_is_there = None if self._into is None else self._into.record_event()
        all_is_out = None if self._out is None else self._out.record_event()

        def wait(events: tuple[Any, ...] = (self._state_is_there, all_is_out)) -> None:
            for event in events:
                if event is not None:
                    event.synchronize()

        self._buffers.finish_switch(last, unit, wait)
        if unit is not None:
            self._unit = unit

    def _exchange(self, memory: Tensor, outgoing: Arena | None, incoming: Arena | None) -> list[tuple[int, Any]]:
        """Copy memory of the device chunk by chunk, so that both directions are under way at once.

        Returns:
            Up to which byte what comes in is there after which event; empty where nothing is to be waited for.
        """
        arrivals: list[tuple[int, Any]] = []
        for start in range(0, len(memory), _CHUNK):
            piece = slice(start, start + _CHUNK)
            if outgoing is not None:
                part = outgoing.changing[piece]
                with torch.cuda.stream(self._out):
                    part.copy_(memory[start : start + len(part)], non_blocking=True)
            if incoming is not None:
                part = incoming.memory[piece]
                if self._into is not None and self._out is not None:
                    self._into.wait_event(self._out.record_event())
                with torch.cuda.stream(self._into):
                    memory[start : start + len(part)].copy_(part, non_blocking=True)
                if self._into is not None:
                    arrivals.append((start + len(part), self._into.record_event()))
        return arrivals

    def _wait_for_weights(self, size: int) -> None:
        """Let the current stream wait for the first bytes of the active unit's weights."""
        event = next((event for end, event in self._arrivals if end >= size), None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def _wait_for_layer(self, needs: list[int], layer: int) -> None:
        if self._arrivals and len(needs) > 1:
            self._wait_for_weights(needs[layer + 1])

    def wait_for_state(self) -> None:
        """Let the current stream wait for the copies of the last switch."""
        if self._state_is_there is not None:
            torch.cuda.current_stream(self.device).wait_event(self._state_is_there)
            self._state_is_there = None
            self._arrivals = []

    def flush(self) -> None:
        """Copy the unit on the device to its host buffer."""
        if self._unit is not None:
            self._switch(None)
        self.settle()

    def on_device(self, model: DiffusionBlocks) -> AbstractContextManager[Any]:
        """Let its blocks take turns on the device, copied from the host buffers."""
        return model.taking_turns(self.device)

    def refresh(self) -> None:
        """Forget what the device has, so that the next step copies its unit in."""
        self.settle()
        self._unit = None

    def settle(self) -> None:
        """Wait for both streams and for the host buffers."""
        for stream in (self._out, self._into):
            if stream is not None:
                stream.synchronize()
        self._buffers.settle()
