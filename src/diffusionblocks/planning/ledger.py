"""The ledger of a recipe: the bytes of a training step by kind, predicted without a device and without weights.

    ledger = predict(load_recipe("recipes/dit/imagenet-latents.yaml"))
    ledger.peak                 # to be compared with torch.cuda.max_memory_allocated()

What stays between steps is counted on the model's outline; what a step makes is followed on fake tensors
(`tracing.py`). Not counted: what the driver itself takes, fragmentation of the allocator's pools, and other processes.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from ..core.block import Block
from ..experiments.recipe import Recipe
from ..experiments.run import with_depth
from ..experiments.sources import config_of, outline_of
from ..families import family_named
from ..training import Unit, units_of
from ..training.shared_module import shape_of
from .counting import kept_on_device
from .timeline import Moment
from .tracing import MakeBatch, StepMoments, trace_step

#: What cuBLAS keeps on a Hopper GPU: torch gives each host thread that calls it 32 MiB from the caching allocator, and
#: the forward and the backward pass run in one thread each. (Other GPUs: 8 MiB.)
WORKSPACE_BYTES = 2 * 32 * 2**20

# A compiled block takes seconds a layer to trace. Deeper ones are traced at these two depths; what a step holds is
# affine in the number of equal layers, at both of its candidate moments.
_TRACED_WHOLE = 6
_DEPTHS = (3, 4)


@dataclass(frozen=True)
class Ledger:
    """Bytes on the device at the peak of a training step, of the unit that needs most.

    Attributes:
        unit: its name.
        parameters: weights on the device, frozen ones too.
        buffers: the modules' buffers.
        optimizer: AdamW's state.
        ema: moving averages.
        data: examples that are kept on the device.
        workspace: of cuBLAS.
        gradients: gradients of parameters that are there at the peak.
        activations: all else that is there at the peak: the batch, what the backward pass needs, temporaries.
    """

    unit: str
    parameters: int
    buffers: int
    optimizer: int
    ema: int
    data: int
    workspace: int
    gradients: int
    activations: int

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind; they add up to the peak."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "unit"}

    @property
    def peak(self) -> int:
        """Most bytes at any moment of the step."""
        return sum(self.kinds.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"peak": self.peak}


@dataclass(frozen=True)
class Forecast:
    """What a recipe keeps between steps, and the worst moments of a step of each shape of unit.

    Attributes:
        kept: bytes by kind.
        moments: by the unit's name.
    """

    kept: dict[str, int]
    moments: dict[str, StepMoments]

    @property
    def ledger(self) -> Ledger:
        """That of the unit that needs most."""
        name, moments = max(self.moments.items(), key=lambda item: item[1].peak.total)
        peak = moments.peak
        return Ledger(name, **self.kept, gradients=peak.gradients, activations=peak.activations)


def predict(recipe: Recipe, *, num_examples: int | None = None) -> Ledger:
    """Predict the bytes of a training step of a recipe.

    With `device: cpu` it is a CPU's step; otherwise a GPU's, whether or not there is one.

    Args:
        recipe: what would be trained; a trunk is not looked at.
        num_examples: how many examples of the data are kept on the device (with `data.placement: host`: none; `auto`
            counts as `device`). None counts those of the train split where that is cheap
            (`DataSection.count_examples`), else none.

    Raises:
        ValueError: what building the recipe's model refuses, num_examples < 0, or nothing to train.
    """
    return forecast(recipe, num_examples=num_examples).ledger


def forecast(recipe: Recipe, *, num_examples: int | None = None) -> Forecast:
    """As `predict`, with both candidate moments of every shape of unit."""
    model = outline_of(recipe)
    units, shared = units_of(model, recipe.train.blocks)
    kept = dataclasses.asdict(kept_on_device(units, shared, recipe.train))
    family, config = family_named(recipe.model.type), config_of(model)
    make_batch = functools.partial(family.empty_batch, config)
    data = _data_bytes(recipe, family.example_shape(config), num_examples, family.num_classes(config))
    kept |= {"data": data, "workspace": WORKSPACE_BYTES if on_gpu(recipe) else 0}
    distinct = {shape_of(unit): unit for unit in reversed(units)}
    moments = {unit.name: _moments(recipe, unit, make_batch) for unit in distinct.values()}
    return Forecast(kept, moments)


def on_gpu(recipe: Recipe) -> bool:
    """Whether the step is a GPU's."""
    return recipe.device != "cpu"


def keeps_data(recipe: Recipe) -> bool:
    """Whether the data are in the device's memory; `auto` is taken to keep them there."""
    if on_gpu(recipe):
        return recipe.data.placement != "host"
    return not recipe.data.mapped or recipe.data.placement == "device"  # else mapped from files


def data_bytes(recipe: Recipe, num_examples: int | None) -> int:
    """Bytes of the data on the device; see `predict`."""
    family, config = family_named(recipe.model.type), config_of(outline_of(recipe))
    return _data_bytes(recipe, family.example_shape(config), num_examples, family.num_classes(config))


def _data_bytes(recipe: Recipe, example_shape: tuple[int, ...], num_examples: int | None, num_classes: int) -> int:
    if num_examples is not None and num_examples < 0:
        raise ValueError(f"num_examples must be >= 0, got {num_examples}")
    if not keeps_data(recipe):
        return 0
    if num_examples is None:
        num_examples = recipe.data.count_examples().count or 0
    return num_examples * recipe.data.example_bytes(example_shape, num_classes)


# ---- the step -----------------------------------------------------------------------------------------------


def _moments(recipe: Recipe, unit: Unit, make_batch: MakeBatch) -> StepMoments:
    whole_graph = recipe.train.compile is True and isinstance(unit.module, Block)
    layers = len(unit.module.layers()) if isinstance(unit.module, Block) else 0
    if not whole_graph or layers <= _TRACED_WHOLE:
        return trace_step(unit, recipe.train, make_batch, on_gpu=on_gpu(recipe))
    low, high = (
        trace_step(unit_of_depth(recipe, depth), recipe.train, make_batch, on_gpu=on_gpu(recipe)) for depth in _DEPTHS
    )
    return StepMoments(_extrapolated(low.early, high.early, layers), _extrapolated(low.late, high.late, layers))


def unit_of_depth(recipe: Recipe, layers: int) -> Unit:
    """A block like the recipe's, of another number of layers."""
    shallow = with_depth(recipe, layers)
    model = outline_of(shallow.model_copy(update={"blocks": recipe.blocks.as_one_block()}))
    (unit,), _ = units_of(model)
    return unit


def _extrapolated(low: Moment, high: Moment, layers: int) -> Moment:
    steps = (layers - _DEPTHS[0]) // (_DEPTHS[1] - _DEPTHS[0])
    return Moment(
        low.activations + steps * (high.activations - low.activations),
        low.gradients + steps * (high.gradients - low.gradients),
    )
