"""How the models of each method that converts nothing are made of a recipe, and read back."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from ..common.seeds import seed_from
from ..core.end_to_end import load_end_to_end
from ..core.saved_model import ENSEMBLE, LOCAL
from ..training.ensemble import Ensemble
from ..training.local_learning import LocalLearning
from ..training.noprop_steps import NoProp
from ..training.units import Baseline, EndToEnd
from .original import Original
from .recipe import Recipe
from .recipe_changes import layers_of_a_block, modules_of, with_depth

#: Makes the network of an `Original`: with its weights, or on the meta device.
MakeNetwork = Callable[[Original], nn.Module]


def outline_of(original: Original) -> nn.Module:
    """The network of an `Original` on the meta device."""
    return original.weights().outline()


class BaselineKind(abc.ABC):
    """Makes and reads the models of one method."""

    #: the file by which a saved model of this method is told from others
    mark: ClassVar[str]

    @abc.abstractmethod
    def make(
        self, recipe: Recipe, original: Original, network: MakeNetwork, blocks: Sequence[int] | None = None
    ) -> Baseline:
        """Make the model of a recipe, on the CPU or on the meta device.

        Args:
            recipe: of that method.
            original: the recipe's ordinary model.
            network: makes networks of it.
            blocks: which parts this job trains; others may be on the meta device. None: all.

        Raises:
            ValueError: what the recipe's model, or its division into parts, does not allow.
        """

    @abc.abstractmethod
    def load(self, model_class: str, path: Path) -> Baseline:
        """Read a saved model, on the CPU.

        Raises:
            FileNotFoundError, ValueError: what its files' reader refuses.
        """


class _OneModel(BaselineKind):
    """One model, in a baseline of a class."""

    mark = "config.json"

    def __init__(self, kind: Callable[[nn.Module], Baseline]) -> None:
        self.kind = kind

    def make(
        self, recipe: Recipe, original: Original, network: MakeNetwork, blocks: Sequence[int] | None = None
    ) -> Baseline:
        return self.kind(network(original))

    def load(self, model_class: str, path: Path) -> Baseline:
        return self.kind(load_end_to_end(model_class, path))


class _Ensemble(BaselineKind):
    mark = ENSEMBLE

    def make(
        self, recipe: Recipe, original: Original, network: MakeNetwork, blocks: Sequence[int] | None = None
    ) -> Baseline:
        """As many networks as blocks, of one block's layers each; the first has the weights of `end-to-end`."""
        options = with_depth(recipe, layers_of_a_block(recipe)).model
        many = recipe.blocks.num_blocks
        if blocks is not None and max(blocks) >= many:
            raise ValueError(f"train.blocks = {list(blocks)}: the ensemble has members 0 to {many - 1}")
        members = []
        for index in range(many):
            seed = original.seed if index == 0 else seed_from(f"{original.seed}/member {index}")
            member = Original(options, seed, original.new_head)
            members.append(network(member) if blocks is None or index in blocks else outline_of(member))
        return Ensemble(members)

    def load(self, model_class: str, path: Path) -> Baseline:
        return Ensemble.load(path)


class _LocalLearning(BaselineKind):
    mark = LOCAL

    def make(
        self, recipe: Recipe, original: Original, network: MakeNetwork, blocks: Sequence[int] | None = None
    ) -> Baseline:
        return LocalLearning(network(original), recipe.local, modules_of(recipe))

    def load(self, model_class: str, path: Path) -> Baseline:
        return LocalLearning.load(path)


#: By `method`.
BASELINE_KINDS: dict[str, BaselineKind] = {
    "end-to-end": _OneModel(EndToEnd),
    "ensemble": _Ensemble(),
    "local": _LocalLearning(),
    "noprop": _OneModel(NoProp),
}
