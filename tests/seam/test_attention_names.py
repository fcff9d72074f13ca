"""The name of an attention implementation is checked on the config that was built, however it got there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CAUSAL_CLASSES, edit_index, tiny
from transformers import ViTConfig

import diffusionblocks as db
from diffusionblocks.core.end_to_end import load_end_to_end
from diffusionblocks.core.loading import load
from diffusionblocks.core.weights import InMemory, pretrained_source
from diffusionblocks.evaluation.mauve import HiddenFeatures
from diffusionblocks.evaluation.teachers import check_teacher, load_teacher
from diffusionblocks.families import check_attention, instantiate, rebuild_config

#: A repository's name would make transformers fetch its code, where the package `kernels` is installed.
NAMES = [
    ("some/kernel", r"attn_implementation = 'some/kernel'; allowed: eager, sdpa"),
    ("paged|sdpa", r"attn_implementation = 'paged\|sdpa'; allowed: eager, sdpa"),
    (3, r"attn_implementation = 3; allowed: eager, sdpa"),
    ("flash_attention_2", r"attn_implementation = 'flash_attention_2': there is no GPU here, or its package is not"),
]
KEYS = ("attn_implementation", "_attn_implementation")


@pytest.fixture(autouse=True)
def _alone() -> None:
    if torch.cuda.is_available():
        pytest.skip("flash attention may be here")


def refused(read: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("name", "message"), NAMES)
@pytest.mark.parametrize("family", ["vit", "llama"])
def test_set_after_construction(family: str, name: Any, message: str) -> None:
    model: Any = tiny(family)
    model.config._attn_implementation = name
    refused(lambda: db.convert(model), message if family == "vit" else "attn_implementation = ")
    refused(lambda: instantiate(type(model).__name__, model.config), message)


@pytest.mark.parametrize(("name", "message"), NAMES)
@pytest.mark.parametrize("key", KEYS)
def test_in_the_config_of_a_folder(key: str, name: Any, message: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: name}))
    found = CAUSAL_CLASSES["llama"]
    readers: list[Callable[[], object]] = [
        lambda: pretrained_source(found, tmp_path, {}, seed=0),
        lambda: InMemory(found, tmp_path, {}, seed=0),
        lambda: load_end_to_end(found, tmp_path),
        lambda: load_teacher(tmp_path, torch.device("cpu")),
        lambda: check_teacher(str(tmp_path), "evaluate.teacher", tokenizer=False),
        lambda: HiddenFeatures(tmp_path, tokenizer=object()),
    ]
    for read in readers:
        refused(read, message)


@pytest.mark.parametrize(("name", "message"), NAMES)
@pytest.mark.parametrize("key", KEYS)
def test_in_a_recipes_values_or_an_index(key: str, name: Any, message: str, tmp_path: Path) -> None:
    refused(lambda: rebuild_config("ViTForImageClassification", {key: name}), message)
    db.convert(tiny()).save_pretrained(tmp_path)

    def change(index: dict[str, Any]) -> None:
        del index["model_config"]["attn_implementation"]  # it would come first
        index["model_config"][key] = name

    edit_index(tmp_path, change)
    refused(lambda: load(tmp_path), message)


def test_in_a_part_of_a_config() -> None:
    class Whole(ViTConfig):
        sub_configs = {"part": ViTConfig}  # noqa: RUF012 - the library's

    whole = Whole()
    whole.part = ViTConfig()
    check_attention(whole)
    whole.part._attn_implementation = "some/kernel"
    refused(lambda: check_attention(whole), "some/kernel")


def test_what_cannot_train_on_a_cpu() -> None:
    config = ViTConfig(attn_implementation="flex_attention")
    check_attention(config)
    check_attention(config, device=torch.device("cuda"))
    refused(
        lambda: check_attention(config, "model.config.", torch.device("cpu")),
        r"model.config.attn_implementation = 'flex_attention' cannot train on a CPU; there: eager, sdpa",
    )
    for name in ("eager", "sdpa", None):
        check_attention(ViTConfig(attn_implementation=name), device=torch.device("cpu"))
