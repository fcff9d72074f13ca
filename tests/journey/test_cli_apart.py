"""Jobs that never talk: blocks trained by separate commands and merged are the blocks of one run, bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from commands import TINY_VIT, VIT, sets
from safetensors.torch import load_file

from diffusionblocks.cli import main
from diffusionblocks.training import Trainer

SMALL = [*TINY_VIT, *sets(train__steps=6, train__lr=1e-3, evaluate__limit=20)]


def killed_at(iteration: int, monkeypatch: pytest.MonkeyPatch, out: Path, **changes: object) -> None:
    """SIGTERM arrives in a step of a job, which saves and ends without a model."""
    step = Trainer.step

    def interrupted(run: Trainer, *args: int) -> None:
        if run.iteration == iteration - 1:
            signal.raise_signal(signal.SIGTERM)
        step(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train(out, **changes) == 128 + signal.SIGTERM
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert json.loads((checkpoint / "state.json").read_text())["iteration"] == iteration
    assert not (out / "model").exists()


def train(out: Path, **changes: object) -> int:
    return main(["train", VIT, "--out", str(out), "--quiet", *SMALL, *sets(**changes)])


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}/{n}": t for file in sorted(model.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.each_value
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("shared", ["replicated", "frozen"])
def test_merged_jobs_are_one_run(
    shared: str, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = {"blocks__shared": shared}
    assert train(tmp_path / "whole", **policy) == 0
    a = policy | {"train__blocks": [1]}
    b = policy | {"train__blocks": [0, 2], "train__resident": "active", "train__schedule": "sequential"}
    if killed:
        killed_at(4, monkeypatch, tmp_path / "a", **a)
        killed_at(8, monkeypatch, tmp_path / "b", **b)  # in its second block
    assert train(tmp_path / "a", **a) == 0
    assert "only block 1; join them with the others: diffusionblocks merge" in capsys.readouterr().out
    assert train(tmp_path / "b", **b) == 0
    assert not (tmp_path / "b" / "resident").exists()
    parts = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["merge", *parts, "--out", str(tmp_path / "merged")]) == 0
    merged = weights(tmp_path / "merged")
    whole = weights(tmp_path / "whole" / "model")
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    assert main(["evaluate", VIT, "--model", str(tmp_path / "merged"), *SMALL]) == 0


def test_compare_and_evaluate_want_all_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", VIT, "--out", str(tmp_path), "--set", "train.blocks=[0]"]) == 2
    assert "compare trains all blocks" in capsys.readouterr().err
    assert train(tmp_path / "part", train__blocks=[0]) == 0
    assert main(["evaluate", VIT, "--model", str(tmp_path / "part" / "model"), *SMALL]) == 2
    assert "merge" in capsys.readouterr().err
    assert train(tmp_path / "none", train__blocks=[7]) == 2
    assert "the model has blocks 0 to" in capsys.readouterr().err
