"""What a recipe measures of a trained model: a classifier's accuracy, a diffusion model's samples, or a text model's
bits a character."""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.fields import MANY_CALLS, MOST_CALLS
from ..common.modules import computes_on, evaluating
from ..core.model import DiffusionBlocks
from ..data import ImageData, TextChunks
from ..data.data_config import DataSection, ImagesSection, PixelsConfig
from ..evaluation.accuracy import AccuracyRow, accuracy_grid
from ..evaluation.bits import Bits, bits_per_character
from ..evaluation.diagnostics import LevelRow, accuracy_by_level
from ..evaluation.features import ClassifierFeatures, Features, InceptionFeatures, train_classifier
from ..evaluation.frechet import FeatureStatistics
from ..evaluation.mauve import require_mauve
from ..evaluation.sample_quality import SampleRow, Setting, measure_samples, statistics
from ..evaluation.teachers import check_teacher
from ..noise import Masking
from ..targets import ImageTarget
from . import language
from .language import check_prompts, check_room
from .recipe import AccuracyConfig, BitsConfig, LanguageConfig, Recipe, SamplesConfig
from .sources import Data, check_data, device_of, load_data

_log = logging.getLogger(__name__)

#: Data by split, where the caller has loaded it already.
Splits = Mapping[str, Data]
Row = AccuracyRow | SampleRow | Bits | language.LanguageResult


def evaluate(recipe: Recipe, model: nn.Module, splits: Splits | None = None) -> list[Row]:
    """Measure a model as the recipe's `evaluate` section says: one row a combination of its settings."""
    if isinstance(recipe.evaluate, LanguageConfig):
        data = (splits or {}).get("test") or load_data(recipe, "test")
        assert isinstance(data, TextChunks), "recipes of text models have text"
        with precision(recipe, model):
            return [language.measure(recipe, recipe.evaluate, model, data)]
    if isinstance(recipe.evaluate, AccuracyConfig):
        return list(_accuracy(recipe, recipe.evaluate, model, splits or {}))
    assert isinstance(model, DiffusionBlocks)
    if isinstance(recipe.evaluate, BitsConfig):
        return [_bits(recipe, recipe.evaluate, model, splits or {})]
    return list(_samples(recipe, recipe.evaluate, model, splits or {}))


def headline(rows: list[Row]) -> Row:
    """The row that stands for the run in a table, fixed beforehand: nothing is selected by its result.

    Of accuracies the one with the most seeds and the fewest steps; of samples the first setting of the recipe.
    """
    if isinstance(rows[0], AccuracyRow):
        return max(rows, key=lambda row: (row.seeds or 1, -(row.steps or 1)))  # type: ignore[union-attr]
    return rows[0]


def diagnose(recipe: Recipe, model: DiffusionBlocks, splits: Splits | None = None) -> list[LevelRow]:
    """Accuracy of every block on test images at levels of its own, beside what z gives away."""
    options = recipe.evaluate
    if not isinstance(options, AccuracyConfig):
        raise ValueError(f"accuracy by level is for classifiers, and {recipe.model.type} is none")
    with precision(recipe, model):
        return accuracy_by_level(model, _test_batches(recipe, options, model, splits or {}), seed=options.seed)


def precision(recipe: Recipe, model: nn.Module) -> torch.autocast:
    """The training's precision, for evaluation."""
    return torch.autocast(computes_on(model).type, torch.bfloat16, enabled=recipe.train.precision == "bfloat16")


def settings_of(options: SamplesConfig) -> list[Setting]:
    """Every combination of the recipe's sampling settings."""
    found = itertools.product(options.solver, options.steps, options.grid, options.guidance)
    return [Setting(*values) for values in found]


# ---- classifiers -----------------------------------------------------------------------------------------


def _accuracy(recipe: Recipe, options: AccuracyConfig, model: nn.Module, splits: Splits) -> list[AccuracyRow]:
    with precision(recipe, model):
        return accuracy_grid(
            model,
            _test_batches(recipe, options, model, splits),
            steps=options.steps,
            seeds=options.seeds,
            feedback=options.feedback,
            grid=options.grid,
            seed=options.seed,
        )


def _test_batches(
    recipe: Recipe, options: AccuracyConfig, model: nn.Module, splits: Splits
) -> Callable[[], Iterator[dict[str, Tensor]]]:
    images = splits["test"] if "test" in splits else load_data(recipe, "test")
    assert isinstance(images, ImageData), "recipes of classifiers have images"
    section: DataSection = recipe.data
    return functools.partial(
        section.evaluation_batches,
        images.first(options.limit),
        batch_size=options.batch_size,
        device=computes_on(model),
    )


# ---- text models -------------------------------------------------------------------------------------------


def _bits(recipe: Recipe, options: BitsConfig, model: DiffusionBlocks, splits: Splits) -> Bits:
    data = splits["test"] if "test" in splits else load_data(recipe, "test")
    assert isinstance(data, TextChunks), "recipes of text models have text"
    assert isinstance(model.noise, Masking)
    section: DataSection = recipe.data
    batches = section.evaluation_batches(data.first(options.limit), batch_size=options.batch_size, device=model.device)
    networks = {b: functools.partial(model.block(b), {}) for b in range(model.partition.num_blocks)}
    with precision(recipe, model), evaluating(model):
        return bits_per_character(
            networks, model.noise, batches, model.partition, times=options.times, seed=options.seed
        )


# ---- diffusion models --------------------------------------------------------------------------------------


def _samples(recipe: Recipe, options: SamplesConfig, model: DiffusionBlocks, splits: Splits) -> list[SampleRow]:
    features: Features | None = None
    references: dict[str, FeatureStatistics] = {}
    pixels: Callable[[Tensor], Tensor] = lambda samples: samples  # noqa: E731 - nothing looks at them
    if options.features is not None:
        real = {split: splits[split] if split in splits else load_data(recipe, split) for split in ("train", "test")}
        features = features_of(recipe, options, real)
        section: DataSection = recipe.data
        assert isinstance(section, ImagesSection), "recipes of diffusion models have images"
        pixels = section.to_pixels(model.device)
        for split, data in real.items():
            count = min(len(data), options.reference_images or len(data))
            images = section.real_images(data, pixels, count=count, batch_size=options.batch_size, device=model.device)
            references[split] = statistics(features, images)
    with precision(recipe, model):
        return measure_samples(
            model,
            settings_of(options),
            samples=options.samples,
            batch_size=options.batch_size,
            pixels=pixels,
            features=features,
            references=references,
            seed=options.seed,
        )


def features_of(recipe: Recipe, options: SamplesConfig, real: Splits) -> Features:
    """The recipe's features: Inception's, or those of a classifier that is trained here once and kept.

    Raises:
        ValueError: a kept classifier of other data; or a classifier for latents, which have no pixels to train it on.
    """
    device = device_of(recipe)
    if options.features == "inception":
        return InceptionFeatures(device)
    train, test = real["train"], real["test"]
    if not isinstance(train, ImageData) or not isinstance(test, ImageData) or not isinstance(recipe.data, PixelsConfig):
        raise ValueError("evaluate.features: classifier needs images; for latents use inception and data.vae, or null")
    kept = _kept_classifier(recipe, options, train)
    if kept is not None:
        return kept
    made = train_classifier(
        train,
        test,
        mean=recipe.data.mean,
        std=recipe.data.std,
        dataset=data_name(recipe),
        device=device,
        flip=recipe.data.augment.flip,
        crop_padding=max(1, train.image_shape[1] // 8),
        batch_size=min(128, len(train)),
        width=64 if train.image_shape[1] >= 16 else 32,
    )
    made.save(features_folder(recipe, options))
    return made


def features_folder(recipe: Recipe, options: SamplesConfig) -> Path:
    """Where the classifier whose features are compared is kept."""
    return options.features_folder or Path("runs") / f"{recipe.name}-features"


def _kept_classifier(recipe: Recipe, options: SamplesConfig, data: Data) -> ClassifierFeatures | None:
    folder, dataset = features_folder(recipe, options), data_name(recipe)
    if not folder.is_dir():
        return None
    kept = ClassifierFeatures.load(folder, device_of(recipe))
    if kept.dataset != dataset or kept.image_shape != data.example_shape:
        raise ValueError(
            f"{folder} holds a classifier of {kept.dataset} {kept.image_shape}, the data are {dataset} "
            f"{data.example_shape}; set evaluate.features_folder"
        )
    return kept


def evaluated_splits(recipe: Recipe) -> tuple[str, ...]:
    """The splits that the recipe's evaluation reads: none where a run trains some blocks, or only draws pictures."""
    if recipe.train.blocks is not None:
        return ()
    if isinstance(recipe.evaluate, SamplesConfig):
        return () if recipe.evaluate.features is None else ("train", "test")
    return ("test",)


def check_evaluation(recipe: Recipe, model: nn.Module, splits: Splits) -> None:
    """Refuse before work what could only fail after it: the one check of all that `evaluate` measures.

    Args:
        recipe: says what is measured.
        model: on any device, the meta device too.
        splits: the data that are there; a test split among them is one that will be measured.

    Raises:
        ValueError: guidance of a model without null class; a kept classifier of other data; no teacher where the
            recipe says that one is; test data that the model does not take, or too few; texts that outgrow the model;
            more of the likeliest tokens than there are; settings that multiply to more than anybody waits for.
        ImportError: Inception's features without the package that has them.
    """
    options, test = recipe.evaluate, splits.get("test")
    if isinstance(model, DiffusionBlocks):
        for grid in (options.grid,) if isinstance(options.grid, str) else options.grid:
            model.noise.check_grid(grid, "evaluate.grid")
    if test is not None:
        check_data(recipe, model, test)
        _check_enough(recipe, test)
        _check_calls(recipe, model, test)
    if isinstance(options, LanguageConfig):
        check_room(recipe, model, options.prompt_length, options.new_tokens)
        if isinstance(test, TextChunks):
            check_prompts(options, test)
        if options.mauve is not None:
            require_mauve()
            check_teacher(options.mauve, "evaluate.mauve", tokenizer=True, causal=False)
        if options.teacher is not None:
            check_teacher(options.teacher, "evaluate.teacher", tokenizer=not options.teacher_tokens)
        if options.prompt_length == 0 and not (
            isinstance(model, DiffusionBlocks) and getattr(model.target, "shift", 1) == 0
        ):
            raise ValueError(
                "evaluate.prompt_length = 0: only blocks of two streams write from nothing; this model needs at least 1"
            )
    if not isinstance(options, SamplesConfig) or not isinstance(model, DiffusionBlocks):
        return
    assert isinstance(model.target, ImageTarget)
    for guidance in options.guidance:
        model.target.check_guidance(guidance, "evaluate.guidance")
    if options.features == "inception":
        try:
            importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise ImportError(
                f"evaluate.features: inception needs torch-fidelity ({error}): run pip install 'diffusionblocks[fid]', "
                "or --set evaluate.features=null"
            ) from error
    if options.features == "classifier" and (data := splits.get("train", test)) is not None:
        _kept_classifier(recipe, options, data)


def network_calls(recipe: Recipe, model: nn.Module, test: Data) -> int:
    """About how often evaluation calls a block, each example counted by itself: what its settings multiply to."""
    options = recipe.evaluate
    blocks = model.partition.num_blocks if isinstance(model, DiffusionBlocks) else 1
    if isinstance(options, SamplesConfig):
        return sum(options.samples * setting.calls * (1 + (setting.guidance != 1)) for setting in settings_of(options))
    if isinstance(options, AccuracyConfig):
        chains = sum(options.steps) * max(options.seeds) if isinstance(model, DiffusionBlocks) else 1
        return min(len(test), options.limit or len(test)) * chains
    assert isinstance(test, TextChunks)
    sequences = min(len(test), options.limit or len(test))
    if isinstance(options, BitsConfig):
        return sequences * blocks * options.times + options.samples * options.steps
    assert isinstance(options, LanguageConfig)
    levels, steps = (options.levels, options.steps or blocks) if isinstance(model, DiffusionBlocks) else (1, 1)
    return sequences * levels + options.samples * options.new_tokens * steps


def _check_calls(recipe: Recipe, model: nn.Module, test: Data) -> None:
    """Refuse settings that multiply to more than anybody waits for; say so where they are many."""
    calls, options = network_calls(recipe, model, test), recipe.evaluate
    lower = " or ".join(
        f"evaluate.{name}" for name in ("samples", "steps", "seeds", "new_tokens", "limit") if hasattr(options, name)
    )
    said = f"evaluation takes about {calls:,} calls of a block, each example counted by itself"
    if calls > MOST_CALLS:
        raise ValueError(f"{said}, more than {MOST_CALLS:,}: set {lower} lower")
    if calls > MANY_CALLS:
        _say(f"{said}; for a quick look set {lower} lower")


@functools.cache  # every trainer of a run asks
def _say(text: str) -> None:
    _log.warning("%s", text)


def _check_enough(recipe: Recipe, test: Data) -> None:
    """Refuse a test split with fewer examples than its measure needs: two sequences have a standard error."""
    least = 2 if isinstance(recipe.evaluate, (BitsConfig, LanguageConfig)) else 1
    count = len(test)
    if count < least:
        what = f"sequences of data.length = {test.length}" if isinstance(test, TextChunks) else "examples"
        raise ValueError(
            f"the test split has {count} {what}, and evaluate.kind: {recipe.evaluate.kind} needs {least}: give more "
            "test data" + (", or set data.length lower" if isinstance(test, TextChunks) else "")
        )


def data_name(recipe: Recipe) -> str:
    """A short name of the recipe's data."""
    return recipe.data.name
