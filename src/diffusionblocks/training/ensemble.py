"""An ensemble of networks that are trained apart: the strictest baseline of blocks that can vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from ..common.fields import LogitCombination
from ..common.modules import tensors_of
from ..core.ensembles import load_ensemble, save_ensemble
from ..sampling import LogitVotes
from .units import Baseline, EndToEnd, Unit


class Ensemble(Baseline):
    """Unconverted classifiers or language models of one class, each trained on its own, whose answers are averaged.

    Each has data order, augmentation and dropout of its own, keyed by its index, so members that train in separate jobs
    are bit-identical to those that train together.

    Args:
        members: the networks; those on the meta device are of another job, and are neither trained nor saved.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(EndToEnd(member) for member in members)

    @property
    def config(self) -> Any:
        """The config object of each member."""
        return self.member(0).config

    def member(self, index: int) -> EndToEnd:
        """The member of an index."""
        member = self.members[index]
        assert isinstance(member, EndToEnd)
        return member

    def units(self, blocks: Sequence[int] | None = None) -> list[Unit]:
        """Each member; ValueError: there is none of an index."""
        many = len(self.members)
        indices = list(range(many)) if blocks is None else list(blocks)
        if max(indices) >= many:
            raise ValueError(f"train.blocks = {indices}: the ensemble has members 0 to {many - 1}")
        return [Unit(index, f"member {index}", self.member(index)) for index in indices]

    def forward(self, inputs: Tensor) -> Tensor:
        """Images (batch, channels, height, width) or tokens (batch, length) -> the mean of the members' logits."""
        return self.answers(inputs)["mean"]

    def answers(self, pixel_values: Tensor) -> Mapping[str | None, Tensor]:
        """`mean` of the members' logits, and the logarithm of the mean of their `probabilities`.

        Args:
            pixel_values: images; or, of language models, tokens (batch, length).
        """
        votes = LogitVotes()
        for index in range(len(self.members)):  # one after another: logits of texts are large
            votes.add(self.member(index)(pixel_values))
        return {rule: votes.answer(rule) for rule in get_args(LogitCombination)}

    def save(
        self,
        path: Path,
        *,
        processing: Mapping[str, bytes] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        """Write the members that are there, each to a sub-folder in the format of its own library."""
        there = {
            index: self.member(index).model
            for index in range(len(self.members))
            if not any(tensor.is_meta for tensor in tensors_of(self.member(index)))
        }
        save_ensemble(there, len(self.members), path, provenance, processing)

    @classmethod
    def load(cls, path: Path) -> Ensemble:
        """Read what `save` wrote, on the CPU.

        Raises:
            FileNotFoundError, ValueError: what `load_ensemble` refuses, a folder of some members among it.
        """
        return cls(load_ensemble(path))
