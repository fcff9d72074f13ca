"""Images a second of a diffusion model's blocks: the sampler, with one thing more each time, beside what was before it.

    python benchmarks/sampling_speed.py --out speed.json  # DiT-S/2, B = 3, guidance 2, Euler 50, 1,000 at a time
    python benchmarks/sampling_speed.py --out speed.json --set device=cpu --set model.config.hidden_size=48 --tiny

`before` is eager: layers compiled one by one, autocast, every image's noise drawn on the CPU, a launch for each kernel.
The other rows are the same chain by `DiffusionBlocks.sampler`, each with one thing more, and state how far its images
are from those of `before` (mean absolute difference over the mean absolute value). Rows are timed in turns, round after
round, so that none has the cooler GPU; a row's figure is the median of its rounds. Weights are fresh, but with random
modulations and head: how fast images come does not depend on which, and these make them differ from noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusionblocks.core.model import DiffusionBlocks
from diffusionblocks.evaluation.sample_quality import Setting
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.tasks.image_generation import SamplesConfig
from diffusionblocks.noise import GaussianProcess
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table
from diffusionblocks.sampling import SeedNoise, guided, sample_images
from diffusionblocks.targets import ImageTarget
from diffusionblocks.training.compilation import sampling_options

#: Draws the images of seeds.
Draw = Callable[[list[int]], Tensor]

_FLASH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to sample.

    Attributes:
        sampler: options of `DiffusionBlocks.sampler`; None is the loop that there was before.
        autotune: let torch.compile time its own products, with what follows in them, against the library's.
        gelu: let products apply the GELU behind them.
        flash: flash attention before cuDNN's.
        whole: compile each block whole, so that a layer's end and the next one's norm are one kernel.
        parts: batches that the images are drawn in.
    """

    sampler: dict[str, Any] | None = None
    autotune: bool = False
    gelu: bool = False
    flash: bool = False
    whole: bool = False
    parts: int = 1


_GRAPHS: dict[str, Any] = {"cuda_graph": True}
_LOWER: dict[str, Any] = {"cuda_graph": True, "dtype": torch.bfloat16}

#: Each has one thing more than one before it.
WAYS: dict[str, Way] = {
    "before": Way(),
    "noise on the device": Way({}),
    "graphs": Way(_GRAPHS),
    "graphs, bfloat16": Way(_LOWER),
    "graphs, bfloat16, gelu": Way(_LOWER, gelu=True),
    "graphs, bfloat16, gelu, flash": Way(_LOWER, gelu=True, flash=True),
    "graphs, bfloat16, gelu, whole": Way(_LOWER, gelu=True, whole=True),
    "graphs, bfloat16, gelu, whole, 4 parts": Way(_LOWER, gelu=True, whole=True, parts=4),
    "graphs, bfloat16, gelu, 4 parts": Way(_LOWER, gelu=True, parts=4),
    "graphs, bfloat16, gelu, 8 parts": Way(_LOWER, gelu=True, parts=8),
    "graphs, bfloat16, autotuned": Way(_LOWER, autotune=True),
    "graphs, bfloat16, autotuned, 4 parts": Way(_LOWER, autotune=True, parts=4),
}


def build(recipe: Recipe) -> DiffusionBlocks:
    """The recipe's model on its device, whose fresh zeros (modulations, head) are random numbers."""
    experiment = Experiment(recipe)
    model = experiment.build()
    assert isinstance(model, DiffusionBlocks)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))
    return model.to(experiment.device).eval()


def before(model: DiffusionBlocks, setting: Setting, compiled: bool) -> Draw:
    """The chain as it was: noise of each seed from the CPU, kernels launched one by one."""
    if compiled:
        model.compile_layers()
    noise, target = model.noise, model.target
    assert isinstance(noise, GaussianProcess)
    assert isinstance(target, ImageTarget)

    def draw(seeds: list[int]) -> Tensor:
        z = (noise.alpha_sigma(noise.read_max)[1] * SeedNoise(seeds, target.chain_shape(None)).draw()).to(model.device)
        denoiser = guided(
            lambda z, labels, level: model.denoise({"labels": labels}, z, level),
            labels_of(model, seeds).to(model.device),
            target.null_class,
            setting.guidance,
        )
        levels = noise.sampling_levels(setting.steps, setting.grid)
        owner = model.partition.block_of
        return sample_images(denoiser, z, levels, noise, solver=setting.solver, owner=owner)

    return draw


def labels_of(model: DiffusionBlocks, seeds: list[int]) -> Tensor:
    """Classes in turn."""
    assert isinstance(model.target, ImageTarget)
    return torch.tensor([seed % model.target.num_classes for seed in seeds])


def prepared(model: DiffusionBlocks, setting: Setting, way: Way, compiled: bool) -> Draw:
    """The chain by the model's sampler."""
    options: dict[str, Any] = {}
    if compiled:
        how: Any = True if way.whole else "layers"
        options = {"compile": how, "compile_options": sampling_options(model.device) if way.gelu else {}}
        if way.autotune:
            options["compile_options"] = {"mode": "max-autotune-no-cudagraphs"}
    sampler = model.sampler(**(way.sampler or {}), **options)
    values = dataclasses.asdict(setting)

    def draw(seeds: list[int]) -> Tensor:
        size = -(-len(seeds) // way.parts)
        parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        return torch.cat([sampler.sample(labels_of(model, part), seeds=part, **values) for part in parts])

    return draw


def timed(draw: Draw, seeds: list[int], context: Callable[[], AbstractContextManager[Any]]) -> tuple[float, Tensor]:
    """Seconds, by the host's clock with the device waited for before and after, and the images."""
    wait()
    start = time.perf_counter()
    with context():
        images = draw(seeds)
    wait()
    return time.perf_counter() - start, images


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def contexts(model: DiffusionBlocks, way: Way, lower: bool) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as in evaluation, and the kernels of attention."""

    def enter() -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(torch.autocast(model.device.type, torch.bfloat16, enabled=lower))
        stack.enter_context(sdpa_kernel(_FLASH) if way.flash and model.device.type == "cuda" else nullcontext())
        return stack

    return enter


def measure(recipe: Recipe, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All rows, after every round; the first round of each way compiles and captures, and is not timed."""
    assert isinstance(recipe.evaluate, SamplesConfig)
    setting, lower = recipe.evaluate.settings[0], recipe.train.precision == "bfloat16"
    batch = options.batch_size or recipe.evaluate.batch_size
    seeds = list(range(batch))
    runs: dict[str, tuple[Draw, Callable[[], AbstractContextManager[Any]]]] = {}
    apart: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    firsts: dict[str, float] = {}
    reference: Tensor | None = None
    for name in options.ways:
        way, model = WAYS[name], build(recipe)
        run = before(model, setting, options.compile) if way.sampler is None else None
        draw = run or prepared(model, setting, way, options.compile)
        runs[name] = draw, contexts(model, way, lower)
        try:
            firsts[name], images = timed(draw, seeds, runs[name][1])
        except Exception as error:  # a way that this machine or version has not: the others are still measured
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            del runs[name]
            continue
        reference = images if reference is None else reference
        apart[name] = ((images - reference).abs().mean() / reference.abs().mean()).item()
        timed(draw, seeds, runs[name][1])
        gc.collect()
        print(f"{name}: first batch {firsts[name]:.1f} s, {apart[name]:.2e} from {options.ways[0]!r}", flush=True)
    for number in range(options.rounds):
        for name, (draw, context) in runs.items():
            seconds, _ = timed(draw, [number * batch + seed for seed in seeds], context)
            times.setdefault(name, []).append(seconds)
        yield [
            {
                "way": name,
                "name": "diffusionblocks" if recipe.blocks.num_blocks > 1 else "end-to-end",
                "blocks": recipe.blocks.num_blocks,
                "solver": setting.solver,
                "steps": setting.steps,
                "guidance": setting.guidance,
                "batch": batch,
                "parts": WAYS[name].parts,
                "images_per_second": batch / statistics.median(seconds),
                "images_per_second_before": batch / statistics.median(times[options.ways[0]]),
                "ratio": statistics.median(times[options.ways[0]]) / statistics.median(seconds),
                "images_per_second_min": batch / max(seconds),
                "images_per_second_max": batch / min(seconds),
                "first_batch_seconds": firsts[name],
                "apart": apart[name],
            }
            for name, seconds in times.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/dit/cifar10.yaml")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help="default all")
    parser.add_argument("--batch-size", type=int, help="images at a time (default: the recipe's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="two rounds of four images, not compiled: to try it")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    options = parser.parse_args()
    if options.tiny:
        options.compile, options.batch_size, options.rounds = False, 4, 2
    torch.set_float32_matmul_precision("high")
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = 1000  # every way is compiled anew; past the limit torch would quietly run eagerly
    recipe = load_recipe(options.recipe, options.set)
    rows: list[dict[str, Any]] = []
    for rows in measure(recipe, options):
        write_results(options.out, rows, study="sampling speed", setting={"recipe": options.recipe, "set": options.set})
    print(format_table([{name: row[name] for name in ("way", "images_per_second", "ratio", "apart")} for row in rows]))


if __name__ == "__main__":
    main()
