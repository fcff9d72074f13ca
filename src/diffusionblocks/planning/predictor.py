"""Predicts the bytes of a recipe's training step, without a device and without weights.

What stays between steps is counted on the model's outline; what a step makes is followed on fake tensors
(`tracing.py`). A `Predictor` serves a recipe and what is changed of it: each model is laid out once, each distinct step
is traced once, and the examples are counted once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.digests import json_digest
from ..common.interpreter import uncollected
from ..common.messages import Say
from ..core.block import Block
from ..data.dataset import ExampleCount
from ..experiments.experiment import Experiment
from ..experiments.recipe import Recipe
from ..experiments.recipe_changes import with_depth
from ..families import Family, config_values, family_named
from ..targets import AUTO, LossChunk
from ..training import EndToEnd, Unit, units_of
from ..training.shared_module import shape_of
from .counting import count_persistent, count_waiting
from .ledger import ChunkLaw, DepthLaw, Forecast, Ledger, StepLaw
from .step_cache import StepCache, code_of, surroundings
from .timeline import StepLog
from .tracing import MakeBatch, StepTracer

#: What cuBLAS keeps on a Hopper GPU: torch gives each host thread that calls it 32 MiB from the caching allocator, and
#: the forward and the backward pass run in one thread each. (Other GPUs: 8 MiB.)
WORKSPACE_BYTES = 2 * 32 * 2**20

#: What a process takes of a GPU beside its allocator: the driver's context, and the kernels that are loaded. No peak
#: has it; a budget must have room for it. An allowance, not a measurement: it differs by driver, GPU and library.
CONTEXT_BYTES = 600 * 2**20

# A block takes up to a second a layer to trace. Where all layers of a model are alike, two depths serve blocks of all
# numbers of layers: what a step holds is affine in it, at both of its candidate moments, but for the first layer.
_DEPTHS = (2, 3)

#: Fields of `train` that a planner changes, or a run of blocks is given, and that a step on fake tensors does not read.
_UNTRACED = {
    *("resident", "offload", "optimizer", "cuda_graph", "concurrent", "blocks", "schedule", "steps_per_switch"),
    *("batch_size", "loss_chunk"),  # a `StepLog` holds for any batch, a `StepTracer` follows any chunks
}
#: Sections of a recipe that do not change its model.
_OUTSIDE_THE_MODEL = {"name", "train", "evaluate", "device"}


#: A model, a unit of it, what a step reads of `train`, and tokens of a text.
_StepKey = tuple[str, str, str, int | None]


@dataclass(frozen=True)
class _Outline:
    """A model on the meta device.

    Attributes:
        key: equal for recipes of this model.
        module: the model.
        config: of its original.
    """

    key: str
    family: Family
    module: nn.Module
    config: Any


@dataclass(frozen=True)
class HostBytes:
    """Bytes that a run on a GPU keeps in host memory; Python, torch and the driver take some more.

    Attributes:
        waiting: blocks that are not on the GPU (`train.resident: active`), with their optimizer state and averages.
        data: examples that are not on the GPU, and not mapped from files.
    """

    waiting: int
    data: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.waiting + self.data


class Predictor:
    """Predicts the bytes of a recipe's training step, and of the same recipe with changes.

    Args:
        recipe: what would be trained; a trunk is not looked at. With `device: cpu` it is a CPU's step; otherwise a
            GPU's, whether or not there is one.
        num_examples: how many examples of the data are kept on the device (with `data.placement: host`: none; `auto`
            counts as `device`). None counts those of the train split where that is cheap
            (`DataSection.count_examples`), else none.
        say: is told of each step that is about to be traced, which takes up to some seconds.
        cache: of steps that were traced before; None traces all.

    Raises:
        ValueError: num_examples < 0, or a recipe that distils.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_examples: int | None = None,
        *,
        say: Say = lambda line: None,
        cache: StepCache | None = None,
    ) -> None:
        if recipe.train.teaching is not None:
            raise ValueError(
                "train.distill: the memory of teachers is not predicted; plan without it (set train.distill to null), "
                "and add their weights and their forward pass"
            )
        if num_examples is not None and num_examples < 0:
            raise ValueError(f"num_examples must be >= 0, got {num_examples}")
        self.recipe = recipe
        self.num_examples = num_examples
        self._outlines: dict[str, _Outline] = {}
        self._say = say
        self.cache = cache
        self._tracers: dict[_StepKey, StepTracer] = {}
        self._logs: dict[tuple[_StepKey, LossChunk], StepLog] = {}

    @functools.cached_property
    def examples(self) -> ExampleCount:
        """The examples that are counted where none are given."""
        return self.recipe.data.count_examples()

    @functools.cached_property
    def on_gpu(self) -> bool:
        """Whether the step is a GPU's."""
        return self.recipe.device != "cpu"

    @property
    def context_bytes(self) -> int:
        """Bytes of a budget that are the GPU's context (`CONTEXT_BYTES`); none of a CPU's."""
        return CONTEXT_BYTES if self.on_gpu else 0

    def keeps_data(self, recipe: Recipe) -> bool:
        """Whether the data are in the device's memory; `auto` is taken to keep them there."""
        if self.on_gpu:
            return recipe.data.placement != "host"
        return not recipe.data.mapped or recipe.data.placement == "device"  # else mapped from files

    def example_bytes(self) -> int:
        """Bytes of one example on the device."""
        outline = self._outline(self.recipe)
        length, classes = _text_length(self.recipe), outline.family.num_classes(outline.config)
        shape = self.shapes["pixel_values"] if length is None else (length,)
        return self.recipe.data.example_bytes(shape, classes)

    @property
    def takes_any_shape(self) -> bool:
        """Whether the data say how large an example is, and not the model's config."""
        outline = self._outline(self.recipe)
        return outline.family.batch_of(outline.config) is not None

    @functools.cached_property
    def at_hand(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the data's largest example, as the model takes it, where files at hand say them."""
        outline = self._outline(self.recipe)
        batch_of, shapes = outline.family.batch_of(outline.config), self.recipe.data.largest_example()
        if batch_of is None or not shapes:
            return {}
        batch = batch_of({name: torch.empty(1, *shape, device="meta") for name, shape in shapes.items()})
        return {name: tuple(value.shape[1:]) for name, value in batch.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the example that a step is followed with: of data at hand, else the usual ones of the model."""
        outline = self._outline(self.recipe)
        batch = outline.family.empty_batch(outline.config, 1, _text_length(self.recipe))
        return {name: tuple(value.shape[1:]) for name, value in batch.items()} | dict(self.at_hand)

    def data_bytes(self, recipe: Recipe | None = None) -> int:
        """Bytes of the data on the device, of the recipe or of a changed one."""
        if not self.keeps_data(recipe or self.recipe):
            return 0
        return self._count * self.example_bytes() if self._count else 0

    @functools.cached_property
    def _count(self) -> int:
        return self.num_examples if self.num_examples is not None else self.examples.count or 0

    def host_bytes(self, recipe: Recipe | None = None) -> HostBytes:
        """Bytes that a run of the recipe, or of a changed one, keeps in host memory beside a GPU."""
        recipe = recipe or self.recipe
        if not self.on_gpu:
            return HostBytes(0, 0)
        count = 0 if self.keeps_data(recipe) or recipe.data.mapped else self._count
        return HostBytes(count_waiting(self.units(recipe), recipe.train), count * self.example_bytes() if count else 0)

    def forecast(self, recipe: Recipe | None = None) -> Forecast:
        """Predict what stays between steps, and the step of every shape of unit.

        Args:
            recipe: this one with changes; None: as it is.

        Raises:
            ValueError: what building the recipe's model refuses, or nothing to train.
        """
        recipe = recipe or self.recipe
        outline = self._outline(recipe)
        units, shared = units_of(outline.module, recipe.train.blocks)
        persistent = dataclasses.asdict(count_persistent(units, shared, recipe.train))
        persistent |= {"data": self.data_bytes(recipe), "workspace": WORKSPACE_BYTES if self.on_gpu else 0}
        distinct = {shape_of(unit): unit for unit in reversed(units)}
        laws = {unit.name: self._law(recipe, outline, unit) for unit in distinct.values()}
        for law in laws.values():
            law.at(recipe.train.batch_size)  # what cannot be followed is said now
        return Forecast(persistent, laws, recipe.train.batch_size, self.on_gpu and recipe.train.cuda_graph)

    def units(self, recipe: Recipe | None = None) -> list[Unit]:
        """What the recipe, or a changed one, trains, on the meta device."""
        recipe = recipe or self.recipe
        return units_of(self._outline(recipe).module, recipe.train.blocks)[0]

    def _outline(self, recipe: Recipe) -> _Outline:
        key = json.dumps(recipe.model_dump(mode="json", exclude=_OUTSIDE_THE_MODEL), sort_keys=True)
        if key not in self._outlines:
            with uncollected():  # the model's library is imported
                module = Experiment(recipe).outline
            self._outlines[key] = _Outline(key, family_named(recipe.model.type), module, Experiment.config_of(module))
        return self._outlines[key]

    def _law(self, recipe: Recipe, outline: _Outline, unit: Unit) -> StepLaw:
        layers = len(unit.module.layers()) if isinstance(unit.module, Block) else 0
        family = outline.family
        of_any_depth = recipe.model.pretrained is None and family.layers_alike and not family.depth_dependent_weights
        if layers < min(_DEPTHS) or not of_any_depth:
            return self._trace(recipe, outline, unit)
        if layers in _DEPTHS:
            return self._trace_at_depth(recipe, layers)
        low, high = (self._trace_at_depth(recipe, depth) for depth in _DEPTHS)
        return DepthLaw(low, high, layers - min(_DEPTHS))

    def _trace_at_depth(self, recipe: Recipe, layers: int) -> StepLaw:
        """Trace a step of a block like the recipe's, of another number of layers."""
        one_block = {"blocks": recipe.blocks.as_one_block()}
        outline = self._outline(with_depth(recipe, layers).model_copy(update=one_block))
        (unit,), _ = units_of(outline.module)
        return self._trace(recipe, outline, unit)

    def _trace(self, recipe: Recipe, outline: _Outline, unit: Unit) -> StepLaw:
        length, module = _text_length(recipe), unit.module
        if recipe.train.loss_chunk != AUTO or length is None:
            return self._trace_chunk(recipe.train.loss_chunk, recipe, outline, unit)
        assert isinstance(module, (Block, EndToEnd)), "these learn texts"

        def chunk(batch: int) -> int | None:
            return module.auto_chunk(torch.empty(batch, length, dtype=torch.int64, device="meta"))

        return ChunkLaw(chunk, functools.partial(self._trace_chunk, recipe=recipe, outline=outline, unit=unit))

    def _trace_chunk(self, chunk: LossChunk, recipe: Recipe, outline: _Outline, unit: Unit) -> StepLog:
        key = outline.key, unit.name, recipe.train.model_dump_json(exclude=_UNTRACED), _text_length(recipe)
        if (key, chunk) not in self._logs:
            step = None if self.cache is None else self._step(key, chunk, recipe, outline, unit)
            log = None if self.cache is None or step is None else self.cache.read(step)
            if log is None:
                self._say(f"following a step of {unit.name} on tensors without memory")
                if key not in self._tracers:
                    make_batch = self._make_batch(recipe, outline)
                    self._tracers[key] = StepTracer(unit, recipe.train, make_batch, on_gpu=self.on_gpu)
                log = self._tracers[key].follow(chunk)
                if self.cache is not None and step is not None:
                    self.cache.write(step, log)
            self._logs[key, chunk] = log
        return self._logs[key, chunk]

    def _step(
        self, key: _StepKey, chunk: LossChunk, recipe: Recipe, outline: _Outline, unit: Unit
    ) -> dict[str, Any] | None:
        """All that decides on a step's log, as JSON values; None: not all is known."""
        code = code_of(unit.module)
        if code is None:
            return None
        batch = self._make_batch(recipe, outline)(1)
        return {
            "model, unit, train, length": list(key),
            "config": json_digest(config_values(recipe.model.type, outline.config)),
            "unit": json_digest(repr(shape_of(unit))),
            "batch": {name: [list(value.shape[1:]), str(value.dtype)] for name, value in batch.items()},
            "chunk": chunk,
            "on_gpu": self.on_gpu,
            "code": code,
            **surroundings(),
        }

    def _make_batch(self, recipe: Recipe, outline: _Outline) -> MakeBatch:
        """What makes examples whose values do not matter, of the shapes at hand; see `StepTracer`."""
        make_batch = functools.partial(outline.family.empty_batch, outline.config, length=_text_length(recipe))
        if not self.at_hand:
            return make_batch
        optional = set(outline.family.optional_inputs(outline.config)) - self.at_hand.keys()
        dtypes = {name: value.dtype for name, value in make_batch(1).items() if name not in optional}

        def of_shapes(size: int) -> dict[str, Tensor]:
            return {name: torch.ones(size, *self.shapes[name], dtype=dtype) for name, dtype in dtypes.items()}

        return of_shapes


def why_not_predicted(recipe: Recipe) -> str | None:
    """Why the memory of a recipe's step cannot be predicted; None: it can."""
    if not family_named(recipe.model.type).reads_values:
        return None
    return f"{recipe.model.type} counts tokens on the host, so the memory of its step is not predicted, only measured"


def _text_length(recipe: Recipe) -> int | None:
    """Tokens of a text, which may be fewer than the model takes; None: the data are no texts."""
    return getattr(recipe.data, "length", None)


def predict(recipe: Recipe, *, num_examples: int | None = None) -> Ledger:
    """Predict the bytes of a training step of a recipe; see `Predictor` for arguments and errors."""
    return Predictor(recipe, num_examples).forecast().ledger


def forecast(recipe: Recipe, *, num_examples: int | None = None) -> Forecast:
    """Predict as `predict`, with both candidate moments of every shape of unit."""
    return Predictor(recipe, num_examples).forecast()
