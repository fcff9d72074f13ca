"""The command line as a user meets it: three jobs train a block or two each, and their folders become one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import DIGITS, TINY_VIT, VIT, sets
from helpers import listing

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.core.model_card import CARD
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe
from diffusionblocks.experiments.run import trained_differently, write_recipe

SMALL = [*TINY_VIT, *sets(train__steps=3)]


def overrides(arguments: list[str]) -> list[str]:
    return arguments[1::2]


def trained(folder: Path, blocks: list[int] | None = None) -> Path:
    """A run of the digits recipe that trains some of the blocks, and saves those."""
    chosen = [] if blocks is None else sets(train__blocks=blocks)
    recipe = load_recipe(VIT, overrides([*SMALL, *chosen]))
    experiment = Experiment(recipe)
    trainer = experiment.trainer(folder, progress=False)
    trainer.train()
    with trainer.averaged() as model:
        experiment.save(model, folder / "model")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs below one folder: `all`, and the jobs `first` and `second` that share its blocks."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "all")
    trained(folder / "first", [0, 2])
    trained(folder / "second", [1])
    return folder


def test_blocks_trained_by_jobs_apart_are_those_of_one_run(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "whole"
    assert main(["merge", str(runs / "first"), str(runs / "second"), "--out", str(out)]) == 0
    merged, whole = listing(out), listing(runs / "all" / "model")
    cards = [files.pop(CARD).decode() for files in (merged, whole)]
    assert ["## Recipe" in card for card in cards] == [False, True]  # each job had a recipe of its own
    assert ["1,438 images of 1x8x8" in card for card in cards] == [True, True]
    assert merged == whole
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["block", "layers", "taken", "from", "size", "passed", "over"]
    taken = [line.split()[:3] for line in printed[2:5]]
    first, second = (str(runs / name / "model") for name in ("first", "second"))
    assert taken == [["0", "0-0", first], ["1", "1-1", second], ["2", "2-2", first]]
    assert printed[5] == f"3 blocks in {out}"


def test_the_merged_model_is_evaluated_as_the_whole_one(runs: Path, tmp_path: Path) -> None:
    assert main(["merge", str(runs / "second"), str(runs / "first"), "--out", str(tmp_path / "merged")]) == 0
    rows = []
    for model in (tmp_path / "merged", runs / "all" / "model"):
        arguments = ["evaluate", VIT, "--model", str(model), "--json", str(tmp_path / "rows.json"), *SMALL]
        assert main(arguments) == 0
        rows.append(json.loads((tmp_path / "rows.json").read_text())["rows"])
    assert rows[0] == rows[1]
    rules = ("mean", "product", "probabilities", "chain")
    assert [(row["combine"], row["steps"]) for row in rows[0]] == [(rule, n) for rule in rules for n in (1, 3)]


def test_a_part_is_not_evaluated_as_a_model(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", VIT, "--model", str(runs / "first" / "model"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert "blocks [1] are missing" in error
    assert "diffusionblocks merge" in error


def test_whose_copy_wins(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(runs / name) for name in ("all", "second")]
    out = tmp_path / "out"
    assert main(["merge", *folders, "--out", str(out)]) == 2
    assert f"--prefer {runs / 'all' / 'model'}" in capsys.readouterr().err
    assert not out.exists()
    assert main(["merge", *folders, "--out", str(out), "--prefer", folders[1], "--prefer", folders[0]]) == 0
    row = capsys.readouterr().out.splitlines()[3].split()
    assert row[2] == str(runs / "second" / "model")
    assert row[-1] == str(runs / "all" / "model")


def test_jobs_that_trained_differently_are_merged_with_a_warning(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        shutil.copytree(runs / folder.name, folder)
    write_recipe(load_recipe(VIT, overrides([*SMALL, *sets(train__blocks=[0, 2])])), first)

    def warned(**changes: object) -> str:
        write_recipe(load_recipe(VIT, overrides([*SMALL, *sets(train__blocks=[1], **changes)])), second)
        assert main(["merge", str(first), str(second / "model"), "--out", str(tmp_path / "out")]) == 0
        return capsys.readouterr().err

    assert "warning" not in warned(train__resident="active", train__schedule="sequential", train__dwell=3)
    older = json.loads((second / "recipe.json").read_text())  # as an earlier version wrote it
    older["train"]["dwell"] = older["train"].pop("steps_per_switch")
    (second / "recipe.json").write_text(json.dumps(older))
    assert trained_differently([first, second]) == []
    expected = f"train.seed is 0 in {first / 'recipe.json'} and 9 in {second / 'recipe.json'}"
    assert f"warning: blocks were trained differently: {expected}" in warned(train__seed=9)


def test_what_cannot_be_merged_exits_with_2(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    first, second = (str(runs / name) for name in ("first", "second"))
    for arguments, message in (
        (["merge", first, "--out", out], "blocks [1] are in none of"),
        (["merge", first, str(tmp_path / "nowhere"), "--out", out], "nowhere holds no model"),
        (["merge", first, first, "--out", out], "given twice"),
        (["merge", first, second, "--out", second], "choose another folder"),
        (["merge", first, second, "--out", out, "--prefer", str(runs / "all")], "none of the folders to merge"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for arguments in (["merge", "--out", out], ["merge", first, second]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2


def test_a_merged_diffusion_model_draws_what_the_whole_one_does(tmp_path: Path) -> None:
    size = sets(
        device="cpu", model__config__hidden_size=16, model__config__num_attention_heads=2, evaluate__steps="[2]"
    )
    whole = Experiment(load_recipe(DIGITS, overrides(size))).build()
    assert isinstance(whole, db.DiffusionBlocks)
    with torch.no_grad():
        for parameter in whole.parameters():  # a fresh head is zero, and draws the noise it is given
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    whole.save_pretrained(tmp_path / "whole")
    folders = [tmp_path / str(b) for b in range(whole.partition.num_blocks)]
    for b, folder in enumerate(folders):
        whole.save_pretrained(folder, blocks=[b])
    assert main(["merge", *map(str, folders), "--out", str(tmp_path / "merged")]) == 0
    pictures = []
    for name in ("whole", "merged"):
        out = tmp_path / f"pictures of {name}"
        arguments = ["--model", str(tmp_path / name), "--out", str(out), "--count", "2", "--quiet", *size]
        assert main(["sample", DIGITS, *arguments]) == 0
        pictures.append({f.name: f.read_bytes() for f in out.rglob("*.png")})
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) >= 2
