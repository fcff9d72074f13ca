"""What is checked before a run works: its machine, its disk, its data and its evaluation."""

from __future__ import annotations

from pathlib import Path

from ..common.files import check_space, check_writable, free_space
from ..common.machine import check_memory
from ..common.modules import bytes_of
from ..training import check_optimizer, units_of
from ..training.checkpoint import checkpoints
from ..training.distillation import check_teachers, model_folder
from .experiment import Experiment
from .identity import check_same_scale
from .recipe import Recipe
from .recipe_changes import fit_recipe, trunk_recipe


def check_machine(experiment: Experiment, folder: Path, *, units_at_once: int | None = None) -> None:
    """Refuse what this machine's memory or disk cannot hold: a lower bound, of weights and what is kept for each.

    Args:
        experiment: what to train.
        folder: of the run.
        units_at_once: how many units are in memory together; None: all, or one with `resident: active`.

    Raises:
        ValueError: not enough memory or disk, a folder that cannot be written into, or a model that cannot be built, or
            has no trunk or fit.
        ImportError: an optimizer whose package is not installed.
    """
    recipe = experiment.recipe
    check_writable(folder, "the run's folder")
    check_optimizer(recipe.train)
    if recipe.train.batch_size == 1 and experiment.family.batch_norm:
        raise ValueError(
            f"train.batch_size = 1: a {recipe.model.type} has batch norm, and one example has no variance; set "
            "train.batch_size to 2 or more"
        )
    if experiment.of_method_blocks:  # first: what blocks alone would take may not do for these
        if recipe.trunk is not None:
            trunk_recipe(recipe)
        if recipe.fit is not None:
            fit_recipe(recipe)
    device = experiment.device
    blocks, in_training = _blocks_of(experiment)
    there = 1 if recipe.train.resident == "active" and device.type == "cuda" else units_at_once or in_training
    advice = "set model.config or blocks to make it smaller"
    check_memory(experiment.outline, there / blocks, 2 + _state(recipe), device, advice)
    check_disk(experiment, folder, free=free_space(folder))


def check_disk(experiment: Experiment, folder: Path, *, free: int, num_examples: int | None = None) -> None:
    """Refuse a run whose model, checkpoints and snapshots the disk has no room for: a lower bound.

    Args:
        experiment: what to train.
        folder: of the run.
        free: bytes that are free there.
        num_examples: of the training data, which says how many steps `train.epochs` are; None: not known yet.

    Raises:
        ValueError: fewer bytes are free; with the settings that would fit.
    """
    recipe, train = experiment.recipe, experiment.recipe.train
    units, _ = units_of(experiment.outline, train.blocks)
    # What units hold in common is there once, however many of them are trained.
    tensors = [tensor for unit in units for tensor in unit.module.state_dict(keep_vars=True).values()]
    # What low-rank updates are of is fixed: it is in the model alone.
    in_checkpoint = tensors if recipe.blocks.lora is None else [tensor for tensor in tensors if tensor.requires_grad]
    model, weights = bytes_of(tensors), bytes_of(in_checkpoint)
    trainable = bytes_of(p for unit in units for p in unit.parameters)
    steps = train.steps if num_examples is None else train.unit_steps(num_examples)
    iterations = None if steps is None else steps * len(units)
    saves = train.checkpoint_every is not None or train.checkpoint_seconds is not None
    snapshots = 0 if train.snapshot_every is None or iterations is None else iterations // train.snapshot_every
    # What a run that began has written is not free any more.
    snapshots = max(0, snapshots - len(list(folder.glob("snapshots/iteration-*"))))
    present = len(checkpoints(folder / "checkpoints"))

    def need(keep: int, snapshots: int) -> int:
        new = keep + 1 if saves else 1  # one is written before an older one is removed
        new = max(1, min(new, iterations or new) - present)
        best = 1 if train.early_stopping is not None else 0
        return int(model * (1 + snapshots) + new * (weights + trainable * (best + _state(recipe))))

    fixes = ["make room", "name another folder with --out"]
    keep = train.keep_checkpoints
    for setting, enough in (
        ("--set train.keep_checkpoints=1", keep > 1 and need(1, snapshots) <= free),
        ("--set train.snapshot_every=null", snapshots > 0 and need(keep, 0) <= free),
    ):
        fixes += [setting] * enough
    check_space(folder, need(keep, snapshots), free, ", or ".join(fixes))


def check_with_data(experiment: Experiment, folder: Path) -> None:
    """Refuse before training what could only fail in it or after it: the one check of a run, once its data are read.

    Raises:
        ValueError: examples that the model does not take, an evaluation that cannot be done (`Task.check`), teachers
            that do not suit, or more snapshots than the disk holds.
        ImportError: a package that the evaluation needs is not installed.
    """
    data = experiment.data("train")
    experiment.task.check_examples(experiment, experiment.outline, data)
    experiment.task.check(experiment, experiment.outline)
    teaching = experiment.recipe.train.teaching
    if teaching is not None:
        check_teachers(teaching, experiment.family, experiment.config_of(experiment.outline))
        for name in teaching.teacher:
            check_same_scale(model_folder(name), experiment.recipe.data, f"train.distill.teacher = {name}")
    if experiment.recipe.train.snapshot_every is not None:  # only now it is known how many there will be
        check_disk(experiment, folder, free=free_space(folder), num_examples=len(data))


def _blocks_of(experiment: Experiment) -> tuple[int, int]:
    """How many blocks, or other units, the model has, and how many of them are trained."""
    units, _ = units_of(experiment.outline)
    blocks, selection = len(units), experiment.recipe.train.blocks
    return blocks, blocks if selection is None else len(selection)


def _state(recipe: Recipe) -> float:
    """What is kept for each weight beside it and its gradient: the optimizer's averages, and the weights' own."""
    averages = 0.5 if recipe.train.optimizer == "adamw-8bit" else 2
    return averages + (1 if recipe.train.keeps_average else 0)
