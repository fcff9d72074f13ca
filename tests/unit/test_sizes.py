"""Sizes of a model are refused before anything is made of them, with the advice that mends them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusionblocks.recipes import load_recipe
from diffusionblocks.runs import check_machine
from diffusionblocks.sizes import check_memory
from diffusionblocks.sources import model_config, outline_of

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
        model_config(load_recipe(path, [f"model.config.{field}={value}"]))
    assert "must be" in str(error.value)
    assert time.process_time() - started < 5


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
        model_config(load_recipe(path, sets))
    message = str(error.value)
    assert [word for word in words if word not in message] == [], message
    found = re.search(r"set (model\.config\.\w+) to (?:one of )?\[?([\d, ]+)", message)
    assert found is not None
    for value in found[2].split(", "):
        model_config(load_recipe(path, [*sets, f"{found[1]}={value}"]))


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
        outline_of(load_recipe(VIT, [f"model.config.{change}"]))
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_no_memory_holds_is_refused_before_it_is_made(tmp_path: Path) -> None:
    sizes = {"hidden_size": 2**15, "intermediate_size": 2**17, "num_attention_heads": 2, "num_hidden_layers": 48}
    recipe = load_recipe(VIT, ["device=cpu", *(f"model.config.{name}={value}" for name, value in sizes.items())])
    with pytest.raises(ValueError, match=r"need at least [\d,.]+ GiB, and this machine has [\d,.]+"):
        check_machine(recipe, tmp_path)


def test_weights_are_counted_with_what_is_kept_for_each() -> None:
    with torch.device("meta"):
        model = nn.Linear(2**20, 2**10)
    check_memory(model, 1.0, torch.device("cpu"), "")
    with pytest.raises(ValueError, match=r"40,\d\d\d\.\d GiB.*: smaller"):
        check_memory(model, 10_000.0, torch.device("cpu"), "smaller")


def test_what_no_disk_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"its disk has 0\.0 free: .*--out"):
        check_machine(load_recipe(VIT, ["device=cpu"]), tmp_path / "run")
