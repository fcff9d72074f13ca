"""A run's stages, called apart from Python: they leave what the whole run leaves, and none is passed over."""

from pathlib import Path

import pytest
from commands import TINY_VIT, VIT, sets

from diffusionblocks.common.digests import digest
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.experiments.run import (
    evaluate_saved,
    fit_noise,
    prepare,
    save_blocks,
    train,
    train_blocks,
    train_trunk,
)

FIT = {"steps": 2, "rounds": 2, "grid": 3, "examples": 16}


def experiment(**changes: object) -> Experiment:
    options = [
        *TINY_VIT,
        *sets(**{"train__steps": 2, "fit": FIT, "trunk": {"steps": 2}, "evaluate__limit": 32} | changes),
    ]
    return Experiment(load_recipe(VIT, options[1::2]))


def weights(run: Path) -> dict[str, str]:
    return {file.name: digest(file).sha256 for file in sorted((run / "model").glob("*.safetensors"))}


@pytest.mark.slow
def test_stages_leave_what_the_whole_run_leaves_and_may_be_called_again(tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    whole = train(experiment(), tmp_path / "whole", progress=False)
    for _ in range(2):  # the second time each reads back what it left
        started = experiment()
        prepare(started, apart)
        fitted, _ = fit_noise(started, apart, progress=False)
        trunk = train_trunk(fitted, apart, progress=False)
        trainer = train_blocks(fitted, apart, trunk, progress=False)
        save_blocks(fitted, apart, trainer)
        assert weights(apart) == weights(tmp_path / "whole") != {}
        assert evaluate_saved(fitted, apart)[1] == whole.rows


def test_a_stage_that_was_left_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fits its noise levels first: give the experiment of fit_noise"):
        train_trunk(experiment(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="fits its noise levels first: give the experiment of fit_noise"):
        train_blocks(experiment(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="branches its blocks from a trunk: give the one of train_trunk"):
        train_blocks(experiment(fit="null"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="trains no trunk"):
        train_trunk(experiment(fit="null", trunk="null"), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
