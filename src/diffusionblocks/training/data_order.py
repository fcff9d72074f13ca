"""The order of the data, keyed by (seed, unit, step of that unit), so that the schedule of blocks does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.seeds import keyed_generator


class DataOrder:
    """Which examples a unit's step trains on: a fresh permutation each epoch, a function of (seed, unit, step).

    Whole steps only: the examples left over at the end of an epoch are dropped, others every epoch.

    Args:
        num_examples: size of the data set.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of a step.
        seed: the run's seed.
        device: of the indices.
    """

    def __init__(self, num_examples: int, batch_size: int, accumulation: int, seed: int, device: torch.device) -> None:
        self.num_examples = num_examples
        self.shape = (accumulation, batch_size)
        self.steps_per_epoch = num_examples // (accumulation * batch_size)
        self.seed = seed
        self.device = device
        self._cache: dict[int, tuple[int, Tensor]] = {}

    def __call__(self, unit: int, step: int) -> Tensor:
        """Indices of the examples, int64, shape (accumulation, batch_size), on the device."""
        epoch, position = divmod(step, self.steps_per_epoch)
        cached = self._cache.get(unit)
        if cached is None or cached[0] != epoch:
            generator = keyed_generator(self.seed, unit, epoch, "order")
            order = torch.randperm(self.num_examples, generator=generator)
            whole_steps = order[: self.steps_per_epoch * self.shape[0] * self.shape[1]]
            cached = epoch, whole_steps.view(self.steps_per_epoch, *self.shape).to(self.device)
            self._cache[unit] = cached
        return cached[1][position]
