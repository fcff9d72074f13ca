"""torch.compile of what trains: which parts, with which options, keeping how much for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..core.block import Block
from .graph_rewrites import rewriting
from .train_config import TrainConfig


class Compiler:
    """Compiles what trains, as a run's configuration says: the one place where torch.compile's options are chosen.

    Args:
        config: `compile`, `activation_memory_budget`, `fused_kernels` and `cuda_graph`; and `optimizer_in_backward`,
            which needs parts, because a graph returns all its gradients together: in one of the whole block none could
            be used up before the last.
        device: where the modules run.
        backend: of torch.compile; None is inductor, with the options that suit the device.
        dynamic: of torch.compile.
        on_gpu: rewrite graphs as for a GPU, wherever they run; None: where they run on one.
        by_parts: compile blocks by their parts, whatever the configuration says.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        *,
        backend: Callable[..., Any] | None = None,
        dynamic: bool | None = None,
        on_gpu: bool | None = None,
        by_parts: bool = False,
    ) -> None:
        self._by_parts = by_parts or config.compile == "layers" or config.optimizer_in_backward
        options = _inductor_options(config, device) if backend is None else None
        if config.activation_memory_budget < 1:
            backend, options = within_budget(config.activation_memory_budget, backend, options), None
        if config.fused_kernels and (device.type == "cuda" if on_gpu is None else on_gpu):
            backend, options = rewriting(backend or _inductor(options), config.fused_kernels, device.type), None
        self._options: dict[str, Any] = {"backend": backend or "inductor", "options": options, "dynamic": dynamic}

    def compile(self, modules: Sequence[nn.Module]) -> None:
        """Compile blocks whole or by their parts, and an end-to-end model by its parts.

        Args:
            modules: of different shapes.
        """
        dynamo: Any = torch._dynamo.config
        # Each shape of block is a graph of its own; past the limit torch would quietly run the others eagerly.
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(modules))
        for module in modules:
            if isinstance(module, Block) and self._by_parts:
                module.compile_parts(**self._options)
            else:
                module.compile(**self._options)


def _inductor_options(config: TrainConfig, device: torch.device) -> dict[str, Any] | None:
    """A block has many small kernels of one kind (casts, reductions of biases): combined, they launch once.

    Not where steps are captured, whose launches cost little, and models so large that they are compiled by layers:
    there the combined kernels take longer than each for itself (1 to 3 % of a step of ViT-H and DiT-L/2).
    """
    if device.type != "cuda" or (config.cuda_graph and config.compile == "layers"):
        return None
    return {"combo_kernels": True}


def _inductor(options: dict[str, Any] | None) -> Callable[..., Any]:
    return lambda graph, inputs: torch._inductor.compile(graph, inputs, options)


def sampling_options(device: torch.device, *, on_gpu: bool | None = None) -> dict[str, Any]:
    """torch.compile's options for a network that samples: static shapes, and kernels that need no backward pass.

    Args:
        device: where the network runs.
        on_gpu: rewrite graphs as for a GPU, wherever they run; None: where they run on one.
    """
    backend: Any = "inductor"
    if device.type == "cuda" if on_gpu is None else on_gpu:
        backend = rewriting(_inductor(None), ("gelu",), device.type)
    return {"backend": backend, "dynamic": False}


def within_budget(
    budget: float, backend: Callable[..., Any] | None, options: dict[str, Any] | None
) -> Callable[..., Any]:
    """A backend of torch.compile whose graphs keep less for the backward pass, which computes the cheapest again.

    Args:
        budget: torch's `activation_memory_budget`, in [0, 1].
        backend: what generates the code; None is inductor.
        options: inductor's.
    """

    def compile_graph(graph: fx.GraphModule, inputs: Any) -> Any:
        functorch: Any = torch._functorch.config
        with functorch.patch(activation_memory_budget=budget):  # read where a graph is parted into forward and backward
            return (backend or _inductor(options))(graph, inputs)

    return compile_graph
