"""Votes of several networks on the same targets, and how they become one answer: an ensemble's rule, written once."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import get_args

import torch
from torch import Tensor

from ..common.fields import LogitCombination


class LogitVotes:
    """Running means of logits and of probabilities, in the memory of one answer for each rule, however many vote.

    Args:
        rules: which means are kept: `mean` (of logits), `probabilities`.
    """

    def __init__(self, rules: Collection[str] = get_args(LogitCombination)) -> None:
        self.count = 0
        self._total: Tensor | None = None
        self._mixture: Tensor | None = None
        self._rules = frozenset(rules)

    def add(self, logits: Tensor) -> None:
        """Add the logits (..., count) of one network, of any dtype; the same shape each time."""
        logits = logits.float()
        self.count += 1
        if "mean" in self._rules:
            self._total = logits if self._total is None else self._total + logits
        if "probabilities" in self._rules:
            logs = logits.log_softmax(-1)
            self._mixture = logs if self._mixture is None else torch.logaddexp(self._mixture, logs)

    def answer(self, combine: str) -> Tensor:
        """Logits, float32, of the answer by a rule.

        Args:
            combine: `mean`, the mean of the logits; or `probabilities`, the logarithm of the mean of the probabilities.

        Raises:
            KeyError: a rule that is not kept, or nobody voted.
        """
        if combine == "mean" and self._total is not None:
            return self._total / self.count
        if combine == "probabilities" and self._mixture is not None:
            return self._mixture - math.log(self.count)
        raise KeyError(combine)
