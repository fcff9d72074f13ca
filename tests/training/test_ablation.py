"""Ablations: rows by presets and lists of values, over seeds; finished ones are not trained again."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from diffusionblocks.cli import main
from diffusionblocks.experiments import ablation
from diffusionblocks.experiments.ablation import _mean, ablate, settings
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.recipe_changes import depth_of, trunk_recipe
from diffusionblocks.training import Trainer

DIGITS = Path(__file__).parents[2] / "recipes" / "vit" / "digits.yaml"
TINY = {
    "model.config.hidden_size": 16,
    "model.config.intermediate_size": 16,
    "train.batch_size": 16,
    "train.steps": 2,
    "train.warmup_steps": 0,
    "evaluate.steps": [1],
    "evaluate.seeds": [1],
    "evaluate.limit": 300,
}


def overrides(**changes: Any) -> list[str]:
    values = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={json.dumps(value)}" for name, value in values.items()]


def recipe(**changes: Any) -> Recipe:
    return load_recipe(DIGITS, overrides(**changes))


def test_presets_are_the_papers_rows() -> None:
    rows = settings(recipe(), presets=["partition"])
    assert len(rows) == 12
    assert {row.recipe.blocks.partition for row in rows} == {"uniform", "equi-probability", "log-uniform"}
    assert {row.recipe.blocks.layers for row in rows} == {(4, 4, 4), (3, 6, 3), (6, 4, 2), (2, 4, 6)}
    assert rows[1].key == "partition=uniform,num_blocks=3,layers=3-6-3"
    counts = settings(recipe(blocks__layers=[3, 6, 3]), presets=["block-count"])
    assert [(row.key, row.recipe.blocks.num_blocks, row.recipe.blocks.layers) for row in counts] == [
        (f"num_blocks={n}", n, None) for n in (1, 2, 3, 4, 6, 12)
    ]
    assert [row.recipe.blocks.overlap for row in settings(recipe(), presets=["overlap"])] == [0, 0.05, 0.1, 0.2]
    deep = settings(recipe(model__config__num_hidden_layers=24), presets=["partition"])
    assert deep[1].recipe.blocks.layers == (6, 12, 6)


def test_presets_give_each_row_of_a_trunk_twice_and_all_the_same_layer_updates() -> None:
    made = recipe(trunk={"epochs": 126}, train__steps=None, train__epochs=8)
    for preset, count in (("partition", 24), ("block-count", 12), ("overlap", 8)):
        rows = settings(made, presets=[preset])
        assert len(rows) == count
        for row in rows:
            of_blocks = 12 * row.recipe.train.epochs
            trunk = trunk_recipe(row.recipe) if row.recipe.trunk else None
            of_trunk = 0 if trunk is None else depth_of(trunk) * trunk.train.epochs
            assert of_blocks + of_trunk == 12 * 50
    twice = settings(made, presets=["partition"])[2:4]
    assert [row.key for row in twice] == [
        "partition=uniform,num_blocks=3,layers=3-6-3,trunk.epochs=84.0",
        "partition=uniform,num_blocks=3,layers=3-6-3,train.epochs=50.0",
    ]
    assert depth_of(trunk_recipe(twice[0].recipe)) == 6
    # From scratch there is no trunk to measure boundaries on.
    measured = recipe(trunk={"steps": 30}, train__steps=10, blocks__partition="loss")
    rows = settings(measured, presets=["overlap"])
    assert [row.recipe.blocks.partition for row in rows] == ["loss", "equi-probability"] * 4
    assert {row.recipe.train.steps for row in rows} == {10, 20}


def test_lists_of_values_combine_or_stand_alone() -> None:
    over = {"blocks.overlap": [0.05, 0.2], "blocks.noise.p_mean": [0.5, 1.0]}
    grid = [(row.key, row.recipe.blocks.overlap) for row in settings(recipe(), over)]
    assert grid == [
        ("overlap=0.05,p_mean=0.5", 0.05),
        ("overlap=0.05,p_mean=1.0", 0.05),
        ("overlap=0.2,p_mean=0.5", 0.2),
        ("overlap=0.2,p_mean=1.0", 0.2),
    ]
    # The recipe's own overlap and p_mean are the row of the recipe as it is.
    assert [row.key for row in settings(recipe(), over, one_at_a_time=True)] == ["recipe", "overlap=0.2", "p_mean=0.5"]
    sections = settings(recipe(), {"trunk": [None, {"steps": 2}]})
    assert [row.key for row in sections] == ["trunk=null", "trunk=steps-2"]


def test_fields_of_one_name_are_told_apart() -> None:
    rows = settings(recipe(), {"train.batch_size": [8], "evaluate.batch_size": [100]})
    assert rows[0].key == "train.batch_size=8,evaluate.batch_size=100"


def test_a_table_over_two_seeds_and_nothing_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model__config__num_hidden_layers": 2}
    experiment = Experiment(recipe(**small))
    rows = settings(experiment.recipe, {"blocks.num_blocks": [1, 2]})
    shown: list[str] = []
    ablate(experiment, tmp_path, rows, only=["num_blocks=2"], seeds=[0, 1], progress=False, show=shown.append)
    assert len(shown) == 2  # after each
    table = ablate(experiment, tmp_path, rows, seeds=[0, 1], progress=False, show=shown.append)

    values = json.loads((tmp_path / "table.json").read_text())
    assert [(row["key"], row["seed"], row["blocks"], row["iterations"]) for row in values["rows"]] == [
        ("num_blocks=1", 0, 1, 2),
        ("num_blocks=1", 1, 1, 2),
        ("num_blocks=2", 0, 2, 4),
        ("num_blocks=2", 1, 2, 4),
    ]
    assert values["rows"][2]["values"] == {"blocks.num_blocks": 2}
    for mean in values["means"]:
        accuracies = [row["test_accuracy"] for row in values["rows"] if row["key"] == mean["key"]]
        assert mean["test_accuracy"] == pytest.approx(statistics.fmean(accuracies))
        assert mean["spread"] == pytest.approx(statistics.stdev(accuracies))
    assert any(mean["spread"] > 0 for mean in values["means"])  # the seeds differ
    assert {"seeds", "train.seed", "spread"} <= set(table.splitlines()[0].split())
    assert f"{100 * values['means'][0]['test_accuracy']:.2f} +-" in table
    assert f"{100 * values['means'][0]['spread']:.2f} %" in table  # of accuracies in per cent
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    means, seeds = page[page.index("Means over the seeds") :].split("<h3>Each seed</h3>")
    for line in table.splitlines()[2:]:
        for cell in re.split(r"  +", line):
            assert f"<td>{cell.replace('+-', '±')}</td>" in means, "as it was printed"
    assert "<td>num_blocks=2, seed 1</td>" in seeds

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
        assert ablate(experiment, tmp_path, rows, seeds=[0, 1], progress=False, show=shown.append) == table
    # Another evaluation of the same run trains nothing, but measures.
    again = Experiment(recipe(**small, evaluate__limit=50))
    ablate(again, tmp_path, settings(again.recipe, {"blocks.num_blocks": [2]}), progress=False, show=shown.append)
    assert json.loads((tmp_path / "num_blocks=2" / "seed-0" / "row.json").read_text())["run"]["evaluate"]["limit"] == 50
    # A damaged result is named, with the way out.
    file = tmp_path / "num_blocks=1" / "seed-0" / "row.json"
    whole = file.read_text()
    file.write_text("{}")
    with pytest.raises(ValueError, match="holds no row of an ablation; remove it"):
        ablate(experiment, tmp_path, rows, progress=False)
    file.write_text(whole)
    # And another training is not taken for it.
    other = Experiment(recipe(**small, train__steps=3))
    with pytest.raises(ValueError, match=r"made with train\.steps = 2, this run has 3"):
        ablate(other, tmp_path, settings(other.recipe, {"blocks.num_blocks": [2]}), progress=False)


def test_bad_rows_are_refused_before_any_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        options = [part for text in overrides() for part in ("--set", text)]
        assert main(["ablate", str(DIGITS), "--out", str(tmp_path / "out"), "--quiet", *options, *arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "num_blocks=5" in (text := refused("--over", "blocks.num_blocks=2,5")) or "num_blocks = 5" in text
    assert "overlap=1.5" in refused("--over", "blocks.overlap=0,1.5")
    assert "nothing to vary" in refused()
    assert "unknown presets ['levels']; allowed: partition" in refused("--preset", "levels")
    assert "unknown rows ['overlap=0.3']" in refused("--preset", "overlap", "--rows", "overlap=0.3")
    assert "--over wants field.name=value,value, got overlap" in refused("--over", "overlap")
    assert "whole numbers from 0" in refused("--preset", "overlap", "--seeds", "a")
    assert "each once" in refused("--preset", "overlap", "--seeds", "1,1")
    assert "varied by the seeds" in refused("--over", "train.seed=0,1")
    assert "the seeds of an ablation would replace" in refused("--over", "train={steps: 2, seed: 3}")
    assert "would replace" in refused("--set", "rows={a: {train: {seed: 3}}}")
    assert "a row is measured whole" in refused("--over", "train.blocks=null,[0]")
    dit = ["--over", "model={type: DiT}", "--over", "evaluate={kind: samples}", "--over", "blocks.noise=null"]
    assert "the same measures" in refused(*dit)
    assert "is the file of the table" in refused("--set", "rows={table.json: {}}")
    assert "is given no values" in refused("--over", "blocks.overlap=")
    assert "do not divide by 12" in refused("--preset", "partition", "--set", "model.config.num_hidden_layers=6")


def test_the_command_prints_its_rows_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [part for text in overrides(train__steps=1) for part in ("--set", text)]
    command = ["ablate", str(DIGITS), "--out", str(tmp_path), "--quiet", *options, "--over", "train.lr=1e-3,2e-3"]
    assert main([*command, "--list"]) == 0
    assert capsys.readouterr().out.split() == ["lr=0.001", "lr=0.002"]
    assert not list(tmp_path.iterdir())
    assert main([*command, "--rows", "lr=0.002"]) == 0
    printed = capsys.readouterr().out
    assert "lr=0.002" in printed
    assert "lr=0.001" not in printed
    assert f"table: {tmp_path / 'table.json'}" in printed


@pytest.mark.parametrize(("command", "row"), [("ablate --over train.lr=1e-3", "lr=0.001/seed-0"), ("compare", "")])
def test_rows_start_anew(command: str, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [] if row else ["--rows", "diffusionblocks"]
    arguments = [*command.split(), *rows, "--out", str(tmp_path), "--quiet"]
    verb, rest = arguments[0], arguments[1:]

    def run(*more: str, **changes: Any) -> int:
        return main([verb, str(DIGITS), *rest, *(p for text in overrides(**changes) for p in ("--set", text)), *more])

    assert run("--restart", train__steps=1) == 0  # of nothing
    capsys.readouterr()
    assert run(train__steps=2) == 2
    assert "train.steps = 1, this run has 2" in (message := capsys.readouterr().err)
    assert "start anew with --restart" in message
    assert run("--restart", train__steps=2) == 0
    (result,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert result["iterations"] == 2 * result["blocks"]


def test_rows_that_another_process_finishes_meanwhile_are_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment(recipe(train__steps=1))
    rows = settings(experiment.recipe, {"train.lr": [1e-3, 2e-3]})
    write = ablation.write_results

    def late(*arguments: Any, **more: Any) -> None:
        """The other process trains its row after this one has read the rows, and before it writes its table."""
        monkeypatch.setattr(ablation, "write_results", write)
        ablate(experiment, tmp_path, rows, only=["lr=0.002"], progress=False, show=lambda _: None)
        write(*arguments, **more)

    monkeypatch.setattr(ablation, "write_results", late)
    ablate(experiment, tmp_path, rows, only=["lr=0.001"], progress=False, show=lambda _: None)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["key"] for row in table["rows"]] == ["lr=0.001", "lr=0.002"]
    assert table["finished"]


def test_the_rows_of_a_recipe_are_its_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NoProp's classifier as blocks, under its own training and under backpropagation: trained, saved, read back."""
    recipe = str(DIGITS.parents[1] / "noprop" / "cifar100.yaml")
    sizes = {"image_size": 8, "num_channels": 1, "num_labels": 10, "hidden_size": 8, "num_filters": 2}
    changes = {"data": {"kind": "digits"}, "evaluate.limit": 50, "evaluate.steps": [2], "evaluate.seeds": [2]}
    changes |= {f"model.config.{name}": value for name, value in sizes.items()}
    changes |= {"train.steps": 2, "train.batch_size": 8, "train.compile": False, "train.epochs": None}
    for row in ("noprop-dt", "backprop"):
        changes |= {f"rows.{row}.train.epochs": None, f"rows.{row}.model.config.num_layers": 4}
    options = [part for name, value in changes.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    assert main(["ablate", recipe, "--out", str(tmp_path), "--quiet", *options]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["key"], row["name"], row["layers"], row["iterations"], row["layer_updates"]) for row in rows] == [
        ("diffusionblocks", "diffusionblocks", 3, 6, 6),
        ("diffusionblocks-added", "diffusionblocks", 3, 6, 6),
        ("noprop-dt", "noprop", 4, 10, 8),  # four networks and the read-out
        ("backprop", "end-to-end", 4, 2, 8),
    ]
    assert rows[2]["values"]["train.lr"] == 1e-3
    assert rows[2]["parameters_trained"] < rows[3]["parameters_trained"] / 3
    capsys.readouterr()
    evaluate = ["evaluate", recipe, "--set", "method=noprop", *options]
    assert main([*evaluate, "--model", str(tmp_path / "noprop-dt" / "seed-0" / "model")]) == 0
    assert f"{rows[2]['test_accuracy']:.4g}" in capsys.readouterr().out


def test_a_training_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="method: noprop is the training of NoPropCNN alone"):
        recipe(method="noprop")


def test_a_mean_of_rows_is_of_all_of_them() -> None:
    assert _mean([{"a": 1.0, "b": "x"}, {"a": 2.0, "b": "x"}]) == {"a": 1.5, "b": "x"}
    assert _mean([{"a": 1.0}, {"a": None}]) == {"a": None}
