"""A saved folder as others see it: configs that their libraries read, files with the umask's modes, a model card."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from helpers import CAUSAL_FAMILIES, DIT_FAMILIES, FAMILIES, convert, fresh_causal, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoTokenizer, GenerationConfig

import diffusionblocks as db
from diffusionblocks.core.end_to_end import save_end_to_end
from diffusionblocks.core.ensembles import save_ensemble
from diffusionblocks.core.model_card import CARD
from diffusionblocks.core.saved_model import INDEX
from diffusionblocks.core.saving import save


def original(family: str) -> nn.Module:
    return fresh_causal(family) if family in CAUSAL_FAMILIES else tiny(family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *DIT_FAMILIES, "llama", "qwen3"])
def test_the_config_is_what_the_library_itself_writes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Module.to(original(family), dtype=dtype)
    model.save_pretrained(tmp_path / "library")  # type: ignore[operator]
    db.convert(model).save_pretrained(tmp_path / "ours")
    names = ["config.json", *(["generation_config.json"] if family in CAUSAL_FAMILIES else [])]
    for name in names:
        ours, library = (json.loads((tmp_path / place / name).read_text()) for place in ("ours", "library"))
        assert {n: v for n, v in ours.items() if v is not None} == {n: v for n, v in library.items() if v is not None}
    assert "_name_or_path" not in (tmp_path / "ours" / "config.json").read_text()


def test_the_libraries_read_a_folder_and_refuse_its_weights(tmp_path: Path) -> None:
    model = db.convert(original("llama"))
    model.generation_config.eos_token_id = [3, 5]
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save(model, tmp_path / "m", processing={"tokenizer.json": tokenizer.to_str().encode()})
    assert type(AutoConfig.from_pretrained(tmp_path / "m")) is type(model.config)
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [3, 5]
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("b a")["input_ids"] == [1, 0]
    convert("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "vit")


def test_what_others_read_is_of_the_model_that_is_there(tmp_path: Path) -> None:
    db.convert(original("llama")).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "generation_config.json").is_file()
    convert("vit").save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "generation_config.json").exists()
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "vit"


def test_a_library_s_own_model_is_not_taken_for_a_folder_of_blocks(tmp_path: Path) -> None:
    original("vit").save_pretrained(tmp_path / "m")  # type: ignore[operator]
    with pytest.raises(ValueError, match="holds other things"):
        convert("vit").save_pretrained(tmp_path / "m")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_all_files_have_the_modes_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        model = db.convert(original("llama"), db.BlocksConfig(shared="replicated"))
        save(model, tmp_path / "all" / "blocks", processing={"tokenizer.json": b"{}"})
        model.save_pretrained(tmp_path / "all" / "a", blocks=[0])
        model.save_pretrained(tmp_path / "all" / "b", blocks=[1, 2])
        db.merge([tmp_path / "all" / "a", tmp_path / "all" / "b"], tmp_path / "all" / "merged")
        save_end_to_end(original("llama"), tmp_path / "all" / "whole", {"tokenizer.json": b"{}"})
        save_ensemble({b: tiny("vit") for b in range(2)}, 2, tmp_path / "all" / "ensemble")
    finally:
        os.umask(before)
    paths = [tmp_path / "all", *(tmp_path / "all").rglob("*")]
    assert len(paths) > 30
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_the_index_and_the_card_of_a_folder_go_together(tmp_path: Path) -> None:
    convert("vit").save_pretrained(tmp_path / "m", blocks=[1])
    card = (tmp_path / "m" / CARD).read_text()
    assert "Here is block 1 of 3. `diffusionblocks merge`" in card
    assert "from_pretrained" not in card
    assert json.loads((tmp_path / "m" / INDEX).read_text())["blocks"] == [1]
