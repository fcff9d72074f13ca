"""`diffusionblocks export`: one block of a run as a folder that its library loads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import DIGITS, TINY, TINY_VIT, VIT, sets
from transformers import AutoModelForImageClassification

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.models import DiT

QUICK = [*TINY_VIT, *sets(train__steps=4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "run"
    assert main(["train", VIT, "--out", str(folder), "--quiet", *QUICK]) == 0
    return folder


@pytest.fixture(scope="module")
def diffusion_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dit") / "run"
    assert main(["train", DIGITS, "--out", str(folder), "--quiet", *TINY]) == 0
    return folder


def export(run: Path, out: Path, *arguments: str) -> int:
    return main(["export", str(run), "--out", str(out), *arguments])


def test_a_classifiers_block_is_a_folder_of_its_library(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "out", "--block", "1") == 0
    said = capsys.readouterr().out
    assert "block 1 of 3 (layers 1 to 1, levels 1.617 to 4.534) as a DeiTForImageClassification, at level 4.534" in said
    assert "log p(label | image)" in said
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(4, 1, 8, 8)
    expected = db.load(run / "model").eval().export_block(1)
    with torch.no_grad():
        assert torch.equal(exported(images).logits, expected(images).logits)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_mean"] == [0.3]
    assert export(run, tmp_path / "out", "--block", "2", "--level", "0.5") == 0  # replaces it
    assert json.loads((tmp_path / "out" / "block.json").read_text())["level"] == 0.5


def test_a_diffusion_models_block_comes_with_its_coefficients(
    diffusion_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(diffusion_run, tmp_path / "out", "--block", "0") == 0
    said = capsys.readouterr().out.splitlines()
    assert "as a DiT: it is F of D = c_skip * z + c_out * F(c_in * z, c_noise, label)" in said[0]
    assert said[1].split() == ["level", "c_skip", "c_out", "c_in", "c_noise"]
    assert len(said) == 7
    assert DiT.from_pretrained(tmp_path / "out").config.num_layers == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--block", "3"], "block must be an integer from 0 to 2, got 3"),
        (["--block", "0", "--level", "0.1"], "level = 0.1: block 0 trains on ["),
        (["--block", "0", "--model", "nowhere"], "no model at nowhere"),
    ],
)
def test_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert export(run, tmp_path / "out", *arguments) in (2, 4)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_failed_is_told_to_go_on(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    assert export(failed, tmp_path / "out", "--block", "0") == 2
    said = capsys.readouterr().err
    assert f"no model at {failed / 'model'}: the run in {failed} has not come to its end" in said
    assert said.endswith(f"go on with it: diffusionblocks train {failed}\n")
    assert export(tmp_path / "nowhere", tmp_path / "out", "--block", "0") == 2
    assert f"no recipe and no run at {tmp_path / 'nowhere'}, and no recipe of that name" in capsys.readouterr().err


def test_places_that_must_not_be_replaced_are_refused_before_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, run, "--block", "0") == 2
    assert "would replace" in capsys.readouterr().err
    (tmp_path / "thesis.txt").write_text("mine")
    assert export(run, tmp_path, "--block", "0") == 2
    assert "thesis" in capsys.readouterr().err


def test_options_of_classifiers_are_refused_for_others(
    diffusion_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(diffusion_run, tmp_path / "out", "--block", "0", "--level", "5") == 2
    assert "is given noise level and z with each input; leave it out" in capsys.readouterr().err
    assert export(diffusion_run, tmp_path / "out", "--block", "0", "--approximate") == 2
    assert "--approximate is for classifiers; DiT generates images" in capsys.readouterr().err


def test_a_block_that_no_class_holds_is_made_on_request_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deit = sets(model__type="DeiTForImageClassification")
    assert main(["train", VIT, "--out", str(tmp_path / "run"), "--quiet", *QUICK, *deit]) == 0
    assert export(tmp_path / "run", tmp_path / "out", "--block", "1") == 2
    assert "it has an extra token of z; to leave that out" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"lacks an extra token of z: log-prob.* differ by up to .* of 359 images"):
        assert export(tmp_path / "run", tmp_path / "out", "--block", "1", "--approximate") == 0


def test_an_end_to_end_model_has_no_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [*QUICK, "--set", "method=end-to-end"]
    assert main(["train", VIT, "--out", str(tmp_path / "run"), "--quiet", *whole]) == 0
    assert export(tmp_path / "run", tmp_path / "out", "--block", "0") == 2
    assert "method end-to-end, which has no blocks to export" in capsys.readouterr().err
