"""From a recipe to a trained, saved and evaluated model: what the command line and the benchmarks call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import instantiate, model_class_named, rebuild_config
from .convert import convert
from .data import ImageBatches, ImageData, digits, evaluation_batches, image_classification
from .evaluation.accuracy import AccuracyRow, accuracy_grid
from .evaluation.diagnostics import LevelRow, accuracy_by_level
from .files import read_json, write_json
from .loading import load
from .model import DiffusionBlocks
from .recipes import DigitsConfig, Recipe
from .training import EndToEnd, Trainer
from .training.logging import Logger


@dataclass(frozen=True)
class RunResult:
    """What a run left: the model, its accuracies, and what training took."""

    model: nn.Module
    accuracies: list[AccuracyRow]
    seconds: float
    iterations: int


def device_of(recipe: Recipe) -> torch.device:
    """The recipe's device.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(recipe.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {recipe.device}, but torch sees no GPU; use device: cpu or auto")
    return device


def load_data(recipe: Recipe, split: str) -> ImageData:
    """The recipe's `train` or `test` images."""
    data = recipe.data
    if isinstance(data, DigitsConfig):
        return digits(split)
    return image_classification(
        data.resolved_source(),
        data.split_files,
        {"train": data.train_split, "test": data.test_split}[split],
        data.image_column,
        data.label_column,
        data.image_size,
        data.channels,
        data.num_classes,
        data.cache,
    )


def build_original(recipe: Recipe) -> nn.Module:
    """The ordinary model that the recipe names: fresh (seeded by `train.seed`) or pretrained.

    Raises:
        ValueError: a class that is not supported, or config values that the class does not take.
    """
    model_class: Any = model_class_named(recipe.model.type)
    known = set(model_class.config_class().to_dict()) | {"num_labels", "attn_implementation"}
    unknown = sorted(set(recipe.model.config) - known)
    if unknown:
        raise ValueError(f"model.config: {recipe.model.type} knows no {unknown}; it takes {sorted(known)}")
    config = rebuild_config(recipe.model.type, recipe.model.config)  # checks what pretrained models are given, too
    if recipe.model.pretrained is not None:
        return model_class.from_pretrained(recipe.model.pretrained, **recipe.model.config)  # type: ignore[no-any-return]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        return instantiate(recipe.model.type, config)


def build_model(recipe: Recipe) -> nn.Module:
    """The recipe's model, converted or wrapped as the end-to-end control, on the CPU."""
    original = build_original(recipe)
    if recipe.method == "end-to-end":
        return EndToEnd(original)
    return convert(original, recipe.blocks)


def check_data(model: nn.Module, data: ImageData) -> None:
    """Refuse images that the model does not take, before any GPU work."""
    config: Any = model.config if isinstance(model, DiffusionBlocks) else model.model.config  # type: ignore[union-attr]
    channels, height, width = data.image_shape
    if (config.num_channels, config.image_size, config.image_size) != (channels, height, width):
        raise ValueError(
            f"the model takes images of {config.num_channels}x{config.image_size}x{config.image_size}, the data has "
            f"{channels}x{height}x{width}; set model.config.image_size and num_channels"
        )
    if config.num_labels != data.num_classes:
        raise ValueError(
            f"the model has num_labels = {config.num_labels}, the data has {data.num_classes} classes; "
            f"--set model.config.num_labels={data.num_classes}"
        )


def make_trainer(
    recipe: Recipe,
    *,
    folder: Path | None,
    loggers: tuple[Logger, ...] = (),
    progress: bool = True,
    data: ImageData | None = None,
) -> Trainer:
    """Model, data and trainer of a recipe, checked and on the device."""
    device = device_of(recipe)
    data = data if data is not None else load_data(recipe, "train")
    model = build_model(recipe)
    check_data(model, data)
    batches = ImageBatches(
        data,
        mean=recipe.data.mean,
        std=recipe.data.std,
        augment=recipe.data.augment,
        device=device,
        placement=recipe.data.placement,
    )
    return Trainer(model.to(device), batches, recipe.train, folder=folder, loggers=loggers, progress=progress)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    loggers: tuple[Logger, ...] = (),
    resume: bool = True,
    progress: bool = True,
    data: ImageData | None = None,
    test_data: ImageData | None = None,
) -> RunResult:
    """Train a recipe, save the model (with averaged weights, where kept) to `folder`/model, and evaluate it.

    `data` and `test_data` are the recipe's images where the caller has loaded them already.
    """
    write_recipe(recipe, folder)
    trainer = make_trainer(recipe, folder=folder, loggers=loggers, progress=progress, data=data)
    trainer.train(resume=resume)
    with trainer.averaged() as model:
        save_model(model, folder / "model")
        started = time.perf_counter()
        accuracies = evaluate(recipe, model, test_data)
        evaluation_seconds = time.perf_counter() - started
    write_json(
        folder / "result.json",
        {
            "accuracies": [row.to_dict() for row in accuracies],
            "train_seconds": trainer.seconds,
            "evaluation_seconds": evaluation_seconds,
            "iterations": trainer.iteration,
        },
    )
    return RunResult(trainer.model, accuracies, trainer.seconds, trainer.iteration)


def evaluate(recipe: Recipe, model: nn.Module, data: ImageData | None = None) -> list[AccuracyRow]:
    """Test accuracy for every pair of steps and seeds of the recipe (one row for an end-to-end model)."""
    options = recipe.evaluate
    with _evaluation_precision(recipe, model):
        return accuracy_grid(
            model.eval(),
            _test_batches(recipe, model, data),
            steps=options.steps,
            seeds=options.seeds,
            bridge=options.bridge,
            grid=options.grid,
            seed=options.seed,
        )


def diagnose(recipe: Recipe, model: DiffusionBlocks, data: ImageData | None = None) -> list[LevelRow]:
    """Accuracy of every block on test images at levels of its own, beside what z gives away."""
    with _evaluation_precision(recipe, model):
        return accuracy_by_level(model, _test_batches(recipe, model, data), seed=recipe.evaluate.seed)


def _evaluation_precision(recipe: Recipe, model: nn.Module) -> torch.autocast:
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bfloat16")


def _test_batches(
    recipe: Recipe, model: nn.Module, data: ImageData | None
) -> Callable[[], Iterator[dict[str, torch.Tensor]]]:
    images = data if data is not None else load_data(recipe, "test")
    if recipe.evaluate.limit is not None:
        images = dataclasses.replace(
            images, images=images.images[: recipe.evaluate.limit], labels=images.labels[: recipe.evaluate.limit]
        )
    return lambda: evaluation_batches(
        images,
        mean=recipe.data.mean,
        std=recipe.data.std,
        batch_size=recipe.evaluate.batch_size,
        device=next(model.parameters()).device,
    )


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Leave the recipe, overrides applied, beside the run's results."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", recipe.model_dump(mode="json"))


def save_model(model: nn.Module, path: Path) -> None:
    """Save a converted model in our format, an end-to-end one in its own library's."""
    if isinstance(model, DiffusionBlocks):
        model.save_pretrained(path)
    elif isinstance(model, EndToEnd):
        model.model.save_pretrained(path)  # type: ignore[operator]


def load_model(recipe: Recipe, path: Path) -> nn.Module:
    """Load what `save_model` wrote, on the recipe's device.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a model of the other method.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no model at {path}; train first: diffusionblocks train RECIPE --out {path.parent}")
    is_blocks = (path / "diffusionblocks.json").is_file()
    if is_blocks != (recipe.method == "diffusionblocks"):
        found = "diffusionblocks" if is_blocks else "end-to-end"
        raise ValueError(f"{path} holds a model of method {found}, the recipe says method: {recipe.method}")
    if is_blocks:
        return load(path, device=device_of(recipe))
    class_name = read_json(path / "config.json").get("architectures", [recipe.model.type])[0]
    model: nn.Module = model_class_named(class_name).from_pretrained(path)  # type: ignore[attr-defined]
    return EndToEnd(model.to(device_of(recipe)))
