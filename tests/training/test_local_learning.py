"""Local learning: what a module's loss is, whom it trains, and that it saves, resumes and is measured like others."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import few_digits, image_batch, same_states, tiny, vit_config, vit_recipe
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from diffusionblocks.common.modules import bytes_of
from diffusionblocks.core.local_modules import read_modules
from diffusionblocks.data import ImageData
from diffusionblocks.evaluation.memory import step_memory
from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.parallel import compare
from diffusionblocks.experiments.recipe import Recipe
from diffusionblocks.training import EndToEnd, TrainConfig, Trainer
from diffusionblocks.training.compilation import Compiler
from diffusionblocks.training.local_learning import (
    LocalConfig,
    LocalLearning,
    LocalModule,
    TransportModule,
    contrastive_losses,
)

OBJECTIVES = ("greedy", "trgl", "mono-forward", "forward-forward")
CONFIG = vit_config(4, hidden_dropout_prob=0.2)


def recipe(**changes: Any) -> Recipe:
    sections = {
        "method": "local",
        "blocks": {"num_blocks": 2},
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


def local(objective: str = "greedy", family: str = "vit", layers: int = 4, **options: Any) -> LocalLearning:
    config = LocalConfig.model_construct(objective=objective, **options)  # infinite tau, too
    return LocalLearning(tiny(family, layers=layers), config, layers if config.by_layer else 2)


class Batches:
    """Batches of random images, keyed by the indices."""

    num_examples = 16

    def __call__(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        whole = image_batch(self.num_examples)
        return {name: tensor[indices] for name, tensor in whole.items()}

    def compile(self) -> None:
        raise NotImplementedError


def trained(model: Any, **options: Any) -> Trainer:
    config = TrainConfig(**({"steps": 3, "batch_size": 4, "lr": 1e-2} | options))
    trainer = Trainer(model, Batches(), config, progress=False)  # type: ignore[arg-type]
    trainer.train()
    return trainer


# ---- losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_the_parts_are_the_whole_network(family: str) -> None:
    model, whole = local(family=family), tiny(family, layers=4)
    images = image_batch()["pixel_values"]
    model.eval()
    expected = whole(pixel_values=images).logits
    for logits in (model(images), model.part(1)(images), model.predict(images).logits.exp().log()):
        torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2-registers", "ijepa"])
def test_a_head_that_reads_the_mean_token_reads_it_in_every_place(family: str) -> None:
    """Registers, which a head passes over, are more than the two tokens that [CLS] and one patch would be."""
    part = local("mono-forward", family).eval().part(1)
    images = image_batch()["pixel_values"]
    mean = part.advance(part.features(images))[-1].mean(dim=1)
    classifier = part.network.get_submodule("classifier")
    assert isinstance(classifier, torch.nn.Linear)
    copies = classifier.in_features // mean.shape[1]  # DINOv2 reads [CLS] and the mean of the patches
    torch.testing.assert_close(part(images), classifier(mean.repeat(1, copies)))


def test_the_first_module_is_an_end_to_end_network_of_its_layers() -> None:
    model = local()
    short = tiny(layers=2)
    part = model.part(0)
    short.load_state_dict({n.removeprefix("network."): t.clone() for n, t in part.state_dict().items()})
    trained(model)
    end_to_end = EndToEnd(short)
    trained(end_to_end)
    weights = {n.removeprefix("network."): t for n, t in part.state_dict().items()}
    assert same_states(weights, short.state_dict())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_gradient_reaches_the_modules_before(objective: str) -> None:
    model = local(objective)
    units = model.units()
    for unit in units:
        model.zero_grad()
        unit.module.loss(image_batch(8)).mean().backward()  # type: ignore[operator]
        own = {id(p) for p in unit.own}
        with_gradient = {id(p) for p in model.parameters() if p.grad is not None}
        assert with_gradient == own
    every = [id(p) for unit in units for p in unit.own]
    assert len(every) == len(set(every))  # nothing is moved twice
    assert set(every) == {id(p) for p in model.parameters()}  # and all of it by someone


def test_without_the_detachment_a_gradient_would_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = local()
    monkeypatch.setattr(torch, "no_grad", torch.enable_grad)
    model.part(1).loss(image_batch()).mean().backward()
    assert any(p.grad is not None for p in model.part(0).parameters())


def test_trgl_of_infinite_tau_is_greedy() -> None:
    greedy, free, bound = local(), local("trgl", tau=math.inf), local("trgl", tau=0.1)
    for model in (greedy, free, bound):
        trained(model)
    assert same_states(dict(greedy.state_dict()), dict(free.state_dict()))
    assert not same_states(dict(greedy.state_dict()), dict(bound.state_dict()))


def test_trgl_adds_the_kinetic_energy() -> None:
    model, batch = local("trgl", tau=0.5, double_tau=True), image_batch()
    part = model.part(1)
    assert isinstance(part, TransportModule)
    assert [model.part(0).tau, part.tau] == [0.5, 1.0]
    model.eval()
    states = part.advance(part.features(batch["pixel_values"]))
    energy = sum(((b - a) ** 2).sum(-1).mean(-1) for a, b in itertools.pairwise(states))
    torch.testing.assert_close(part.loss(batch) - LocalModule.losses(part, states, batch), energy / 2.0)


def test_the_contrastive_loss_in_closed_form() -> None:
    # Two samples of each of two classes, their directions equal within a class and orthogonal between classes.
    features = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 5.0]])
    labels = torch.tensor([0, 0, 1, 1])
    expected = math.log(math.exp(1 / 0.5) + 2) - 1 / 0.5
    torch.testing.assert_close(contrastive_losses(features, labels, 0.5), torch.full((4,), expected))
    # Alone of its class: no loss. Three alike: log 2 each, whatever the direction.
    losses = contrastive_losses(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]]), torch.tensor([0, 0, 0, 1]), 1.0)
    torch.testing.assert_close(losses, torch.tensor([math.log(2 + math.exp(-1))] * 3 + [0.0]))
    alone = torch.ones(1, 2, requires_grad=True)
    contrastive_losses(alone, torch.tensor([0]), 1.0).sum().backward()
    assert torch.equal(alone.grad, torch.zeros(1, 2))  # type: ignore[arg-type]


def test_a_mono_forward_head_is_a_linear_map_of_the_mean_token() -> None:
    model, batch = local("mono-forward"), image_batch()
    model.eval()
    part = model.part(2)
    tokens = part.advance(part.features(batch["pixel_values"]))[-1]
    head = part.network.get_submodule("classifier")
    expected = F.linear(tokens.mean(1), head.weight, head.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(part(batch["pixel_values"]), expected)
    torch.testing.assert_close(part.loss(batch), F.cross_entropy(expected, batch["labels"], reduction="none"))


def test_heads_train_with_smoothed_labels() -> None:
    plain, smoothed = local(), local()
    trained(plain)
    trained(smoothed, label_smoothing=0.1)
    for index in range(2):  # every head
        assert not same_states(dict(plain.part(index).state_dict()), dict(smoothed.part(index).state_dict()))


def test_modules_before_run_as_at_prediction() -> None:
    model = LocalLearning(tiny(layers=4, hidden_dropout_prob=0.5), LocalConfig(), 2)
    part = model.part(1).train()
    images = image_batch()["pixel_values"]
    assert torch.equal(part.features(images), part.features(images))
    assert not torch.equal(part(images), part(images))  # its own layers have dropout


# ---- runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_saves_loads_and_goes_on_exactly(objective: str, data: dict[str, ImageData], tmp_path: Path) -> None:
    made = recipe(local={"objective": objective})
    result = run(made, tmp_path / "whole", data)
    experiment = Experiment(made, data)
    rows: Any = experiment.task.measure(experiment, experiment.load(tmp_path / "whole" / "model"))
    assert rows == result.rows
    names = [row.combine for row in rows]
    heads = {"greedy": 2, "trgl": 2, "mono-forward": 4, "forward-forward": 1}[objective]
    assert names == ["last", *(["mean of heads"] if heads > 1 else []), *(f"head {k}" for k in range(heads - 1))]
    assert experiment.task.headline(rows) is rows[0]

    trainer = runs.blocks_trainer(experiment, tmp_path / "part", progress=False)
    trainer.train(until=4)
    trainer.save_checkpoint()
    resumed = run(made, tmp_path / "part", data).model
    assert same_states(dict(resumed.state_dict()), dict(result.model.state_dict()))
    # A positive control: another seed is another model.
    other = run(recipe(local={"objective": objective}, train={"seed": 1}), tmp_path / "other", data).model
    assert not same_states(dict(other.state_dict()), dict(resumed.state_dict()))


def test_a_sequential_module_trains_on_finished_ones() -> None:
    random, sequential = local(), local()
    trained(random)
    trained(sequential, schedule="sequential")
    assert same_states(dict(random.part(0).state_dict()), dict(sequential.part(0).state_dict()))
    assert not same_states(dict(random.part(1).state_dict()), dict(sequential.part(1).state_dict()))


def test_checkpointed_layers_give_the_same_module() -> None:
    plain, checkpointed = local(), local()
    trained(plain)
    trained(checkpointed, activation_checkpointing=True)
    assert same_states(dict(plain.state_dict()), dict(checkpointed.state_dict()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_compiled_module_has_the_same_loss_and_gradients(objective: str) -> None:
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    plain, compiled = (local(objective, tau=1.0, temperature=0.1).train() for _ in range(2))
    config = TrainConfig(steps=1, compile="layers")
    parts = [compiled.part(index) for index in range(len(compiled.parts))]
    Compiler(config, torch.device("cpu"), backend=graphs, dynamic=False).compile(parts)
    batch = image_batch(8)
    for part, reference in zip(parts, plain.parts, strict=True):
        for each in (part, reference):
            each.loss(batch).mean().backward()  # type: ignore[operator]
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    # Stem, layer, norm and classifier; with and without gradient; in both modes: not one for each layer.
    assert graphs.frame_count <= 10


def test_memory_is_of_one_module_and_all_weights_before_it() -> None:
    model = LocalLearning(tiny(layers=4), LocalConfig(), 4)
    trainer = Trainer(model, Batches(), TrainConfig(steps=9, batch_size=4), progress=False)  # type: ignore[arg-type]
    memory = step_memory(trainer)
    units = model.units()
    for unit, each in zip(units, memory, strict=True):
        assert each.parameters == bytes_of(unit.module.parameters())
        assert each.optimizer >= 2 * bytes_of(unit.own)
    assert memory[3].parameters > memory[0].parameters
    assert memory[3].optimizer < memory[0].optimizer  # the first has the stem


def test_compare_has_rows_on_request(data: dict[str, ImageData], tmp_path: Path) -> None:
    made = recipe(method="diffusionblocks")
    rows = ["greedy-2x2", "trgl-2x2", "mono-forward-4x1", "forward-forward-4x1"]
    compare(Experiment(made, data), tmp_path, rows=rows, progress=False)
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["key"] for row in table] == rows
    assert [row["name"] for row in table] == list(OBJECTIVES)
    assert {row["layer_updates"] for row in table} == {12}
    schedules = [json.loads((tmp_path / row / "recipe.json").read_text())["train"]["schedule"] for row in rows]
    assert schedules == ["random"] * 3 + ["sequential"]  # a head is for the encoder as it ended
    for row in table:
        assert 0 < row["parameters_trained"] < row["memory"]["parameters"]


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"blocks": [0]}}, r"train.blocks = \[0\]: each module of local learning runs those before it"),
        ({"train": {"resident": "active"}}, "set train.resident to all"),
        ({"train": {"concurrent": True, "cuda_graph": True}}, "set train.concurrent to false"),
        ({"local": {"objective": "mono-forward", "modules": 2}}, "leave modules out"),
        ({"local": {"tau": 0}}, "local.tau"),
    ],
)
def test_what_modules_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_modules_must_divide_the_layers() -> None:
    with pytest.raises(ValueError, match=r"3 modules do not divide 4 layers: set local.modules to one of \[1, 2, 4\]"):
        Experiment(recipe(local={"modules": 3})).build()


def test_a_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="for classifiers, not for a LlamaForCausalLM"):
        LocalLearning(tiny("llama"), LocalConfig(), 1)


def test_a_changed_file_is_refused(data: dict[str, ImageData], tmp_path: Path) -> None:
    run(recipe(), tmp_path, data)
    folder = tmp_path / "model"
    saved = read_modules(folder)
    assert saved.modules == 2
    (folder / "module-00.safetensors").write_bytes((folder / "module-01.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"module-00.safetensors does not match local.json beside it"):
        LocalLearning.load(folder)
    index = folder / "local.json"
    index.write_text(index.read_text().replace('"modules": 2', '"modules": 1'))
    with pytest.raises(ValueError, match="was changed or damaged after it was saved"):
        LocalLearning.load(folder)
