"""One training step of one unit on fake tensors: what it holds at its worst moments."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..common.interpreter import without_older_objects
from ..common.modules import bytes_of, empty_tables, tensors_of
from ..core.block import Block
from ..families import TRUNK
from ..layers.two_streams import as_on_a_gpu
from ..targets import LossChunk, followed_in_shape
from ..training import TrainConfig, Unit, trainable
from ..training.compilation import Compiler
from ..training.optim import AVERAGED_AT_ONCE
from ..training.shared_module import SharedModule, kinds_of
from .timeline import TRACED_BATCH, StepLog, Timeline

_MANY = 2**20

#: So many layers of a kind in a row are run. The second stands for those that are left out: the first may hold
#: something else, and so may the last, which also changes what comes and goes in the one before it.
_OF_A_KIND = 4

MakeBatch = Callable[[int], Mapping[str, Tensor]]


class StepTracer:
    """Follows steps of a unit on fake tensors: forward, backward and update, as `training/step.py` does.

    What compiles is compiled once, for chunks of any size of a text's logits. Of many layers of one kind in a row an
    eager step runs four, and what comes and goes in the second is counted for those that are left out as well.

    Args:
        unit: its module may be on the meta device; it is not changed.
        train: precision, compilation, and what else decides on memory, but for the size of the batch and `loss_chunk`.
        make_batch: number of examples -> a batch of them, whose values do not matter (`Family.empty_batch`).
        on_gpu: choose the GPU's kernels where they keep other things than the CPU's.
    """

    def __init__(self, unit: Unit, train: TrainConfig, make_batch: MakeBatch, *, on_gpu: bool) -> None:
        shared = SharedModule(unit, train)
        self._module = shared.module
        self._train, self._make_batch, self._on_gpu = train, make_batch, on_gpu
        if on_gpu:
            _drop_as_a_gpu(self._module, train)
        parameters = unit.parameters
        self._averaged = _averaged_at_once(trainable(self._module))
        self._timeline = Timeline(bytes_of(parameters), on_gpu=on_gpu)
        self._graphs = 0
        if train.compile:
            from .fused import simulating_backend  # brings torch's compiler, which takes seconds to import

            backend = simulating_backend(self._timeline, {p.shape for p in parameters})

            def counting(graph: fx.GraphModule, inputs: Any) -> Any:
                self._graphs += 1
                return backend(graph, inputs)

            compiler = Compiler(train, torch.device("cpu"), backend=counting, dynamic=False, on_gpu=on_gpu)
            compiler.compile([self._module])
        self._times = {} if train.compile else self._leave_equal_layers_out()
        self._fakes = FakeTensorMode()
        with self._fakes:
            shared.bind(unit, _without_memory(tensors_of(unit.module)))
            self._timeline.is_persistent([*tensors_of(self._module), *self._fill_tables()])
            for parameter in trainable(self._module):
                parameter.register_post_accumulate_grad_hook(lambda p: _gradient_is_whole(p, train, self._timeline))

    def _fill_tables(self) -> list[Tensor]:
        """Let tables that no state dict names be where the step is, as a trainer does: fake tensors, of the CPU."""
        tables: list[Tensor] = []
        for name, attribute in list(empty_tables(self._module)):
            part = self._module.get_submodule(name)
            tensors, spec = tree_flatten(getattr(part, attribute))
            tensors = _without_memory(tensors)
            setattr(part, attribute, tree_unflatten(tensors, spec))
            tables += tensors
        return tables

    def follow(self, loss_chunk: LossChunk) -> StepLog:
        """Follow a step with such chunks of a text's logits (`TrainConfig.loss_chunk`)."""
        self._module.loss_chunk = loss_chunk  # type: ignore[assignment]
        recompiling = _recompiling() if self._train.compile else contextlib.nullcontext()
        kernels = as_on_a_gpu() if self._on_gpu else contextlib.nullcontext()
        with self._fakes, kernels, recompiling, without_older_objects(), followed_in_shape():
            if self._train.compile and not self._graphs:
                self._step()  # compiles, which makes fake tensors of its own
            while True:
                gc.collect()  # a traced graph is full of cycles, and holds what a step made
                graphs = self._graphs
                with self._timeline:
                    self._timeline.restart()
                    self._step()
                if self._graphs == graphs:
                    return self._timeline.log.with_more(self._times)

    def _leave_equal_layers_out(self) -> dict[int, int]:
        """Shorten runs of equal layers to four: number of the second one -> for how many layers it stands."""
        block = self._module
        if not isinstance(block, Block) or TRUNK in block.shared.extra:  # its trunk has as many layers
            return {}
        if len(block.layer_groups()) < len(block.layers()):  # some have parts of stem and head
            return {}
        numbers: list[int] = []
        times: dict[int, int] = {}
        runs = itertools.groupby(enumerate(kinds_of(block.layers())), key=lambda item: item[1])
        for run in ([number for number, _ in items] for _, items in runs):
            if len(run) > _OF_A_KIND:
                times[len(numbers) + 1] = len(run) - (_OF_A_KIND - 1)
                run = [*run[: _OF_A_KIND - 2], *run[-2:]]
            numbers += run
        if times:
            block.keep_layers(numbers)
            for number, layer in enumerate(block.layers()):
                self._follow_layer(number, layer)
        return times

    def _follow_layer(self, number: int, layer: nn.Module) -> None:
        """Tell the timeline when forward and backward pass come to a layer."""

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._timeline.layer_goes_back(number))

        layer.register_forward_pre_hook(lambda *_: self._timeline.layer_begins(number))
        layer.register_forward_hook(after)

    def _step(self) -> None:
        module, train, size = self._module, self._train, TRACED_BATCH
        for _ in range(min(train.accumulation, 2)):  # the second finds the gradients of the first; others are like it
            self._timeline.forward_begins()
            batch = self._make_batch(size)
            with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bfloat16"):
                losses = _losses(module, batch, size)
            del batch
            loss = losses.mean() / train.accumulation
            loss.backward()
        # Fused AdamW needs no memory of its own, nor does clipping; the moving average does.
        if train.keeps_average and not train.optimizer_in_backward:
            torch.empty(self._averaged)
        for parameter in trainable(module):
            parameter.grad = None


def _without_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Fake tensors of the same shapes, tied alike; inside a FakeTensorMode."""
    fakes: dict[int, Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return [fakes[id(tensor)] for tensor in tensors]


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
