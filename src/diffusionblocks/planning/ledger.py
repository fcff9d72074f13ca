"""The ledger of a training step: its bytes at the peak by kind, and the forecast that it is read off.

    ledger = predict(load_recipe("recipes/dit/imagenet-latents.yaml"))
    ledger.peak                 # to be compared with torch.cuda.max_memory_allocated()

Not counted: what the driver itself takes (of a budget `predictor.CONTEXT_BYTES`), fragmentation of the allocator's
ordinary pool, and other processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .timeline import Moment, StepMoments

#: What the private pool of a captured step takes beyond the tensors of the step: gaps that no other tensor can use. A
#: pool consists of segments of 2 MiB and more, and a gap serves only tensors that fit into it; so this share of the
#: step's gradients and activations, and these bytes for what few large tensors leave.
POOL_SHARE = 0.05
POOL_BYTES = 128 * 2**20


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
        graph_pool: gaps in the private pool of a captured step (`POOL_SHARE`, `POOL_BYTES`); its tensors are counted
            above.
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
    graph_pool: int = 0

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


class StepLaw(Protocol):
    """The worst moments of a step of one shape of unit, for any size of the batch."""

    def at(self, batch: int) -> StepMoments:
        """With so many examples."""


@dataclass(frozen=True)
class DepthLaw:
    """A `StepLaw` of a block of many equal layers: what its step holds is affine in their number.

    Attributes:
        low: of a block of fewer layers.
        high: of one of a layer more.
        more: layers that the block has beyond those of `low`.
    """

    low: StepLaw
    high: StepLaw
    more: int

    def at(self, batch: int) -> StepMoments:
        """With so many examples."""
        low, high = self.low.at(batch), self.high.at(batch)
        return StepMoments(self._beyond(low.early, high.early), self._beyond(low.late, high.late))

    def _beyond(self, low: Moment, high: Moment) -> Moment:
        return Moment(
            low.activations + self.more * (high.activations - low.activations),
            low.gradients + self.more * (high.gradients - low.gradients),
        )


@dataclass(frozen=True)
class ChunkLaw:
    """A `StepLaw` of texts whose logits are made in chunks that depend on the batch (`train.loss_chunk: auto`).

    Attributes:
        chunk: number of examples -> positions of a chunk, None for all.
        of_chunk: the law with such chunks.
    """

    chunk: Callable[[int], int | None]
    of_chunk: Callable[[int | None], StepLaw]

    def at(self, batch: int) -> StepMoments:
        """With so many examples."""
        return self.of_chunk(self.chunk(batch)).at(batch)


@dataclass(frozen=True)
class Forecast:
    """What stays on the device between steps, and the worst moments of a step of each shape of unit.

    Attributes:
        persistent: bytes that stay between steps, by kind.
        laws: of a step, by the unit's name.
        batch: examples of a step.
        captured: whether the step is a CUDA graph.
    """

    persistent: dict[str, int]
    laws: dict[str, StepLaw]
    batch: int
    captured: bool = False

    def of(self, batch: int) -> Forecast:
        """The forecast with another size of the batch."""
        return dataclasses.replace(self, batch=batch)

    @property
    def moments(self) -> dict[str, StepMoments]:
        """The worst moments by the unit's name."""
        return {name: law.at(self.batch) for name, law in self.laws.items()}

    @property
    def ledger(self) -> Ledger:
        """The ledger of the unit that needs most."""
        name, moments = max(self.moments.items(), key=lambda item: item[1].peak.total)
        peak = moments.peak
        pool = math.ceil(POOL_SHARE * peak.total) + POOL_BYTES if self.captured else 0
        return Ledger(name, **self.persistent, gradients=peak.gradients, activations=peak.activations, graph_pool=pool)
