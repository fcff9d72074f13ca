"""Early stopping: the best weights are what is saved, each unit stops by itself, and a resumed run is the same."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import changed_recipe, fresh_causal, same_states
from torch import nn

from diffusionblocks import convert
from diffusionblocks.config import BlocksConfig
from diffusionblocks.data import TextBatches
from diffusionblocks.data.text_batches import evaluation_chunks
from diffusionblocks.evaluation.cross_entropy import plain_language_row
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parts import begin, finish, missing_parts, parts_of
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.experiments.run_status import read_status
from diffusionblocks.training import TrainConfig, Trainer

EVERY, PATIENCE, STEPS = 3, 2, 60

WORDS = ["noise", "block", "level", "token", "layer", "weight", "the", "a", "of", "is", "and", "learns", "denoises"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little to train on, so that it is soon learned by heart, and other sentences, half of them of other words."""
    folder, words = tmp_path_factory.mktemp("texts"), random.Random(0)
    for split, count in (("train", 40), ("valid", 200), ("test", 200)):
        known = [word if split == "train" or words.random() < 0.5 else word[::-1] for word in WORDS]
        (folder / f"{split}.txt").write_text(" ".join(words.choice(known) for _ in range(count)))
    return folder


def recipe(texts: Path, **changes: Any) -> Recipe:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = {"vocab_size": 27, "num_hidden_layers": 2, "max_position_embeddings": 16, "tie_word_embeddings": False}
    values: dict[str, Any] = {
        "name": "early",
        "model": {"type": "LlamaForCausalLM", "config": {**sizes, **config}},
        "blocks": {"num_blocks": 2, "target": {"kind": "next-token", "logit_scale": 8.0}},
        "data": {"kind": "text", "source": str(texts), "length": 16},
        "train": {
            "steps": STEPS,
            "batch_size": 4,
            "lr": 0.03,
            "lr_schedule": "constant",
            "early_stopping": {"every": EVERY, "patience": PATIENCE, "examples": 32},
            "log_every": 1,
        },
        "evaluate": {"limit": 4, "levels": 2, "samples": 2, "prompt_length": 4, "new_tokens": 4},
    }
    return changed_recipe(values, changes)


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def train(made: Recipe, folder: Path) -> Trainer:
    """As a run does, up to what is saved."""
    experiment = Experiment(made)
    runs.prepare(experiment, folder, measure=False)
    trainer = runs.train_blocks(experiment, folder, progress=False)
    runs.save_blocks(experiment, folder, trainer)
    return trainer


def saved(made: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    return states(Experiment(made).load(folder / "model"))


@pytest.fixture(scope="module")
def stopped(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    folder = tmp_path_factory.mktemp("stopped")
    return folder, train(recipe(texts), folder)


@pytest.mark.parametrize("average", [None, 0.5])
def test_what_is_saved_are_the_weights_of_the_lowest_loss(average: float | None, texts: Path, tmp_path: Path) -> None:
    """Those of a run that ends there; and its loss is the cross-entropy of the held-out text."""
    made = recipe(texts, method="end-to-end", train={"ema_decay": average})
    trainer = train(made, tmp_path / "early")
    assert trainer.stopping is not None
    (progress,) = trainer.stopping.progress
    assert 0 < progress.best_step < trainer.steps_taken == progress.best_step + EVERY * PATIENCE < STEPS
    plain = {"early_stopping": None, "steps": progress.best_step, "ema_decay": average}
    shorter = recipe(texts, method="end-to-end", train=plain)
    train(shorter, tmp_path / "shorter")
    ours = saved(made, tmp_path / "early")
    assert same_states(ours, saved(shorter, tmp_path / "shorter"))
    longer = recipe(texts, method="end-to-end", train=plain | {"steps": trainer.steps_taken})
    train(longer, tmp_path / "longer")
    assert not same_states(ours, saved(longer, tmp_path / "longer")), "the control: training did go on"
    experiment = Experiment(made)
    model, held_out = experiment.load(tmp_path / "early" / "model").eval(), experiment.data("valid").first(32)
    row = plain_language_row(
        model, lambda: evaluation_chunks(held_out.text, 16, batch_size=4, device=torch.device("cpu"))
    )
    assert row.cross_entropy == pytest.approx(progress.best_loss, rel=1e-6)


def test_measuring_changes_nothing(texts: Path, tmp_path: Path) -> None:
    plain = {"steps": 10, "ema_decay": 0.9}
    without = train(recipe(texts, train=plain | {"early_stopping": None}), tmp_path / "without")
    often = recipe(texts, train=plain | {"early_stopping": {"every": 1, "examples": 8}})
    measured = train(often, tmp_path / "often")
    assert measured.stopping is not None
    assert [progress.measurements for progress in measured.stopping.progress] == [10, 10]
    assert same_states(states(without.model), states(measured.model)), "outside of `averaged` they are the last ones"
    assert measured.steps_taken == 20


def test_each_block_stops_by_itself(texts: Path, stopped: tuple[Path, Trainer], tmp_path: Path) -> None:
    """No schedule, residency or job changes where it stops, or what it has learned by then."""
    folder, trainer = stopped
    assert trainer.stopping is not None
    taken = [trainer.sets[unit.name].steps for unit in trainer.units]
    assert len(set(taken)) == 2, "the control: they stop at different steps"
    assert trainer.steps_taken == sum(taken) < 2 * STEPS
    ours = saved(recipe(texts), folder)
    for number, changes in enumerate(
        [{"schedule": "sequential"}, {"schedule": "round-robin", "resident": "active", "steps_per_switch": 3}]
    ):
        other = recipe(texts, train=changes)
        trained = train(other, tmp_path / str(number))
        assert [trained.sets[unit.name].steps for unit in trained.units] == taken
        assert same_states(saved(other, tmp_path / str(number)), ours)
    experiment, apart = Experiment(recipe(texts)), tmp_path / "apart"
    fitted, cost = begin(experiment, apart, progress=False)
    for part in missing_parts(parts_of(fitted, apart)):
        part.train()
    finish(fitted, apart, cost, measure=False)
    assert same_states(saved(recipe(texts), apart), ours)
    assert [unit.state for unit in read_status(apart).units] == ["finished", "finished"]


@pytest.mark.parametrize("until", [5, 2 * STEPS - 1])
@pytest.mark.parametrize("resident", ["all", "active"])
def test_an_interrupted_run_goes_on_exactly(
    until: int, resident: str, texts: Path, stopped: tuple[Path, Trainer], tmp_path: Path
) -> None:
    folder, whole = stopped
    made = recipe(texts, train={"resident": resident})
    experiment = Experiment(made)
    trainer = runs.blocks_trainer(experiment, tmp_path, progress=False)
    trainer.train(until=until)
    trainer.save_checkpoint()
    resumed = train(made, tmp_path)
    assert same_states(saved(made, tmp_path), saved(recipe(texts), folder))
    assert resumed.stopping is not None
    assert whole.stopping is not None
    for ours, theirs in zip(resumed.stopping.progress, whole.stopping.progress, strict=True):
        assert {**vars(ours), "weights": 0} == {**vars(theirs), "weights": 0}


def test_a_run_tells_how_far_it_is(texts: Path, tmp_path: Path) -> None:
    result = runs.train(Experiment(recipe(texts)), tmp_path, progress=False)
    assert result.iterations < 2 * STEPS
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    last = {record["unit"]: record for record in records}
    for record in last.values():
        assert record["since_best"] == PATIENCE
        assert record["best_held_out_loss"] < record["held_out_loss"]
        assert record["best_step"] == record["step"] - EVERY * PATIENCE
    assert [unit.state for unit in read_status(tmp_path).units] == ["finished", "finished"]


def test_members_of_an_ensemble_stop_by_themselves(texts: Path, tmp_path: Path) -> None:
    trainer = train(recipe(texts, method="ensemble"), tmp_path)
    assert trainer.stopping is not None
    for unit, progress in zip(trainer.units, trainer.stopping.progress, strict=True):
        assert trainer.sets[unit.name].steps == progress.best_step + EVERY * PATIENCE


def test_a_limit_of_the_training_text(texts: Path) -> None:
    whole = Experiment(recipe(texts)).data("train").text
    little = Experiment(recipe(texts, data={"train_limit": 100})).data("train").text
    assert torch.equal(little.ids, whole.ids[:100])
    assert len(Experiment(recipe(texts, data={"train_limit": 100})).data("valid").text) > 100
    with pytest.raises(ValueError, match=r"data.train_limit = 10,000: the train split has \d+ characters"):
        Experiment(recipe(texts, data={"train_limit": 10_000})).data("train")


def test_refusals(texts: Path, tmp_path: Path) -> None:
    values = recipe(texts).model_dump(mode="json") | {"data": {"kind": "topics", "length": 16}}
    topics = Experiment(parse_recipe(values, "test"))
    with pytest.raises(ValueError, match=r"data.valid_split, and these data have none: .*early_stopping to null"):
        runs.prepare(topics, tmp_path)
    runs.prepare(Experiment(parse_recipe(values | {"train": {"steps": 2, "batch_size": 4}}, "test")), tmp_path)
    with pytest.raises(
        ValueError, match=r"joint blocks move what others move: set train.early_stopping to null, or bl"
    ):
        recipe(texts, blocks={"shared": "joint"})
    recipe(texts, blocks={"shared": "joint"}, train={"early_stopping": None})
    with pytest.raises(ValueError, match=r"asks no teacher: set train.early_stopping or train.distill to null"):
        TrainConfig.model_validate({"steps": 2, "early_stopping": {}, "distill": {"teacher": "folder"}})
    TrainConfig.model_validate({"steps": 2, "early_stopping": {}, "distill": None})
    blocks = {"num_blocks": 2, "shared": "joint", "target": {"kind": "next-token"}}
    model = convert(fresh_causal(layers=2, vocab_size=27), BlocksConfig.model_validate(blocks))
    batches = TextBatches(Experiment(recipe(texts)).data("train").text, 8, device=torch.device("cpu"))
    options: dict[str, Any] = {"steps": 2, "batch_size": 2}
    stopping = TrainConfig.model_validate(options | {"early_stopping": {}})
    with pytest.raises(ValueError, match=r"and block 0 moves or reads what others move: set train.early_stopping to"):
        Trainer(model, batches, stopping, held_out=list, progress=False)
    Trainer(model, batches, TrainConfig(**options), progress=False)
    with pytest.raises(ValueError, match="needs held-out data: give Trainer held_out"):
        Trainer(model, batches, stopping, progress=False)


def test_a_trunk_trains_to_its_end(texts: Path, tmp_path: Path) -> None:
    trunk = recipe(texts, trunk={"steps": 2}, train={"steps": 8, "early_stopping": {"every": 4}})
    assert runs.train(Experiment(trunk), tmp_path, progress=False, measure=False).iterations == 2 + 16
