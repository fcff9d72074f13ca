"""Boundaries measured on a trunk: once, the same for whoever trains the blocks, and those of the saved model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_DIT, few_digits, listing, vit_config, vit_recipe

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.core.merging import merge
from diffusionblocks.experiments import run
from diffusionblocks.experiments.boundaries import BOUNDARIES, place_boundaries, read_boundaries
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parts import parts_of
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.noise import path_time

DIGITS = Path(__file__).parents[2] / "recipes" / "dit" / "digits.yaml"
TINY: dict[str, Any] = {
    **TINY_DIT,
    "trunk.steps": 3,
    "train.steps": 2,
    "monitor.levels": 8,
    "monitor.examples": 12,
    "evaluate.steps": "[1]",
    "evaluate.grid": "[equal-quantile]",
}


def recipe(**changes: Any) -> Recipe:
    values = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return load_recipe(DIGITS, [f"{name}={value}" for name, value in values.items()])


def silent(text: str) -> None:
    """Says nothing."""


def train(of: Experiment, folder: Path) -> db.DiffusionBlocks:
    return Experiment.blocks_of(run.train(of, folder, progress=False, measure=False).model)


@pytest.mark.parametrize("noise", ["{kind: edm}", "{kind: flow, shift: 2}"])
def test_each_monitor_gives_boundaries_of_its_own(noise: str, tmp_path: Path) -> None:
    first = tmp_path / "loss"
    run.train_before_blocks(Experiment(recipe(blocks__partition="loss", blocks__noise=noise)), first, progress=False)
    boundaries = {}
    for partition in ("loss", "acceleration", "energy"):
        folder = tmp_path / partition
        if folder != first:  # the trunk is the same: it need not train again
            shutil.copytree(first / "trunk", folder / "trunk")
            (folder / "trunk" / BOUNDARIES).unlink()
        experiment = Experiment(recipe(blocks__partition=partition, blocks__noise=noise))
        boundaries[partition] = place_boundaries(experiment, folder).recipe.blocks.boundaries
        result = read_boundaries(experiment, folder)
        assert result is not None
        assert result.between == boundaries[partition]
        assert result.boundaries == result.monitor.boundaries(
            3, db.FlowMatching() if "flow" in noise else db.EDM(), result.power
        )
        assert (folder / "trunk" / "boundaries.png").is_file()
    assert len(set(boundaries.values())) == 3
    assert all(levels is not None and len(levels) == 2 for levels in boundaries.values())


def test_a_shift_by_resolution_is_that_of_the_images_size(tmp_path: Path) -> None:
    by_resolution = "{kind: flow, base_shift: 0.5, max_shift: 2.0, base_image_seq_len: 4, max_image_seq_len: 64}"
    model = Experiment(recipe(blocks__noise=by_resolution)).outline
    tokens = model.target.tokens_of((1, 1, 8, 8))  # type: ignore[union-attr, operator]
    shift = Experiment.blocks_of(model).noise.for_tokens(tokens).shift  # type: ignore[attr-defined]
    assert shift > 1.5
    noises = {"by resolution": by_resolution, "static": f"{{kind: flow, shift: {shift}}}"}
    for name, noise in noises.items():
        experiment = Experiment(recipe(blocks__partition="loss", blocks__noise=noise))
        run.train_before_blocks(experiment, tmp_path / name, progress=False)
    for partition in ("loss", "acceleration", "energy"):
        measured = []
        for name, noise in noises.items():
            folder = tmp_path / name
            (folder / "trunk" / BOUNDARIES).unlink(missing_ok=True)  # of another partition, on the same trunk
            experiment = Experiment(recipe(blocks__partition=partition, blocks__noise=noise))
            place_boundaries(experiment, folder)
            measured.append(read_boundaries(experiment, folder))
        ours, static = measured
        assert ours is not None
        assert static is not None
        assert ours.between == pytest.approx(static.between, rel=1e-4)
        assert ours.levels == static.levels, "boundaries are of t"
        assert ours.times == pytest.approx(static.times, abs=1e-9)
        if partition != "loss":  # the shares of the path, so of t'
            assert ours.times[-2] == pytest.approx(path_time(db.FlowMatching(shift=shift), ours.levels[-2]), abs=1e-9)


def test_a_run_goes_on_and_its_jobs_train_on_the_same_boundaries(tmp_path: Path) -> None:
    of = recipe(blocks__partition="acceleration")
    whole = train(Experiment(of), tmp_path / "whole")
    result = read_boundaries(Experiment(of), tmp_path / "whole")
    assert result is not None
    assert whole.partition.boundaries == result.boundaries
    assert whole.blocks_config.boundaries == result.between
    assert db.load(tmp_path / "whole" / "model").partition == whole.partition
    noted = json.loads((tmp_path / "whole" / "recipe.json").read_text())
    assert noted["blocks"]["boundaries"] is None, "as it was started"
    # The trunk first; then blocks on machines that share nothing but its folder, by copies of it.
    run.train_before_blocks(Experiment(of), tmp_path / "begun", progress=False)
    measured = (tmp_path / "begun" / "trunk" / BOUNDARIES).read_bytes()
    assert measured == (tmp_path / "whole" / "trunk" / BOUNDARIES).read_bytes(), "keyed draws"
    for name, blocks in (("a", "[0]"), ("b", "[1, 2]")):
        shutil.copytree(tmp_path / "begun", tmp_path / name)
        train(Experiment(recipe(blocks__partition="acceleration", train__blocks=blocks)), tmp_path / name)
        assert (tmp_path / name / "trunk" / BOUNDARIES).read_bytes() == measured
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert db.load(tmp_path / "merged").partition == whole.partition
    weights = [
        {name: data for name, data in listing(folder).items() if name.endswith("safetensors")}
        for folder in (tmp_path / "whole" / "model", tmp_path / "merged")
    ]
    assert weights[0] == weights[1]
    # Parts of one folder, too, each from an experiment of its own.
    experiment, _, _ = run.train_fit_and_trunk(Experiment(of), tmp_path / "begun", say=silent, progress=False)
    assert [part.experiment.blocks.boundaries for part in parts_of(experiment, tmp_path / "begun")] == [
        whole.blocks_config.boundaries
    ] * 3
    # A run that has ended says what it was.
    assert main(["inspect", str(tmp_path / "whole"), "--figure", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").is_file()


def test_the_loss_of_a_classifier_is_measured(tmp_path: Path) -> None:
    sections = {
        "blocks": {"num_blocks": 3, "partition": "loss"},
        "trunk": {"steps": 2},
        "monitor": {"levels": 6, "examples": 16},
        "train": {"steps": 1, "batch_size": 4},
        "evaluate": {"limit": 16, "seeds": [1]},
    }
    data = few_digits()
    experiment = Experiment(vit_recipe(vit_config(3), sections, {}), {"train": data, "test": data})
    model = train(experiment, tmp_path)
    assert model.blocks_config.boundaries is not None
    assert model.partition.boundaries[1:-1] == model.blocks_config.boundaries


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blocks\.partition = energy is measured on a trunk, and there is none"):
        recipe(blocks__partition="energy", trunk="null")
    with pytest.raises(ValueError, match="partition = energy is measured on a trained network: give the boundaries"):
        Experiment(recipe()).derive(recipe()).build_empty()[0].partition.build(db.EDM(), 3, 3, strategy="energy")
    assert recipe(blocks__partition="energy", trunk="null", blocks__boundaries="[0.1, 1]").blocks.boundaries == (0.1, 1)
    experiment = Experiment(recipe(blocks__partition="energy"))
    with pytest.raises(ValueError, match="measures its boundaries first: give the one of place_boundaries"):
        run.blocks_trainer(experiment, tmp_path)
    assert experiment.blocks.partition == "equi-probability", "what is planned before the trunk has ended"
    (tmp_path / "trunk").mkdir()
    (tmp_path / "trunk" / BOUNDARIES).write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"boundaries.json.*; delete it, and it is measured again"):
        place_boundaries(experiment, tmp_path)


def test_boundaries_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    experiment = Experiment(recipe(blocks__partition="loss"))
    run.train_before_blocks(experiment, tmp_path, progress=False)
    other = Experiment(recipe(blocks__partition="loss", monitor__power=0.5))
    with pytest.raises(ValueError, match=r"has 3 blocks by loss with monitor = .*'power': None.* delete the file"):
        place_boundaries(other, tmp_path)
