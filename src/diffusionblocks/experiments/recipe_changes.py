"""Recipes that follow from a recipe: of other depth or length, of the noise fit, of the trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..families import family_named
from ..noise import NoiseProcess
from .original import model_config
from .recipe import FitConfig, Recipe, TrunkConfig


def depth_of(recipe: Recipe) -> int:
    """Number of layers of the recipe's model.

    Raises:
        ValueError: the recipe does not say.
    """
    family = family_named(recipe.model.type)
    if recipe.model.pretrained is not None:  # its folder says it, not the recipe
        return family.depth(model_config(recipe.model))
    part, fields = family.config_part, family.depth_fields
    sizes = recipe.model.config if part is None else recipe.model.config.get(part, {})
    for field in fields:
        if field not in sizes:
            where = field if part is None else f"{part}.{field}"
            raise ValueError(f"the recipe must give model.config.{where}, to make models of fewer layers")
    return sum(int(sizes[field]) for field in fields)


def numbers_of_blocks(recipe: Recipe) -> list[int]:
    """Into how many blocks of as many layers the recipe's model can be split, ascending.

    Experts are as many as the recipe says: each has all layers, so their number changes no memory.

    Raises:
        ValueError: the recipe does not say how many layers its model has.
    """
    if recipe.blocks.split == "experts":
        return [recipe.blocks.num_blocks]
    depth = 1 if family_named(recipe.model.type).depth_dependent_weights else depth_of(recipe)
    return [many for many in range(1, depth + 1) if depth % many == 0]


def layers_of_a_block(recipe: Recipe) -> int:
    """How many layers a block has on average: those of the baseline of equal memory, where all have as many.

    Of experts, all.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    depth, many = depth_of(recipe), recipe.blocks.num_blocks
    if recipe.blocks.split == "experts":
        return depth
    if depth % many:
        divisors = [n for n in range(1, depth + 1) if depth % n == 0]
        raise ValueError(
            f"a fit, a trunk, or a baseline of one block's layers, needs layers that divide: {depth} layers, {many} "
            f"blocks; set blocks.num_blocks to one of {divisors}"
        )
    return depth // many


def layers_of_all_blocks(recipe: Recipe) -> int:
    """How many layers the blocks have together: those of the model, and of experts as often as there are experts.

    Raises:
        ValueError: the recipe does not say how many layers its model has.
    """
    return depth_of(recipe) * (recipe.blocks.num_blocks if recipe.blocks.split == "experts" else 1)


def largest_block(recipe: Recipe) -> int:
    """How many layers the largest block has: those of a trunk, and of what takes the memory of training blocks.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    layers = recipe.blocks.layers
    return layers_of_a_block(recipe) if layers is None else max(layers)


def steps_of_the_trunk(recipe: Recipe) -> float:
    """How many steps of the trunk move as many layers as a step of every block."""
    layers = recipe.blocks.layers
    return recipe.blocks.num_blocks if layers is None else sum(layers) / max(layers)


def modules_of(recipe: Recipe) -> int:
    """How many modules local learning trains.

    Raises:
        ValueError: the recipe does not say how many layers its model has.
    """
    if recipe.local.by_layer:
        return depth_of(recipe)
    return recipe.blocks.num_blocks if recipe.local.modules is None else recipe.local.modules


def with_train(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with other values in its `train` section; they are not checked."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def with_depth(recipe: Recipe, layers: int) -> Recipe:
    """The recipe with another number of layers in its model.

    Raises:
        ValueError: the model is pretrained, and has another number.
    """
    if recipe.model.pretrained is not None:
        if (depth := depth_of(recipe)) != layers:
            raise ValueError(
                f"a trunk, a fit or a baseline of {layers} layers starts afresh, but {recipe.model.pretrained} has "
                f"{depth}: leave trunk and fit out, or train afresh, with all its sizes in model.config: --set "
                "model.pretrained=null"
            )
        return recipe
    config = family_named(recipe.model.type).with_depth(recipe.model.config, layers)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"config": config})})


def with_noise(recipe: Recipe, noise: NoiseProcess) -> Recipe:
    """The recipe on the levels of a process, which it does not fit again."""
    return recipe.model_copy(update={"blocks": recipe.blocks.model_copy(update={"noise": noise}), "fit": None})


def with_boundaries(recipe: Recipe, boundaries: Sequence[float]) -> Recipe:
    """The recipe on levels between the blocks that were measured."""
    blocks = recipe.blocks.model_copy(update={"boundaries": tuple(boundaries)})
    return recipe.model_copy(update={"blocks": blocks})


def after_branch(recipe: Recipe) -> Recipe:
    """The recipe of the blocks after the branch: they must not see the trunk's draws of data and noise again."""
    changes: dict[str, Any] = {"seed": recipe.train.seed + 1}
    if trunk_options(recipe).warmup == "none":
        changes |= {"warmup_steps": 0, "warmup_epochs": 0.0}
    return with_train(recipe, **changes)


def fit_options(recipe: Recipe) -> FitConfig:
    """The recipe's `fit` section, which it must have."""
    assert recipe.fit is not None
    return recipe.fit


def fit_recipe(recipe: Recipe) -> Recipe:
    """The recipe of what the levels are fitted to: one block of L/B layers on all levels, without averages.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    options = fit_options(recipe)
    length = {"steps": options.steps, "epochs": options.epochs}
    none = {"ema_decay": None, "ema_half_life": None, "snapshot_every": None, "sample_every": None}
    return _of_one_block(recipe, **length, **none).model_copy(update={"fit": None})


def trunk_options(recipe: Recipe) -> TrunkConfig:
    """The recipe's `trunk` section, which it must have."""
    assert recipe.trunk is not None
    return recipe.trunk


def trunk_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the trunk: one block on all levels, of L/B layers or of those of the largest block.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    options = trunk_options(recipe)
    length = {"steps": options.steps, "epochs": options.epochs, "lr_schedule": options.lr_schedule}
    rate = {} if options.lr is None else {"lr": options.lr}
    return _of_one_block(recipe, **length, **rate)


def _of_one_block(recipe: Recipe, **train: Any) -> Recipe:
    """The recipe of one block on all levels, with the layers of the largest, which starts from no trunk."""
    changes = {"trunk": None, "blocks": recipe.blocks.as_trunk()}
    shallow = with_depth(recipe, largest_block(recipe))
    return with_train(shallow, blocks=None, early_stopping=None, **train).model_copy(update=changes)


def _count(number: float | None, thing: str) -> str:
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {thing}{'s' * (number != 1)}"


def stages(recipe: Recipe) -> list[tuple[str, str, str]]:
    """The stages of a run that train, `fit`, `trunk` and `train`, each with what it trains and how long that is."""
    before = [("fit", "fit of the noise levels", recipe.fit), ("trunk", "trunk", recipe.trunk)]
    units = {
        "diffusionblocks": "each block",
        "ensemble": "each member",
        "local": "each module",
        "noprop": "each network",
    }
    unit = ("train", units.get(recipe.method, "the whole model"), recipe.train)
    return [
        (key, name, _count(stage.steps, "step") if stage.steps is not None else _count(stage.epochs, "epoch"))
        for key, name, stage in [*(before if recipe.method == "diffusionblocks" else []), unit]
        if stage is not None
    ]
