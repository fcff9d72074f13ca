"""Sizes of a model are refused before anything is made of them, with the advice that mends them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusionblocks.common.machine import check_memory
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.original import described_config, model_config
from diffusionblocks.experiments.preflight import check_disk, check_machine
from diffusionblocks.experiments.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
VIT, DIT, LLAMA = (FOLDER / f"{name}.yaml" for name in ("vit/digits", "dit/digits", "text/autoregressive_topics"))
DEEP = FOLDER / "text/recurrent_topics.yaml"


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (VIT, "num_hidden_layers", 10**6),
        (VIT, "num_hidden_layers", 0),
        (VIT, "num_labels", 10**9),
        (VIT, "num_labels", 1),
        (VIT, "hidden_size", 10**9),
        (VIT, "hidden_size", "yes"),
        (VIT, "hidden_size", "1:30"),
        (VIT, "hidden_size", "[16]"),
        (VIT, "hidden_size", 1.5),
        (VIT, "intermediate_size", 10**12),
        (VIT, "num_attention_heads", -2),
        (VIT, "image_size", 10**9),
        (VIT, "patch_size", 10**9),
        (VIT, "encoder_stride", 10**12),
        (DIT, "num_layers", 10**6),
        (DIT, "num_classes", 10**9),
        (DIT, "sample_size", 10**6),
        (DIT, "in_channels", 10**9),
        (LLAMA, "vocab_size", 10**9),
        (LLAMA, "num_hidden_layers", 10**9),
        (LLAMA, "max_position_embeddings", 10**12),
        (DEEP, "mean_recurrence", 10**9),
        (DEEP, "num_prelude_layers", 10**9),
    ],
)
def test_out_of_range(path: Path, field: str, value: Any) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=rf"^model\.config\.{field} = ") as error:
        model_config(load_recipe(path, [f"model.config.{field}={value}"]).model)
    assert "must be" in str(error.value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("patch", "fine"), [([1, 2, 2], True), ([1, 2], False), ([1, 2, 10**9], False), (["a"] * 3, False)]
)
def test_a_patch_of_videos_has_three_sides(patch: list[Any], fine: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", "patch_size": patch}))
    if fine:
        assert list(described_config("WanTransformer3DModel", str(tmp_path)).patch_size) == patch
        return
    with pytest.raises(ValueError, match=r"patch_size = .*must be"):
        described_config("WanTransformer3DModel", str(tmp_path))


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        (VIT, {"hidden_size": 33, "num_attention_heads": 2}, ("hidden_size = 33", "num_attention_heads = 2")),
        (VIT, {"patch_size": 3}, ("patch_size = 3", "image_size = 8")),
        (VIT, {"patch_size": 16}, ("patch_size = 16", "image_size = 8")),
        (LLAMA, {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 4}, ("num_key_value_heads = 4",)),
    ],
)
def test_sizes_that_do_not_go_together_come_with_advice_that_works(
    path: Path, changes: dict[str, int], words: tuple[str, ...]
) -> None:
    sets = [f"model.config.{name}={value}" for name, value in changes.items()]
    with pytest.raises(ValueError, match=r"set model\.config") as error:
        model_config(load_recipe(path, sets).model)
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    found = re.search(r"set (model\.config\.\w+) to (?:one of )?\[?([\d, ]+)", message)
    assert found is not None
    for value in found[2].split(", "):
        model_config(load_recipe(path, [*sets, f"{found[1]}={value}"]).model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("hidden_sise=16", ("model.config.hidden_sise", "did you mean hidden_size")),
        ("hidden_act=wrong", ("model.config", "wrong")),
        ("attention_probs_dropout_prob=word", ("model.config",)),
        ("attn_implementation=some/kernel", ("some/kernel", "eager")),
    ],
)
def test_other_config_values(change: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        _ = Experiment(load_recipe(VIT, [f"model.config.{change}"])).outline
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_no_memory_holds_is_refused_before_it_is_made(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2**15, "intermediate_size": 2**17, "num_attention_heads": 2, "num_hidden_layers": 48}
    recipe = load_recipe(VIT, ["device=cpu", *(f"model.config.{name}={value}" for name, value in sizes.items())])
    with pytest.raises(ValueError, match=r"need at least [\d,.]+ GiB, and this machine has [\d,.]+"):
        check_machine(Experiment(recipe), tmp_path)


def test_weights_are_counted_with_what_is_kept_for_each() -> None:
    with torch.device("meta"):
        model = nn.Linear(2**20, 2**10)
    check_memory(model, 1.0, 1.0, torch.device("cpu"), "")
    with pytest.raises(ValueError, match=r"40,\d\d\d\.\d GiB.*: smaller"):
        check_memory(model, 1.0, 10_000.0, torch.device("cpu"), "smaller")
    with pytest.raises(ValueError, match=r"10,\d\d\d\.\d GiB"):
        check_memory(model, 0.25, 10_000.0, torch.device("cpu"), "smaller")
    check_memory(model.requires_grad_(False), 1.0, 10_000.0, torch.device("cpu"), "")  # as below low-rank updates


def of_disk(path: Path, *changes: str) -> tuple[Recipe, int, int]:
    """(recipe, bytes of what is saved of the blocks that train, bytes of what moves of them)."""
    recipe = load_recipe(path, ["device=cpu", "train.steps=4", "train.batch_size=10", *changes])
    model: Any = Experiment(recipe).outline
    blocks = [model.blocks[b] for b in recipe.train.blocks or range(model.partition.num_blocks)]
    tensors = {id(t): t for block in blocks for t in block.state_dict(keep_vars=True).values()}.values()
    sizes = [(t.requires_grad, t.numel() * t.element_size()) for t in tensors]
    return recipe, sum(size for _, size in sizes), sum(size for moves, size in sizes if moves)


@pytest.mark.parametrize(
    ("changes", "saved", "kept"),
    [
        ({}, 1 + 3, 3 * 2),  # the model; two checkpoints and the one that is being written, and two averages in each
        ({"keep_checkpoints": 1}, 1 + 2, 2 * 2),
        ({"keep_checkpoints": 10**6}, 1 + 12, 12 * 2),  # as many as there are iterations
        ({"checkpoint_seconds": "null"}, 1 + 1, 2),
        ({"ema_decay": 0.9}, 1 + 3, 3 * 3),
        ({"snapshot_every": 5}, 1 + 2 + 3, 3 * 2),
        ({"blocks": "[0, 2]"}, 1 + 3, 3 * 2),
        ({"steps": "null", "epochs": 1, "snapshot_every": 1}, 1 + 12 + 3, 3 * 2),  # of 40 examples
    ],
)
def test_what_no_disk_holds_is_refused(changes: dict[str, object], saved: int, kept: int, tmp_path: Path) -> None:
    recipe, weights, moved = of_disk(VIT, *(f"train.{name}={v}" for name, v in changes.items()))
    needed = saved * weights + kept * moved
    check_disk(Experiment(recipe), tmp_path / "run", free=needed, num_examples=40)
    with pytest.raises(ValueError, match=r"its disk has [\d.]+ free: make room.*--out"):
        check_disk(Experiment(recipe), tmp_path / "run", free=needed - 1, num_examples=40)


@pytest.mark.parametrize("blocks", ["null", "[1]"])
def test_fixed_weights_under_low_rank_updates_are_on_the_disk_once(blocks: str, tmp_path: Path) -> None:
    """As a run writes them: a checkpoint has the updates, with their state; the model has all, of one block too."""
    sizes = ["model.config.num_layers=2", "model.config.dual_attention_layers=[0]", "blocks.lora.rank=2"]
    recipe, weights, updates = of_disk(FOLDER / "flow/12gb.yaml", *sizes, f"train.blocks={blocks}")
    assert 0 < 10 * updates < weights
    needed = weights + 3 * 3 * updates  # three checkpoints, of the updates and two averages of AdamW
    check_disk(Experiment(recipe), tmp_path, free=needed)
    with pytest.raises(ValueError, match=r"its disk has [\d.]+ free"):
        check_disk(Experiment(recipe), tmp_path, free=needed - 1)


def test_what_a_run_has_written_is_not_counted_again(tmp_path: Path) -> None:
    recipe, weights, moved = of_disk(VIT, "train.snapshot_every=5")
    (tmp_path / "snapshots" / "iteration-000000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iteration-000000006").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iteration-000000006" / "state.json").write_text("{}")
    check_disk(Experiment(recipe), tmp_path, free=(1 + 1 + 2) * weights + 2 * 2 * moved)


@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
def test_texts_may_be_longer_than_a_sliding_window_and_not_than_the_positions(method: str) -> None:
    changes = ["model.type=MistralForCausalLM", "model.config.sliding_window=24", f"method={method}", "device=cpu"]
    recipe = load_recipe(LLAMA, changes)
    outline = Experiment(recipe).outline
    recipe.task.check_room(Experiment(recipe), outline, 200, 56)
    with pytest.raises(ValueError, match=r"are 257, more than the model's 256 \(max_position_embeddings\)"):
        recipe.task.check_room(Experiment(recipe), outline, 200, 57)


@pytest.mark.parametrize(
    ("path", "changes", "calls"),
    [
        (VIT, ["evaluate.steps=[1, 3]", "evaluate.seeds=[2, 5]", "evaluate.limit=7"], 7 * (1 + 3) * 5),
        (VIT, ["evaluate.limit=7", "method=end-to-end"], 7),
        (DIT, ["evaluate.samples=10", "evaluate.steps=[4]", "evaluate.guidance=[1, 2]"], 10 * 4 * (1 + 2)),
        (DIT, ["evaluate.samples=10", "evaluate.steps=[4]", "evaluate.solver=[euler, heun]"], 10 * (4 + 7) * 2),
        # all levels, then a vote of two blocks
        (LLAMA, ["evaluate.limit=5", "evaluate.samples=2", "evaluate.new_tokens=6"], 5 * (16 + 2) + 2 * 6 * 2),
        (LLAMA, ["evaluate.limit=5", "evaluate.samples=2", "evaluate.new_tokens=6", "method=end-to-end"], 5 + 2 * 6),
    ],
)
def test_calls_of_an_evaluation_are_counted(path: Path, changes: list[str], calls: int) -> None:
    recipe = load_recipe(path, ["device=cpu", *changes])
    assert recipe.task.calls(Experiment(recipe), Experiment(recipe).outline, recipe.data.load("test")) == calls


@pytest.mark.slow
def test_many_calls_are_said_and_too_many_refused(caplog: pytest.LogCaptureFixture) -> None:
    def check(*changes: str) -> None:
        recipe = load_recipe(DIT, ["device=cpu", "evaluate.features=null", *changes])
        experiment = Experiment(recipe, {"test": recipe.data.load("test")})
        experiment.task.check(experiment, experiment.outline)

    check("evaluate.samples=1000", "evaluate.steps=[20]")
    assert not caplog.records
    check("evaluate.samples=10000000", "evaluate.steps=[20]")
    assert "evaluation takes about 400,000,000 calls of a block" in caplog.text
    with pytest.raises(
        ValueError, match=r"200,000,000,000 calls .* more than 100,000,000,000: set evaluate.samples or"
    ):
        check("evaluate.samples=10000000", "evaluate.steps=[10000]")
