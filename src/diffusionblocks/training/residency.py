"""Residency: what of the model, its optimizer state and its averages is on the device, and where the rest waits.

A unit never computes in its own module. It computes in a `Skeleton`: a copy of the module without tensors, in which
the tensors of any unit of the same shape can be mounted; so units of one shape share one compiled step.

- `all`: every unit's tensors are on the device, and mounted in turn.
- `active`: on the device there is memory for the weights, optimizer state and averages of one unit, the largest; a
  `Slot` is how units of one shape use it. The other units wait at home (`homes.py`). At a switch both directions of the
  bus work at once: while one chunk of the next unit comes in, a chunk of the last one goes out. The next forward pass
  waits for the weights alone; optimizer state and averages follow while it computes.
"""

from __future__ import annotations

import abc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.tensors import places_of, tensors_of
from .arena import Arena, Layout
from .host_buffers import DiskHomes, Homes, HostHomes, Layouts, Luggage
from .optim import ParameterSet, Updater, average_dtype
from .schedules import lr_factor
from .shared_module import Skeleton, in_several, move, shape_of
from .train_config import TrainConfig
from .units import Unit

_CHUNK = 2**26  # bytes that move at once


@dataclass
class Place:
    """Where a unit computes when it is its turn."""

    module: nn.Module
    updaters: list[Updater]
    owners: list[ParameterSet]


@dataclass(frozen=True)
class Lengths:
    """Steps of a unit and how many of them warm up."""

    steps: int
    warmup: int


class Residency(abc.ABC):
    """Brings units to where they compute.

    Attributes:
        sets: what belongs to each unit, by its name, and to all together (`shared`, under `joint`), wherever it is.
        skeletons: one for every shape of unit.
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
        self._skeletons: dict[tuple[Any, ...], Skeleton] = {}
        self._shapes = [shape_of(unit) for unit in units]
        for unit, shape in zip(units, self._shapes, strict=True):
            if shape not in self._skeletons:
                self._skeletons[shape] = Skeleton(unit, config)
        self._shared: list[tuple[Updater, ParameterSet]] = []
        self._shared_parameters = shared
        self._places: dict[int, Place] = {}
        self._common = in_several([unit.module for unit in units])
        self._fill = fill
        if fill is not None and self._common:  # what they have in common is on the device before the first of them
            for unit in units:
                self._materialise(unit)
            self._common = in_several([unit.module for unit in units])

    def _add_shared(self) -> None:
        """After the shared parts are on the device: they step at every iteration, and always stay."""
        if self._shared_parameters:
            steps, warmup = (len(self.units) * length for length in (self.lengths.steps, self.lengths.warmup))
            updater, owner = _fresh(self._shared_parameters, steps, warmup, self.config)
            self.sets["shared"] = owner
            self._shared.append((updater, owner))

    def common_tensors(self) -> list[Tensor]:
        """What several units hold: the shared parts under `joint`."""
        found = {id(t): t for unit in self.units for t in tensors_of(unit.module) if id(t) in self._common}
        return list(found.values())

    def learning_rate(self, unit: int) -> float:
        """The rate of a unit's last step."""
        done = max(0, self.sets[self.units[unit].name].steps - 1)
        return self.config.lr * lr_factor(done, self.lengths.steps, self.lengths.warmup, self.config.lr_schedule)

    def _materialise(self, unit: Unit) -> None:
        """Give a unit that was never built its initial weights."""
        if self._fill is not None and any(tensor.is_meta for tensor in tensors_of(unit.module)):
            self._fill(unit.index)

    def _place(self, unit: int, skeleton: Skeleton, updater: Updater) -> Place:
        if unit not in self._places:
            pairs = [(updater, self.sets[self.units[unit].name]), *self._shared]
            self._places[unit] = Place(skeleton.module, [u for u, _ in pairs], [owner for _, owner in pairs])
        return self._places[unit]

    @property
    def skeletons(self) -> list[Skeleton]:
        """One for every shape of unit."""
        return list(self._skeletons.values())

    @abc.abstractmethod
    def activate(self, unit: int, following: int | None) -> Place:
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
        """The units' own tensors were changed from outside: read them again before the next step."""

    def settle(self) -> None:  # noqa: B027
        """Wait until no copy is under way (nothing else may use the device while a graph is captured)."""


def _fresh(
    parameters: list[nn.Parameter], steps: int, warmup: int, config: TrainConfig
) -> tuple[Updater, ParameterSet]:
    ema = [p.detach().to(average_dtype(p), copy=True) for p in parameters] if config.keeps_average else []
    updater = Updater(parameters, steps, warmup, config, ema)
    updater.allocate()
    return updater, ParameterSet(parameters, updater.moments(), ema)


class AllResident(Residency):
    """Every unit is on the device."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._updaters = []
        for unit in self.units:
            self._materialise(unit)
            unit.module.to(self.device)
            updater, owner = _fresh(unit.own, self.lengths.steps, self.lengths.warmup, self.config)
            self.sets[unit.name] = owner
            self._updaters.append(updater)
        self._add_shared()
        self._tensors = [tensors_of(unit.module) for unit in self.units]

    def activate(self, unit: int, following: int | None) -> Place:
        """See `Residency`."""
        chosen = self.units[unit]
        skeleton = self._skeletons[self._shapes[unit]]
        if skeleton.unit is not chosen:
            skeleton.mount(chosen, self._tensors[unit])
        return self._place(unit, skeleton, self._updaters[unit])


@dataclass(frozen=True)
class Slot:
    """How units of one shape use the memory on the device that all units share, one after another.

    Attributes:
        luggage: the memory, as a unit of this shape uses it.
        tensors: mounted in the skeleton, in the order of `tensors_of`.
    """

    skeleton: Skeleton
    luggage: Luggage
    updater: Updater
    tensors: list[Tensor]


class ActiveResident(Residency):
    """Only the unit that trains is on the device, and what all units move together (under `joint`).

    Args:
        folder: where `offload: disk` keeps its files.
    """

    def __init__(self, *args: Any, folder: Path) -> None:
        super().__init__(*args)
        for unit in self.units:
            move(unit.module, self._common, self.device)
        self._add_shared()
        on_gpu = self.device.type == "cuda"
        self._out, self._into = (torch.cuda.Stream(self.device) if on_gpu else None for _ in range(2))
        self._state_came: Any = None
        self._occupant: int | None = None

        layouts = {shape: self._measure(self.units[self._shapes.index(shape)]) for shape in self._skeletons}
        of_units = [layouts[shape] for shape in self._shapes]
        self._memory = [
            torch.zeros(max(both[part].bytes for both in of_units), dtype=torch.uint8, device=self.device)
            for part in range(2)
        ]
        self._homes: Homes
        if self.config.offload == "disk":
            self._homes = DiskHomes(of_units, folder, pinned=on_gpu)
        else:
            self._homes = HostHomes(of_units, pinned=on_gpu)
        self.host_bytes = self._homes.host_bytes
        self._slots: dict[tuple[Any, ...], Slot] = {}
        for shape, skeleton in self._skeletons.items():
            alike = [place for place, other in enumerate(self._shapes) if other == shape]
            self._slots[shape] = slot = self._make_slot(self.units[alike[0]], skeleton, layouts[shape])
            for place in alike:
                self._move_in(self.units[place], slot, self._homes.home(place))

    # ---- making -------------------------------------------------------------------------------------------

    def _own_tensors(self, unit: Unit) -> list[Tensor]:
        """What only the unit holds, each once."""
        distinct = {id(t): t for t in tensors_of(unit.module) if id(t) not in self._common}
        return list(distinct.values())

    def _measure(self, unit: Unit) -> Layouts:
        """What a unit of this shape brings: its weights, and the state that the optimizer makes for them."""
        weights = Layout({str(i): t for i, t in enumerate(self._own_tensors(unit))})
        trial = Arena(weights, torch.zeros(weights.bytes, dtype=torch.uint8, device=self.device))
        _, parameters = self._mounted(unit, trial)
        state: dict[str, Tensor] = {}

        def note(i: int, name: str, fresh: Tensor) -> Tensor:
            return state.setdefault(f"{i}.{name}", torch.empty_like(fresh, device="meta"))

        Updater(parameters, 1, 0, self.config, []).allocate(note)
        averages = parameters if self.config.keeps_average else []
        for i, p in enumerate(averages):
            state[f"{i}.ema"] = torch.empty_like(p, dtype=average_dtype(p), device="meta")
        return weights, Layout(state)

    def _mounted(self, unit: Unit, weights: Arena) -> tuple[list[Tensor], list[nn.Parameter]]:
        """The tensors to mount for a unit whose weights lie there, and which of them are trained."""
        lying: dict[int, Tensor] = {}
        for i, tensor in enumerate(self._own_tensors(unit)):
            view = weights[str(i)]
            # Without `.data`, a step of one parameter would count as a change of all that lie in the same memory.
            lying[id(tensor)] = (
                nn.Parameter(view.data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
            )
        parameters = [p for p in (lying[id(p)] for p in unit.own) if isinstance(p, nn.Parameter)]
        return [lying.get(id(t), t) for t in tensors_of(unit.module)], parameters

    def _make_slot(self, unit: Unit, skeleton: Skeleton, layouts: Layouts) -> Slot:
        weights, state = (
            Arena(layout, memory[: layout.bytes]) for layout, memory in zip(layouts, self._memory, strict=True)
        )
        tensors, parameters = self._mounted(unit, weights)
        skeleton.mount(unit, tensors)
        ema = [state[f"{i}.ema"] for i in range(len(parameters))] if self.config.keeps_average else []
        updater = Updater(parameters, self.lengths.steps, self.lengths.warmup, self.config, ema)
        updater.allocate(lambda i, name, fresh: state[f"{i}.{name}"])
        return Slot(skeleton, Luggage(weights, state), updater, tensors)

    def _move_in(self, unit: Unit, slot: Slot, home: Luggage) -> None:
        """Let the unit's own tensors lie in its home, and start its optimizer state afresh."""
        self._materialise(unit)
        places = {}
        for i, tensor in enumerate(self._own_tensors(unit)):
            view = home.weights[str(i)]
            with torch.no_grad():
                view.copy_(tensor)
            places[id(tensor)] = view
        for entries, name in places_of(unit.module):
            tensor = entries[name]
            if id(tensor) not in places:
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = places[id(tensor)]
            else:
                entries[name] = places[id(tensor)]
        home.state.memory.copy_(slot.luggage.state.memory)
        moments = [
            {name: home.state[f"{i}.{name}"] for name in names} for i, names in enumerate(slot.updater.moments())
        ]
        ema = [home.state[f"{i}.ema"] for i in range(len(slot.updater.ema))]
        for average, parameter in zip(ema, unit.own, strict=False):
            average.copy_(parameter.detach())
        self.sets[unit.name] = ParameterSet(unit.own, moments, ema)

    # ---- moving -------------------------------------------------------------------------------------------

    def activate(self, unit: int, following: int | None) -> Place:
        """See `Residency`."""
        slot = self._slots[self._shapes[unit]]
        if self._occupant != unit:
            self._switch(unit)
            slot.skeleton.mount(self.units[unit], slot.tensors)
            if following is not None:
                self._homes.prefetch(following)
        return self._place(unit, slot.skeleton, slot.updater)

    def _switch(self, unit: int | None) -> None:
        """Bring the unit that is there home, and another one in; with None it only goes home, and stays as well."""
        left = self._occupant
        coming = None if unit is None else self._homes.coming(unit)
        leaving = None if left is None else self._homes.leaving(left)
        if self._out is not None and self._into is not None:
            for stream in (self._out, self._into):  # after the last step of the unit that leaves
                stream.wait_stream(torch.cuda.current_stream(self.device))
        weights, state = self._memory
        self._exchange(weights, leaving.weights if leaving else None, coming.weights if coming else None)
        if self._into is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._into)
        self._exchange(state, leaving.state if leaving else None, coming.state if coming else None)
        self._state_came = None if self._into is None else self._into.record_event()
        went = None if self._out is None else self._out.record_event()

        def copied(came: Any = self._state_came, went: Any = went) -> None:
            for event in (came, went):
                if event is not None:
                    event.synchronize()

        self._homes.switched(left, unit, copied)
        if unit is not None:
            self._occupant = unit

    def _exchange(self, here: Tensor, leaving: Arena | None, coming: Arena | None) -> None:
        """Chunk by chunk, so that both directions are under way at once."""
        for start in range(0, len(here), _CHUNK):
            piece = slice(start, start + _CHUNK)
            if leaving is not None:
                part = leaving.memory[piece]
                with torch.cuda.stream(self._out):
                    part.copy_(here[start : start + len(part)], non_blocking=True)
            if coming is not None:
                part = coming.memory[piece]
                if self._into is not None and self._out is not None:
                    self._into.wait_event(self._out.record_event())
                with torch.cuda.stream(self._into):
                    here[start : start + len(part)].copy_(part, non_blocking=True)

    def wait_for_state(self) -> None:
        """See `Residency`."""
        if self._state_came is not None:
            torch.cuda.current_stream(self.device).wait_event(self._state_came)
            self._state_came = None

    def flush(self) -> None:
        """See `Residency`."""
        if self._occupant is not None:
            self._switch(None)
        self.settle()

    def refresh(self) -> None:
        """See `Residency`."""
        self.settle()
        self._occupant = None

    def settle(self) -> None:
        """See `Residency`."""
        for stream in (self._out, self._into):
            if stream is not None:
                stream.synchronize()
        self._homes.settle()


def make_residency(
    units: list[Unit],
    shared: list[nn.Parameter],
    lengths: Lengths,
    config: TrainConfig,
    device: torch.device,
    folder: Path | None,
    fill: Callable[[int], None] | None,
) -> Residency:
    """The residency that a configuration asks for; one unit alone is always on the device.

    Args:
        units: what is trained.
        shared: parameters that all units move.
        lengths: steps of each unit.
        config: `resident` and `offload`.
        device: where to train.
        folder: of the run; mapped files go below it (None: to the system's temporary folder).
        fill: gives the block of an index its weights, where it is still on the meta device.
    """
    if config.resident == "all" or len(units) == 1:
        return AllResident(units, shared, lengths, config, device, fill)
    place = folder / "resident" if folder is not None else Path(tempfile.mkdtemp(prefix="diffusionblocks-"))
    return ActiveResident(units, shared, lengths, config, device, fill, folder=place)
