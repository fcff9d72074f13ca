"""The rows of a comparison: the blocks, and the baselines that every claim about them needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..common.formats import read_json
from ..training.local_learning import LocalConfig
from .experiment import Experiment
from .recipe import DEPTH_ON_HOST, Recipe
from .recipe_changes import (
    depth_of,
    largest_block,
    layers_of_a_block,
    layers_of_all_blocks,
    modules_of,
    steps_of_the_trunk,
    trunk_recipe,
    with_depth,
    with_train,
)
from .shipped_recipes import RECIPE
from .step_time import seconds_a_step


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: a recipe and what is particular about it.

    Attributes:
        key: names it, and its folder.
        recipe: what is trained.
        layers: of all blocks, members or modules together.
        blocks: how many of these there are.
    """

    key: str
    recipe: Recipe
    layers: int
    blocks: int

    @property
    def name(self) -> str:
        """The method: `end-to-end`, `ensemble`, `diffusionblocks`, or the objective of local learning."""
        return self.recipe.local.objective if self.recipe.method == "local" else self.recipe.method

    def layer_updates(self, iterations: int, examples: int) -> int:
        """Layers moved x steps.

        Args:
            iterations: of the whole run, its trunk and fit among them.
            examples: in the training data, which say how many steps an epoch of the trunk has.
        """
        units = self.blocks + (self.recipe.local.more_units if self.recipe.method == "local" else 0)
        a_step = self.layers / units
        updates = iterations * a_step
        if self.has_trunk:  # which has the layers of the largest block
            trunk = trunk_recipe(self.recipe)
            updates += trunk.train.unit_steps(examples) * (depth_of(trunk) - a_step)
        return round(updates)

    @property
    def has_trunk(self) -> bool:
        """Whether the blocks start from a trunk."""
        return self.recipe.trunk is not None and self.recipe.method == "diffusionblocks"

    @property
    def has_fit(self) -> bool:
        """Whether the levels are fitted first."""
        return self.recipe.fit is not None


def variants(recipe: Recipe) -> list[Variant]:
    """The rows that a recipe of method `diffusionblocks` is compared in; of a pretrained model none has fewer layers.

    Raises:
        ValueError: the recipe does not say how many layers its model has, or they do not divide.
    """
    if recipe.train.blocks is not None:
        raise ValueError(f"compare trains all blocks, not train.blocks = {list(recipe.train.blocks)}; leave it out")
    depth, many = depth_of(recipe), recipe.blocks.num_blocks
    short, together = layers_of_a_block(recipe), layers_of_all_blocks(recipe)
    field = length_field(recipe)
    fit = 0 if recipe.fit is None else getattr(recipe.fit, field)
    without_fit = _longer(recipe, fit / many, field).model_copy(update={"fit": None})
    ordinary = _without_stages(recipe, field)
    rows = [
        Variant(f"end-to-end-{depth}", _end_to_end(ordinary, depth, together // depth, field), depth, 1),
    ]
    if (
        many > 1 and recipe.model.pretrained is None and short < depth
    ):  # else one block is the whole model, or has its layers' weights
        # Of blocks of several sizes L/B layers take the time of one, the layers of the largest take the memory.
        for layers in dict.fromkeys((short, largest_block(recipe))):
            factor = depth // layers if depth % layers == 0 else depth / layers
            longer = _end_to_end(ordinary, layers, factor, field)
            rows.append(Variant(f"end-to-end-{layers}", _end_to_end(ordinary, layers, 1, field), layers, 1))
            rows.append(Variant(f"end-to-end-{layers}-x{factor:.3g}", longer, layers, 1))
        if recipe.task.plain_training:
            ensemble = ordinary.model_copy(update={"method": "ensemble"})
            rows.append(Variant(f"ensemble-{many}x{short}", ensemble, depth, many))
    rows.append(Variant("diffusionblocks", from_scratch(recipe), together, many))
    if recipe.trunk is not None:
        trunk_recipe(recipe)  # refuses what cannot be a trunk before anything is trained
        rows.append(Variant("diffusionblocks-branched", recipe, together, many))
    if recipe.fit is not None:
        rows.append(Variant(f"{rows[-1].key}-unfitted", without_fit, together, many))
    return rows


def from_scratch(recipe: Recipe) -> Recipe:
    """The recipe without its trunk, whose blocks have what each would have had, had they shared the trunk's updates."""
    field = length_field(recipe)
    trunk = 0 if recipe.trunk is None else getattr(recipe.trunk, field)
    longer = _longer(recipe, trunk / steps_of_the_trunk(recipe), field)
    return longer.model_copy(update={"trunk": None, "blocks": recipe.blocks.until_measured()})


def _without_stages(recipe: Recipe, field: str) -> Recipe:
    """The recipe of a baseline, whose units have the steps of a block and their share of trunk and fit."""
    stages = (0 if part is None else getattr(part, field) for part in (recipe.trunk, recipe.fit))
    longer = _longer(recipe, sum(stages) / steps_of_the_trunk(recipe), field)
    return longer.model_copy(update={"trunk": None, "fit": None})


def local_variants(recipe: Recipe) -> list[Variant]:
    """A row for each objective of local learning, of a classifier; each module has the steps of a block.

    Raises:
        ValueError: the recipe does not say how many layers its model has.
    """
    if recipe.task.target != "label":
        return []
    depth, recipe = depth_of(recipe), _without_stages(recipe, length_field(recipe))
    rows = []
    for objective in get_args(LocalConfig.model_fields["objective"].annotation):
        options = recipe.local.model_copy(update={"objective": objective})
        if options.by_layer:
            options = options.model_copy(update={"modules": None})
        local = with_train(recipe, resident="all", concurrent=False)  # a module runs those before it
        if options.more_units:  # a head that is for the encoder as it ended
            local = with_train(local, schedule="sequential")
        local = local.model_copy(update={"method": "local", "local": options})
        many = modules_of(local)
        key = f"{objective}-{many}x{depth // many}"
        rows.append(Variant(key, local, depth, many))
    return rows


def length_field(recipe: Recipe) -> str:
    """The field that says how long the recipe trains."""
    return "steps" if recipe.train.steps is not None else "epochs"


def _longer(recipe: Recipe, more: float, field: str) -> Recipe:
    length = getattr(recipe.train, field) + more
    update = {field: round(length) if field == "steps" else length}
    return with_train(recipe, **update)


def _end_to_end(recipe: Recipe, layers: int, factor: float, field: str) -> Recipe:
    shallow = with_depth(recipe, layers)
    length = getattr(recipe.train, field) * factor
    changes = {field: round(length) if field == "steps" else length}
    if recipe.model.type in DEPTH_ON_HOST:
        changes["cuda_graph"] = False
    return with_train(shallow, **changes).model_copy(update={"method": "end-to-end"})


def of_equal_time(experiment: Experiment, seconds: float, folder: Path) -> list[Variant]:
    """The end-to-end baselines with as many steps as they make in the time that the blocks took.

    Args:
        experiment: what is compared, of whose data a few steps of each baseline are timed.
        seconds: what training the blocks took, trunk and fit included.
        folder: of the comparison. A baseline whose run began there keeps its length.
    """
    plain = {row.layers: row for row in variants(experiment.recipe) if row.name == "end-to-end"}
    rows = []
    for row in plain.values():
        key = f"end-to-end-{row.layers}-same-time"
        begun = folder / key / RECIPE
        if begun.is_file():
            steps = int(read_json(begun)["train"]["steps"])
        else:
            steps = max(1, round(seconds / seconds_a_step(experiment.derive(row.recipe))))
        rows.append(dataclasses.replace(row, key=key, recipe=with_train(row.recipe, steps=steps, epochs=None)))
    return rows


def executed(recipe: Recipe, *, fast: bool) -> Recipe:
    """The same steps with torch.compile and CUDA graphs, or without either."""
    return with_train(recipe, compile=fast, cuda_graph=fast)
