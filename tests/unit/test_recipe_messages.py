"""Every field of every recipe refuses a wrong value in one line that has its name as the user writes it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

import diffusionblocks as db
from diffusionblocks.common import schema_errors
from diffusionblocks.common.yaml_values import read_yaml
from diffusionblocks.experiments.recipe import Recipe, load_recipe, parse_recipe
from diffusionblocks.training import TrainConfig

FOLDER = Path(__file__).parents[2] / "recipes"
SHIPPED = ("vit/digits", "dit/digits", "dit/imagenet-latents", "text/masked_text8", "text/autoregressive_prose")

#: No field takes all of these; each kind of field refuses most.
WRONG = (
    *("word", "1:30", "x" * 500, True, -1, -3.5, 1.5, 10**12, 1e300, float("nan"), float("inf")),
    *([], [True], [None], ["a"] * 300, {}, {"a": 1}, None),
)

#: Messages of fields that do not go together name the section, or the others.
TOGETHER = ("fit", "trunk", "evaluate.kind", "give either", "train.steps", "train.distill")


def shipped(name: str) -> dict[str, Any]:
    values = read_yaml((FOLDER / f"{name}.yaml").read_bytes(), name)
    assert isinstance(values, dict)
    values["evaluate"].setdefault("kind", parse_recipe(values, name).evaluate.kind)  # it follows from the model
    return values


def fields(section: Any, prefix: tuple[str, ...], values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Paths of all fields of the recipe that the values are of."""
    for name, annotation in schema_errors._types_of(section).items():
        path = (*prefix, name)
        yield path
        inner = values.get(name)
        kind = inner.get("kind") if isinstance(inner, dict) else None
        choice = schema_errors._sections(annotation)
        for found in choice:
            kinds = get_args(schema_errors._types_of(found).get("kind"))
            if len(choice) == 1 or kind in kinds:
                yield from fields(found, path, inner if isinstance(inner, dict) else {})


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    result = copy.deepcopy(values)
    place = result
    for part in path[:-1]:
        if not isinstance(place.get(part), dict):
            place[part] = {}
        place = place[part]
    place[path[-1]] = value
    return result


@pytest.mark.parametrize("name", SHIPPED)
def test_a_wrong_value_is_refused_in_one_line_with_the_field(name: str) -> None:
    values, refused = shipped(name), set()
    for path in fields(Recipe, (), values):
        for wrong in WRONG:
            try:
                parse_recipe(changed(values, path, wrong), "r.yaml")
            except ValueError as error:
                head, *lines = str(error).splitlines()
                assert head == "r.yaml is not a valid recipe:"
                dotted = ".".join(path)
                named = [line for line in lines if dotted in line or any(word in line for word in TOGETHER)]
                assert named or path[-1] in lines[0], (dotted, wrong, lines)
                assert len(lines) <= 4, (dotted, wrong, lines)
                assert all(len(line) <= 610 for line in lines), (dotted, wrong, lines)
                refused.add(path)
    assert refused == set(fields(Recipe, (), values)), "some field takes everything"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("blocks.num_blocks", 10**6),
        ("blocks.layers", [10**6]),
        ("blocks.conditioning_dim", 10**9),
        ("blocks.seed", 2**32),
        ("train.steps", 10**9),
        ("train.epochs", 1e12),
        ("train.batch_size", 10**9),
        ("train.accumulation", 10**9),
        ("train.warmup_steps", 10**9),
        ("train.seed", 10**30),
        ("train.blocks", [10**6]),
        ("train.betas", [0.9, 1.0]),
        ("evaluate.steps", [10**6]),
        ("evaluate.steps", []),
        ("evaluate.seeds", [10**6]),
        ("evaluate.batch_size", 10**9),
        ("evaluate.limit", 10**9),
        ("data.mean", [True]),
        ("data.std", [0.0]),
        ("data.std", [0.5, 0.5]),
        ("data.mean", []),
        ("data.augment.crop_padding", 10**9),
        ("data.augment.randaugment_ops", 10**9),
        ("fit.rounds", 10**6),
        ("fit.grid", 10**6),
    ],
)
def test_numbers_have_bounds(path: str, value: Any) -> None:
    values = shipped("vit/digits")
    with pytest.raises(ValueError, match=r"r\.yaml is not a valid recipe") as error:
        parse_recipe(changed(values, tuple(path.split(".")), value), "r.yaml")
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("evaluate.new_tokens", 10**9),
        ("evaluate.prompt_length", 10**9),
        ("evaluate.samples", 10**9),
        ("evaluate.levels", 10**6),
        ("data.length", 10**9),
        ("data.vocab_size", 10**9),
        ("blocks.target.top_k", 10**9),
    ],
)
def test_numbers_of_text_have_an_upper_bound(path: str, value: Any) -> None:
    values = shipped("text/autoregressive_prose")
    values["blocks"].setdefault("target", {"kind": "next-token"}).setdefault("kind", "next-token")
    with pytest.raises(ValueError, match=r"r\.yaml is not a valid recipe") as error:
        parse_recipe(changed(values, tuple(path.split(".")), value), "r.yaml")
    assert f"{path}: " in str(error.value)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("trian", "train"),
        ("train.learning_rate", "lr_schedule"),
        ("train.batchsize", "batch_size"),
        ("evaluate.step", "steps"),
        ("data.augment.flipp", "flip"),
        ("blocks.noise.sigma", "sigma_max"),
        ("blocks.target.tokens", "token"),
        ("model.configs", "config"),
    ],
)
def test_an_unknown_field_is_told_what_is_near(path: str, near: str) -> None:
    values = changed(shipped("vit/digits"), tuple(path.split(".")), 3)
    with pytest.raises(ValueError, match=r"no such field") as error:
        parse_recipe(values, "r.yaml")
    line = next(line for line in str(error.value).splitlines() if "no such field" in line)
    assert line.startswith(f"  {path}: no such field")
    assert near in line


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train.trunk", "trunk is a section of its own: write trunk, not train.trunk"),
        ("blocks.device", "write device"),
        ("train.num_blocks", "write blocks.num_blocks"),
        ("evaluate.label_smoothing", "write train.label_smoothing"),
        ("blocks.lr", "write trunk.lr or train.lr"),
        ("data.length", "allowed: augment, kind"),  # of data of another kind
        ("train.kind", "allowed: accumulation"),  # of many sections
    ],
)
def test_a_field_of_another_section_is_told_where_it_is(path: str, message: str) -> None:
    values = changed(shipped("vit/digits"), tuple(path.split(".")), {"steps": 3})
    with pytest.raises(ValueError, match=rf"  {path}: no such field; {message}"):
        parse_recipe(values, "r.yaml")


def test_many_wrong_fields_are_a_few_lines() -> None:
    values = shipped("vit/digits")
    values["train"] |= dict.fromkeys(
        ("lr", "seed", "steps_per_switch", "steps", "batch_size", "schedule", "resident"), "word"
    )
    with pytest.raises(ValueError, match=r"and 2 more") as error:
        parse_recipe(values, "r.yaml")
    assert len(str(error.value).splitlines()) == 7


def test_a_colon_without_a_space_is_told() -> None:
    with pytest.raises(ValueError, match=r"every:5: no such field; a colon of YAML has a space behind it: every: 5"):
        load_recipe("vit/digits", ["train.early_stopping={every:5, patience: 1}"])


def test_a_file_is_not_blamed_for_an_override() -> None:
    with pytest.raises(ValueError, match=r"digits\.yaml, with what --set changes, is not a valid recipe"):
        load_recipe("vit/digits", ["train.steps=0"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: db.BlocksConfig(num_block=3), "BlocksConfig: num_block: no such field; did you mean num_blocks?"),
        (
            lambda: db.BlocksConfig(target={"kind": "label", "embeddin": 3}),
            "BlocksConfig: target.embeddin: no such field; did you mean embedding?",
        ),
        (
            lambda: db.LoraConfig(rank=0, dropout=1),
            "LoraConfig: rank: Input should be greater than or equal to 1 (got 0); dropout: Input should be less than "
            "1 (got 1)",
        ),
        (
            lambda: TrainConfig(steps=1, resident="activ"),
            "TrainConfig: resident: Input should be 'all' or 'active' (got 'activ') (did you mean active?)",
        ),
        (
            lambda: db.BlocksConfig(lora={}, shared="joint"),
            "BlocksConfig: lora with shared = joint: no shared parameter trains, and blocks train apart; leave shared "
            "out",
        ),
    ],
)
def test_python_is_told_in_one_line_as_well(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as error:
        make()
    assert isinstance(error.value.__cause__, ValidationError)
