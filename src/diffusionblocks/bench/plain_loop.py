"""A loop without a trainer, for methods of other packages: model, data, batches and precision are those of our rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..experiments.experiment import Experiment
from ..experiments.recipe import Recipe
from ..training import BatchMaker, Diverged, units_of
from ..training.compilation import Compiler
from ..training.data_order import DataOrder
from ..training.step import arithmetic
from .bench_models import build, bytes_of_data, recipe_of, splits_of
from .methods import Spec
from .runners import Runner, bytes_of

#: What installs the packages of the benchmarks.
INSTALL = "pip install 'diffusionblocks[bench]'"


def compile_units(plain: Plain) -> None:
    """Compile each unit as the trainer does."""
    Compiler(plain.recipe.train, plain.device).compile([unit.module for unit in plain.units])


class Plain:
    """A model and its data, for a loop without a trainer.

    Attributes:
        recipe, device: what is trained, and where.
        units: of the model; one, if it trains end to end.
        batches: makes batches on the device.
        data_bytes: of the examples.
        order: which examples a step takes.

    Args:
        spec: what is measured.
        dtype: of the weights; None: as the recipe says.
        place: where the weights are; None: on the device.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype | None = None, place: str | None = None) -> None:
        self.recipe: Recipe = recipe_of(spec)
        experiment = Experiment(self.recipe, splits_of(self.recipe))
        self.device = experiment.device
        model = build(self.recipe, torch.device(place or self.device))
        if dtype is not None:
            model.to(dtype)
        self.units, shared = units_of(model)
        assert not shared, "no recipe of the benchmarks has joint shared parameters"
        data = experiment.data("train")
        self.data_bytes = bytes_of_data(data)
        self.batches: BatchMaker = experiment.batches()
        train = self.recipe.train
        for unit in self.units:
            module: Any = unit.module
            module.loss_chunk = train.loss_chunk
            if train.activation_checkpointing:
                module.activation_checkpointing = True
        self.order = DataOrder(self.batches.num_examples, train.batch_size, 1, train.seed, self.device)
        self.generator = torch.Generator(device=self.device).manual_seed(train.seed)

    def loss(self, unit: int, step: int) -> Tensor:
        """The mean loss of a unit on its step's batch."""
        batch = self.batches(self.order(unit, step)[0], self.generator)
        with arithmetic(self.device, self.recipe.train.precision):
            losses: Tensor = self.units[unit].module.loss(batch, self.generator)  # type: ignore[operator]
        return losses.mean()

    def adamw(self) -> dict[str, Any]:
        """The recipe's settings of AdamW."""
        train = self.recipe.train
        return {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}


class AlternativeRunner(Runner):
    """A whole model, end to end, with an optimizer of another package.

    Args:
        plain: model and data.
        optimizer: has `step` and `zero_grad`.
        state: the tensors that it keeps, wherever they are.

    Attributes:
        plain, optimizer: as given.
    """

    def __init__(self, plain: Plain, optimizer: Any, state: Callable[[], Iterator[Tensor]]) -> None:
        self.device = plain.device
        self.data_bytes = plain.data_bytes
        self.optimizer = optimizer
        self.plain = plain
        self._state = state
        self._steps = 0
        self._finite = torch.ones((), dtype=torch.bool, device=plain.device)

    def step(self, turn: int, following: int | None = None) -> None:
        """Go to the part, and step it."""
        self._go_to(turn)
        loss = self.plain.loss(0, self._steps)
        loss.backward()
        self._move()
        self._finite &= torch.isfinite(loss.detach())
        self._steps += 1

    def _move(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _go_to(self, turn: int) -> None:
        assert turn == 0, "all parameters train together"

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return self.plain.units[0].module

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the whole model."""
        return list(self.module.parameters())

    def _state_bytes(self, *, here: bool) -> int:
        return bytes_of(t for t in self._state() if (t.device.type == self.device.type) == here)

    @property
    def host_bytes(self) -> int:  # type: ignore[override]
        """Bytes of the optimizer's state on the host."""
        return self._state_bytes(here=False)

    def persistent_bytes(self) -> dict[str, int]:
        """Bytes of weights, buffers and the optimizer's state on the device."""
        return {
            "parameters": bytes_of(self.parameters()),
            "optimizer": self._state_bytes(here=True),
            "ema": 0,
            "buffers": bytes_of(self.module.buffers()),
        }

    def check(self) -> None:
        """Raise `Diverged` if a loss was not finite."""
        if not self._finite:
            raise Diverged("a loss was not finite, so the figures are of no use")


def imported(module: str, package: str, how: str | None = None) -> Any:
    """A module of another package.

    Args:
        module: its name.
        package: that has it.
        how: what installs it; None: our extra.

    Raises:
        ImportError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(module, package, how) from error


def missing(module: str, package: str, how: str | None = None) -> ImportError:
    """What `imported` raises."""
    return ImportError(f"{module} is missing (package {package}): run {how or INSTALL}, or leave this method out")
