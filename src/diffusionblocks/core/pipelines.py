"""Blocks in diffusers' pipelines: a transformer that routes by the time it is told, and folders with two experts.

    pipeline.transformer = model.as_transformer()           # any pipeline of the class, blocks of any number
    model.export_pipeline("folder", source="Wan2.2-...")     # two blocks of Wan, for WanPipeline.from_pretrained

Both compare in t of the path before the shift, as training and `sample` do.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..common.files import whole_folder
from ..common.finite import DIVERGED, require_finite
from ..common.formats import read_json, write_json
from ..families.conditioned import ConditionedFamily
from ..families.module_tree import shell_of
from ..noise import FlowMatching
from .exporting import export_block
from .model import DiffusionBlocks
from .partition import ABOVE_BOUNDARY, SAME_LEVEL

#: class of a model -> the pipeline that runs one transformer above a time and another below it
_PAIRS = {"WanTransformer3DModel": "WanPipeline"}
_INDEX = "model_index.json"
#: names of what a pipeline's folder has
_FILES = re.compile(r"model_index\.json|transformer(_2)?|scheduler|vae|text_encoder|tokenizer")


def as_transformer(
    model: DiffusionBlocks, *, low_memory: bool = False, device: torch.device | str = "cuda"
) -> nn.Module:
    """A transformer of the blocks' class that runs, at each call, the block that owns the time it is told.

    It is of the class, and has its config, so a pipeline of the class takes it; its scheduler must have the blocks'
    shift. It is the blocks' own networks, not copies.

    Args:
        model: blocks of a class of text to image or text to video, by flow matching.
        low_memory: let blocks wait where they are, and copy the one that runs to `device`, in place of the last. In the
            last call before a boundary the next block is copied layer by layer into the memory of layers that have run.
        device: where blocks run with `low_memory`.

    Returns:
        The transformer, in evaluation mode. A call with rows of different times raises ValueError.

    Raises:
        ValueError: blocks of another class or noise process.
    """
    family, noise = _conditioned(model), _flow(model)
    network: Any = model.block(0).network
    if low_memory:
        model.run_one_at_a_time(device)
    ahead = _NextLevel()

    def run(*args: Any, **options: Any) -> Any:
        call = inspect.signature(kind.forward).bind(network, *args, **options)
        time = call.arguments["timestep"]
        first = time.flatten()[0]
        if bool((time != first).any()):
            raise ValueError("a call must have one time for all its rows: a block owns an interval of times")
        shape = call.arguments["hidden_states"].shape  # of packed tokens, or of latents
        tokens = shape[1] if len(shape) == 3 else math.prod(shape[2:]) // math.prod(family.patch(model.config))
        level = _level_of(model, family, noise.for_tokens(tokens), float(first), time.dtype)
        block, following = (model.block(model.partition.block_of(t)) for t in (level, ahead.after(level)))
        model.bring(block, following)
        return block.network(*args, **options)

    kind: Any = type(network)
    transformer: Any = shell_of(network, (), memo={id(model.config): model.config}, kind=_routing_class(kind))
    transformer.experts = nn.ModuleList(model.block(b).network for b in range(model.partition.num_blocks))
    vars(transformer)["route"] = run
    return cast(nn.Module, transformer.eval())


def _level_of(
    model: DiffusionBlocks, family: ConditionedFamily, noise: FlowMatching, time: float, dtype: torch.dtype
) -> float:
    """The level of a time that a pipeline tells in a precision, by the process of the image's resolution.

    Many pipelines round times to the latents' precision. Where a boundary is told by the same number, and chains of
    even steps meet it, such as 0.5, it is meant: it goes to the block below it, as in `Partition.block_of`.
    """
    if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize:
        for boundary in filter(_is_met, model.partition.boundaries[1:-1]):
            place = noise.shifted(torch.tensor(boundary, dtype=torch.float64)).item()
            if family.rounded_time(place, dtype) == time:
                return boundary
    return noise.unshifted(min(max(family.condition_of(model.config, time), 0.0), 1.0))


def _is_met(level: float) -> bool:
    """Whether a chain of at most 100 even steps has a call at a level."""
    return abs(float(Fraction(level).limit_denominator(100)) - level) <= SAME_LEVEL * level


class _NextLevel:
    """Foresees the level of a chain's next call, where levels are even before the shift, as schedulers' are by default.

    A step is taken to make as many calls as the one before it (of guidance, two).
    """

    def __init__(self) -> None:
        self._levels: list[float] = []  # of the last step, and of this one
        self._calls = [0, 0]

    def after(self, level: float) -> float:
        """The level of the call after one at a level, between 0 and 1; the level itself where nothing is known."""
        if not self._levels or level != self._levels[-1]:
            self._levels = [*self._levels[-1:], level]
            self._calls = [self._calls[1], 0]
        self._calls[1] += 1
        if len(self._levels) == 1 or self._calls[1] < self._calls[0]:
            return level
        before, now = self._levels
        return min(max(2 * now - before, 0.0), 1.0)


@functools.cache
def _routing_class(model_class: Any) -> Any:
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return self.route(*args, **options)

    return type(f"Routing{model_class.__name__}", (model_class,), {"forward": forward, "__module__": __name__})


def export_pipeline(model: DiffusionBlocks, path: str | Path, *, source: str | Path | None = None) -> None:
    """Write two blocks as a folder of the stock pipeline that runs one transformer above a time and one below.

        transformer/, transformer_2/        the blocks of high and of low noise, low-rank updates added
        scheduler/                          Euler's, with the blocks' shift
        model_index.json                    with `boundary_ratio`, the blocks' boundary after the shift
        vae/, text_encoder/, ...            of `source`

    Args:
        model: two blocks of a class that has such a pipeline (Wan).
        path: the folder; an older export there is replaced.
        source: folder of the pretrained pipeline; None leaves its other parts out, to be given to `from_pretrained`.

    Raises:
        ValueError: another class or number of blocks, weights that are not finite, a `source` that is no pipeline of
            the class, or a place that must not be replaced.
        FileNotFoundError: `source` has no model_index.json.
    """
    _conditioned(model)
    noise, pipeline = _flow(model), _PAIRS.get(model.model_class)
    if pipeline is None or model.partition.num_blocks != 2:
        raise ValueError(
            f"stock pipelines take one transformer, and of {', '.join(_PAIRS)} two; this {model.model_class} has "
            f"{model.partition.num_blocks} blocks: give a pipeline model.as_transformer(), which runs them all"
        )
    from diffusers import FlowMatchEulerDiscreteScheduler, __version__

    if noise.base_shift is not None:
        raise ValueError(
            "the blocks' shift follows the resolution (base_shift), and a stock pipeline compares times with one "
            "ratio: give a pipeline model.as_transformer(), which knows the resolution"
        )
    index: dict[str, Any] = {name: [None, None] for name in ("text_encoder", "tokenizer", "vae")}
    if source is not None:
        there = read_json(Path(source) / _INDEX)
        if there.get("_class_name") != pipeline:
            raise ValueError(
                f"{Path(source) / _INDEX} is of a {there.get('_class_name')}, not of a {pipeline}: name the folder of "
                "such a pipeline"
            )
        index = {name: value for name, value in there.items() if name in index}
    boundary = torch.tensor(model.partition.boundaries[1], dtype=torch.float64)
    index |= {
        "_class_name": pipeline,
        "_diffusers_version": __version__,
        # The pipeline gives the boundary itself to the expert of high noise, a partition to the one below it.
        "boundary_ratio": noise.shifted(boundary * ABOVE_BOUNDARY).item(),
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", model.model_class],
        "transformer_2": ["diffusers", model.model_class],
    }
    with whole_folder(Path(path), _FILES) as folder:
        for b, name in enumerate(("transformer", "transformer_2")):
            exported: Any = export_block(model, b)
            require_finite(exported.state_dict().items(), f"block {b}", DIVERGED)
            exported.save_pretrained(folder / name)
        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=noise.shift)  # type: ignore[no-untyped-call]
        scheduler.save_pretrained(folder / "scheduler")
        for name in ("text_encoder", "tokenizer", "vae"):
            if source is not None and (Path(source) / name).is_dir():
                shutil.copytree(Path(source) / name, folder / name)
        write_json(folder / _INDEX, index)


def _conditioned(model: DiffusionBlocks) -> ConditionedFamily:
    if not isinstance(model.family, ConditionedFamily):
        raise ValueError(
            f"pipelines are of classes of text to image and text to video, and {model.model_class} is none of them: "
            "sample it with `diffusionblocks sample`, or model.sample; one block goes into an ordinary model with "
            "`export --block`, or model.export_block"
        )
    return model.family


def _flow(model: DiffusionBlocks) -> FlowMatching:
    if not isinstance(model.noise, FlowMatching):
        raise ValueError(f"a pipeline's time tells blocks of flow matching apart, not of {model.noise.kind}")
    return model.noise
