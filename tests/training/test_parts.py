"""Parts of a run: trained one by one they leave what one process leaves, whatever stopped them and whoever goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import few_digits, listing, vit_config, vit_recipe

from diffusionblocks.experiments import parallel, run
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parts import (
    PartsMissing,
    begin,
    check_parts,
    finish,
    has_parts,
    missing_parts,
    parts_of,
    train_in_parts,
)
from diffusionblocks.training import Interrupted, Trainer

CONFIG = vit_config(3)
STAGES = {"fit": {"steps": 2, "rounds": 2, "grid": 3, "examples": 16}, "trunk": {"steps": 2}}


def experiment(**changes: Any) -> Experiment:
    sections = {
        "blocks": {"num_blocks": 3},
        "train": {"steps": 3, "batch_size": 4, "ema_decay": 0.9},
        "evaluate": {"limit": 16, "seeds": [1]},
    }
    data = few_digits()
    return Experiment(vit_recipe(CONFIG, sections, changes), {"train": data, "test": data})


def without_time(result: Path) -> dict[str, Any]:
    values = json.loads(result.read_text())
    return {name: values[name] for name in ("rows", "iterations")}


def apart(of: Experiment, folder: Path, *, order: slice = slice(None)) -> None:
    """As several engines do: each part from an experiment of its own, in any order."""
    check_parts(of, folder)
    begin(of, folder, say=lambda _: None)
    for index in range(3)[order]:
        again = Experiment(of.recipe, of.splits)
        fitted, _ = begin(again, folder, say=lambda _: None)
        parts_of(fitted, folder)[index].train()


@pytest.mark.parametrize(
    "changes",
    [STAGES, {"blocks": {"shared": "frozen"}}, {"method": "ensemble"}],
    ids=["stages", "frozen", "ensemble"],
)
def test_parts_are_one_run(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = run.train(experiment(**changes), tmp_path / "whole", progress=False)
    folder = tmp_path / "parts"
    apart(experiment(**changes), folder, order=slice(None, None, -1))
    trained = listing(folder / "blocks")
    result = parallel.train(experiment(**changes), folder, progress=False)  # which only joins
    assert listing(folder / "blocks") == trained
    assert listing(folder / "model") == listing(tmp_path / "whole" / "model") != {}
    assert (result.rows, result.iterations) == (whole.rows, whole.iterations)
    assert without_time(folder / "result.json") == without_time(tmp_path / "whole" / "result.json")
    assert (folder / "recipe.json").read_bytes() == (tmp_path / "whole" / "recipe.json").read_bytes()


def test_a_part_goes_on_from_its_checkpoint_and_a_finished_one_is_let_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int]] = []
    step, stop = Trainer.step, {("block 1", 1)}

    def counted(trainer: Trainer, unit: int, following: int | None = None) -> None:
        name = trainer.units[unit].name
        now = name, trainer.sets[name].steps
        if now in stop:
            stop.clear()
            trainer._watch.signum = 15
        steps.append(now)
        step(trainer, unit, following)

    monkeypatch.setattr(Trainer, "step", counted)
    check_parts(experiment(), tmp_path)
    with pytest.raises(Interrupted, match=r"resume from .*blocks/block-01"):
        train_in_parts(experiment(), tmp_path, progress=False)
    assert [part.index for part in missing_parts(parts_of(experiment(), tmp_path))] == [1, 2]
    train_in_parts(experiment(), tmp_path, progress=False)
    assert steps == [(f"block {b}", s) for b in range(3) for s in range(3)]
    assert train_in_parts(experiment(), tmp_path, progress=False).iterations == 9
    assert len(steps) == 9


def test_a_checkpoint_that_was_cut_off_is_refused_with_the_fix(tmp_path: Path) -> None:
    part = parts_of(experiment(), tmp_path)[0]
    part.train()
    (part.folder / "result.json").unlink()
    (*_, newest) = sorted((part.folder / "checkpoints").iterdir())
    file = newest / "block-0.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"by its SHA-256 in state.json; remove .*{newest.name}, and the run goes on"):
        part.train()


@pytest.mark.parametrize("method", ["diffusionblocks", "ensemble"])
def test_a_part_that_diverges_stops_alone(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def spoiled(trainer: Trainer, unit: int, following: int | None = None) -> None:
        if trainer.units[unit].index == 1 and trainer.iteration == 1:
            with torch.no_grad():
                trainer.units[unit].own[0].fill_(float("nan"))
        step(trainer, unit, following)

    name = {"diffusionblocks": "block", "ensemble": "member"}[method]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", spoiled)
        with pytest.raises(PartsMissing, match=rf"{name} 1 is missing: {name} 1: loss or .*holds {name} 0, {name} 2"):
            train_in_parts(experiment(method=method), tmp_path, progress=False)
    index = {"diffusionblocks": "diffusionblocks.json", "ensemble": "ensemble.json"}[method]
    assert json.loads((tmp_path / "model" / index).read_text())[f"{name}s"] == [0, 2]
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(ValueError, match=r"1"):
        experiment(method=method).load(tmp_path / "model")
    assert train_in_parts(experiment(method=method), tmp_path, progress=False).iterations == 9  # it is tried again


def test_some_blocks_are_joined_without_an_evaluation(tmp_path: Path) -> None:
    some = experiment(train={"blocks": [0, 2]})
    result = train_in_parts(some, tmp_path, progress=False)
    assert (result.rows, result.iterations) == ([], 6)
    assert json.loads((tmp_path / "model" / "diffusionblocks.json").read_text())["blocks"] == [0, 2]


def test_what_cannot_train_apart_is_refused_with_the_fix() -> None:
    assert has_parts(experiment())
    assert not has_parts(experiment(method="end-to-end"))
    assert not has_parts(experiment(blocks={"num_blocks": 1, "shared": "joint"}))
    with pytest.raises(ValueError, match=r"shared = joint: .* set blocks.shared to replicated or frozen"):
        has_parts(experiment(blocks={"shared": "joint"}))
    with pytest.raises(ValueError, match=r"method: local trains its .* without torchrun"):
        has_parts(experiment(method="local"))


def test_a_run_goes_on_only_as_what_it_was(tmp_path: Path) -> None:
    run.train(experiment(), tmp_path / "whole", progress=False, measure=False)
    with pytest.raises(ValueError, match=r"all blocks in one process: .*--restart"):
        check_parts(experiment(), tmp_path / "whole")
    apart(experiment(), tmp_path / "parts", order=slice(0, 1))
    with pytest.raises(ValueError, match=r"blocks train apart, .*--restart"):
        run.train(experiment(), tmp_path / "parts", progress=False)
    with pytest.raises(ValueError, match=r"block-00/.*train.lr = 0.0005, this run has 0.001"):
        parallel.train(experiment(train={"lr": 0.001}), tmp_path / "parts", progress=False)
    with pytest.raises(PartsMissing, match=r"block 1 is missing: it was not trained; block 2 .*holds block 0$"):
        finish(experiment(), tmp_path / "parts", begin(experiment(), tmp_path / "parts")[1])
    parallel.train(experiment(), tmp_path / "parts", progress=False, resume=False, measure=False)
    assert not (tmp_path / "parts" / "blocks").exists()
