"""One optimizer step of one unit, eager or as a CUDA graph: the only place where training computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.seeds import seed_global
from ..data.dataset import BatchMaker
from .ranks import Group
from .residency import ActiveUnit, Residency
from .train_config import TrainConfig

_EAGER_STEPS = 3  # real steps before capture: they load kernels and create the optimizer's state


@contextlib.contextmanager
def attention_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU flash attention before cuDNN's, which is slower on a ViT's short sequences, and wrong at times.

    Its backward pass in torch 2.11 keys its plans without the layout of the incoming gradient, whose other layouts then
    give wrong gradients (pytorch/pytorch#191576); under a mask, and 64 beyond a multiple of 128 tokens, it gives NaN
    (pytorch/pytorch#196678).

    The backward pass belongs inside, too: activation checkpointing computes layers again there, with the same kernel.
    """
    if device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str, *, keep_casts: bool = True) -> Iterator[None]:
    """Autocast, and the kernels of attention.

    Args:
        device: where to compute.
        precision: `float32` or `bfloat16`.
        keep_casts: whether weights cast to bfloat16 are kept until the end, for the next use or the backward pass.
    """
    lower = precision == "bfloat16"
    cast = torch.autocast(device.type, torch.bfloat16, enabled=lower, cache_enabled=keep_casts)
    with cast, attention_kernels(device):
        yield


@dataclass
class Lane:
    """What steps read on the device, one after another on one stream.

    Attributes:
        generator: source of noise.
        indices: examples of the step (accumulation, batch).
        step: number of the step.
        stream: where the steps run; None: on the current one.
        dropout: state of torch's generator while the steps run; None: as it is. Captured steps read it from memory of
            the state, which steps that overlap must not share.
        pool: memory of the captured steps, which they use in turn.
    """

    generator: torch.Generator
    indices: Tensor
    step: Tensor
    stream: Any = None
    dropout: Any = None
    pool: Any = None

    @classmethod
    def on(cls, device: torch.device, config: TrainConfig, *, own_stream: bool) -> Lane:
        """Make a lane on a device, with a stream of its own or without."""
        own: dict[str, Any] = {}
        if own_stream:
            own = {"stream": torch.cuda.Stream(device), "dropout": _torchs_generator(device).clone_state()}
        return cls(
            torch.Generator(device=device),
            torch.zeros(config.accumulation, config.batch_size, dtype=torch.int64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            **own,
        )


def _torchs_generator(device: torch.device) -> Any:
    """The generator that dropout draws from on a GPU."""
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


class Stepper:
    """Runs steps of units on one device, with no host sync.

    Steps of one unit follow one another. Those of different units do so too, or overlap (`concurrent`), each unit in a
    lane of its own.

    Args:
        residency: brings the units to where they compute.
        batches: makes batches.
        config: batch size, accumulation, precision, clipping.
        device: where all of it lives.
        group: ranks that train the unit together, of whose batches each computes some rows; None: this one alone.
    """

    def __init__(
        self,
        residency: Residency,
        batches: BatchMaker,
        config: TrainConfig,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        self.group = group
        self.residency = residency
        self.batches = batches
        self.config = config
        self.device = device
        many = len(residency.units)
        self.use_graphs = config.cuda_graph and device.type == "cuda"
        self.concurrent = config.concurrent and self.use_graphs and many > 1
        lanes = many if self.concurrent else 1
        self._lanes = [Lane.on(device, config, own_stream=self.concurrent) for _ in range(lanes)] * (many // lanes)
        # Read by the host only when it logs: sums since the last log, and the first step that was not finite.
        self.loss_sum = torch.zeros(many, device=device)
        self.norm_sum = torch.zeros(many, device=device)
        self.bad_step = torch.full((many,), -1, dtype=torch.int64, device=device)
        self._eager_steps: dict[nn.Module, int] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, unit: int, step: int, indices: Tensor, keys: tuple[int, int], following: int | None = None) -> None:
        """Step a unit.

        Args:
            unit: place of the unit in the list.
            step: its own 0-based step count.
            indices: examples (accumulation, batch).
            keys: of noise and of dropout.
            following: the unit that comes after this one's turn, where known.
        """
        lane = self._lanes[unit]
        if lane.stream is None:
            self._run(lane, unit, step, indices, keys, following)
            return
        lane.stream.wait_stream(torch.cuda.current_stream(self.device))
        indices.record_stream(lane.stream)  # their memory must not be used again before they are read
        generator = _torchs_generator(self.device)
        before = generator.graphsafe_get_state()
        generator.graphsafe_set_state(lane.dropout)
        try:
            with torch.cuda.stream(lane.stream):
                self._run(lane, unit, step, indices, keys, following)
        finally:
            generator.graphsafe_set_state(before)

    def _run(
        self, lane: Lane, unit: int, step: int, indices: Tensor, keys: tuple[int, int], following: int | None
    ) -> None:
        active = self.residency.activate(unit, following)
        lane.generator.manual_seed(keys[0])
        seed_global(keys[1], self.device)  # dropout draws from it
        if self.use_graphs:
            lane.indices.copy_(indices)  # captured steps read them there
        else:
            lane.indices = indices
        lane.step.fill_(step)
        for updater, owner in zip(active.updaters, active.sets, strict=True):
            updater.prepare(owner, lane.generator)
        if not self.use_graphs:
            with contextlib.nullcontext() if self.group is None else self.group.computing():
                self._compute(lane, unit, active)
        elif unit in self._graphs:
            self.residency.wait_for_state()
            self._graphs[unit].replay()
        elif self._eager_steps.get(active.module, 0) < _EAGER_STEPS:
            self._eager_steps[active.module] = self._eager_steps.get(active.module, 0) + 1
            self._compute(lane, unit, active)
        else:
            self._capture(lane, unit, active)
            self._graphs[unit].replay()

    def join(self) -> None:
        """Let the current stream wait for the steps of all lanes."""
        for lane in self._lanes:
            if lane.stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(lane.stream)

    def _capture(self, lane: Lane, unit: int, active: ActiveUnit) -> None:
        self.residency.wait_for_state()
        self.residency.settle()
        if not self._graphs:
            torch.cuda.empty_cache()  # what the eager steps used is of no use to graphs, which have their own memory
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(lane.generator)
        with torch.cuda.graph(graph, pool=lane.pool, stream=torch.cuda.current_stream()):
            self._compute(lane, unit, active)
        # Every graph makes its own gradients, so graphs of a lane may reuse each other's memory.
        lane.pool = graph.pool()
        self._graphs[unit] = graph

    def _compute(self, lane: Lane, index: int, active: ActiveUnit) -> None:
        config = self.config
        total = torch.zeros((), device=self.device)
        for indices in lane.indices:
            batch = self.batches(indices, lane.generator)
            # Checkpointing throws a layer's casts away and makes them anew: kept ones would be a copy of all weights.
            with arithmetic(self.device, config.precision, keep_casts=not config.activation_checkpointing):
                loss = self._mean_loss(active.module, batch, lane.generator) / len(lane.indices)
            del batch  # what the backward pass needs of it is saved; images in float32 are not
            if config.optimizer_in_backward:  # which steps in there
                self.residency.wait_for_state()
            with attention_kernels(self.device):
                loss.backward()
            total += loss.detach()
        active.collect_gradients()
        gradients = [p.grad for p in active.parameters if p.grad is not None]
        if self.group is not None:
            self.group.add_up_step(gradients, total)
        if config.gradient_clip is not None:
            norm = nn.utils.get_total_norm(gradients) if self.group is None else self.group.norm(gradients)
            nn.utils.clip_grads_with_norm_(active.parameters, config.gradient_clip, norm)
            self.norm_sum[index] += norm
            finite = torch.isfinite(total) & torch.isfinite(norm)
        else:
            finite = torch.isfinite(total)
        del gradients
        self.residency.wait_for_state()
        for updater in active.updaters:
            updater.update()
        for parameter in active.parameters:
            parameter.grad = None
        self.loss_sum[index] += total
        first_bad = (self.bad_step[index] < 0) & ~finite
        self.bad_step[index] = torch.where(first_bad, lane.step, self.bad_step[index])

    def _mean_loss(self, module: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The mean loss of a batch, or in a group this rank's share of it: the shares add up to the mean."""
        if self.group is None:
            losses: Tensor = module.loss(batch, generator)
            return losses.mean()
        losses = module.loss(batch, generator, rows=self.group.rows(self.config.batch_size))
        return losses.sum() / self.config.batch_size

    def first_bad_step(self) -> tuple[int, int] | None:
        """(unit, step) whose loss or gradient was first not finite, or None. Waits for the device."""
        self.join()
        for unit, step in enumerate(self.bad_step.tolist()):
            if step >= 0:
                return unit, step
        return None

    def read_sums(self) -> tuple[list[float], list[float]]:
        """Sums of loss and (where it is clipped) gradient norm of each unit since the last call. Waits."""
        self.join()
        losses, norms = self.loss_sum.tolist(), self.norm_sum.tolist()
        self.loss_sum.zero_()
        self.norm_sum.zero_()
        return losses, norms
