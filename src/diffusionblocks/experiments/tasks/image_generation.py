"""The task of diffusion models of images: pictures of their samples, and the Frechet distance to real images."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field

from ...common.choices import NameOf, choice_of
from ...common.fields import MOST_SAMPLES, Int, Levels, Many, NonNegative, Positive, Samples, Seed, check_count
from ...common.progress import Progress
from .image_features import FEATURE_KINDS, FeatureName, image_measures, saved_classifier
from .task import PROMPT, EvaluateSection, LevelGrid, RunResult, SampleOption, Task, register_task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...core.image_sampler import ImageSampler
    from ...core.model import DiffusionBlocks
    from ...data.dataset import Dataset
    from ...data.image_config import ImagesSection
    from ...evaluation.boundary_distances import BoundaryRow, MovedRow
    from ...evaluation.image_quality import ImageMeasures
    from ...evaluation.sample_quality import Conditions, SampleRow, Setting
    from ...noise import GaussianProcess
    from ..experiment import Experiment
    from ..recipe import Recipe


_log = logging.getLogger(__name__)


def _solvers() -> Collection[str]:
    from ...sampling.solvers import SOLVERS

    return SOLVERS


def _solver(name: str) -> str:
    from ...sampling.solvers import SOLVERS

    return SOLVERS.check(name)


Solver = Annotated[str, NameOf(_solvers, _solver)]


def _interval(values: tuple[float, float]) -> tuple[float, float]:
    low, high = values
    if not low < high:
        raise ValueError(f"must be [low, high] with low < high, got {list(values)}")
    return values


#: Two numbers between which something is done.
Interval = Annotated[tuple[NonNegative, NonNegative], AfterValidator(_interval)]


def _listed(values: Any) -> Any:
    """A list of intervals, where one is given."""
    plain = values is None or (isinstance(values, (list, tuple)) and all(isinstance(v, (int, float)) for v in values))
    return [values] if plain and values != [] else values


_CHAINS, _COLUMNS = 3, 8  # what the picture of chains shows


class SamplesConfig(EvaluateSection):
    """Generated images are measured for every combination of solver, steps, grid, guidance, its interval, and churn.

    Attributes:
        samples: Number of images; labels take turns, image i starts from the noise of seed `seed` + i.
        solver: `euler` (the paper), `heun` (EDM), `dpmpp-2m` and `dpmpp-3m` (DPM-Solver++), `unipc` (UniPC) or one that
            is registered.
        steps: Solver steps.
        grid: Level grid: of EDM `karras` (EDM eq. 5) or `equal-quantile`, of flow matching `uniform` or
            `equal-quantile`.
        guidance: Classifier-free guidance on D; 1 is none.
        guidance_interval: [low, high], or a list of such: only levels low < level <= high are guided, and a call at
            another level costs half. null: all levels.
        churn: S_churn of EDM's stochastic sampler, which is `heun` with churn: fresh noise before every step. 0 is
            none; `euler` takes it too, multistep solvers do not.
        churn_interval: [S_min, S_max]: sigma / alpha of the steps with churn. null: all.
        churn_noise: S_noise, standard deviation of the noise that is added, over what the levels say.
        features: What the Frechet distance compares. `classifier`: features of a small CNN that is trained on the data
            set first, and kept; `inception`: FID (extra: fid); `efficientnet-lite0`: a small classifier of ImageNet
            from PyPI (extra: efficientnet), whose distance is no FID; null: only pictures are drawn. Precision, recall,
            density, coverage and what class probabilities say are of the same features.
        class_accuracy: With other features than `classifier`, also train (or read) that classifier, and measure how
            often it gives images the label they were drawn with.
        features_folder: Where the classifier is kept, and the features of real images; null is runs/<name>-features.
        reference_images: Number of real images to compare with, evenly spread over each split; null takes all (of
            latents each has to be decoded).
        batch_size: Images at a time.
        grid_images: Number of images in the picture.
        seed: Seed of the first image; the next count up.
        cuda_graph: Capture the network calls of chains as CUDA graphs. The same images; it pays for many or small
            batches. Without effect on a CPU.
        dtype: `bfloat16`: the network samples in bfloat16, its residual stream too; z and solver stay float32. null: as
            trained, under the autocast of `train.precision`.
        compile: Compile blocks for sampling with torch.compile, as `train.compile`: `true`, a block as a whole;
            `layers`, layer by layer. It changes rounding.
    """

    kind: Literal["samples"] = "samples"
    samples: Int = Field(default=10_000, ge=2, le=MOST_SAMPLES)
    solver: Many[Solver] = ("euler",)
    steps: Many[Levels] = (50,)
    grid: Many[LevelGrid] = ("karras",)
    guidance: Many[NonNegative] = (1.0,)
    guidance_interval: Annotated[Many[Interval | None], BeforeValidator(_listed)] = (None,)
    churn: Many[NonNegative] = (0.0,)
    churn_interval: Interval | None = None
    churn_noise: Positive = 1.0
    features: FeatureName | None = "classifier"
    class_accuracy: bool = False
    features_folder: Path | None = None
    reference_images: Int | None = Field(default=None, ge=2, le=MOST_SAMPLES)
    batch_size: Samples = 500
    grid_images: Int = Field(default=100, ge=1, le=10_000)
    seed: Seed = 0
    cuda_graph: bool = False
    dtype: Literal["bfloat16"] | None = None
    compile: bool | Literal["layers"] = False

    @property
    def settings(self) -> list[Setting]:
        """Every combination of the sampling settings, once: without guidance its interval means nothing."""
        from ...evaluation.sample_quality import Setting

        several = (self.solver, self.steps, self.grid, self.guidance, self.guidance_interval, self.churn)
        settings = []
        for solver, steps, grid, guidance, interval, churn in itertools.product(*several):
            fresh = (churn, self.churn_interval, self.churn_noise) if churn else ()
            settings.append(Setting(solver, steps, grid, guidance, interval if guidance != 1 else None, *fresh))
        return list(dict.fromkeys(settings))


@register_task
class ImageGeneration(Task[SamplesConfig]):
    """Measures and draws the samples of diffusion models."""

    target = "image"
    section = SamplesConfig
    takes = ("images", "latents")
    has_trajectories = True
    draws_in_training = True
    does = "generates images"
    score = "fd_test"
    makes = "images"
    shares_work = True
    sample_options = (
        PROMPT,
        SampleOption("labels", "images: class labels, in turn (default: all classes)", {"type": int, "nargs": "+"}),
        SampleOption(
            "solver",
            "images: euler (the paper's), heun, dpmpp-2m, dpmpp-3m, unipc or a registered one (default: the recipe's "
            "first)",
            {"type": choice_of(_solvers), "metavar": "NAME"},
        ),
        SampleOption("guidance", "images: classifier-free guidance (default: the recipe's first)", {"type": float}),
        SampleOption(
            "guidance_interval",
            "images: guide only levels above LOW, up to HIGH (default: the recipe's first)",
            {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")},
        ),
        SampleOption(
            "churn",
            "images: fresh noise before every step, S_churn of EDM; 0 is none (default: the recipe's first)",
            {"type": float},
        ),
    )

    # ---- checks ------------------------------------------------------------------------------------------------

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse features that the data have no pixels for, and churn of solvers that take none."""
        from ...sampling.solvers import SOLVERS

        options: Any = recipe.evaluate
        for solver, churn in itertools.product(options.solver, options.churn):
            SOLVERS[solver].check_churn(churn, "evaluate.churn")
        if options.features is None or recipe.data.examples != "latents":
            return
        if options.class_accuracy:
            raise ValueError("evaluate.class_accuracy: a classifier needs images to learn; for latents leave it out")
        if FEATURE_KINDS[options.features].is_trained:
            raise ValueError(
                f"evaluate.features: {options.features} needs images; for latents use inception or "
                "efficientnet-lite0, with data.vae, or null"
            )

    def splits(self, options: SamplesConfig) -> tuple[str, ...]:
        """Both, to compare with; none where only pictures are drawn."""
        return () if options.features is None else ("train", "test")

    def calls(self, experiment: Experiment, model: nn.Module, test: Dataset) -> int:
        """Those of all chains, twice where they are guided."""
        options, noise = self.options(experiment), process_of(experiment, model)
        return sum(options.samples * setting.evaluations(noise) for setting in options.settings)

    def check_settings(self, experiment: Experiment, model: nn.Module) -> None:
        """Refuse guidance without a null class, features without their package, and a classifier of other data.

        An interval without guidance is told in a warning.
        """
        from ...sampling import check_churned_levels, check_guided_levels

        options, noise = self.options(experiment), process_of(experiment, model)
        if experiment.recipe.train.sample_every is not None:  # else a missing autoencoder would be told in training
            images_of(experiment).to_pixels(experiment.device)
        if set(options.guidance) == {1.0} and any(options.guidance_interval):
            _log.warning(
                "evaluate.guidance_interval does nothing, for evaluate.guidance is 1: set guidance to another number, "
                "or leave guidance_interval out"
            )
        for guidance in options.guidance:
            model.target.check_guidance(guidance, "evaluate.guidance")  # type: ignore[union-attr, operator]
        for setting in options.settings:
            levels = noise.sampling_levels(setting.steps, setting.grid)
            if setting.churn:
                check_churned_levels(levels, noise, setting.churn_interval, "evaluate.churn_interval")
            if setting.guidance_interval is not None:
                check_guided_levels(levels, setting.guidance_interval, "evaluate.guidance_interval")
        if options.features is None:
            return
        if any(len(data.example_shape) == 4 for data in experiment.splits.values()):
            raise ValueError(
                f"evaluate.features: {options.features} compares images, and the latents are of videos: set "
                "evaluate.features to null"
            )
        if any(getattr(data, "groups", None) is not None for data in experiment.splits.values()):
            raise ValueError(
                f"evaluate.features: {options.features} compares images of one size, and the latents have several: set "
                "evaluate.features to null"
            )
        kind, splits = FEATURE_KINDS[options.features], experiment.splits
        kind.check_installed(options.features)
        if experiment.recipe.data.examples == "latents":  # else what no autoencoder decodes is told after training
            images_of(experiment).to_pixels(experiment.device)
        if (kind.is_trained or options.class_accuracy) and (
            data := splits.get("train", splits.get("test"))
        ) is not None:
            saved_classifier(experiment, data)

    # ---- pictures of a model that trains -----------------------------------------------------------------------

    def cost_of_pictures(self, experiment: Experiment) -> str:
        """Images and network calls of a picture; a call is about a third of a step's work for an example."""
        options, train = self.options(experiment), experiment.recipe.train
        assert train.sample_every is not None
        each = options.settings[0].evaluations(process_of(experiment, experiment.outline))
        examples = train.sample_every * train.batch_size * train.accumulation
        return (
            f"samples: every {train.sample_every:,} iterations a picture of {options.grid_images:,} images of {each:,} "
            f"network calls, about {options.grid_images * each / (3 * examples):.0%} of the training's work on top"
        )

    def draw_in_training(
        self, experiment: Experiment, model: DiffusionBlocks, path: Path, *, last_block: int | None
    ) -> None:
        """A grid of the recipe's first setting; prompts are those of the training data."""
        import torch

        from ...evaluation.sample_quality import pieces_of, sample_batch
        from ...reports.pictures import film_strips, readable_scale, save_grid

        options, sampler = self.options(experiment), model.sampler()
        conditions = conditions_of(experiment, model, split="train")
        chain: dict[str, Any] = {"seed": options.seed, "conditions": conditions, "last_block": last_block}
        with experiment.precision(model):
            samples = [
                sample_batch(sampler, images, options.settings[0], **chain)
                for images in pieces_of(options.grid_images, options.batch_size)
            ]
            pixels = images_of(experiment).to_pixels(model.device)  # an autoencoder is there for a picture alone
            pictures = torch.cat([film_strips(pixels(batch)).cpu() for batch in samples])
        columns = grid_columns(getattr(model.target, "num_classes", 0), len(pictures))
        save_grid(pictures, path, columns, scale=readable_scale(pictures))

    # ---- measures ----------------------------------------------------------------------------------------------

    def measure(self, experiment: Experiment, model: nn.Module) -> list[SampleRow]:
        """Quality and speed for every setting."""
        from ...evaluation.sample_quality import measure_samples

        options, section, work = self.options(experiment), images_of(experiment), experiment.work
        measures: ImageMeasures | None = None
        pixels: Callable[[Tensor], Tensor] = lambda samples: samples  # noqa: E731 - nothing looks at them
        blocks: Any = model
        if options.features is not None:
            pixels = section.to_pixels(blocks.device)
            measures = image_measures(experiment, pixels)
        with experiment.precision(model):
            return measure_samples(
                sampler_of(options, blocks),
                options.settings,
                samples=options.samples,
                batch_size=options.batch_size,
                pixels=pixels,
                measures=measures,
                seed=options.seed,
                work=work,
                conditions=conditions_of(experiment, blocks),
            )

    def compare_neighbours(
        self,
        experiment: Experiment,
        model: nn.Module,
        folder: Path,
        *,
        count: int,
        examples: int,
        shares: Sequence[float] | None,
    ) -> tuple[Sequence[BoundaryRow], Sequence[MovedRow]]:
        """Distances of velocities and of D, and samples of the recipe's first setting with each boundary moved."""
        from ...evaluation.boundary_distances import SHARES, boundary_distances, check_boundaries, moved_boundaries
        from ...evaluation.sample_quality import sample_batch
        from ...reports.boundary_pictures import draw_boundary_moves
        from ...reports.pictures import film_strips
        from ...sampling import network_calls

        check_count("count", count, MOST_SAMPLES)
        check_count("examples", examples, MOST_SAMPLES)
        blocks = experiment.blocks_of(model)
        check_boundaries(blocks)
        noise, options = process_of(experiment, blocks), self.options(experiment)
        setting, pixels = options.settings[0], images_of(experiment).to_pixels(blocks.device)
        levels = noise.sampling_levels(setting.steps, setting.grid)
        calls = network_calls(setting.solver, levels, noise, churn=setting.churn, churn_interval=setting.churn_interval)
        data = experiment.data("train")
        size = min(experiment.recipe.train.batch_size, examples)
        batches = map(
            experiment.batch_of,
            experiment.recipe.data.evaluation_batches(data.part(examples), batch_size=size, device=experiment.device),
        )
        conditions = conditions_of(experiment, blocks)

        def draw(view: DiffusionBlocks) -> Tensor:
            return sample_batch(
                sampler_of(options, view), range(count), setting, seed=options.seed, conditions=conditions
            )

        with experiment.precision(blocks):
            distances = boundary_distances(blocks, batches, seed=options.seed)
            call_levels = [call.level for call in calls]
            views = list(moved_boundaries(blocks, draw, call_levels, SHARES if shares is None else shares))
        if not views:
            raise ValueError("--moved: no boundary can be moved so far without reaching its neighbour; move it by less")
        draw_boundary_moves(
            distances,
            [(row, film_strips(pixels(images)).cpu()) for row, images in views],
            noise,
            folder / "boundaries.png",
        )
        return distances, [row for row, _ in views]

    # ---- tables and figures --------------------------------------------------------------------------------------

    def summary(self, rows: Sequence[SampleRow]) -> dict[str, Any]:
        """The first setting's row, and beside it all rows, and the one with the least distance to training images."""
        from ...evaluation.sample_quality import best_of

        settings = [row.to_dict() for row in rows]
        best = best_of(settings)
        return {
            **self.headline(rows).to_dict(),
            "samples_measured": settings,
            "best": None if best is None else {**best},
        }

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Distances to both splits, their number of images, their bias, real images' own distance, and speed."""
        from ...reports.image_tables import distance_columns

        return distance_columns(row) | {"images/s": f"{row['images_per_second']:.0f}"}

    def text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """A line a setting, the best one marked; below it what the real test images have."""
        from ...reports.image_tables import quality_columns, setting_lines
        from ...reports.tables import format_table

        real = quality_columns(rows[0].get("real") or {})
        return "\n".join(
            [format_table(setting_lines(rows)), *(["real test images:", format_table([real])] if real else [])]
        )

    def details(self, table: Sequence[Mapping[str, Any]]) -> list[str]:
        """Quality beside that of real images; and where there are several settings, distance against network calls."""
        from ...reports.image_tables import distances_by_calls, quality_columns
        from ...reports.tables import format_table

        texts = []
        lines = [{"row": row["key"]} | quality_columns(row) for row in table]
        if len(lines[0]) > 1:
            real = quality_columns(table[0].get("real") or {})
            lines += [{name: real.get(name, "-") for name in lines[0]} | {"row": "real test images"}] if real else []
            texts += ["", "by the same features, with the first setting:", format_table(lines)]
        by_calls = distances_by_calls({row["key"]: row["samples_measured"] for row in table})
        if by_calls:
            texts += ["", "distance against network calls; * the best setting of a row:", format_table(by_calls)]
        return texts

    def draw(
        self,
        experiment: Experiment,
        table: Sequence[Mapping[str, Any]],
        results: Mapping[str, RunResult],
        folder: Path,
    ) -> None:
        """Pictures of every row's samples, and where there are several settings distance against network calls."""
        from ...evaluation.image_quality import distance_name
        from ...reports.figures import draw_distance_by_calls

        if all(row["fd_train"] is not None for row in table) and len(table[0]["samples_measured"]) > 1:
            rows = {row["key"]: row["samples_measured"] for row in table}
            draw_distance_by_calls(rows, distance_name(table[0]["features"]), folder / "calls.png")
        for key, result in results.items():
            draw_samples(experiment, result.model, folder / key / "samples")  # type: ignore[arg-type]

    def sample(
        self, experiment: Experiment, model: nn.Module, folder: Path, values: Mapping[str, Any], *, progress: bool
    ) -> list[Path]:
        """Draw images: a file each, a grid, a chain over its steps, and which block makes which step."""
        names = ("solver", "steps", "grid", "guidance", "guidance_interval", "churn")
        changes = {name: values[name] for name in names if values[name] is not None}
        if "guidance_interval" in changes:
            changes["guidance_interval"] = tuple(changes["guidance_interval"])
        elif changes.get("guidance") == 1:  # the recipe's interval is of its own guidance
            changes["guidance_interval"] = None
        if "churn" in changes:
            own = self.options(experiment)
            changes |= {"churn_interval": own.churn_interval, "churn_noise": own.churn_noise}
        return draw_samples(
            experiment,
            model,  # type: ignore[arg-type]
            folder,
            count=values["count"],
            labels=values["labels"],
            setting=dataclasses.replace(self.options(experiment).settings[0], **changes),
            seed=values["seed"],
            prompts=values["prompt"],
            files=True,
            progress=progress,
        )


def sampler_of(options: SamplesConfig, model: DiffusionBlocks) -> ImageSampler:
    """The model's sampler, as a recipe's `evaluate` section says."""
    import torch

    from ...training.compilation import sampling_options

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    prepared = {"cuda_graph": options.cuda_graph, "dtype": dtype, "compile": options.compile}
    return model.sampler(**prepared, compile_options=sampling_options(model.device) if options.compile else None)


def images_of(experiment: Experiment) -> ImagesSection:
    """The recipe's `data` section, which has images or their latents."""
    return cast("ImagesSection", experiment.recipe.data)  # the recipe's validation saw to it


def sizes_of(experiment: Experiment, model: nn.Module) -> tuple[int, ...] | None:
    """Sizes of the images that are sampled, of a model that takes any: those of the data's first."""
    target: Any = model.target
    if None not in target.shape:
        return None
    sizes = experiment.data("train").example_shape[1:]
    return (1, *sizes) if len(target.shape) == 4 and len(sizes) == 2 else sizes  # an image is a video of one frame


def process_of(experiment: Experiment, model: nn.Module) -> GaussianProcess:
    """The model's noise process at the resolution of the images that are sampled."""
    target: Any = model.target
    noise = cast("GaussianProcess", model.noise)
    return noise.for_tokens(target.tokens_of((1, *target.chain_shape(sizes_of(experiment, model)))))


def grid_columns(labels: int, count: int) -> int:
    """Images in a row of a picture: one a label where these are few."""
    return labels if 2 <= labels <= 20 else math.ceil(math.sqrt(count))


def conditions_of(
    experiment: Experiment, model: DiffusionBlocks, prompts: Sequence[str] | None = None, split: str | None = None
) -> Conditions | None:
    """What images of a text-to-image model are told: prompts in turn, those of the data by default; None of others.

    Args:
        experiment: of latents with prompts.
        model: its blocks.
        prompts: whose states the text encoder that the latents note makes; None: those of the data.
        split: of the data; None: the `test` split where that is read anyway, else `train`.

    Raises:
        ValueError: prompts of a model that is told none.
    """
    import torch

    from ...data.image_config import LatentsConfig

    target: Any = model.target
    if not target.conditions:
        if prompts is not None:
            raise ValueError(f"this {model.model_class} is told no prompts; leave --prompt out")
        return None
    section = cast(LatentsConfig, experiment.recipe.data)
    data: Any = experiment.data(split or ("test" if "test" in experiment.splits else "train"))
    device, sizes = model.device, sizes_of(experiment, model)
    states = None if prompts is None else section.states_of_prompts(prompts, device)

    def of_images(images: range) -> dict[str, Any]:
        if states is None:
            own = section.conditions(data, torch.tensor(images) % len(data), device)
        else:
            rows = torch.tensor(images) % len(prompts or ())
            own = section.conditions_without_prompt(data, len(images), device)
            own |= {name: value[rows].to(device) for name, value in states.items()}
        without = section.conditions_without_prompt(data, len(images), device)
        return {
            "inputs": experiment.batch_of(own),
            "negative_inputs": experiment.batch_of(without) if data.empty else None,
            "sizes": sizes,
        }

    return of_images


# ---- pictures --------------------------------------------------------------------------------------------------


def draw_samples(
    experiment: Experiment,
    model: DiffusionBlocks,
    folder: Path,
    *,
    count: int | None = None,
    labels: Sequence[int] | None = None,
    setting: Setting | None = None,
    seed: int | None = None,
    prompts: Sequence[str] | None = None,
    files: bool = False,
    progress: bool = False,
) -> list[Path]:
    """Sample images and draw them.

    Args:
        experiment: of a diffusion model; says how samples become pixels, the precision, and the defaults.
        model: its blocks.
        folder: where `grid.png`, `chain.png`, `routing.png` (and `images/`) go.
        count: how many images; default one a label, or the recipe's `grid_images`.
        labels: the images' labels, repeated in turn up to `count`; default all classes in turn.
        setting: how to sample; default the first of the recipe.
        seed: image i has seed `seed` + i; default the recipe's.
        prompts: the images' prompts, repeated in turn; default those of the data. Of models that are told states of
            prompts.
        files: also write every image to `images/SEED-LABEL.png`, every video to `videos/SEED-LABEL.mp4`.
        progress: show a progress bar.

    Returns:
        The pictures written; of several ranks the first writes them.

    Raises:
        ValueError: no diffusion model, a count < 1 or of more images than memory holds, a label out of range, a folder
            that cannot be written into, or see `DiffusionBlocks.sample`.
    """
    import torch

    from ...common.files import check_writable
    from ...common.machine import host_memory
    from ...data.video_files import pyav, save_video
    from ...evaluation.sample_quality import pieces_of, sample_batch
    from ...reports.pictures import Chain, draw_chain, draw_routing, film_strips, readable_scale, save_grid, save_png
    from ...targets import ImageTarget, check_labels

    target = model.target
    if not isinstance(target, ImageTarget):
        raise ValueError(f"only diffusion models of images make pictures, and {experiment.recipe.model.type} is none")
    options, section = cast(SamplesConfig, experiment.recipe.evaluate), images_of(experiment)
    noise = process_of(experiment, model)
    turns_of = labels or prompts
    count = count if count is not None else len(turns_of) if turns_of is not None else options.grid_images
    check_count("count", count, MOST_SAMPLES)
    conditions = conditions_of(experiment, model, prompts)
    shape = target.chain_shape(sizes_of(experiment, model))
    if count * math.prod(shape) > host_memory():
        raise ValueError(
            f"count = {count:,} images of {'x'.join(map(str, shape))} are {count * math.prod(shape):,} "
            "bytes, more than this machine's memory: draw fewer at a time, each time with another seed"
        )
    if labels is not None and not target.num_classes:
        raise ValueError(f"this {model.model_class} is unconditional and takes no labels; leave them out")
    if labels is not None:  # all of them, not only those of the first batch
        check_labels(
            torch.tensor(list(labels)), len(labels), target.num_classes, null_class=target.null_class is not None
        )
    check_writable(folder, "the samples' folder")
    fps = section.frames_per_second()
    if files and fps is not None:
        pyav()
    setting = setting or options.settings[0]
    target.check_guidance(setting.guidance)
    first = options.seed if seed is None else seed
    turns = list(labels) if labels is not None else list(range(target.num_classes))
    pixels = section.to_pixels(model.device)
    keep = sorted({round(i * (setting.steps - 1) / (_COLUMNS - 1)) for i in range(_COLUMNS)})
    chain = Chain(images=_CHAINS, keep=keep)

    work, sampler = experiment.work, sampler_of(options, model)

    def sample(images: range) -> dict[str, Tensor]:
        watched = chain if images.start == 0 else None
        batch = sample_batch(
            sampler, images, setting, seed=first, labels=labels, callback=watched, conditions=conditions
        )
        return {"final": batch[:_CHAINS].cpu(), "pictures": pixels(batch).cpu()}

    batches, pieces = [], pieces_of(count, options.batch_size)
    with experiment.precision(model), Progress("sample", count, "images", show=progress and work.leads) as bar:
        for images, batch in zip(pieces, work.in_order(pieces, sample), strict=False):  # the first rank has them
            batches.append(batch)
            bar.update(len(images))
    if not work.leads:
        return []
    final, pictures = batches[0]["final"], torch.cat([batch["pictures"] for batch in batches])

    columns = grid_columns(len(turns), count)
    grid, routing, steps = folder / "grid.png", folder / "routing.png", folder / "chain.png"
    strips = film_strips(pictures)
    save_grid(strips, grid, columns if strips is pictures else 1, scale=readable_scale(strips))
    levels = noise.sampling_levels(setting.steps, setting.grid)
    draw_routing(
        model.partition,
        noise,
        levels,
        routing,
        solver=setting.solver,
        churn=setting.churn,
        churn_interval=setting.churn_interval,
    )
    names = [f"seed {first + i}" for i in range(len(final))]
    on_device: Callable[[Tensor], Tensor] = lambda values: film_strips(pixels(values.to(model.device))).cpu()  # noqa: E731
    draw_chain(chain, model.partition, noise, steps, pixels=on_device, names=names, final=final)
    paths = [grid, routing, steps]
    if files:
        for i, image in enumerate(pictures):
            label = f"-{turns[i % len(turns)]:04d}" if turns else ""
            name = f"{first + i:06d}{label}"
            if fps is None:
                save_png(image, folder / "images" / f"{name}.png")
            else:
                save_video(image, folder / "videos" / f"{name}.mp4", fps)
        paths.append(folder / ("images" if fps is None else "videos"))
    return paths
