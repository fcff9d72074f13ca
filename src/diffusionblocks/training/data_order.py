"""The order of the data, keyed by (seed, unit, step of that unit), so that the schedule of blocks does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.seeds import keyed_generator


class DataOrder:
    """Which examples a unit's step trains on: a fresh permutation each epoch, a function of (seed, unit, step).

    Whole steps only: the examples left over at the end of an epoch are dropped, others every epoch. Where examples are
    of groups, such as sizes, a step is of one group. What is left over in the groups makes up further steps: each is
    filled with examples of its group that the epoch has already, and the more a group has left, the likelier it is.

    Args:
        num_examples: size of the data set.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of a step.
        seed: the run's seed.
        device: of the indices.
        groups: int64 (num_examples,): of which group each example is; None: all of one.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        device: torch.device,
        groups: Tensor | None = None,
    ) -> None:
        self.num_examples = num_examples
        self.shape = (accumulation, batch_size)
        self.steps_per_epoch = num_examples // (accumulation * batch_size)
        self.seed = seed
        self.device = device
        self.groups = groups
        self._cache: dict[int, tuple[int, Tensor]] = {}

    def __call__(self, unit: int, step: int) -> Tensor:
        """Indices of the examples, int64, shape (accumulation, batch_size), on the device."""
        epoch, position = divmod(step, self.steps_per_epoch)
        cached = self._cache.get(unit)
        if cached is None or cached[0] != epoch:
            generator = keyed_generator(self.seed, unit, epoch, "order")
            order = torch.randperm(self.num_examples, generator=generator)
            size = self.shape[0] * self.shape[1]
            if self.groups is None:
                steps = order[: self.steps_per_epoch * size]
            else:
                steps = self._grouped(order, self.groups[order], size, generator)
            cached = epoch, steps.view(self.steps_per_epoch, *self.shape).to(self.device)
            self._cache[unit] = cached
        return cached[1][position]

    def _grouped(self, order: Tensor, groups: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """An epoch's steps, (steps, size), each of one group, in a random order."""
        of_groups = [order[groups == group] for group in groups.unique()]
        left = torch.tensor([len(rows) % size for rows in of_groups])
        steps = [rows[: len(rows) // size * size].view(-1, size) for rows in of_groups]
        more = self.steps_per_epoch - sum(map(len, steps))
        if more:  # each group's chance of a step is more * left / sum: even places on a line of all that is left
            places = (torch.rand(1, generator=generator) + torch.arange(more)) * (left.sum() / more)
            for group in torch.searchsorted(left.cumsum(0), places, right=True).clamp(max=len(left) - 1).tolist():
                rows = of_groups[group]
                steps.append(rows.roll(int(left[group])).repeat(-(-size // len(rows)))[None, :size])
        together = torch.cat(steps)
        return together[torch.randperm(len(together), generator=generator)]
