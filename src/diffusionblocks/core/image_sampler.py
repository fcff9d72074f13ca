"""Images of a diffusion model's blocks, batch after batch, with what can be prepared once: graphs, copies, kernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..common.modules import evaluating, tensors_of
from ..noise import GaussianProcess
from ..sampling import (
    SOLVERS,
    Callback,
    Churn,
    Denoiser,
    GuidedDenoiser,
    SeedNoise,
    StaticCalls,
    check_churned_levels,
    check_guidance,
    check_guided_levels,
    first_z,
    global_state,
    guided_by_inputs,
    sample_images,
)
from ..targets import ImageTarget, check_entries, check_labels

if TYPE_CHECKING:
    from .model import DiffusionBlocks

#: Batch sizes and settings whose graphs are kept: that of all batches, and that of a last one, which is smaller.
_MOST_KEPT = 2


class ImageSampler:
    """Draws images of a model; `DiffusionBlocks.sampler` makes one, and `DiffusionBlocks.sample` uses one for a call.

    The model may be trained further, moved or loaded into in between: every call reads its weights anew.

    Args:
        model: a diffusion model's blocks.
        cuda_graph: capture the network calls of a chain, guidance included, as CUDA graphs: one for each block, batch
            size and setting of guidance. Images are the same bit for bit. It pays for many batches, and for small ones.
            Without effect on other devices.
        dtype: dtype that the network computes in, such as torch.bfloat16: a copy of its weights, which autocast then
            leaves alone. z, levels, preconditioning and the solver stay float32. None: the model's own weights.
        compile: torch.compile the blocks for static shapes, as `train.compile` does: True, each as a whole; "layers",
            layer by layer, which takes less time to prepare. Without a dtype it is the model's own blocks.
        compile_options: further options of torch.compile.

    Raises:
        ValueError: no diffusion model, a dtype that is not floating, another `compile`, or graphs or a copy of a model
            whose blocks take turns on the device.
    """

    def __init__(
        self,
        model: DiffusionBlocks,
        *,
        cuda_graph: bool = False,
        dtype: torch.dtype | None = None,
        compile: bool | Literal["layers"] = False,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        if model.family.target != "image":
            model.inference.refuse("sampler", "diffusion models")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype such as torch.bfloat16, or None; got {dtype}")
        if model.takes_turns and (cuda_graph or dtype is not None):
            raise ValueError(
                "the model's blocks run one at a time, each copied to the device for its turn: a sampler with "
                "cuda_graph or dtype needs them all there; leave both out"
            )
        self.model = model
        self.cuda_graph = cuda_graph
        self.dtype = dtype
        self.network = model if dtype is None else copy.deepcopy(model).to(dtype).requires_grad_(False)
        if compile:
            self._compile(compile, {"dynamic": False, **(compile_options or {})})
        self._calls: dict[Hashable, StaticCalls] = {}
        self._addresses: tuple[int, ...] = ()

    @property
    def target(self) -> ImageTarget:
        """What the model's blocks denoise."""
        target = self.model.target
        assert isinstance(target, ImageTarget)
        return target

    @property
    def noise(self) -> GaussianProcess:
        """The model's noise process."""
        assert isinstance(self.model.noise, GaussianProcess)
        return self.model.noise

    @property
    def device(self) -> torch.device:
        """Where the blocks run."""
        return self.model.device

    def sample(
        self,
        labels: Tensor | Sequence[int] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        steps: int = 50,
        solver: str = "euler",
        grid: str | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        churn: float = 0.0,
        churn_interval: tuple[float, float] | None = None,
        churn_noise: float = 1.0,
        callback: Callback | None = None,
        progress: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
        negative_inputs: Mapping[str, Tensor] | None = None,
        sizes: Sequence[int] | None = None,
        last_block: int | None = None,
    ) -> Tensor:
        """Generate images, in evaluation mode: arguments, result and errors are those of `DiffusionBlocks.sample`.

        Args:
            last_block: the chain ends with the levels of this block, and its last D is the result: an image as sharp as
                blocks 0 to this one make it. None: all blocks.
        """
        model, target = self.model, self.target
        if labels is not None and not isinstance(labels, Tensor):
            labels = torch.tensor(labels)
        if labels is not None and labels.dim() == 0:
            raise ValueError(f"labels must be a list, one an image, got {labels.tolist()}; for one image, labels=[3]")
        rows = labels if inputs is None or not inputs else next(iter(inputs.values()))
        if seeds is None:
            seeds = range(len(rows) if rows is not None else 1)
        shape = target.chain_shape(None if sizes is None else tuple(sizes))
        source = SeedNoise(seeds, shape, model.device)
        read, negative = self._read(labels, inputs, negative_inputs, len(seeds), guidance)
        denoiser = guided_by_inputs(self._call, read, negative, guidance, guidance_interval)
        noise = self.noise.for_tokens(target.tokens_of((len(seeds), *shape)))
        levels = noise.sampling_levels(steps, grid)
        if guidance != 1:
            check_guided_levels(levels, guidance_interval)
        fresh = Churn(churn, source.draw, churn_interval, churn_noise)
        SOLVERS[SOLVERS.check(solver)].check_churn(churn)
        if churn:
            check_churned_levels(levels, noise, churn_interval)
        if last_block is not None:
            owner = model.partition.block_of
            levels = [*(level for level in levels if level > 0 and owner(level) <= last_block), 0.0]
        with model.one_thread, evaluating(self.network), self._precision():
            self._follow()
            z = first_z(noise, source)
            return sample_images(
                self._captured(denoiser, z) if self.cuda_graph else denoiser,
                z,
                levels,
                noise,
                solver=solver,
                churn=fresh,
                callback=callback,
                progress=progress,
                owner=model.partition.block_of,
            )

    # ---- what the network reads beside z ----------------------------------------------------------------

    def _read(
        self,
        labels: Tensor | None,
        inputs: Mapping[str, Tensor] | None,
        negative_inputs: Mapping[str, Tensor] | None,
        count: int,
        guidance: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the model reads of each image, and of the rows that guidance leads away from; checked, on its device."""
        target = self.target
        own_labels = self._labels(labels, count)
        if target.conditions:
            negative = None
            if negative_inputs is not None:
                negative = self._conditions(negative_inputs, count, "negative_inputs")
            return self._conditions(inputs or {}, count, "inputs"), negative
        self._refuse_inputs(inputs, negative_inputs)
        check_guidance(guidance)
        target.check_guidance(guidance)
        if guidance != 1 and labels is None:
            raise ValueError(f"guidance = {guidance} needs labels; give labels, or set guidance to 1")
        if own_labels is None:
            return {}, None
        null = target.null_class
        return {"labels": own_labels}, None if null is None else {"labels": torch.full_like(own_labels, null)}

    def _conditions(self, inputs: Mapping[str, Tensor], count: int, name: str) -> dict[str, Tensor]:
        """What the model reads beside z, checked, on its device."""
        block = self.model.block(0)
        if missing := [entry for entry in block.input_names if entry not in inputs]:
            raise ValueError(f"{name} lacks {', '.join(missing)}, which this {self.model.model_class} reads")
        check_entries(inputs, (*block.input_names, *block.optional_inputs), f"this {self.model.model_class} ({name})")
        self.target.check_conditions(inputs, count)
        return {entry: value.to(self.model.device) for entry, value in inputs.items()}

    def _refuse_inputs(self, *inputs: Mapping[str, Tensor] | None) -> None:
        for name, given in zip(("inputs", "negative_inputs"), inputs, strict=True):
            if given is not None:
                raise ValueError(f"this {self.model.model_class} reads no {name}; leave them out")

    def _labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        """The labels that the network reads, on its device; None for an unconditional model."""
        target, model = self.target, self.model
        if not target.num_classes:
            if labels is not None:
                raise ValueError(f"this {model.model_class} is unconditional and takes no labels; leave them out")
            return None
        if labels is None:
            if target.null_class is None:
                raise ValueError(
                    f"labels are needed: in [0, {target.num_classes - 1}]; the model was trained without label dropout "
                    "and knows no null class"
                )
            return torch.full((count,), target.null_class, device=model.device)
        if labels.dim() == 1 and len(labels) != count:
            raise ValueError(f"got {len(labels)} labels and {count} seeds; give one of each an image")
        check_labels(labels, count, target.num_classes, null_class=target.null_class is not None)
        return labels.to(model.device)

    # ---- what is prepared -------------------------------------------------------------------------------

    def _compile(self, how: bool | Literal["layers"], options: dict[str, Any]) -> None:
        if how not in (True, "layers"):
            raise ValueError(f'compile must be True, False or "layers", got {how!r}')
        dynamo: Any = torch._dynamo.config
        # Each batch size is a graph of its own; past the limit torch would quietly run the others eagerly.
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * (1 + len(self.network.blocks)))
        if how == "layers":
            self.network.compile_layers(**options)
            return
        for block in self.network.blocks:
            block.compile(**options)

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast would compute norms, and with them the residual stream, in float32: not where a dtype is set."""
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, enabled=False)

    def _follow(self) -> None:
        """Bring the copy up to date, and forget graphs whose weights lie elsewhere by now."""
        if self.network is not self.model:
            self.network.to(self.device)
            with torch.no_grad():
                torch._foreach_copy_(tensors_of(self.network), tensors_of(self.model))
        addresses = tuple(tensor.data_ptr() for tensor in tensors_of(self.network)) if self.cuda_graph else ()
        if addresses != self._addresses:
            self._calls.clear()
            self._addresses = addresses

    def _call(self, z: Tensor, inputs: Mapping[str, Tensor], level: float) -> Tensor:
        return self.network.denoise(inputs, z, level)

    def _captured(self, denoiser: GuidedDenoiser, z: Tensor) -> Denoiser:
        """The same denoiser, run from memory that stays in place."""
        calls, owner = self._static_calls(denoiser, z), self.network.partition.block_of

        def call(z: Tensor, inputs: Mapping[str, Tensor], level: float) -> Tensor:
            # Told the level by memory: the number is of the call that is captured.
            return self.network.block(owner(level))(inputs, z, calls.level[: len(z)])  # type: ignore[no-any-return]

        inputs, both = calls.inputs
        in_place = GuidedDenoiser(call, inputs or {}, both, denoiser.guidance, denoiser.interval)

        def run(z: Tensor, level: float) -> Tensor:
            return calls.run((owner(level), in_place.guides(level)), lambda: in_place(calls.z, level), z, level)

        return run

    def _static_calls(self, denoiser: GuidedDenoiser, z: Tensor) -> StaticCalls:
        """The graphs for a batch: all that a graph holds fast, but for block and guided or not, tells them apart."""
        groups = (denoiser.inputs, denoiser.both)
        shapes = [sorted((name, v.shape, v.dtype) for name, v in (group or {}).items()) for group in groups]
        key = (z.shape, z.device, str(shapes), denoiser.guidance, *global_state(z.device))
        if key not in self._calls:
            while len(self._calls) >= _MOST_KEPT:
                self._calls.pop(next(iter(self._calls)))
            self._calls[key] = StaticCalls(z, *groups)
        calls = self._calls[key]
        calls.set_inputs(*groups)
        return calls
