"""One training step of one unit on fake tensors: what it holds at its worst moments."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..common.modules import bytes_of, tensors_of
from ..core.block import Block
from ..layers.two_streams import rows_of_a_gpu
from ..training import TrainConfig, Unit, trainable
from ..training.compilation import Compiler
from ..training.optim import AVERAGED_AT_ONCE
from ..training.shared_module import SharedModule
from .timeline import TRACED_BATCH, StepLog, Timeline

_MANY = 2**20

MakeBatch = Callable[[int], Mapping[str, Tensor]]


def trace_step(unit: Unit, train: TrainConfig, make_batch: MakeBatch, *, on_gpu: bool) -> StepLog:
    """Run a step of a unit on fake tensors: forward, backward and update, as `training/step.py` does.

    Args:
        unit: its module may be on the meta device; it is not changed.
        train: precision, compilation, and what else decides on memory, but for the size of the batch.
        make_batch: number of examples -> a batch of them, whose values do not matter (`Family.empty_batch`).
        on_gpu: choose the GPU's kernels where they keep other things than the CPU's.
    """
    shared = SharedModule(unit, train)
    module = shared.module
    if on_gpu:
        _drop_as_a_gpu(module, train)
    parameters = unit.parameters
    timeline = Timeline(bytes_of(parameters), on_gpu=on_gpu)
    if train.compile:
        from .fused import simulating_backend  # brings torch's compiler, which takes seconds to import

        backend = simulating_backend(timeline, {p.shape for p in parameters})
        Compiler(train, torch.device("cpu"), backend=backend, dynamic=False, on_gpu=on_gpu).compile([module])
    with FakeTensorMode(), rows_of_a_gpu() if on_gpu else contextlib.nullcontext():
        tensors = _without_memory(tensors_of(unit.module))
        shared.bind(unit, tensors)
        timeline.is_persistent(tensors)
        for parameter in trainable(module):
            parameter.register_post_accumulate_grad_hook(lambda p: _gradient_is_whole(p, train, timeline))
        with timeline:
            if train.compile:
                with _recompiling():
                    _step(module, train, make_batch, timeline)  # compiles, which makes fake tensors of its own
                gc.collect()  # a traced graph is full of cycles, and holds what the first step made
                timeline.restart()
            _step(module, train, make_batch, timeline)
    return timeline.log


def _without_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Fake tensors of the same shapes, tied alike; inside a FakeTensorMode."""
    fakes: dict[int, Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return [fakes[id(tensor)] for tensor in tensors]


def _step(module: nn.Module, train: TrainConfig, make_batch: MakeBatch, timeline: Timeline) -> None:
    size = TRACED_BATCH
    for _ in range(min(train.accumulation, 2)):  # the second finds the gradients of the first; others are like it
        timeline.forward_begins()
        batch = make_batch(size)
        with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bfloat16"):
            losses = _losses(module, batch, size)
        del batch
        loss = losses.mean() / train.accumulation
        loss.backward()
    # Fused AdamW needs no memory of its own, nor does clipping; the moving average does.
    if train.keeps_average and not train.optimizer_in_backward:
        torch.empty(_averaged_at_once(trainable(module)))
    for parameter in trainable(module):
        parameter.grad = None


def _losses(module: nn.Module, batch: Mapping[str, Tensor], size: int) -> Tensor:
    """Level and depth are given: drawing them looks at values, which fake tensors have not."""
    if isinstance(module, Block):
        return module.loss(batch, None, level=torch.empty(size))
    return module.heaviest_loss(batch)  # type: ignore[operator, no-any-return]


def _gradient_is_whole(parameter: Tensor, train: TrainConfig, timeline: Timeline) -> None:
    assert parameter.grad is not None
    timeline.is_gradient(parameter.grad)
    if train.optimizer_in_backward:
        if train.keeps_average:
            torch.empty_like(parameter)
        parameter.grad = None


def _averaged_at_once(parameters: list[nn.Parameter]) -> int:
    """Most elements that the moving average handles at a time (see `Updater.update`)."""
    most = size = 0
    for parameter in parameters:
        size += parameter.numel()
        most = max(most, size)
        if size >= AVERAGED_AT_ONCE:
            size = 0
    return most


@contextlib.contextmanager
def _recompiling() -> Iterator[None]:
    """Every traced unit is compiled anew; past its limits torch would quietly run them eagerly."""
    with torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY):
        yield


class _Masked(nn.Module):
    """Dropout that keeps a mask of one byte an element, as a GPU's kernel does; a CPU's keeps float factors."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0]


def _drop_as_a_gpu(module: nn.Module, train: TrainConfig) -> None:
    """Let dropout keep what it keeps on a GPU; flash attention draws its own again, and keeps nothing."""
    for part in list(module.modules()):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float) and not isinstance(part, (nn.Dropout, _Masked)):
                setattr(part, name, 0.0)
        for name, child in part.named_children():
            if isinstance(child, nn.Dropout) and child.p and not train.compile:  # the compiler makes masks of its own
                setattr(part, name, _Masked(child.p))
