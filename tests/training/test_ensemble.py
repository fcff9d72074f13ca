"""Ensembles: members of one block's layers, trained apart or together, saved, merged, resumed and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import few_digits, same_states, vit_config, vit_recipe
from torch.nn import functional as F

from diffusionblocks.cli.commands import main
from diffusionblocks.core.ensembles import merge_ensembles
from diffusionblocks.core.saved_model import ENSEMBLE
from diffusionblocks.data import ImageData
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parallel import compare
from diffusionblocks.experiments.recipe import Recipe, load_recipe, parse_recipe
from diffusionblocks.experiments.tasks.next_token_text import write_continuations
from diffusionblocks.training import EndToEnd
from diffusionblocks.training.ensemble import Ensemble

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIG = vit_config(4, hidden_dropout_prob=0.2)


def recipe(**changes: Any) -> Recipe:
    sections = {
        "method": "ensemble",
        "blocks": {"num_blocks": 2},
        "data": {"kind": "digits", "augment": {"crop_padding": 1}},
        "train": {"steps": 3, "batch_size": 4, "ema_decay": 0.9},
        "evaluate": {"limit": 20, "steps": [1], "seeds": [1]},
    }
    return vit_recipe(CONFIG, sections, changes)


@pytest.fixture(scope="module")
def data() -> dict[str, ImageData]:
    few = few_digits()
    return {"train": few, "test": few}


def run(made: Recipe, folder: Path, data: dict[str, ImageData]) -> runs.RunResult:
    return runs.train(Experiment(made, data), folder, progress=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def together(data: dict[str, ImageData], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, runs.RunResult]:
    folder = tmp_path_factory.mktemp("together") / "run"
    return folder, run(recipe(), folder, data)


def states(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def test_an_ensemble_of_one_is_the_end_to_end_network(data: dict[str, ImageData], tmp_path: Path) -> None:
    one = {"blocks": {"num_blocks": 1}}
    ensemble = run(recipe(**one), tmp_path / "ensemble", data).model
    network = run(recipe(**one, method="end-to-end"), tmp_path / "network", data).model
    assert isinstance(ensemble, Ensemble)
    assert isinstance(network, EndToEnd)
    assert same_states(states(ensemble.member(0)), states(network))


def test_members_have_one_blocks_layers_and_start_and_train_differently(
    data: dict[str, ImageData], together: tuple[Path, runs.RunResult]
) -> None:
    fresh = Experiment(recipe(), data).build()
    for model in (fresh, together[1].model):
        assert isinstance(model, Ensemble)
        first, second = (model.member(index) for index in range(2))
        assert first.config.num_hidden_layers == 2
        assert not same_states(states(first), states(second))
    # The first member has the weights of the end-to-end network of as many layers.
    shallow = recipe(method="end-to-end", model={"config": CONFIG | {"num_hidden_layers": 2}})
    assert same_states(states(fresh.members[0]), states(Experiment(shallow, data).build()))  # type: ignore[union-attr]


def test_members_that_train_apart_are_those_that_train_together(
    data: dict[str, ImageData], together: tuple[Path, runs.RunResult], tmp_path: Path, capsys: Any
) -> None:
    for index in range(2):
        part = recipe(train={"blocks": [index], "schedule": "sequential", "resident": "active"})
        result = run(part, tmp_path / str(index), data)
        assert result.rows == []
        trained = result.model.members[index]  # type: ignore[union-attr]
        assert all(p.device.type == "cpu" for p in trained.parameters()), "the trained one, and no outline"
    experiment = Experiment(recipe(), data)
    with pytest.raises(ValueError, match=r"lacks members \[1\] of the ensemble: train them \(train.blocks: \[1\]\)"):
        experiment.load(tmp_path / "0" / "model")
    assert main(["merge", str(tmp_path / "1"), str(tmp_path / "0"), "--out", str(tmp_path / "whole")]) == 0
    assert "2 members in" in capsys.readouterr().out
    merged = experiment.load(tmp_path / "whole")
    assert same_states(states(merged), states(together[1].model))
    # A positive control: other seeds give other members.
    other = run(recipe(train={"seed": 1}), tmp_path / "other", data).model
    assert not same_states(states(other), states(together[1].model))


@pytest.mark.parametrize("schedule", ["round-robin", "sequential"])
@pytest.mark.parametrize("resident", ["all", "active"])
def test_no_schedule_or_residency_changes_members(
    schedule: str, resident: str, data: dict[str, ImageData], together: tuple[Path, runs.RunResult], tmp_path: Path
) -> None:
    changed = recipe(train={"schedule": schedule, "resident": resident})
    assert same_states(states(run(changed, tmp_path, data).model), states(together[1].model))


def test_an_interrupted_run_goes_on_exactly(
    data: dict[str, ImageData], together: tuple[Path, runs.RunResult], tmp_path: Path
) -> None:
    experiment = Experiment(recipe(), data)
    trainer = runs.blocks_trainer(experiment, tmp_path, progress=False)
    trainer.train(until=3)
    trainer.save_checkpoint()
    assert same_states(states(run(recipe(), tmp_path, data).model), states(together[1].model))


def test_answers_are_means_of_logits_and_of_probabilities(together: tuple[Path, runs.RunResult]) -> None:
    model = together[1].model
    assert isinstance(model, Ensemble)
    images = torch.randn(5, 1, 8, 8)
    model.eval()
    with torch.no_grad():
        logits = torch.stack([model.member(index)(images) for index in range(2)])
    mean, probabilities = (model.predict(images, combine=name) for name in ("mean", "probabilities"))
    torch.testing.assert_close(mean.probabilities, logits.mean(0).softmax(-1))
    torch.testing.assert_close(probabilities.probabilities, logits.softmax(-1).mean(0))
    torch.testing.assert_close(model.predict(images).logits, mean.logits)
    assert not torch.allclose(mean.probabilities, probabilities.probabilities, atol=1e-7)
    with pytest.raises(ValueError, match="combine = 'product'; allowed: mean, probabilities"):
        model.predict(images, combine="product")


def test_evaluation_reports_both(data: dict[str, ImageData], together: tuple[Path, runs.RunResult]) -> None:
    rows: Any = together[1].rows
    assert [row.combine for row in rows] == ["mean", "probabilities"]
    task = recipe().task
    assert task.headline(rows) is rows[0]
    saved = Experiment(recipe(), data).load(together[0] / "model")
    again: Any = task.measure(Experiment(recipe(), data), saved)
    assert again == rows


def test_evaluation_says_what_members_answer_alone(
    data: dict[str, ImageData], together: tuple[Path, runs.RunResult]
) -> None:
    folder, result = together
    ensemble = Ensemble.load(folder / "model")
    ensemble.member(1).model.classifier.bias.data[3] += 100.0  # it always says 3
    rows = recipe().task.measure(Experiment(recipe(), data), ensemble)  # type: ignore[arg-type]
    threes = float((data["test"].part(20).labels == 3).double().mean())
    assert [row.alone for row in rows] == [(result.rows[0].alone[0], threes)] * 2  # type: ignore[attr-defined]


def test_compare_has_the_row(data: dict[str, ImageData], tmp_path: Path) -> None:
    made = recipe(method="diffusionblocks", train={"ema_decay": None})
    rows = ["end-to-end-2", "ensemble-2x2", "diffusionblocks"]
    shown = compare(Experiment(made, data), tmp_path, rows=rows, progress=False)
    table = {row["key"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert list(table) == rows
    ensemble, short = table["ensemble-2x2"], table["end-to-end-2"]
    assert (ensemble["name"], ensemble["layers"], ensemble["blocks"]) == ("ensemble", 4, 2)
    assert ensemble["iterations"] == 6
    assert ensemble["layer_updates"] == table["diffusionblocks"]["layer_updates"] == 12
    assert ensemble["parameters_trained"] == short["parameters_trained"]
    assert ensemble["peak_memory_bytes"] == pytest.approx(short["peak_memory_bytes"], rel=0.01)
    assert "ensemble" in shown


# ---- refusals --------------------------------------------------------------------------------------------------


def test_what_cannot_be_an_ensemble_is_refused(data: dict[str, ImageData]) -> None:
    with pytest.raises(ValueError, match=r"train.blocks = \[2\]: the ensemble has members 0 to 1"):
        Experiment(recipe(train={"blocks": [2]}), data).build()
    with pytest.raises(ValueError, match="4 layers, 3 blocks"):
        Experiment(recipe(blocks={"num_blocks": 3}), data).build()
    values = {"name": "text", "method": "ensemble", "train": {"steps": 1}, "data": {"kind": "topics", "length": 8}}
    for model_class in ("MaskedTransformer", "RecurrentDepth"):
        with pytest.raises(ValueError, match=r"method: ensemble is for models of several .*: use method: end-to-end"):
            parse_recipe({**values, "model": {"type": model_class, "config": {}}}, "test")


def test_language_models_answer_together(tmp_path: Path) -> None:
    changes = ["method=ensemble", "train.steps=2", "model.config.hidden_size=16", "blocks.num_blocks=2", "device=cpu"]
    changes += ["model.config.num_hidden_layers=2", "evaluate.limit=4", "train.warmup_steps=0"]
    experiment = Experiment(load_recipe(RECIPES / "text" / "autoregressive_topics.yaml", changes))
    result = runs.train(experiment, tmp_path, progress=False)
    model = result.model
    assert isinstance(model, Ensemble)
    some = experiment.data("test").first(4)
    (batch,) = experiment.recipe.data.evaluation_batches(some, batch_size=4, device=torch.device("cpu"))
    tokens = batch["input_ids"]
    with torch.no_grad():
        logs = torch.stack([model.member(index)(tokens).log_softmax(-1) for index in range(2)])
    expected = {"mean": logs.mean(0).log_softmax(-1), "probabilities": logs.exp().mean(0).log()}
    rows: Any = result.rows
    assert [row.combine for row in rows] == ["mean", "probabilities"]
    for row in rows:
        nll = F.cross_entropy(expected[row.combine][:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert row.cross_entropies.cross_entropy == pytest.approx(nll.item(), rel=1e-5)
    with pytest.raises(ValueError, match="an ensemble of 2 networks writes no texts"):
        write_continuations(experiment, model, tmp_path / "samples")


def test_another_methods_model_is_refused(data: dict[str, ImageData], together: tuple[Path, runs.RunResult]) -> None:
    with pytest.raises(ValueError, match="holds a model of method ensemble, the recipe says method: end-to-end"):
        Experiment(recipe(method="end-to-end"), data).load(together[0] / "model")


def test_merging_refuses_what_is_no_one_ensemble(
    data: dict[str, ImageData], together: tuple[Path, runs.RunResult], tmp_path: Path
) -> None:
    whole = together[0]
    run(recipe(train={"blocks": [0], "lr": 1e-4}), tmp_path / "other", data)
    run(recipe(train={"blocks": [0]}), tmp_path / "same", data)
    with pytest.raises(ValueError, match=r"trained.train.lr is 0.0005 in the first and 0.0001 in the second"):
        merge_ensembles([whole, tmp_path / "other"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"member 0 is in .* say whose copy to take: --prefer"):
        merge_ensembles([whole, tmp_path / "same"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"members \[1\] are in none of"):
        merge_ensembles(tmp_path / "same", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    origins = merge_ensembles([whole, tmp_path / "same"], tmp_path / "out", prefer=tmp_path / "same")
    assert [origin.folder.parent.name for origin in origins] == ["same", "run"]
    assert same_states(states(Experiment(recipe(), data).load(tmp_path / "out")), states(together[1].model))


def test_a_damaged_index_is_refused(
    data: dict[str, ImageData], together: tuple[Path, runs.RunResult], tmp_path: Path
) -> None:
    merge_ensembles(together[0], tmp_path / "copy")
    index = tmp_path / "copy" / ENSEMBLE
    index.write_text(index.read_text().replace('"num_members": 2', '"num_members": 3'))
    with pytest.raises(ValueError, match="was changed or damaged after it was saved"):
        Experiment(recipe(), data).load(tmp_path / "copy")
