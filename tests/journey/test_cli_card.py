"""The model card that a run leaves: its data, recipe and results, and nothing of the machine it ran on."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from commands import TINY_VIT, VIT, sets

from diffusionblocks.cli import main
from diffusionblocks.core.model_card import CARD, is_generated
from diffusionblocks.experiments.card_notes import card_notes
from diffusionblocks.experiments.recipe import load_recipe, parse_recipe


def test_the_card_of_a_run_has_data_recipe_and_results_with_baselines(tmp_path: Path) -> None:
    options = [*TINY_VIT, *sets(train__steps=4), "--quiet", "--out", str(tmp_path)]
    assert main(["compare", VIT, *options, "--rows", "diffusionblocks", "end-to-end-1"]) == 0
    folder = tmp_path / "diffusionblocks" / "model"
    card = (folder / CARD).read_text()
    assert is_generated(card)
    assert "1,438 images of 1x8x8" in card
    rows = [line for line in card.partition("## Results")[2].splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| diffusionblocks", "| end-to-end"]
    header = yaml.safe_load(card.split("---\n")[1])
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    metric = header["model-index"][0]["results"][0]["metrics"][0]
    assert metric == {
        "type": "accuracy",
        "value": {row["key"]: row["test_accuracy"] for row in table}["diffusionblocks"],
    }
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    written = json.loads((tmp_path / "diffusionblocks" / "recipe.json").read_text())
    assert parse_recipe(recipe, "the card") == parse_recipe(written, "the run")
    assert not (tmp_path / "end-to-end-1" / "model" / CARD).exists()
    edited = card.replace("license: unknown", "license: mit")
    (folder / CARD).write_text(edited)
    assert main(["compare", VIT, *options, "--rows", "diffusionblocks"]) == 0
    assert (folder / CARD).read_text() == edited


def test_a_card_names_no_place_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "photos of mine").mkdir()
    values = load_recipe(VIT).model_dump(mode="json")
    source = str(tmp_path / "photos of mine")
    values["data"] = {"kind": "images", "source": source, "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    notes = card_notes(parse_recipe(values, "own"), None)
    assert str(tmp_path) not in notes.recipe + notes.data
    assert "photos of mine" in notes.recipe
    assert notes.datasets == ()
    values["data"]["source"] = "uoft-cs/cifar100"
    notes = card_notes(parse_recipe(values, "hub"), None)
    assert notes.datasets == ("uoft-cs/cifar100",)
    assert "source: uoft-cs/cifar100" in notes.recipe
