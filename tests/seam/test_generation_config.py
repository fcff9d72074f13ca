"""How a language model generates goes where it goes; all its eos ids end a text, and nothing else of it is followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CAUSAL_CLASSES, CAUSAL_FAMILIES, edit_index, listing, tiny
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.core.end_to_end import load_end_to_end, save_end_to_end
from diffusionblocks.core.loading import load
from diffusionblocks.core.materialise import build
from diffusionblocks.core.merging import merge
from diffusionblocks.core.weights import InFiles, InMemory, pretrained_source
from diffusionblocks.families.generation_config import end_tokens
from diffusionblocks.sampling import continue_plainly

SETTINGS = {"eos_token_id": [3, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.5}
PROMPTS = [torch.tensor([1, 2]), torch.tensor([4]), torch.tensor([7, 8, 9])] * 4


def original(family: str = "llama", settings: dict[str, Any] = SETTINGS) -> Any:
    from transformers import GenerationConfig

    model: Any = tiny(family, layers=2)
    model.generation_config = GenerationConfig.from_dict(dict(settings))
    return model


def settings_of(model: Any) -> dict[str, Any]:
    values = model.generation_config.to_diff_dict()
    return {name: values.get(name) for name in SETTINGS}


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_it_goes_through_the_whole_seam(family: str, tmp_path: Path) -> None:
    source = original(family)
    model = db.convert(source, db.BlocksConfig(num_blocks=2))
    source.generation_config.eos_token_id = 1  # the original's is another object
    assert settings_of(model) == SETTINGS
    model.save_pretrained(tmp_path / "whole")
    for b in (0, 1):
        model.save_pretrained(tmp_path / f"{b}", blocks=[b])
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    loaded, merged = load(tmp_path / "whole"), load(tmp_path / "merged")
    loaded.save_pretrained(tmp_path / "again")
    assert listing(tmp_path / "again") == listing(tmp_path / "whole")
    trunk = db.convert(original(family), db.BlocksConfig(num_blocks=1))
    branched, exported = db.branch(trunk, 2), model.export_initialisation()
    for found in (loaded, merged, branched, exported):
        assert settings_of(found) == SETTINGS
    exported.save_pretrained(tmp_path / "exported")  # type: ignore[operator]
    for road in (InFiles, InMemory):
        built = road(CAUSAL_CLASSES[family], tmp_path / "exported", {}, seed=0)
        assert settings_of(build(built, db.BlocksConfig(num_blocks=2))) == SETTINGS
    save_end_to_end(exported, tmp_path / "control")
    assert settings_of(load_end_to_end(CAUSAL_CLASSES[family], tmp_path / "control")) == SETTINGS


def test_blocks_that_generate_otherwise_are_not_merged(tmp_path: Path) -> None:
    for b, settings in enumerate((SETTINGS, SETTINGS | {"eos_token_id": 4})):
        db.convert(original(settings=settings), db.BlocksConfig(num_blocks=2)).save_pretrained(
            tmp_path / f"{b}", blocks=[b]
        )
    with pytest.raises(ValueError, match=r"generation_config\.eos_token_id is \[3, 5\] in the first and 4"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")


def test_older_folders_have_what_the_config_says(tmp_path: Path) -> None:
    model = db.convert(original(), db.BlocksConfig(num_blocks=2))
    model.config.eos_token_id = [2, 6]
    model.save_pretrained(tmp_path)
    edit_index(tmp_path, lambda index: index.pop("generation_config"))
    loaded = load(tmp_path)
    assert end_tokens(loaded) == (2, 6)
    assert loaded.generation_config.temperature != SETTINGS["temperature"]


def until(rows: list[Tensor], ends: set[int]) -> list[list[int]]:
    """Rows up to their first end behind the prompt, that included."""
    cut = []
    for row, prompt in zip((r.tolist() for r in rows), PROMPTS, strict=True):
        stops = [place for place, token in enumerate(row) if place >= len(prompt) and token in ends]
        cut.append(row[: stops[0] + 1] if stops else row)
    return cut


@pytest.mark.slow
@pytest.mark.parametrize("of", ["blocks", "plain", "loaded"])
def test_all_eos_ids_end_a_text_and_nothing_else_is_followed(of: str, tmp_path: Path) -> None:
    model: Any = original()
    if of != "plain":
        model = db.convert(model, db.BlocksConfig(num_blocks=2))
    if of == "loaded":
        model.save_pretrained(tmp_path)
        model = load(tmp_path)

    def written(**options: Any) -> list[Tensor]:
        if of == "plain":
            return continue_plainly(model, PROMPTS, max_new_tokens=24, seeds=range(12), **options).tokens
        return model.continue_texts(PROMPTS, 24, **options).tokens

    endless, by_default = written(stop_tokens=[]), [row.tolist() for row in written()]
    assert all(len(row) == len(prompt) + 24 for row, prompt in zip(endless, PROMPTS, strict=True))
    assert by_default == until(endless, {3, 5})
    assert {row[-1] for row in by_default} >= {3, 5}  # each of them ended some
    assert [row.tolist() for row in written(stop_tokens=[4])] == until(endless, {4})
    plain = [row.tolist() for row in written(temperature=1.0, top_p=1.0)]
    assert by_default == plain  # temperature and top_p are the caller's
    model.generation_config.eos_token_id, model.config.eos_token_id = None, 7
    assert [row.tolist() for row in written()] == until(endless, {7})
    model.config.eos_token_id = None
    assert [row.tolist() for row in written()] == [row.tolist() for row in endless]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"eos_token_id": "end"}, r"eos_token_id = 'end': must be an id, a list of ids, or null"),
    ({"eos_token_id": [2, True]}, r"eos_token_id = \[2, True\]"),
    ({"eos_token_id": -1}, r"eos_token_id = -1"),
    ({"validate": 3}, r"validate is no setting of generation"),
    ({"cache_implementation": "x"}, r"GenerationConfig refuses it"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
@pytest.mark.parametrize("place", ["index", "parts", "whole"])
def test_what_is_none_is_refused_in_a_line(values: dict[str, Any], message: str, place: str, tmp_path: Path) -> None:
    read: Callable[[], object]
    if place == "index":
        db.convert(original(), db.BlocksConfig(num_blocks=2)).save_pretrained(tmp_path)
        edit_index(tmp_path, lambda index: index.update(generation_config=values))
        read = lambda: load(tmp_path)  # noqa: E731
    else:
        original().save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        name = CAUSAL_CLASSES["llama"]
        read = lambda: {"parts": pretrained_source, "whole": InMemory}[place](name, tmp_path, {}, seed=0)  # noqa: E731
    with pytest.raises(ValueError, match=message) as refusal:
        read()
    assert "\n" not in str(refusal.value)


def test_models_that_write_nothing_have_none(tmp_path: Path) -> None:
    for family in ("vit", "dit", "masked"):
        assert db.convert(tiny(family)).generation_config is None
    db.convert(tiny("vit")).save_pretrained(tmp_path)
    assert "generation_config" not in json.loads((tmp_path / "diffusionblocks.json").read_text())
