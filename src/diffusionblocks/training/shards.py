"""A unit shared out over the ranks that train it together, by torch's FSDP2 (`fully_shard`), layer by layer.

On its device each rank has a share of every weight, gradient, optimizer state and average: some of its rows. A layer is
whole there only while it computes: FSDP gathers its weights from the group, and scatters the sums of its gradients.

    leading rank's host       each rank's device
    weights | state  <------  rows of weights | rows of state  --- gathered by FSDP --->  one layer whole
                     ------>

The group's first rank has the whole in host memory, as of the last `flush`, for checkpoints and the saved model. So
these are the files of a run in one process, and any number of ranks goes on from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.modules import bytes_of, tensors_of
from ..core.model import DiffusionBlocks
from .optim import ParameterSet, Updater, average_dtype
from .ranks import Group, ShardGroup
from .residency import ActiveUnit, Residency
from .train_config import TrainConfig
from .units import Unit


def check_shards(config: TrainConfig) -> None:
    """Refuse settings under which a unit cannot be shared out.

    Raises:
        ValueError: it is so.
        ImportError: torch is too old.
    """
    replicate = "or parallel.within_block to replicate"
    if config.cuda_graph:
        raise ValueError(
            "train.cuda_graph = true captures steps whose weights lie still, and parallel.within_block = shard "
            f"gathers them anew for every layer: set train.cuda_graph (and train.concurrent) to false, {replicate}"
        )
    if config.optimizer == "adamw-8bit":
        raise ValueError(
            "train.optimizer = adamw-8bit scales its state by stretches of a whole weight, which parallel.within_block "
            f"= shard cuts through: set train.optimizer to adamw, {replicate}"
        )
    if config.weights is not None:
        raise ValueError(
            f"train.weights = {config.weights} rounds a whole weight by draws of its step, and parallel.within_block = "
            f"shard cuts through it: set train.weights to null, {replicate}"
        )
    if config.early_stopping is not None:
        raise ValueError(
            "train.early_stopping measures a whole unit between its steps, and under parallel.within_block = shard a "
            f"rank has its rows: set train.early_stopping to null, {replicate}"
        )
    if config.optimizer_in_backward:
        raise ValueError(
            "train.optimizer_in_backward steps before the gradients of the group are summed, and under "
            "parallel.within_block = shard no rank has them whole: set train.optimizer_in_backward to false, "
            f"{replicate}"
        )
    from torch.distributed.fsdp import FSDPModule  # takes a second

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ImportError(
            f"parallel.within_block = shard needs a newer torch than {torch.__version__} (2.8 has what it takes): "
            "install it, or set parallel.within_block to replicate"
        )


def gathered_dtype(config: TrainConfig, device: torch.device) -> torch.dtype | None:
    """In what the weights of layers are gathered; None: in their own.

    On a GPU autocast would cast them to bfloat16 anyway, but for norms, which it computes in float32. A CPU's norms
    take no weights of another precision than their input's.
    """
    return torch.bfloat16 if config.precision == "bfloat16" and device.type == "cuda" else None


def share_out(module: Any, group: Group, config: TrainConfig) -> None:
    """Let FSDP share out a unit's module over a group: each layer with its norms, and the rest as one.

    Under bfloat16 the layers are gathered in bfloat16 (`gathered_dtype`), and gradients are summed in float32. Inputs,
    stem and head keep their precision, for noise levels and targets must not be rounded.

    Args:
        module: a block, or an end-to-end model, with its tensors.
        group: the ranks.
        config: `precision`.

    Raises:
        ValueError: a parameter cannot be cut.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    for name, parameter in module.named_parameters():
        if not parameter.dim():
            raise ValueError(
                f"parallel.within_block = shard: {name} is a single number, which FSDP cannot cut: set "
                "parallel.within_block to replicate"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"parallel.within_block = shard: {name} holds codes of a weight in few bits, which FSDP does not "
                "gather with others: set blocks.lora.base to null, or parallel.within_block to replicate"
            )
    lower = gathered_dtype(config, group.device)
    of_layers = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=lower and torch.float32, cast_forward_inputs=False)
    for parts in module.layer_groups():
        fully_shard(parts if len(parts) > 1 else parts[0], mesh=group.mesh, mp_policy=of_layers)
    fully_shard(module, mesh=group.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(module, "loss")
    for part in module.modules():
        if isinstance(part, FSDPModule):  # each rank's loss is its share of the batch's mean: gradients are summed
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)


@dataclass(frozen=True)
class ActiveShards(ActiveUnit):
    """As `ActiveUnit`, whose parameters are this rank's rows.

    Attributes:
        distributed: the parameters that FSDP knows, in the order of `parameters`.
    """

    distributed: tuple[Any, ...] = ()

    def collect_gradients(self) -> None:
        """Take over the rows' gradients from FSDP's parameters."""
        for theirs, rows in zip(self.distributed, self.parameters, strict=True):
            if theirs.grad is not None:
                rows.grad, theirs.grad = theirs.grad.to_local(), None


class ShardResident(Residency):
    """Shares one unit out over a group, see above.

    Args:
        group: the ranks.

    Raises:
        ValueError, ImportError: what `check_shards` and `share_out` refuse.
    """

    def __init__(self, *args: Any, group: ShardGroup) -> None:
        super().__init__(*args)
        (unit,) = self.units
        (shape,) = self._shapes
        self._group = group
        self._is_newer_here = False  # whether the device has taken steps since the last flush
        self._materialise(unit)
        unit.module.to("cpu")
        module = self._modules[shape]
        module.bind(unit, _aliases(unit.module, self.device))
        share_out(module.module, group, self.config)
        pairs = zip(tensors_of(unit.module), tensors_of(module.module), strict=True)
        #: (tensor of the unit, what the device has of it): FSDP's parameter, or a buffer
        self._pairs: list[tuple[Tensor, Any]] = list({id(mine): (mine, theirs) for mine, theirs in pairs}.values())
        places = {id(mine): theirs for mine, theirs in self._pairs}
        self._distributed = tuple(places[id(parameter)] for parameter in unit.own)
        rows = [nn.Parameter(theirs.to_local().detach()) for theirs in self._distributed]
        ema = [p.detach().to(average_dtype(p), copy=True) for p in rows] if self.config.keeps_average else []
        updater = Updater(rows, self.lengths.steps, self.lengths.warmup, self.config, ema)
        updater.allocate()
        self._rows = ParameterSet(rows, updater.moments(), ema)
        if not group.leads:
            for parameter in unit.module.parameters():
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                torch.utils.swap_tensors(parameter, empty)
        whole = self._whole_set(unit)
        self.sets[unit.name] = whole
        self._active[0] = ActiveShards(module.module, [updater], [whole], rows, self._distributed)
        if group.leads and self.device.type == "cuda":
            self.host_bytes = bytes_of([*unit.module.parameters(), *whole.state().values()])

    def _whole_set(self, unit: Unit) -> ParameterSet:
        """What training keeps for the whole of each parameter; without memory on ranks that do not lead."""

        def zeros(parameter: nn.Parameter, rows: Tensor) -> Tensor:
            if not rows.dim():  # a count, which every rank has
                return torch.zeros_like(rows, device="cpu")
            return torch.zeros(parameter.shape, dtype=rows.dtype, device=parameter.device)

        moments = [
            {name: zeros(parameter, rows) for name, rows in of_rows.items()}
            for parameter, of_rows in zip(unit.own, self._rows.moments, strict=True)
        ]
        averages = unit.own if self._rows.ema else []
        return ParameterSet(unit.own, moments, [p.detach().to(average_dtype(p), copy=True) for p in averages])

    def activate(self, unit: int, following: int | None) -> ActiveUnit:
        """The one unit is always there."""
        self._is_newer_here = True
        return self._active[unit]

    def flush(self) -> None:
        """Gather the whole to the host of the rank that leads. All ranks of the group call it, or none has stepped."""
        if not self._is_newer_here:
            return
        self._is_newer_here = False
        for whole, rows, like in self._state():
            if not rows.dim():  # a count, the same on all
                whole.copy_(rows)
                continue
            values = self._group.gather_rows(rows, like)
            if self._group.leads:
                whole.copy_(values)

    def refresh(self) -> None:
        """Scatter the whole from the host of the rank that leads. All ranks of the group call it."""
        self._is_newer_here = False
        for whole, rows, like in self._state():
            if not rows.dim():
                rows.copy_(whole)
                continue
            rows.copy_(self._group.scatter_rows(whole, like))
        for mine, theirs in self._pairs:
            if not isinstance(mine, nn.Parameter):
                theirs.copy_(mine)

    @torch.no_grad()
    def _state(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """All weights and what is kept for them: (the whole, this rank's rows, FSDP's parameter that is cut alike)."""
        for mine, theirs in self._pairs:
            if isinstance(mine, nn.Parameter):
                yield mine.detach(), theirs.to_local().detach(), theirs
        (whole,) = self.sets.values()
        for i, like in enumerate(self._distributed):
            for name, rows in self._rows.moments[i].items():
                yield whole.moments[i][name], rows, like
        for average, rows, like in zip(whole.ema, self._rows.ema, self._distributed, strict=False):
            yield average, rows, like

    def on_device(self, model: DiffusionBlocks) -> AbstractContextManager[Any]:
        """Bring the whole there, on the rank that leads."""
        return self.whole(0)

    @contextlib.contextmanager
    def whole(self, unit: int) -> Iterator[nn.Module | None]:
        """Bring the whole to the device of the rank that leads, for a while."""
        self.flush()
        if not self._group.leads:
            yield None
            return
        module = self.units[unit].module
        module.to(self.device)
        try:
            yield module
        finally:
            module.to("cpu")


def _aliases(module: nn.Module, device: torch.device) -> list[Tensor]:
    """Other objects with a module's tensors, in the order of `tensors_of`: what FSDP does to them is not seen there."""
    aliases: dict[int, Tensor] = {}
    for tensor in tensors_of(module):
        if id(tensor) not in aliases:
            values = tensor.detach()
            is_parameter = isinstance(tensor, nn.Parameter)
            aliases[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values.to(device)
    return [aliases[id(tensor)] for tensor in tensors_of(module)]
