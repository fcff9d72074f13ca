"""Older names of settings: accepted in recipes, configs and calls, and written out under the new name."""

import pytest
from helpers import convert, image_batch, seeded

from diffusionblocks import EDM, BlocksConfig
from diffusionblocks.common.keywords import older_keywords
from diffusionblocks.experiments.recipe import load_recipe


def test_the_older_key_of_feedback_is_read_and_written_as_the_new_one() -> None:
    config = BlocksConfig.model_validate({"target": {"kind": "label", "bridge": "hard"}})
    assert config.target.feedback == "hard"
    assert config.model_dump()["target"]["feedback"] == "hard"
    assert BlocksConfig.model_validate({"target": {"kind": "next-token", "bridge": "top-k"}}).target.feedback == "top-k"


def test_a_call_by_the_older_name_warns_and_gives_the_same() -> None:
    model, images = convert("vit"), image_batch(2)["pixel_values"]
    with pytest.warns(DeprecationWarning, match="feedback"):
        older = model.predict(images, steps=2, bridge="hard", generator=seeded())
    assert older.probabilities.equal(model.predict(images, steps=2, feedback="hard", generator=seeded()).probabilities)


@pytest.mark.parametrize(
    ("recipe", "section", "name", "former"),
    [
        ("vit/digits", "train", "steps_per_switch", "dwell"),
        ("vit/digits", "blocks.target", "feedback", "bridge"),
        ("vit/digits", "evaluate", "feedback", "bridge"),
        ("text/autoregressive_topics", "evaluate", "feedback", "bridge"),
    ],
)
def test_both_keys_at_once_are_refused_and_the_message_says_why(
    recipe: str, section: str, name: str, former: str
) -> None:
    value = "4" if name == "steps_per_switch" else "hard"
    both = [f"{section}.{key}={value}" for key in (name, former)]
    with pytest.raises(ValueError, match=rf"{section}.*{name} is given twice: {former} is its former name"):
        load_recipe(f"recipes/{recipe}.yaml", both)


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(TypeError, match="_rename got new twice: old is its older name"):
        _rename(old=1, new=2)


@older_keywords(old="new")
def _rename(new: int) -> int:
    return new


def test_the_older_name_of_a_grid_is_the_same_grid() -> None:
    assert EDM().levels(4, "equal-mass") == EDM().levels(4, "equal-quantile") != EDM().levels(4, "karras")
