"""What moves parameters: AdamW, its learning rate, the moving average; and the state that this keeps for its owner."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .adamw_kernel import OneKernelAdamW
from .schedules import lr_factor
from .stochastic_rounding import Draws, RoundedAdamW, round_stochastically
from .train_config import TrainConfig

#: Elements that the moving average handles at once: bounds the memory of its temporaries.
AVERAGED_AT_ONCE = 2**24

#: What torchao's update of one parameter takes, in this order.
_UPDATE_TAKES = (
    *("p", "grad", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    *("lr", "beta1", "beta2", "weight_decay", "eps", "IS_ADAMW", "BF16_STOCHASTIC_ROUND"),
)


class ParameterSet:
    """The parameters of one owner (a unit, or all units together) and what training keeps for them.

    It only holds them, on whatever device; an `Updater` moves them, or copies of them.

    Attributes:
        parameters: what is trained; may be empty.
        moments: of each parameter, the optimizer's state by name, as plain tensors.
        ema: of each parameter, its moving average, in `average_dtype`; empty where none is kept.
        steps: how often it stepped.
        inherited_steps: steps behind the average before these (of a trunk), which count for its ramp-up.
    """

    def __init__(self, parameters: list[nn.Parameter], moments: list[dict[str, Tensor]], ema: list[Tensor]) -> None:
        self.parameters = parameters
        self.moments = moments
        self.ema = ema
        self.steps = 0
        self.inherited_steps = 0
        self._exact: dict[int, Tensor] = {}

    def swap_ema(self) -> None:
        """Exchange weights and averages; a second call undoes it."""
        with torch.no_grad():
            for i, (parameter, average) in enumerate(zip(self.parameters, self.ema, strict=False)):
                weights = parameter.detach().clone()
                parameter.copy_(average)
                if i in self._exact:
                    average.copy_(self._exact.pop(i))
                    continue
                if average.dtype != parameter.dtype:  # the weights would keep a rounded one
                    self._exact[i] = average.clone()
                average.copy_(weights)

    def state(self) -> dict[str, Tensor]:
        """Optimizer state and averages as flat named tensors."""
        counts = {"steps": self.steps, "inherited_steps": self.inherited_steps}
        tensors: dict[str, Tensor] = {name: torch.tensor(count) for name, count in counts.items()}
        for i, moments in enumerate(self.moments):
            tensors |= {f"{i}.{name}": value for name, value in moments.items()}
        tensors |= {f"{i}.ema": average for i, average in enumerate(self.ema)}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.steps = int(tensors["steps"])
        self.inherited_steps = int(tensors["inherited_steps"])
        for i, moments in enumerate(self.moments):
            for name, value in moments.items():
                value.copy_(tensors[f"{i}.{name}"])
        for i, average in enumerate(self.ema):
            average.copy_(tensors[f"{i}.ema"])

    def inherit(self, sources: dict[nn.Parameter, tuple[ParameterSet, int]], *, optimizer: bool, average: bool) -> None:
        """Take over the optimizer state or average of other parameters, those of a trunk.

        Args:
            sources: for each parameter here, the set that holds its source, and its place there; none for one that
                was not trained there, which starts afresh.
            optimizer: copy the optimizer's state.
            average: copy the moving averages, and the steps that count for their ramp-up.
        """
        for i, parameter in enumerate(self.parameters):
            if parameter not in sources:
                continue
            source, place = sources[parameter]
            if optimizer:
                for name, value in self.moments[i].items():
                    value.copy_(source.moments[place][name])
            if average and self.ema and source.ema:
                self.ema[i].copy_(source.ema[place])
                self.inherited_steps = source.inherited_steps + source.steps


def average_dtype(parameter: Tensor) -> torch.dtype:
    """In what a parameter's moving average is kept: never below float32, where it would not move."""
    return torch.promote_types(parameter.dtype, torch.float32)


class Updater:
    """Moves parameters on the device: AdamW and the moving average.

    `prepare` does the host's part of a step, `update` the device's: `update` reads learning rate and decay from
    tensors on the device, so a captured CUDA graph replays it at any step. With `config.optimizer_in_backward` there is
    an optimizer for every parameter, which steps as soon as the parameter's gradient is whole.

    Args:
        parameters: on their device; may be empty.
        total_steps: length of the owner's learning-rate schedule.
        warmup: warm-up steps.
        config: AdamW's settings, schedule and EMA decay.
        ema: moving averages of the parameters, on their device; empty where none is kept.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        total_steps: int,
        warmup: int,
        config: TrainConfig,
        ema: list[Tensor],
    ) -> None:
        self.parameters = parameters
        self.total_steps = total_steps
        self.warmup = warmup
        self.config = config
        self.ema = ema
        device = parameters[0].device if parameters else torch.device("cpu")
        self.lr = torch.tensor(0.0, dtype=torch.float32, device=device)
        self.decay = torch.tensor(0.0, dtype=torch.float32, device=device)
        #: Of the rounding of bfloat16 weights; each step brings its own (`prepare`).
        self._draws = Draws(device) if config.weights == "bfloat16" else None
        self._way = way_to_step(parameters, config, self._draws)
        everything = [range(len(parameters))] if parameters else []
        #: Of places; each has an optimizer.
        self._groups = self._way.groups(parameters) if config.optimizer_in_backward else everything
        self._group_of = [i for i, places in enumerate(self._groups) for _ in places]
        self._optimizers = [self._way.make(parameters[g.start : g.stop], lr=self.lr) for g in self._groups]
        self._ready = [0] * len(self._groups)  # gradients of the coming step that are whole
        if config.optimizer_in_backward:
            # A hook that held this would keep the parameters for good: torch's hooks are no garbage.
            me = weakref.ref(self)

            def step(_: Tensor, place: int) -> None:
                updater = me()
                if updater is not None:  # else the training is over
                    updater._step_one(place)

            for i, parameter in enumerate(parameters):
                parameter.register_post_accumulate_grad_hook(functools.partial(step, place=i))

    def allocate(self, place: Callable[[int, str, Tensor], Tensor] = lambda i, name, fresh: fresh) -> None:
        """Make the optimizer's lazy state now: it is moved between devices, and measured.

        Args:
            place: gives, for the i-th parameter, the state's name and fresh value, the tensor that shall hold it.
        """
        for i, parameter in enumerate(self.parameters):
            optimizer = self._optimizers[self._group_of[i]]
            optimizer.state.pop(parameter, None)
            parameter.grad = torch.zeros_like(parameter)
            with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, for every shape anew
                optimizer.step()  # gradient 0, at learning rate 0: nothing moves; the others have no gradient
            parameter.grad = None
            state = self._state(i)
            # torchao counts on the host, where a step in a CUDA graph never comes.
            state["step"] = torch.zeros_like(state["step"], device=parameter.device)
            for key, value in state.items():
                parts = {name: place(i, name, part).copy_(part) for name, part in _parts(key, value).items()}
                state[key] = _rebuilt(key, value, parts)

    def moments(self) -> list[dict[str, Tensor]]:
        """Each parameter's optimizer state by name, live and as plain tensors (those inside an 8-bit tensor)."""
        return [
            {name: part for key, value in self._state(i).items() for name, part in _parts(key, value).items()}
            for i in range(len(self.parameters))
        ]

    def _state(self, place: int) -> dict[str, Any]:
        optimizer = self._optimizers[self._group_of[place]]
        state: dict[str, Any] = optimizer.state[self.parameters[place]]
        return state

    def learning_rate(self, owner: ParameterSet) -> float:
        """The rate of the owner's coming step."""
        return self.config.lr * lr_factor(owner.steps, self.total_steps, self.warmup, self.config.lr_schedule)

    def prepare(self, owner: ParameterSet, generator: torch.Generator | None = None) -> None:
        """Write the rate and decay of the owner's step to the device (no sync), and count the step.

        Args:
            owner: of the state that the step moves.
            generator: keyed to the step; bfloat16 weights are rounded by its draws. None: by those of the last step's.
        """
        if self._draws is not None and generator is not None:
            self._draws.generator = generator
        self.lr.fill_(self.learning_rate(owner))
        for optimizer in self._optimizers:
            self._way.reserve(optimizer)
        if self.ema:
            self.decay.fill_(self.config.average_decay(owner.inherited_steps + owner.steps))
        owner.steps += 1

    def update(self) -> None:
        """Step with the gradients at hand, then move the average; or with those that the backward pass left."""
        if self.config.optimizer_in_backward:
            for group, ready in enumerate(self._ready):
                if ready:  # some parameter of the group has no gradient this time
                    self._step_group(group)
            return
        for optimizer in self._optimizers:
            optimizer.step()
        start = size = 0
        for stop, parameter in enumerate(self.parameters if self.ema else [], start=1):
            size += parameter.numel()
            if size >= AVERAGED_AT_ONCE or stop == len(self.parameters):
                self._average(slice(start, stop))
                start, size = stop, 0

    def _step_one(self, place: int) -> None:
        group = self._group_of[place]
        self._ready[group] += 1
        if self._ready[group] == len(self._groups[group]):
            self._step_group(group)

    def _step_group(self, group: int) -> None:
        self._ready[group] = 0
        self._optimizers[group].step()
        places = self._groups[group]
        stepped = [place for place in places if self.parameters[place].grad is not None]
        for place in places:
            self.parameters[place].grad = None
        if self.ema:
            for place in stepped:
                self._average(slice(place, place + 1))

    def _average(self, places: slice) -> None:
        with torch.no_grad():
            # Tensor factors, not numbers: reading a number off the device would wait for it.
            averages = self.ema[places]
            weights = [p.detach().to(a.dtype) for p, a in zip(self.parameters[places], averages, strict=True)]
            torch._foreach_mul_(averages, self.decay)
            torch._foreach_add_(averages, list(torch._foreach_mul(weights, 1.0 - self.decay)))


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer whose package is not installed, before anything is made for it.

    Raises:
        ImportError: 8-bit AdamW without torchao.
    """
    if config.optimizer == "adamw-8bit":
        try:
            _adamw_8bit()
        except ImportError as error:
            raise ImportError(
                f"train.optimizer: adamw-8bit needs torchao ({error}): run pip install 'diffusionblocks[memory]', or "
                "--set train.optimizer=adamw"
            ) from error


@dataclass(frozen=True)
class WayToStep:
    """How AdamW steps parameters of one device.

    Attributes:
        make: parameters, and `lr`, a float32 scalar on their device -> the optimizer.
        groups: parameters -> those that step at once in a backward pass, as ranges of their places.
        reserve: is called with an optimizer before each step, for memory that a step in a CUDA graph cannot take.
    """

    make: Callable[..., Optimizer]
    groups: Callable[[Sequence[Tensor]], list[range]]
    reserve: Callable[[Any], None] = lambda optimizer: None


def way_to_step(parameters: Sequence[Tensor], config: TrainConfig, draws: Draws | None = None) -> WayToStep:
    """How AdamW steps these parameters: in one kernel where there is one for them, else as its library does.

    Args:
        parameters: what it moves, all on one device.
        config: AdamW's settings.
        draws: bfloat16 weights are rounded by chance, by these; None: to nearest.

    Raises:
        ImportError: 8-bit AdamW without torchao, or with one that cannot do what the settings ask for.
    """
    settings: dict[str, Any] = {"betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw-8bit":
        check_optimizer(config)
        from .eight_bit_kernel import OneKernelAdamW8bit  # needs torchao

        if "adamw-8bit" in config.fused_kernels and draws is None and OneKernelAdamW8bit.takes(parameters):
            one = functools.partial(OneKernelAdamW8bit, **settings)
            return WayToStep(one, together, OneKernelAdamW8bit.reserve)
        return WayToStep(functools.partial(_torchaos(config, draws), **settings), one_by_one)
    if draws is not None:
        return WayToStep(functools.partial(RoundedAdamW, draws=draws, **settings), one_by_one)
    settings |= {"fused": True, "capturable": any(p.is_cuda for p in parameters)}
    if "adamw" in config.fused_kernels and not config.optimizer_in_backward and OneKernelAdamW.takes(parameters):
        return WayToStep(functools.partial(OneKernelAdamW, **settings), one_by_one, OneKernelAdamW.reserve)
    return WayToStep(functools.partial(torch.optim.AdamW, **settings), one_by_one)


def one_by_one(parameters: Sequence[Tensor]) -> list[range]:
    """Groups of one parameter each."""
    return [range(i, i + 1) for i in range(len(parameters))]


def together(parameters: Sequence[Tensor]) -> list[range]:
    """Group neighbours that step at once in a backward pass; a group has no more elements than the largest of all.

    So the gradients that wait for their group are few, and a layer steps in a few kernels.
    """
    most = max((p.numel() for p in parameters), default=0)
    starts: list[int] = []
    size = most
    for place, parameter in enumerate(parameters):
        size += parameter.numel()
        if size > most:
            starts.append(place)
            size = parameter.numel()
    return [range(start, stop) for start, stop in itertools.pairwise([*starts, len(parameters)])]


def _torchaos(config: TrainConfig, draws: Draws | None) -> Callable[..., Optimizer]:
    """torchao's 8-bit AdamW that does what the settings ask for."""
    kind = _adamw_8bit()
    if hasattr(kind, "draws"):
        return functools.partial(kind, draws=draws)
    if draws is not None:
        raise ImportError(
            "train.weights: bfloat16 rounds each step of 8-bit AdamW by chance, which this version of torchao "
            "cannot be told: install the one of diffusionblocks[memory], or --set train.optimizer=adamw"
        )
    if config.cuda_graph:
        raise ImportError(
            "train.cuda_graph: true captures each step, in which 8-bit AdamW of this version of torchao compiles: "
            "install the one of diffusionblocks[memory], or --set train.cuda_graph=false"
        )
    return kind  # type: ignore[no-any-return]


@functools.cache
def _adamw_8bit() -> Any:
    """torchao's AdamW8bit, with a step that costs the host less.

    torchao calls torch.compile anew for every parameter at every step: on a GPU the host then takes longer than the
    arithmetic. Here its update of one parameter is compiled once; state and arithmetic stay torchao's. A torchao whose
    update takes other arguments keeps its own step.
    """
    from torchao.optim import AdamW8bit

    update: Any = getattr(sys.modules[AdamW8bit.__module__], "single_param_adam", None)
    if update is None or tuple(inspect.signature(update).parameters) != _UPDATE_TAKES:
        return AdamW8bit
    compiled: Any = torch.compile(update, fullgraph=True, dynamic=False)

    class AdamW8bitCompiledOnce(AdamW8bit):  # type: ignore[misc]
        draws: Draws | None = None  # of the rounding of bfloat16 weights; None: to nearest

        def __init__(self, parameters: Any, *, draws: Draws | None = None, **options: Any) -> None:
            super().__init__(parameters, **options)
            self.draws = draws

        def _new_buffer(self, p: Tensor, signed: bool) -> Any:
            fresh = super()._new_buffer(p, signed)
            # What is too small for 8 bits torchao keeps in the weight's dtype, to nearest: a second moment in bfloat16
            # would not move.
            plain = self.draws is not None and not hasattr(fresh, "__tensor_flatten__")
            return torch.zeros_like(p, dtype=torch.float32) if plain else fresh

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
            if closure is not None or not all(self.state.get(p) for p, _ in pairs):
                return super().step(closure)  # which makes the state
            # As in torchao: every shape is a graph of its own, and there are only so many.
            with torch._dynamo.utils.disable_cache_limit():
                for p, group in pairs:
                    state = self.state[p]
                    state["step"] += 1
                    moments = (state["step"], state["exp_avg"], state["exp_avg_sq"], None)  # no amsgrad
                    settings = (group["lr"], *group["betas"], group["weight_decay"], group["eps"])
                    by_chance = self.draws is not None and p.dtype == torch.bfloat16
                    weights = p.detach().float() if by_chance else p.detach()
                    compiled(weights, p.grad, *moments, *settings, True, False)  # AdamW, rounding to nearest
                    if self.draws is not None and by_chance:
                        round_stochastically(p, weights, self.draws.generator)
            return None

    return AdamW8bitCompiledOnce


def _parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """A plain tensor as it is; a wrapper of several (8-bit codes and scales) as its parts."""
    if not hasattr(value, "__tensor_flatten__"):
        return {name: value}
    return {f"{name}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def _rebuilt(name: str, value: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    if not hasattr(value, "__tensor_flatten__"):
        return tensors[name]
    parts, about = value.__tensor_flatten__()
    inner = {part: tensors[f"{name}.{part}"] for part in parts}
    kind: Any = type(value)
    rebuilt: Tensor = kind.__tensor_unflatten__(inner, about, value.shape, value.stride())
    return rebuilt
