"""Diffusion transformers by command line: bad input is refused before any work, with a message that helps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIGITS, LATENTS, TINY, TINY_VIT, VIT, sample, sets

from diffusionblocks.cli import main
from diffusionblocks.common.formats import read_json, write_json
from diffusionblocks.data.latent_data import LatentScale
from diffusionblocks.data.latent_shards import write_shards
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe


def refused(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") <= 3, "one error, without its whole input"
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "3", "11"], "labels must be in [0, 10] (10: the null class), got 3 to 11"),
        (["--labels", "-1"], "got -1"),
        (["--count", "0"], "count must be >= 1, got 0"),
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--guidance", "-1"], "guidance must be a finite number >= 0, got -1"),
        (["--guidance", "nan"], "guidance must be a finite number >= 0, got nan"),
        (["--guidance", "2", "--guidance-interval", "3", "1"], "0 <= low < high; got [3.0, 1.0]"),
        (["--guidance", "2", "--guidance-interval", "90", "99"], "guidance_interval = [90.0, 99.0] holds none of"),
        (
            ["--guidance", "1", "--guidance-interval", "1", "3"],
            "guidance_interval = [1.0, 3.0] says which levels are guided, and guidance = 1 guides none",
        ),
        (["--churn", "-1"], "churn must be a finite number >= 0, got -1"),
        (["--churn", "9", "--solver", "unipc"], "churn = 9 is for solvers of one step at a time, euler, heun, and not"),
        (sets(evaluate__churn="[9]", evaluate__solver="[unipc]"), "evaluate.churn = 9 is for solvers of one step"),
        (sets(evaluate__guidance_interval="[3, 1]"), "must be [low, high] with low < high, got [3.0, 1.0]"),
        (["--seed", "-1"], "whole number from 0 to 2^63 - 1, got -1"),
        (["--model", "nowhere"], "no model at nowhere; train first"),
        (sets(evaluate__solver="[rk4]"), "unknown solver 'rk4'; allowed: euler, heun, dpmpp-2m"),
        (sets(evaluate__solver="heun"), "evaluate.solver: Input should be a list, in brackets (got 'heun')"),
        (sets(evaluate__steps="[0]"), "evaluate.steps: Input should be greater than or equal to 1 (got 0)"),
        (sets(evaluate__guidance="[-1]"), "evaluate.guidance: Input should be greater than or equal to 0 (got -1)"),
        (sets(method="end-to-end"), "holds 3 blocks, the recipe says method: end-to-end, which is one block"),
        (sets(model__config__sample_size=16), "images (1, 8, 8), the recipe describes one of (1, 16, 16)"),
        (sets(model__type="DiTTransformer2DModel", model__config="{}"), "holds a DiT, the recipe describes a DiTTrans"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_sample_refuses(
    run: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample(run, Path("out"), *arguments) == 2
    refused(message, capsys)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("option", ["--solver", "--grid"])
def test_an_unknown_name_is_refused_with_the_known_ones(run: Path, option: str, capsys: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        sample(run, tmp_path / "out", option, "rk4")
    assert error.value.code == 2
    known = {"--solver": ("euler", "heun", "dpmpp-2m"), "--grid": ("karras", "equal-quantile")}[option]
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("'rk4'", *known))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            sets(model__config__num_classes=0),
            "evaluate.guidance = 1.25 needs a null class, but the model is unconditional",
        ),
        (
            sets(blocks__target__label_dropout=0),
            "the model was trained with label_dropout = 0; set evaluate.guidance to 1",
        ),
        (sets(evaluate__kind="accuracy"), "evaluate.kind must be samples for DiT, got accuracy"),
        (sets(evaluate="{kind: bits}"), "evaluate.kind must be samples for DiT, got bits"),
        (sets(trunk__steps="null", trunk__epochs=2), "trunk and train must both be given in steps, or both in epochs"),
        (sets(trunk__epochs=2), "trunk and train must both be given in steps, or both in epochs"),
        (sets(trunk="{}"), "trunk and train must both be given in steps, or both in epochs"),
        (sets(trunk__steps=0), "trunk.steps: Input should be greater than or equal to 1 (got 0)"),
        (sets(trunk__weights="best"), "trunk.weights: Input should be 'raw' or 'averaged' (got 'best')"),
        (sets(blocks__layers="[1, 1, 2]"), "add up to the model's 3 layers, not 4"),
        (sets(blocks__num_blocks=2), "3 layers, 2 blocks; set blocks.num_blocks to one of [1, 3]"),
        (sets(model__config__patch_size=3), "sample_size must be a multiple of patch_size, got 8 and 3"),
        (
            sets(model__config__num_classes=7),
            "num_classes = 7, the data has 10 classes; --set model.config.num_classes",
        ),
        (sets(blocks__target__kind="label"), "target"),
        (sets(blocks__shared="frozen"), "shared = frozen would freeze"),
        (sets(train__batch_size=5000), "one step needs batch_size x accumulation = 5000"),
        (sets(data__mean="[0.1, 0.2]"), "mean = [0.1, 0.2]: must be 1 finite numbers"),
        (
            sets(evaluate__guidance_interval="[90, 99]"),
            "evaluate.guidance_interval = [90.0, 99.0] holds none of the chain's levels",
        ),
        (sets(evaluate__samples=1), "evaluate.samples: Input should be greater than or equal to 2 (got 1)"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[1::2]),
)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_training_refuses(
    command: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, DIGITS, "--out", "out", "--quiet", *TINY, *arguments]) == 2
    refused(message, capsys)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            sets(evaluate__features="classifier"),
            "evaluate.features: classifier needs images; for latents use inception or efficientnet-lite0",
        ),
        (
            [],
            "or set DIFFUSIONBLOCKS_DATA to a folder that holds 'imagenet-latents'; make it with `diffusionblocks en",
        ),
        (sets(data__source="nowhere"), "nowhere: no such folder of latents"),
        (sets(model__type="ViTForImageClassification", evaluate="{}"), "data.kind: latents is for diffusion models"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value[1::2]),
)
def test_latents_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFUSIONBLOCKS_DATA", raising=False)
    small = sets(model__config__num_layers=3)  # else a small disk is what is told first
    assert main(["train", LATENTS, "--out", "out", "--quiet", *small, *arguments]) == 2
    refused(message, capsys)
    assert not list(tmp_path.iterdir())


def test_features_of_other_data_are_refused_before_training(
    features: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "features"
    other.mkdir()
    for path in features.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    write_json(other / "classifier.json", read_json(other / "classifier.json") | {"dataset": "letters"})
    with_features = sets(evaluate__features="classifier", evaluate__features_folder=other)
    for command in (
        ["train", DIGITS, "--out", str(tmp_path / "out"), "--quiet"],
        ["evaluate", DIGITS, "--model", str(run / "model"), "--json", str(tmp_path / "out")],
    ):
        assert main([*command, *TINY, *with_features]) == 2
        refused(
            "a classifier of letters (1, 8, 8), the data are digits (1, 8, 8); set evaluate.features_folder", capsys
        )
        assert not (tmp_path / "out").exists()


def test_missing_inception_is_noticed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    inception = sets(evaluate__features="inception")
    assert main(["train", DIGITS, "--out", str(tmp_path / "out"), "--quiet", *TINY, *inception]) == 2
    refused("pip install 'diffusionblocks[fid]'", capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_model_of_another_family_is_refused(
    method: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [*TINY_VIT, *sets(method=method, train__steps=1)]
    assert main(["train", VIT, "--out", str(tmp_path / "vit"), "--quiet", *small]) == 0
    capsys.readouterr()
    fix = "give the recipe that the model was trained with"
    for command in ("evaluate", "sample"):
        assert main([command, DIGITS, "--model", str(tmp_path / "vit" / "model"), *TINY]) == 2
        message = capsys.readouterr().err
        assert "holds a ViTForImageClassification, the recipe describes a DiT" in message
        assert fix in message
    assert main(["evaluate", VIT, "--model", str(run / "model"), *small]) == 2
    message = capsys.readouterr().err
    assert "holds a DiT, the recipe describes a ViTForImageClassification" in message
    assert fix in message
    assert main(["sample", VIT, "--model", str(run / "model"), *small]) == 2
    assert "sample is for diffusion models; ViTForImageClassification classifies images" in capsys.readouterr().err


def test_the_folder_of_the_run_is_no_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", DIGITS, "--model", str(run), "--out", str(tmp_path / "out"), *TINY]) == 2
    refused("holds no model; of a run, give the folder RUN/model", capsys)


def test_accuracy_by_level_is_for_classifiers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", DIGITS, "--model", str(run / "model"), "--by-level", *TINY]) == 2
    refused("--by-level is for classifiers; DiT generates images", capsys)


def test_inspect_refuses_latents_of_another_shape_as_train_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DIFFUSIONBLOCKS_DATA", raising=False)
    small = [
        *sets(data__source=tmp_path / "latents", model__config__hidden_size=16, model__config__num_attention_heads=2),
        *sets(model__config__num_classes=2, evaluate__features="null"),
    ]
    assert main(["inspect", LATENTS, *small]) == 0  # before there are any
    for split in ("train", "validation"):
        rows = [(torch.zeros(4, 4, 8, 8), torch.zeros(4, 4, 8, 8), torch.arange(4) % 2)]
        names = ["cat", "dog"]
        write_shards(
            tmp_path / "latents", split, rows, shard_rows=4, class_names=names, vae="x", scale=LatentScale(1.0)
        )
    capsys.readouterr()
    for command in (["inspect"], ["train", "--out", str(tmp_path / "out"), "--quiet"]):
        assert main([command[0], LATENTS, *command[1:], *small]) == 2
        refused("the model takes images of 4x32x32, the data has 4x8x8", capsys)
    assert main(["inspect", LATENTS, *small, *sets(model__config__sample_size=8)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "0"], "num_blocks: Input should be greater than or equal to 1 (got 0)"),
        (["--blocks", "3", "--overlap", "1"], "overlap: Input should be less than 1 (got 1.0)"),
        (["--blocks", "3", "--layers", "1", "2", "1"], "a block of 2 layers cannot be copied from a trunk of 1"),
        (["--blocks", "3", "--layers", "1", "1"], "layers = [1, 1] names 2 blocks, but num_blocks = 3"),
    ],
)
def test_branch_refuses(
    run: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["branch", str(run / "trunk" / "model"), *arguments, "--out", str(out)]) == 2
    refused(message, capsys)
    assert main(["branch", str(run / "model"), "--blocks", "3", "--out", str(out)]) == 2
    refused("a trunk has one block on all levels; this model has 3", capsys)
    assert main(["branch", str(tmp_path / "nowhere"), "--blocks", "3", "--out", str(out)]) == 2
    refused("is missing", capsys)
    assert not out.exists()


def test_a_class_that_reads_a_text_is_refused_before_work(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Digits have no prompts."""
    monkeypatch.chdir(tmp_path)
    config = "{sample_size: 8, in_channels: 1, out_channels: 1, num_layers: 3, num_attention_heads: 2}"
    changes = {"model__type": "SanaTransformer2DModel", "model__config": config, "blocks__noise": "{kind: flow}"}
    assert main(["train", DIGITS, *TINY, *sets(**changes), "--out", "run"]) == 2
    refused("model.type = SanaTransformer2DModel reads encoder_hidden_states, which the data do not have", capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("guidance", "told"), [("[1]", True), ("[1, 2]", False)])
def test_an_interval_without_guidance_is_told(guidance: str, told: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It is no error: recipes that have one mean what they meant."""
    given = {"evaluate__guidance": guidance, "evaluate__guidance_interval": "[0.1, 9]", "evaluate__features": "null"}
    experiment = Experiment(load_recipe(DIGITS, [*TINY, *sets(**given)][1::2]))
    experiment.task.check_settings(experiment, experiment.outline)
    line = "evaluate.guidance_interval does nothing, for evaluate.guidance is 1"
    assert (line in caplog.text) is told
