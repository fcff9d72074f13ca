"""What an expert would do instead of blocks, with the optimizers of other packages.

They share model, data, batches and precision with our rows; only the optimizer is theirs, used as its authors say.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.block import Block
from ..families import family_for
from ..training import EndToEnd, Unit
from ..training.compilation import Compiler
from .methods import Spec
from .offloading import MegaTrainRunner, fsdp_offload, group_offloading, ramtorch
from .plain_loop import AlternativeRunner, Plain, compile_units, imported, missing
from .runners import Runner, tensors_in

# ---- CPU offload -------------------------------------------------------------------------------------------


def _cpu_offload(spec: Spec) -> Runner:
    """torchao: AdamW's state and step on the CPU; gradients go there as they come, weights come back."""
    if spec.device != "cuda":
        raise ValueError(f"end-to-end-cpu-offload offloads from a GPU, so it does not run on device {spec.device}")
    optimizer_class = imported("torchao.optim", "torchao").CPUOffloadOptimizer
    plain = Plain(spec)
    if spec.compile:
        compile_units(plain)
    optimizer = optimizer_class(
        plain.units[0].own, torch.optim.AdamW, offload_gradients=True, fused=True, **plain.adamw()
    )

    def state() -> Iterator[Tensor]:
        for host in optimizer.param_d2h_map.values():
            yield from (host, host.grad)
        for part in optimizer.optim_dict.values():
            yield from tensors_in(dict(part.state))
        if optimizer.d_opt is not None:  # parameters too small to be worth the way
            yield from tensors_in(dict(optimizer.d_opt.state))

    return AlternativeRunner(plain, optimizer, state)


# ---- BAdam -------------------------------------------------------------------------------------------------


class BAdamRunner(AlternativeRunner):
    """BAdam: Adam on one layer at a time, in turn; stem and head take the last turn, as they start untrained here.

    All weights are in bfloat16, as its README asks; the layer that trains has a float32 copy beside Adam's state.
    """

    switches = True
    steps_per_switch = 100  # its README's switch_block_every

    def __init__(self, spec: Spec) -> None:
        optimizer_class = imported("badam", "badam").BlockOptimizer
        plain = Plain(spec, torch.bfloat16)
        (unit,) = plain.units
        prefixes = _parts(unit)
        if spec.compile:
            # Whole, the model would be compiled anew at every switch; a layer has but few states: frozen or not, after
            # or before the one that trains.
            layers = [unit.module.get_submodule(path) for path in _layer_paths(unit)]
            Compiler(plain.recipe.train, plain.device).compile(layers)
        self.turns = len(prefixes)
        self._turn = 0
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every switch
            optimizer = optimizer_class(
                torch.optim.AdamW(unit.own, fused=True, **plain.adamw()),
                list(unit.module.named_parameters()),
                block_prefix_list=prefixes,
                switch_block_every=sys.maxsize,  # we say when
                switch_mode="ascending",
                verbose=0,
            )

        def state() -> Iterator[Tensor]:
            yield from optimizer.param_idx2hp.values()
            yield from tensors_in(dict(optimizer.base_optimizer.state))

        super().__init__(plain, optimizer, state)
        gc.collect()
        gc.freeze()  # it collects garbage at every switch: let it not look at the libraries' objects

    def _go_to(self, turn: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            while turn != self._turn:  # the optimizer knows its next layer by itself
                self.optimizer.switch_trainable_params()
                self._turn = (self._turn + 1) % self.turns


def _layer_paths(unit: Unit) -> list[str]:
    """Paths of the layers in a unit's module."""
    if isinstance(unit.module, Block):
        return [f"network.{path}" for path in unit.module.layer_paths]
    assert isinstance(unit.module, EndToEnd)
    return [f"model.{path}" for path in family_for(unit.module.model).layer_paths(unit.module.model)]


def _parts(unit: Unit) -> list[list[str]]:
    """Prefixes of parameter names that train together: each layer, then all that is no layer."""
    layers = tuple(f"{path}." for path in _layer_paths(unit))
    rest = [name for name, _ in unit.module.named_parameters() if not name.startswith(layers)]
    return [*([layer] for layer in layers), rest]


# ---- APOLLO ------------------------------------------------------------------------------------------------

#: Its README's settings of APOLLO-Mini.
_MINI = {
    "rank": 1,
    "proj": "random",
    "scale_type": "tensor",
    "scale": 128,
    "update_proj_gap": 200,
    "proj_type": "std",
}


def _apollo_mini(spec: Spec) -> Runner:
    """APOLLO-Mini on the matrices of the layers, its AdamW on the rest."""
    optimizer_class = _apollo_module().AdamW
    plain = Plain(spec)
    (unit,) = plain.units
    if spec.compile:
        compile_units(plain)
    layers = tuple(f"{path}." for path in _layer_paths(unit))
    parameters = dict(unit.module.named_parameters())
    low_rank = [p for name, p in parameters.items() if name.startswith(layers) and p.dim() == 2]
    identities = {id(p) for p in low_rank}
    rest = [p for p in parameters.values() if id(p) not in identities]
    optimizer = optimizer_class([{"params": rest}, {"params": low_rank, **_MINI}], **plain.adamw())
    return AlternativeRunner(plain, optimizer, lambda: tensors_in(dict(optimizer.state)))


def _apollo_module() -> Any:
    """`apollo_torch.apollo`, without the package's `__init__`, which imports bitsandbytes for other optimizers."""
    spec = importlib.util.find_spec("apollo_torch")
    if spec is None or spec.submodule_search_locations is None:
        raise missing("apollo_torch", "apollo-torch")
    package = types.ModuleType("apollo_torch")
    package.__path__ = list(spec.submodule_search_locations)
    imported = sys.modules.get("apollo_torch")
    sys.modules["apollo_torch"] = package
    try:
        return importlib.import_module("apollo_torch.apollo")
    finally:
        del sys.modules["apollo_torch"]
        if imported is not None:
            sys.modules["apollo_torch"] = imported


# ---- packages ----------------------------------------------------------------------------------------------

_ALTERNATIVES: dict[str, Callable[[Spec], Runner]] = {
    "end-to-end-cpu-offload": _cpu_offload,
    "end-to-end-badam": BAdamRunner,
    "end-to-end-apollo-mini": _apollo_mini,
    "end-to-end-fsdp-offload": fsdp_offload,
    "end-to-end-group-offloading": group_offloading,
    "end-to-end-ramtorch": ramtorch,
    "end-to-end-megatrain": MegaTrainRunner,
}


def alternative_runner(spec: Spec) -> Runner:
    """The alternative of a specification, ready to step.

    Raises:
        ImportError: its package is missing; the message says how to install it.
        ValueError: it needs a GPU.
    """
    return _ALTERNATIVES[spec.method](spec)
