"""Ways to branch a trunk, beside each other at equal layer-updates: how many layers each block has, which blocks branch
first, and weights that are averaged after training.

    python benchmarks/branching.py --seeds 0 1 2 --out benchmarks/results/branching.json

The recipe's trunk and its blocks give the budget. A part of the training images is held out: by the loss on them shares
of averages are chosen, and rows are compared beside the distance of samples. Both are of averaged weights.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import diffusionblocks as db
from diffusionblocks.core.branching import trunk_name
from diffusionblocks.core.model import DiffusionBlocks
from diffusionblocks.core.soup import average_with_trunk, soup
from diffusionblocks.evaluation.sample_quality import measure_samples
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.recipe_changes import depth_of, trunk_recipe, with_depth, with_train
from diffusionblocks.experiments.tasks.image_features import image_measures
from diffusionblocks.experiments.tasks.image_generation import SamplesConfig
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table
from diffusionblocks.training import Trainer

#: what is tried of a share of other weights in a block
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)


class Study:
    """One seed: data with a part held out, measures, and rows as they come."""

    def __init__(self, recipe: Recipe, held_out: int, repeats: int) -> None:
        self.recipe, self.repeats = recipe, repeats
        assert isinstance(recipe.evaluate, SamplesConfig)
        self.options = recipe.evaluate
        assert recipe.trunk is not None
        assert recipe.trunk.steps is not None
        assert recipe.train.steps is not None
        self.trunk_steps, self.steps = recipe.trunk.steps, recipe.train.steps
        self.blocks, self.short = recipe.blocks.num_blocks, depth_of(recipe) // recipe.blocks.num_blocks
        whole = {split: recipe.data.load(split) for split in ("train", "test")}
        self.device = Experiment(recipe).device
        self.pixels = recipe.data.to_pixels(self.device)
        self.measures = image_measures(Experiment(recipe, whole), self.pixels)
        order = torch.randperm(len(whole["train"]), generator=torch.Generator().manual_seed(0))
        train: Any = whole["train"]
        parts = [
            dataclasses.replace(train, images=train.images[rows], labels=train.labels[rows])
            for rows in (order[held_out:], order[:held_out])
        ]
        self.splits = whole | {"train": parts[0]}
        batches = recipe.data.evaluation_batches(parts[1], batch_size=held_out, device=self.device)
        self.held_out = {name: value.repeat_interleave(repeats, 0) for name, value in next(iter(batches)).items()}
        self.rows: list[dict[str, Any]] = []

    def trunk(self, layers: int, steps: int) -> Trainer:
        """A trunk of some layers, at its start; it can be trained further and further."""
        blocks = self.recipe.blocks.model_copy(update={"num_blocks": 1})
        recipe = trunk_recipe(with_depth(self.recipe, layers).model_copy(update={"blocks": blocks}))
        return Experiment(with_train(recipe, steps=steps), self.splits).trainer(progress=False)

    def grow(
        self,
        parent: Trainer,
        sources: Sequence[int],
        steps: int,
        *,
        layers: Sequence[int] | None = None,
        boundaries: Sequence[float] | None = None,
        only: Sequence[int] | None = None,
    ) -> Trainer:
        """Train blocks that go on from those of a parent, with its optimizer state and a fresh average."""
        assert isinstance(parent.model, DiffusionBlocks)
        parents = {
            p: soup(parent.model, [float(p == b) for b in range(parent.model.partition.num_blocks)])
            for p in sorted(set(sources))
        }
        changes = {"layers": layers, "boundaries": boundaries, "overlap": self.recipe.blocks.overlap}
        model = db.branch(parents[sources[0]], len(sources), **changes)
        depth = parents[sources[0]].partition.num_layers
        for b, p in enumerate(sources):
            state, block = parents[p].block(0).state_dict(), model.block(b)
            block.load_state_dict({name: state[trunk_name(model, b, name, depth)] for name in block.state_dict()})
        config = self.recipe.blocks.model_copy(
            update={"num_blocks": len(sources), "layers": layers, "boundaries": boundaries}
        )
        recipe = with_depth(self.recipe, model.partition.num_layers).model_copy(
            update={"blocks": config, "trunk": None}
        )
        seed = parent.config.seed + 1
        trainer = Experiment(
            with_train(recipe, steps=steps, warmup_steps=0, seed=seed, blocks=only), self.splits
        ).trainer(progress=False, model=model)
        self._inherit(trainer, parent, sources, depth)
        trainer.train()
        return trainer

    def _inherit(self, trainer: Trainer, parent: Trainer, sources: Sequence[int], depth: int) -> None:
        assert isinstance(trainer.model, DiffusionBlocks)
        assert isinstance(parent.model, DiffusionBlocks)
        places = {p: (group, i) for group in parent.sets.values() for i, p in enumerate(group.parameters)}
        by_name = [
            {trunk_name(parent.model, p, name, depth): parameter for name, parameter in block.named_parameters()}
            for p, block in enumerate(parent.model.blocks)
        ]
        states = {
            parameter: places[by_name[sources[unit.index]][trunk_name(trainer.model, unit.index, name, depth)]]
            for unit in trainer.units
            for name, parameter in unit.module.named_parameters()
        }
        for group in trainer.sets.values():
            group.inherit(states, optimizer=True, average=False)

    def losses(self, model: DiffusionBlocks, blocks: Sequence[int] | None = None) -> list[float]:
        """The loss of blocks, default of all, on held-out images, at evenly spread quantiles, with the same noise."""
        result = []
        count = len(self.held_out["labels"])
        for b in range(model.partition.num_blocks) if blocks is None else blocks:
            low, high = model.noise.cdf(torch.tensor(model.partition.interval(b), dtype=torch.float64))
            # Every image at each of `repeats` places.
            places = (torch.arange(count) % self.repeats + 0.5) / self.repeats
            level = model.noise.icdf(low + (high - low) * places).float().to(self.device)
            generator = torch.Generator(self.device).manual_seed(b)
            with torch.no_grad():
                result.append(model.eval().loss(self.held_out, b, generator, level).double().mean().item())
        return result

    def row(self, name: str, model: DiffusionBlocks, **about: Any) -> dict[str, Any]:
        """Measure a model."""
        measured = measure_samples(
            model.eval(),
            self.options.settings[:1],
            samples=self.options.samples,
            batch_size=self.options.batch_size,
            pixels=self.pixels,
            measures=self.measures,
            seed=self.options.seed,
        )[0].to_dict()
        losses = self.losses(model)
        shares = [model.noise.share(model.partition.interval(b)) for b in range(model.partition.num_blocks)]
        loss = sum(loss * share for loss, share in zip(losses, shares, strict=True)) / sum(shares)
        row = {
            "name": name,
            "seed": self.recipe.train.seed,
            "layers": list(model.partition.layers),
            "held_out_loss": loss,
            "fd_train": measured["fd_train"],
            "fd_test": measured["fd_test"],
            "by_block": losses,
        } | about
        self.rows.append(row)
        print(format_table([{k: str(v) if isinstance(v, list) else v for k, v in row.items()}]), flush=True)
        return row


def averaged(trainer: Trainer) -> DiffusionBlocks:
    with trainer.averaged() as model:
        assert isinstance(model, DiffusionBlocks)
        return copy.deepcopy(model).eval()


def joined(parts: Sequence[tuple[DiffusionBlocks, Sequence[int]]]) -> DiffusionBlocks:
    """Blocks that were trained in several jobs, in one model."""
    model = copy.deepcopy(parts[0][0])
    for other, blocks in parts[1:]:
        for b in blocks:
            model.block(b).load_state_dict(other.block(b).state_dict())
    return model


def depths(study: Study, rows: set[str]) -> None:
    """Blocks of several sizes: the trunk has the layers of the largest, and is as much shorter."""
    k = study.short // 2
    shapes = [(3 * k, 2 * k, k), (k, 2 * k, 3 * k)] if study.blocks == 3 else []
    if not shapes or "layers" not in rows:
        return
    steps = study.trunk_steps * study.short // (3 * k)
    trunk = study.trunk(3 * k, steps)
    trunk.train()
    for layers in shapes:
        study.row("branched", averaged(study.grow(trunk, [0] * 3, study.steps, layers=layers)), trunk=steps)


def mixes(study: Study, model: DiffusionBlocks, trunk: DiffusionBlocks) -> None:
    """Averages after training, their shares chosen block by block by the held-out loss."""
    many = model.partition.num_blocks

    def chosen(candidates: Callable[[float, int], list[DiffusionBlocks]]) -> tuple[DiffusionBlocks, list[float]]:
        best, shares = copy.deepcopy(model), []
        for b in range(many):
            options = [(share, mixed) for share in SHARES for mixed in candidates(share, b)]
            tried = [(study.losses(mixed, [b])[0], share, mixed) for share, mixed in options]
            _, share, mixed = min(tried, key=lambda entry: entry[0])
            best.block(b).load_state_dict(mixed.block(b).state_dict())
            shares.append(share)
        return best, shares

    def with_trunk(share: float, b: int) -> list[DiffusionBlocks]:
        return [average_with_trunk(model, trunk, [share] * many)]

    def with_neighbours(share: float, b: int) -> list[DiffusionBlocks]:
        result = []
        for other in (b - 1, b + 1):
            if 0 <= other < many:
                neighbour = soup(model, [float(i == other) for i in range(many)])
                result.append(average_with_trunk(model, neighbour, [share] * many))
        return result

    for name, candidates in (("trunk", with_trunk), ("neighbour", with_neighbours)):
        best, shares = chosen(candidates)
        study.row(f"averaged with {name}", best, shares=shares)
    study.row("first block half trunk", average_with_trunk(model, trunk, [0.5, *[0.0] * (many - 1)]))


def schedules(study: Study, rows: set[str]) -> None:
    """All blocks at once, the ends first, and in between a model of three intervals of four."""
    total, steps, many = study.trunk_steps, study.steps, study.blocks
    early = total - total // 5  # where the first ones branch
    trunk = study.trunk(study.short, total + total // 5)
    trunk.train(until=early)
    if "tree" in rows:
        stage = (total - early) // 4
        quarter = steps * many // 4
        whole = db.branch(trunk.model, 4)  # type: ignore[arg-type]
        inner = whole.partition.boundaries[1:-1]
        halves = study.grow(trunk, [0, 0], 2 * stage, boundaries=[inner[1]])
        study.row("tree of 4", averaged(study.grow(halves, [0, 0, 1, 1], quarter)), trunk=early)
        threes = study.grow(trunk, [0, 0, 0], 4 * stage // 3, boundaries=[inner[0], inner[2]])
        study.row("ends first of 4", averaged(study.grow(threes, [0, 1, 1, 2], quarter)), trunk=early)
    if "ends" in rows:
        more = (total - early) // many
        everything = list(range(many))
        ends, middle = [0, many - 1], everything[1:-1]
        study.row("branched early", averaged(study.grow(trunk, [0] * many, steps + more)), trunk=early)
        # The ends branch and have as much more; the trunk goes on for the middle.
        first = study.grow(trunk, [0] * many, steps + more, only=ends)
        later = total - len(ends) * more
        trunk.train(until=later)
        second = study.grow(trunk, [0] * many, steps, only=middle)
        both = joined([(averaged(first), ends), (averaged(second), middle)])
        study.row("ends first", both, trunk=later)
    if trunk.iteration < total:
        trunk.train(until=total)
    if "tree" in rows:
        quarter = steps * many // 4
        study.row("branched into 4", averaged(study.grow(trunk, [0] * 4, quarter)), trunk=total)
    of_trunk = averaged(trunk)
    study.row("trunk", of_trunk)
    model = averaged(study.grow(trunk, [0] * many, steps))
    study.row("branched", model, trunk=total)
    if "mixes" in rows:
        mixes(study, model, of_trunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="dit/digits", help="with a trunk, in steps")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=v", help="changes of the recipe")
    parser.add_argument("--rows", nargs="+", default=["layers", "ends", "tree", "mixes"], help="beside plain branching")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--held-out", type=int, default=237, help="training images that no row trains on")
    parser.add_argument("--repeats", type=int, default=4, help="levels of each held-out image and block")
    parser.add_argument("--out", type=Path, default=Path("runs/branching.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        study = Study(
            load_recipe(options.recipe, [*options.set, f"train.seed={seed}"]), options.held_out, options.repeats
        )
        for part in (schedules, depths):
            part(study, set(options.rows))
        rows += study.rows
        write_results(options.out, rows)


if __name__ == "__main__":
    main()
