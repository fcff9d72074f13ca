"""What others do with a model that is too large for the GPU: weights on the host, streamed there layer by layer.

Model, data, batches and precision are those of our rows, and layers are computed again in the backward pass. What
streams is each package's own code, called as its authors say.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..experiments.experiment import Experiment
from ..training import Diverged, EndToEnd
from .bench_models import build, recipe_of, splits_of
from .methods import Spec
from .plain_loop import AlternativeRunner, Plain, compile_units, imported
from .runners import Runner, bytes_of, tensors_in

_ATTENTION = "diffusionblocks_bench_causal"


class StreamedRunner(AlternativeRunner):
    """A whole model, end to end, whose weights are on the host, or most of them.

    Args:
        plain: model and data.
        optimizer: of all parameters, where they are.
        before_step: what must have happened before the optimizer steps.
    """

    def __init__(self, plain: Plain, optimizer: Any, before_step: Callable[[], Any] = lambda: None) -> None:
        super().__init__(plain, optimizer, lambda: tensors_in(dict(optimizer.state)))
        self._before_step = before_step

    def _move(self) -> None:
        self._before_step()
        super()._move()

    def _weights(self, *, here: bool) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if (p.device.type == self.device.type) == here]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that stay on the device."""
        return self._weights(here=True)

    @property
    def host_bytes(self) -> int:  # type: ignore[override]
        """Bytes of weights, gradients and the optimizer's state on the host."""
        return 2 * bytes_of(self._weights(here=False)) + super().host_bytes


def _needs_gpu(spec: Spec) -> None:
    if spec.device != "cuda":
        raise ValueError(f"{spec.method} streams to a GPU, so it does not run on device {spec.device}")


def _adamw(plain: Plain, parameters: Iterator[nn.Parameter] | None = None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters or plain.units[0].module.parameters(), fused=True, **plain.adamw())


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------


def fsdp_offload(spec: Spec) -> Runner:
    """torch's FSDP2 over one rank: `CPUOffloadPolicy` keeps weights, gradients and AdamW on the host."""
    import torch.distributed as distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method

    plain = Plain(spec, place="cpu")
    dist: Any = distributed
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if spec.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if spec.compile:
        compile_units(plain)
    module: Any = plain.units[0].module
    mesh = init_device_mesh(plain.device.type, (1,))
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=spec.device == "cuda")}
    for parts in module.layer_groups():
        fully_shard(parts if len(parts) > 1 else parts[0], **options)
    fully_shard(module, **options)
    register_fsdp_forward_method(module, "loss")
    for name, buffer in module.named_buffers():  # which FSDP leaves to us
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, buffer.to(plain.device))
    return StreamedRunner(plain, _adamw(plain))


# ---- diffusers' group offloading -----------------------------------------------------------------------------------


def group_offloading(spec: Spec) -> Runner:
    """diffusers' `apply_group_offloading`, a layer a group on a stream.

    It is made for inference, and leaves gradients on the GPU: each is moved to its weight as it comes.
    """
    _needs_gpu(spec)
    hooks = imported("diffusers.hooks", "diffusers")
    plain = Plain(spec, place="cpu")
    module: Any = plain.units[0].module
    layers = nn.ModuleList(part for parts in module.layer_groups() for part in parts)
    streamed = {id(t) for t in [*layers.parameters(), *layers.buffers()]}
    for owner in module.modules():
        for entries in (owner._parameters, owner._buffers):
            for name, tensor in entries.items():
                if tensor is not None and id(tensor) not in streamed:
                    there = tensor.detach().to(plain.device)
                    entries[name] = nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there
    for parameter in layers.parameters():
        parameter.register_post_accumulate_grad_hook(_to_its_weight)
    stack = nn.Module()
    stack.layers = layers
    hooks.apply_group_offloading(
        stack,
        onload_device=plain.device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )

    def before_step() -> None:
        for parameter in layers.parameters():
            _to_its_weight(parameter)

    return StreamedRunner(plain, _adamw(plain), before_step)


def _to_its_weight(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.device != parameter.device:
        parameter.grad = gradient.to(parameter.device)


# ---- RamTorch ------------------------------------------------------------------------------------------------------


def ramtorch(spec: Spec) -> Runner:
    """RamTorch's linear layers (as SimpleTuner calls them): weights in page-locked memory, fetched for each product."""
    _needs_gpu(spec)
    helpers = imported("ramtorch.helpers", "ramtorch", "pip install ramtorch")
    plain = Plain(spec, place="cpu")
    module = plain.units[0].module
    helpers.replace_linear_with_ramtorch(module, device="cuda")
    for parameter in module.parameters():
        if getattr(parameter, "is_ramtorch", False):
            parameter.data = parameter.data.pin_memory()
    helpers.move_model_to_device(module, plain.device)
    return StreamedRunner(plain, _adamw(plain), torch.cuda.synchronize)  # gradients come without a wait


# ---- MegaTrain -----------------------------------------------------------------------------------------------------


class MegaTrainRunner(Runner):
    """MegaTrain (arXiv 2604.05091): weights, gradients and AdamW on the host, layers streamed both ways.

    It knows language models of transformers alone. AdamW is DeepSpeed's for the CPU where that is installed, else
    torch's fused one; gradients are not clipped, as in our rows.
    """

    def __init__(self, spec: Spec) -> None:
        _needs_gpu(spec)
        package = imported("infinity", "megatrain", "pip install git+https://github.com/DLYuanGod/MegaTrain")
        recipe = recipe_of(spec)
        model = build(recipe, torch.device("cpu"))
        if not isinstance(model, EndToEnd) or model.family.target != "next-token":
            raise ValueError(f"{spec.method} trains language models of transformers, and {spec.model} is none")
        network: Any = model.model
        _register_attention()
        network.set_attn_implementation(_ATTENTION)
        self.device = torch.device("cuda")
        experiment = Experiment(recipe, splits_of(recipe)).on("cpu")
        data, train = experiment.data("train"), recipe.train
        self.data_bytes = 0
        self._batches, self._generator = experiment.batches(), torch.Generator().manual_seed(train.seed)
        self._count, self._size = self._batches.num_examples, train.batch_size
        before = torch.cuda.memory_allocated()
        config = package.CPUMasterConfig(
            model_name=spec.model,
            dataset_name="none",
            attn_implementation="sdpa",
            trust_remote_code=False,
            batch_size=train.batch_size,
            max_seq_len=data.length,
            dtype=next(network.parameters()).dtype,
        )
        self._master = package.CPUMasterModel(network, config)
        self._resident = torch.cuda.memory_allocated() - before
        settings = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
        self._optimizer = _host_adamw()(self._master.get_parameters(), **settings)
        self._step, self._loss = 0, 0.0

    def step(self, turn: int, following: int | None = None) -> None:
        """Stream all layers forward and backward, and step on the host."""
        indices = torch.arange(self._step * self._size, (self._step + 1) * self._size) % self._count
        tokens = self._batches(indices, self._generator)["input_ids"]
        self._loss, *_ = self._master.forward_and_backward(tokens, torch.ones_like(tokens), tokens)
        self._optimizer.step()
        self._master._sync_params_to_gpu()
        self._master.zero_grad()
        self._optimizer.zero_grad()
        self._step += 1

    def parameters(self) -> list[nn.Parameter]:
        """None that stays there: they are copies in buffers."""
        return []

    @property
    def host_bytes(self) -> int:  # type: ignore[override]
        """Bytes of weights, their page-locked copies, gradients and AdamW's state."""
        weights = bytes_of(self._master.get_parameters())
        copies = bytes_of(self._master.layer_pinned_flats)
        return 2 * weights + copies + bytes_of(tensors_in(dict(self._optimizer.state)))

    def persistent_bytes(self) -> dict[str, int]:
        """Its buffers on the device, which count as parameters."""
        return {"parameters": self._resident, "optimizer": 0, "ema": 0, "buffers": 0}

    def check(self) -> None:
        """Raise `Diverged` if the last loss is not finite."""
        if not math.isfinite(self._loss):
            raise Diverged("a loss was not finite, so the figures are of no use")


@functools.cache
def _register_attention() -> None:
    """Causal attention that needs no mask: without flash-attn, a mask would keep layers off the fast kernels."""
    from transformers import AttentionInterface

    sdpa: Any = AttentionInterface()["sdpa"]

    def causal(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        return sdpa(module, q, k, v, None, **options | {"is_causal": True})

    AttentionInterface.register(_ATTENTION, causal)


def _host_adamw() -> Any:
    try:
        deepspeed = imported("deepspeed.ops.adam", "deepspeed", "pip install deepspeed")
    except ImportError:
        return functools.partial(torch.optim.AdamW, fused=True)
    return functools.partial(deepspeed.DeepSpeedCPUAdam, adamw_mode=True)
