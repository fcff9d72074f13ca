"""Weights are trained in float32 unless a recipe asks for less, whatever the folder holds; averages always are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny, without_generated_code
from test_trainer import differing, everything, model_of, trainer
from torch import nn

import diffusionblocks as db
from diffusionblocks.common.modules import bytes_of
from diffusionblocks.core.weights import InFiles, InMemory, pretrained_source
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.families import pretrained
from diffusionblocks.planning.counting import count_persistent
from diffusionblocks.training import EndToEnd, TrainConfig
from diffusionblocks.training.units import units_of


def recipe(method: str = "diffusionblocks", **model: Any) -> Recipe:
    values = {
        "name": "r",
        "method": method,
        "model": model,
        "data": {"kind": "digits"},
        "train": {"steps": 2},
        "device": "cpu",
    }
    if model["type"] == "LlamaForCausalLM":
        values |= {"data": {"kind": "text", "source": "x", "length": 8}, "evaluate": {"kind": "language"}}
    return parse_recipe(values, "recipe")


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 ViT in its library's own format."""
    path = tmp_path_factory.mktemp("vit")
    tiny().to(torch.bfloat16).save_pretrained(path)  # type: ignore[operator]
    return path


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_recipe_trains_in_float32_whatever_the_folder_holds(method: str, stored: torch.dtype, tmp_path: Path) -> None:
    tiny("llama").to(stored).save_pretrained(tmp_path)  # type: ignore[operator]
    given = {"type": "LlamaForCausalLM", "pretrained": str(tmp_path)}
    assert dtypes(Experiment(recipe(method, **given)).build()) == {torch.float32}
    low = recipe(method, **given, dtype="bfloat16")
    assert dtypes(Experiment(low).build()) == dtypes(Experiment(low).outline) == {torch.bfloat16}


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_a_fresh_model_of_another_precision(method: str) -> None:
    config = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = {"type": "LlamaForCausalLM", "config": {**config, "vocab_size": 96, "max_position_embeddings": 8}}
    exact, low = (Experiment(recipe(method, **model, dtype=d)).build() for d in ("float32", "bfloat16"))
    assert dtypes(low) == dtypes(Experiment(recipe(method, **model, dtype="bfloat16")).outline) == {torch.bfloat16}
    weights = dict(low.named_parameters())
    for name, parameter in exact.named_parameters():
        # What a target makes of the embedding is made of the rounded one.
        assert ".target." in name or torch.equal(parameter.to(torch.bfloat16), weights[name]), name
    rotary = {name: t for name, t in exact.named_buffers() if "inv_freq" in name}
    assert rotary
    for name, buffer in low.named_buffers():
        assert name not in rotary or torch.equal(buffer, rotary[name])  # what no file holds keeps its digits


@pytest.mark.parametrize("road", [InFiles, InMemory])
def test_both_roads_read_what_the_files_hold(road: Any, folder: Path, tmp_path: Path) -> None:
    """A float32 file under a config that says bfloat16 loses nothing, either."""
    exact = tiny()
    exact.save_pretrained(tmp_path)  # type: ignore[operator]
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    assert pretrained("ViTForImageClassification", tmp_path, {}).dtype == torch.bfloat16
    for path in (folder, tmp_path):
        source = road("ViTForImageClassification", path, {}, seed=0, dtype=torch.float32)
        assert source.model_config.dtype == torch.float32
        for name, tensor in source.tensors(0, range(1), list(exact.state_dict())):
            original = exact.state_dict()[name]
            expected = original if path is tmp_path else original.to(torch.bfloat16)
            assert torch.equal(tensor.float(), expected.float()), name
    assert pretrained_source("ViTForImageClassification", folder, {}, seed=0).dtype == torch.float32
    assert pretrained_source("ViTForImageClassification", folder, {}, seed=0, dtype=None).dtype == torch.bfloat16


def test_the_dtype_of_a_library_is_not_another_way(folder: Path) -> None:
    for field in ("dtype", "torch_dtype"):
        wrong = recipe(type="ViTForImageClassification", pretrained=str(folder), config={field: "bfloat16"})
        with pytest.raises(ValueError, match=rf"model\.config\.{field}.*(model\.dtype|knows no)"):
            Experiment(wrong).build()
    with pytest.raises(ValueError, match=r"model\.dtype: Input should be 'float32' or 'bfloat16'"):
        recipe(type="ViTForImageClassification", dtype="float16")


def test_low_precision_is_told_once_and_only_of_what_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "diffusionblocks"):
        trainer("", model=model_of("replicated"))
        assert not caplog.records
        trainer("", model=model_of("replicated").to(torch.bfloat16))
    (record,) = caplog.records
    assert "is bfloat16" in record.getMessage()
    assert "model.float()" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert dtypes(db.convert(tiny().to(torch.bfloat16))) == {torch.bfloat16}  # conversion keeps what it is given


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["end-to-end", "replicated", "joint"])
@pytest.mark.parametrize("resident", ["all", "active"])
def test_averages_of_bfloat16_weights_are_float32(kind: str, resident: str, tmp_path: Path) -> None:
    """Rounded to bfloat16 an average under a decay of 0.999 would not move at all."""
    options: dict[str, Any] = {"resident": resident, "ema_decay": None, "ema_half_life": 10_000, "ema_ramp_up": 1e9}
    options |= {"compile": False, "precision": "float32"}
    run = trainer(kind, tmp_path, model=model_of(kind).to(torch.bfloat16), **options)
    before = [e.clone() for s in run.sets.values() for e in s.ema]
    assert before
    assert {e.dtype for e in before} == {torch.float32}
    units, shared = units_of(run.model)
    counted = count_persistent(units, shared, run.config.model_copy(update={"resident": "all"}))
    assert counted.ema == sum(e.numel() * e.element_size() for e in before)
    run.train()
    after = [e for s in run.sets.values() for e in s.ema]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) > len(moved) / 2
    state = everything(run)
    averages = {name: [e.clone() for e in group.ema] for name, group in run.sets.items()}
    with run.averaged():
        for name, group in run.sets.items():
            for parameter, average in zip(group.parameters, averages[name], strict=True):
                assert torch.equal(parameter, average.to(torch.bfloat16))
    again = everything(run)
    assert all(torch.equal(state[name], again[name]) for name in state)  # and swapping loses nothing
    other = trainer(kind, tmp_path, model=model_of(kind).to(torch.bfloat16), **options)
    other.train()
    resumed = everything(other)
    assert all(torch.equal(state[name], resumed[name]) for name in state)


def test_averages_of_float32_weights_are_as_they_were() -> None:
    config = TrainConfig(steps=1, ema_decay=0.9)
    model = EndToEnd(tiny())
    units, shared = units_of(model)
    assert count_persistent(units, shared, config).ema == sum(p.numel() * 4 for p in units[0].own)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_rounding_by_chance_follows_the_step_alone(optimizer: str, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint, and one of another schedule and residency, are bit-equal to it."""

    def run(folder: str = "", **more: Any) -> Any:
        options = {"compile": False, "precision": "float32", "weights": "bfloat16", "optimizer": optimizer} | more
        model = model_of("replicated").to(torch.bfloat16)
        with without_generated_code():
            return trainer("replicated", tmp_path / folder if folder else None, model=model, **options)

    with without_generated_code():
        whole = run()
        whole.train()
        first = run("split")
        first.train(until=len(whole.schedule) // 2 - 1)
        second = run("split")
        second.train()
        assert differing(everything(whole), everything(second)) == []
        other = run(resident="active", schedule="sequential")
        other.train()
        assert differing(everything(whole), everything(other)) == []
        nearest = run(weights=None)
        nearest.train()
    if optimizer == "adamw":
        assert differing(everything(whole), everything(nearest)) != []
    units, shared = units_of(whole.model)
    counted = count_persistent(units, shared, whole.config).optimizer
    moments = [one for owner in whole.sets.values() for one in owner.moments]
    assert counted == 4 * len(moments) + bytes_of(v for one in moments for name, v in one.items() if name != "step")


def test_weights_in_bfloat16_are_asked_for_in_one_place(caplog: pytest.LogCaptureFixture) -> None:
    values = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    values |= {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    plain = recipe(type="ViTForImageClassification", config=values)
    rounded = plain.model_copy(update={"train": plain.train.model_copy(update={"weights": "bfloat16"})})
    experiment = Experiment(rounded)
    assert dtypes(experiment.build()) == dtypes(experiment.outline) == {torch.bfloat16}
    with caplog.at_level(logging.WARNING, "diffusionblocks"):
        trainer("", model=model_of("replicated").to(torch.bfloat16), weights="bfloat16")
    assert not caplog.records
    message = r"train.weights = bfloat16: .* of block 0 is float32; .* or set train.weights to null"
    with pytest.raises(ValueError, match=message):
        trainer("", model=model_of("replicated"), weights="bfloat16")
