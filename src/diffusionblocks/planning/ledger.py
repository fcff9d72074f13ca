"""The ledger of a training step: its bytes at the peak by kind, and the forecast that it is read off.

    ledger = predict(load_recipe("recipes/dit/imagenet-latents.yaml"))
    ledger.peak                 # to be compared with torch.cuda.max_memory_allocated()

Not counted: what the driver itself takes, fragmentation of the allocator's pools, and other processes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .tracing import StepMoments


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
    """What stays on the device between steps, and the worst moments of a step of each shape of unit.

    Attributes:
        persistent: bytes that stay between steps, by kind.
        moments: by the unit's name.
    """

    persistent: dict[str, int]
    moments: dict[str, StepMoments]

    @property
    def ledger(self) -> Ledger:
        """The ledger of the unit that needs most."""
        name, moments = max(self.moments.items(), key=lambda item: item[1].peak.total)
        peak = moments.peak
        return Ledger(name, **self.persistent, gradients=peak.gradients, activations=peak.activations)
