"""Distillation: trained classifiers as teachers, whose logits go with every batch as one more entry.

A block stays whole: it reads `teacher_logits` as it reads `labels`, and does not know where they come from. Teachers
run where batches are made, inside the captured step, without a wait for the device. What they draw, noise of teachers
that denoise, follows from the step's generator, so a run resumes exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import recover
from ..common.formats import read_json
from ..common.messages import shorten
from ..core.end_to_end import load_end_to_end
from ..core.ensembles import read_ensemble
from ..core.loading import load
from ..core.model import DiffusionBlocks
from ..core.saved_model import ENSEMBLE, INDEX, LOCAL, MODEL_FILES, read_saved
from ..data.dataset import BatchMaker
from ..families import Family, family_named, rebuild_config
from ..targets import TEACHER_LOGITS
from .ensemble import Ensemble
from .step import arithmetic
from .train_config import DistillConfig
from .units import EndToEnd

#: What a teacher and its student must have in common: (number of labels, shape of the images).
_Shape = tuple[int, tuple[int, ...]]


class TaughtBatches:
    """Makes the batches of another maker, with the mean of the teachers' logits as the entry `teacher_logits`.

    Args:
        batches: makes batches with `pixel_values`.
        teachers: classifiers, `DiffusionBlocks` or baselines, on the device of the batches, in evaluation mode.
        precision: `float32` or `bfloat16`, in which they compute.
    """

    def __init__(self, batches: BatchMaker, teachers: Sequence[nn.Module], precision: str) -> None:
        self.batches = batches
        self.teachers = list(teachers)
        self.precision = precision
        self.num_examples = batches.num_examples

    def compile(self) -> None:
        """Compile the batches' own work, and the teachers layer by layer."""
        self.batches.compile()
        for teacher in self.teachers:
            for part in teacher.members if isinstance(teacher, Ensemble) else [teacher]:
                part.compile_layers() if isinstance(part, DiffusionBlocks) else part.compile()

    def __call__(self, indices: Tensor, generator: torch.Generator | None) -> Mapping[str, Tensor]:
        """Make the batch of the given examples: see `BatchMaker`."""
        batch = self.batches(indices, generator)
        images = batch["pixel_values"]
        with torch.no_grad(), arithmetic(images.device, self.precision):
            logits = torch.stack([_logits(teacher, images, generator).float() for teacher in self.teachers])
        return {**batch, TEACHER_LOGITS: logits.mean(dim=0)}


def _logits(teacher: nn.Module, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """A teacher's logits (batch, num_classes): of blocks the mean of their context logits."""
    if isinstance(teacher, DiffusionBlocks):
        return teacher.inference.context_logits(images, generator)  # type: ignore[attr-defined, no-any-return]
    return teacher(images)  # type: ignore[no-any-return]


def load_teachers(
    config: DistillConfig, student: nn.Module, model_config: object, device: torch.device
) -> list[nn.Module]:
    """The teachers of a configuration, on the device, in evaluation mode, without gradients.

    Args:
        config: names their folders.
        student: a unit's module, which has a `family`.
        model_config: of the original class.
        device: where they go.

    Raises:
        FileNotFoundError: there is no model at one of the folders, or a file of it is missing.
        ValueError: what is there cannot be read, or see `check_teachers`.
    """
    family: Any = student.family
    check_teachers(config, family, model_config)
    teachers = [_load(model_folder(name), device) for name in config.teacher]
    return [teacher.eval().requires_grad_(False) for teacher in teachers]


def _load(folder: Path, device: torch.device) -> nn.Module:
    if (folder / INDEX).is_file():
        return load(folder, device=device)
    if (folder / ENSEMBLE).is_file():
        return Ensemble.load(folder).to(device)
    return EndToEnd(load_end_to_end(_class_of(folder), folder)).to(device)


def check_teachers(config: DistillConfig, family: Family, model_config: object) -> None:
    """Refuse, by their configs alone, teachers that a classifier cannot be distilled from.

    Args:
        config: names their folders.
        family, model_config: of the classifier.

    Raises:
        FileNotFoundError: no model at one of the folders.
        ValueError: a model that is no classifier, of other labels or images, or blocks without context logits.
    """
    ours = _shape(family, model_config)
    for name in config.teacher:
        folder = model_folder(name)
        theirs = _shape_of_saved(folder)
        for what, one, other in zip(("labels", "images"), theirs, ours, strict=True):
            if one != other:
                raise ValueError(
                    f"train.distill.teacher = {name} is a model of {what} {one}, this recipe's model is one of "
                    f"{other}: name a teacher that was trained on the same data"
                )


def _shape(family: Family, config: object) -> _Shape:
    return family.num_classes(config), family.example_shape(config)


def _shape_of_saved(folder: Path) -> _Shape:
    """What a saved classifier takes and gives; ValueError where it is none that can teach."""
    if not (folder / INDEX).is_file():
        ensemble = read_ensemble(folder) if (folder / ENSEMBLE).is_file() else None
        member = folder if ensemble is None else ensemble.path_of(ensemble.members[0])
        name = _class_of(member)
        family = family_named(name)
        _require_classifier(folder, name, family)
        return _shape(family, rebuild_config(name, read_json(member / "config.json")))
    source = read_saved(folder)
    family = family_named(source.model_class)
    _require_classifier(folder, source.model_class, family)
    target = source.blocks_config.target
    if target is not None and not target.adds_likelihood:
        raise ValueError(
            f"train.distill.teacher = {folder} holds blocks of target.likelihood: learned, which have no context "
            "logits; name blocks trained with likelihood: added, or an end-to-end classifier"
        )
    return _shape(family, source.model_config)


def _require_classifier(folder: Path, name: str, family: Family) -> None:
    if family.target != "label":
        raise ValueError(f"train.distill.teacher = {folder} holds a {name}, which is no classifier; name another")


def model_folder(name: str) -> Path:
    """The saved model at a path, which may be the folder of a run."""
    for folder in (Path(name), Path(name) / "model"):
        recover(folder, MODEL_FILES)
        with contextlib.suppress(OSError):  # a name too long for the disk
            if any((folder / file).is_file() for file in (INDEX, ENSEMBLE, "config.json")):
                return folder
            if (folder / LOCAL).is_file():
                raise ValueError(
                    f"train.distill.teacher = {shorten(name, 160)} is of method: local, whose modules cannot teach; "
                    "name blocks, an ensemble or an end-to-end classifier"
                )
    name = shorten(name, 160)
    raise FileNotFoundError(
        f"train.distill.teacher = {name}: no model is there, nor in {Path(name) / 'model'}; give the folder of a "
        "trained model, or of its run"
    )


def _class_of(folder: Path) -> str:
    """The class of an unconverted model, as its library's config names it."""
    architectures = read_json(folder / "config.json").get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ValueError(f"{folder / 'config.json'} names no class (architectures); save the model again")
    return str(architectures[0])
