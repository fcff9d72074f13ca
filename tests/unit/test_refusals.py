"""Bad input is refused before any work, with a message that names the value and what is allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import convert, fresh_dit, noise_batch, seeded, tiny
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import diffusionblocks as db
from diffusionblocks import EDM, BlocksConfig, Partition
from diffusionblocks.evaluation.sample_quality import Setting
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.experiments.recipe_changes import trunk_recipe
from diffusionblocks.experiments.tasks.image_generation import draw_samples
from diffusionblocks.families import model_class_named
from diffusionblocks.training import TrainConfig

NOISE = EDM()
CLASSES = ("ViTForImageClassification", "DeiTForImageClassification", "Dinov2ForImageClassification")
_models: dict[str, db.DiffusionBlocks] = {}


def model() -> db.DiffusionBlocks:
    """One converted model for all cases: refusals must not change it."""
    return _models.setdefault("vit", convert("vit"))


def partition(**kwargs: Any) -> Partition:
    return Partition.build(NOISE, **({"num_layers": 12, "num_blocks": 3} | kwargs))


def loss(block: Any = 1, level: Tensor | None = None, **changes: Any) -> Tensor:
    batch = noise_batch() | changes
    batch = {name: value for name, value in batch.items() if value is not None}
    return model().loss(batch, block=block, generator=seeded(), level=level)


def predict(**kwargs: Any) -> Any:
    return model().predict(noise_batch()["pixel_values"], generator=seeded(), **kwargs)


def diffusion(num_classes: int = 4, label_dropout: float = 0.1) -> db.DiffusionBlocks:
    key = f"dit {num_classes} {label_dropout}"
    if key not in _models:
        target = {"kind": "image", "label_dropout": label_dropout}
        _models[key] = db.convert(fresh_dit(num_classes=num_classes), BlocksConfig(target=target))
    return _models[key]


def large() -> db.DiffusionBlocks:
    """A model of images, 10^7 of which no machine holds."""
    return db.convert(fresh_dit(num_classes=4, sample_size=512, patch_size=64), BlocksConfig(target={"kind": "image"}))


def text(family: str) -> db.DiffusionBlocks:
    return _models.setdefault(family, convert(family))


def recipe(**changes: Any) -> Recipe:
    values = {
        "name": "r",
        "model": {"type": "DiT", "config": {"num_layers": 3}},
        "data": {"kind": "digits"},
        "train": {"steps": 1},
        "evaluate": {"kind": "samples"},
    }
    return parse_recipe(values | changes, "here")


def draw(blocks: db.DiffusionBlocks, **kwargs: Any) -> Any:
    return draw_samples(Experiment(recipe()), blocks, Path("nowhere"), **kwargs)


def levels(*values: float) -> Tensor:
    return torch.tensor(values)


# (name, what is done, words the message must hold: the thing, its value, what is allowed)
CASES: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
    # models
    ("linear", lambda: db.convert(nn.Linear(2, 2)), ("Linear", *CLASSES)),
    ("backbone without a head", lambda: db.convert(ViTModel(tiny().config)), ("ViTModel", "ViTForImageClassification")),
    ("converted twice", lambda: db.convert(model()), ("DiffusionBlocks", *CLASSES)),
    ("one label", lambda: db.convert(tiny(num_labels=1)), ("num_labels = 1", "at least 2")),
    ("no label", lambda: db.convert(tiny("dinov2", num_labels=0)), ("num_labels = 0", "at least 2")),
    (
        "a stranger of the same name",
        lambda: db.convert(type("ViTForImageClassification", (nn.Module,), {})()),
        ("ViTForImageClassification", "supported"),
    ),
    ("class by unknown name", lambda: model_class_named("os.system"), ("'os.system'", *CLASSES)),
    # layers and blocks
    ("layers do not divide", lambda: partition(num_blocks=5), ("12", "5", "[1, 2, 3, 4, 6, 12]", "[3, 3, 2, 2, 2]")),
    ("convert: layers do not divide", lambda: convert(layers=4), ("4 layers", "num_blocks = 3", "[1, 2, 4]")),
    ("layers: wrong sum", lambda: partition(layers=(4, 4, 3)), ("[4, 4, 3]", "12", "11")),
    ("layers: wrong number of blocks", lambda: partition(layers=(6, 6)), ("[6, 6]", "num_blocks = 3")),
    ("layers: a zero", lambda: partition(layers=(6, 6, 0)), ("[6, 6, 0]", "positive")),
    ("layers: a negative", lambda: partition(layers=(14, -1, -1)), ("[14, -1, -1]", "positive")),
    ("no block", lambda: partition(num_blocks=0), ("0", "from 1 to", "12")),
    ("negative blocks", lambda: partition(num_blocks=-3), ("-3", "from 1 to", "12")),
    ("more blocks than layers", lambda: partition(num_blocks=13), ("13", "from 1 to", "12")),
    ("boundaries of no interval", lambda: NOISE.boundaries(0), (">= 1", "0")),
    ("overlap negative", lambda: partition(overlap=-0.1), ("-0.1", "[0, 1)")),
    ("overlap one", lambda: partition(overlap=1.0), ("1.0", "[0, 1)")),
    ("overlap nan", lambda: partition(overlap=float("nan")), ("nan", "[0, 1)")),
    (
        "strategy unknown",
        lambda: partition(strategy="equal"),
        ("'equal'", "equi-probability", "log-uniform", "uniform"),
    ),
    ("boundaries too few", lambda: Partition((0.1, 1.0), (1, 1), ((0.1, 1.0),) * 2), ("2 blocks", "3", "2")),
    ("boundaries descend", lambda: Partition((1.0, 0.1), (1,), ((0.1, 1.0),)), ("[1.0, 0.1]", "ascend")),
    ("intervals too few", lambda: Partition((0.1, 1.0), (1,), ()), ("training interval",)),
    # configs
    ("config: no block", lambda: BlocksConfig(num_blocks=0), ("num_blocks", "greater than or equal to 1")),
    ("config: fraction of a block", lambda: BlocksConfig(num_blocks=1.5), ("num_blocks", "1.5", "integer")),
    ("config: overlap negative", lambda: BlocksConfig(overlap=-1), ("overlap", "-1", "greater than or equal to 0")),
    ("config: overlap one", lambda: BlocksConfig(overlap=1), ("overlap", "1", "less than 1")),
    ("config: overlap nan", lambda: BlocksConfig(overlap=float("nan")), ("overlap", "nan")),
    ("config: partition", lambda: BlocksConfig(partition="equal"), ("partition", "'equal'", "'equi-probability'")),
    ("config: shared", lambda: BlocksConfig(shared="own"), ("shared", "'own'", "'joint'", "'replicated'", "'frozen'")),
    ("config: unknown field", lambda: BlocksConfig(blocks=3), ("BlocksConfig: blocks: no such field", "num_blocks")),
    (
        "config: unknown noise field",
        lambda: BlocksConfig(noise={"sigma": 1}),
        ("noise.sigma: no such field", "sigma_min or sigma_max?"),
    ),
    ("config: noise out of range", lambda: BlocksConfig(noise={"p_std": 0}), ("p_std", "> 0", "got 0")),
    (
        "config: unknown target field",
        lambda: BlocksConfig(target={"dim": 3}),
        ("target.dim: no such field", "embedding"),
    ),
    ("config: target token", lambda: BlocksConfig(target={"token": "cls"}), ("'cls'", "'extra'", "'replace-cls'")),
    ("config: target feedback", lambda: BlocksConfig(target={"feedback": "mid"}), ("'mid'", "'soft'", "'hard'")),
    ("config: target weight", lambda: BlocksConfig(target={"weight": "snr"}), ("'snr'", "'none'", "'edm'")),
    ("config: seed negative", lambda: BlocksConfig(seed=-1), ("seed", "-1", "greater than or equal to 0")),
    ("config: conditioning_dim zero", lambda: BlocksConfig(conditioning_dim=0), ("conditioning_dim", "0")),
    (
        "config: learned target, replicated parts",
        lambda: BlocksConfig(shared="replicated", target={"embedding": "learned"}),
        ("learned", "joint", "replicated", "frozen"),
    ),
    (
        "config: learned target, frozen parts",
        lambda: BlocksConfig(shared="frozen", target={"embedding": "learned"}),
        ("learned", "joint", "frozen"),
    ),
    # noise
    ("p_std zero", lambda: EDM(p_std=0.0), ("p_std", "> 0", "0.0")),
    ("p_std nan", lambda: EDM(p_std=float("nan")), ("p_std", "> 0", "nan")),
    ("p_mean infinite", lambda: EDM(p_mean=float("inf")), ("p_mean", "finite", "inf")),
    ("sigma_min zero", lambda: EDM(sigma_min=0.0), ("sigma_min", "> 0", "0.0")),
    ("sigma_min above sigma_max", lambda: EDM(sigma_min=3.0, sigma_max=2.0), ("sigma_max", "sigma_min = 3.0", "2.0")),
    ("sigma_min equal to sigma_max", lambda: EDM(sigma_min=2.0, sigma_max=2.0), ("sigma_max", "2.0")),
    ("sigma_max infinite", lambda: EDM(sigma_max=float("inf")), ("sigma_max", "finite", "inf")),
    ("sigma_data negative", lambda: EDM(sigma_data=-0.5), ("sigma_data", "> 0", "-0.5")),
    ("grid: steps zero", lambda: NOISE.levels(0), ("steps", ">= 1", "0")),
    ("grid: unknown", lambda: NOISE.levels(4, "linear"), ("'linear'", "equal-quantile", "karras")),
    ("grid: rho zero", lambda: NOISE.levels(4, "karras", rho=0.0), ("rho", "> 0", "0.0")),
    # numbers beyond all use, none of which takes time or memory
    ("grid: steps beyond use", lambda: NOISE.levels(10**9), ("steps", "at most 10,000", "1,000,000,000")),
    ("grid: steps of samples beyond use", lambda: NOISE.sampling_levels(10**9), ("steps", "at most 10,000")),
    ("grid: half a step", lambda: NOISE.levels(1.5), ("steps", "whole number", "1.5")),
    ("grid of masking: steps beyond use", lambda: db.Masking(vocab_size=3).levels(10**9), ("steps", "at most 10,000")),
    ("boundaries beyond use", lambda: NOISE.boundaries(10**9), ("number of blocks", "at most 10,000")),
    ("layers beyond use", lambda: partition(num_layers=10**9, num_blocks=7), ("num_layers", "at most 1,024")),
    ("quantiles beyond use", lambda: EDM(quantiles=range(10**9)), ("quantiles", "at most 10,000")),
    ("config: blocks beyond use", lambda: BlocksConfig(num_blocks=10**9), ("num_blocks", "1024")),
    ("trainer: steps beyond use", lambda: TrainConfig(steps=10**12), ("steps", "100000000")),
    ("predict: steps beyond use", lambda: predict(steps=10**9), ("steps", "at most 10,000")),
    ("predict: seeds beyond use", lambda: predict(seeds=10**9), ("seeds", "at most 10,000")),
    ("sample: steps beyond use", lambda: diffusion().sample([1], steps=10**9), ("steps", "at most 10,000")),
    ("sample: seeds beyond use", lambda: diffusion(0).sample(seeds=range(10**9)), ("seeds", "at most 10,000,000")),
    ("generate: steps beyond use", lambda: text("masked").generate(steps=10**9), ("steps", "at most 10,000")),
    ("generate: seeds beyond use", lambda: text("masked").generate(range(10**9)), ("seeds", "at most 10,000,000")),
    (
        "continue: tokens beyond use",
        lambda: text("llama").continue_texts([[1]], 10**9),
        ("max_new_tokens", "2,097,152"),
    ),
    ("continue: steps beyond use", lambda: text("llama").continue_texts([[1]], 3, steps=10**9), ("steps", "10,000")),
    ("branch: layers beyond use", lambda: db.branch(convert(num_blocks=1), 1000), ("1000", "3,000", "at most 341")),
    ("draw: labels of a later batch", lambda: draw(diffusion(), labels=[0] * 600 + [9]), ("[0, 4]", "0 to 9")),
    ("draw: images beyond memory", lambda: draw(large(), count=10**7), ("10,000,000 images of 3x512x512", "fewer")),
    # levels and block indices
    ("level above the range", lambda: model().partition.block_of(81.0), ("81", "[0.002, 80]")),
    ("level below the range", lambda: model().partition.block_of(0.001), ("0.001", "[0.002, 80]")),
    ("level zero", lambda: model().partition.block_of(0.0), ("level 0", "[0.002, 80]")),
    ("level nan", lambda: model().partition.block_of(float("nan")), ("nan", "[0.002, 80]")),
    ("level infinite", lambda: model().partition.block_of(float("inf")), ("inf", "[0.002, 80]")),
    ("one of many levels", lambda: model().partition.block_of(levels(1.0, 99.0)), ("99", "[0.002, 80]")),
    ("a nan among levels", lambda: model().partition.block_of(levels(1.0, float("nan"))), ("nan", "[0.002, 80]")),
    ("block too big", lambda: model().partition.interval(3), ("3", "from 0 to 2")),
    ("block negative", lambda: model().partition.training_interval(-1), ("-1", "from 0 to 2")),
    ("block a bool", lambda: model().partition.layer_range(True), ("True", "from 0 to 2")),
    ("block a float", lambda: model().partition.interval(1.0), ("1.0", "from 0 to 2")),  # type: ignore[arg-type]
    ("model.block too big", lambda: model().block(3), ("3", "from 0 to 2")),
    # loss
    ("loss: block too big", lambda: loss(block=3), ("3", "from 0 to 2")),
    ("loss: block negative", lambda: loss(block=-1), ("-1", "from 0 to 2")),
    ("loss: block None", lambda: loss(block=None), ("None", "from 0 to 2")),
    ("loss: level of block 0", lambda: loss(level=levels(*[0.3] * 5, 60.0)), ("60", "block 1", "block 0 owns")),
    ("loss: level of block 2", lambda: loss(level=levels(0.01, *[0.3] * 5)), ("0.01", "block 1", "block 2 owns")),
    ("loss: too few levels", lambda: loss(level=levels(0.3, 0.3)), ("(6,)", "(2,)")),
    ("loss: levels not flat", lambda: loss(level=torch.full((6, 1), 0.3)), ("(6,)", "(6, 1)")),
    ("loss: one level for all", lambda: loss(level=torch.tensor(0.3)), ("(6,)", "()")),
    ("loss: label too big", lambda: loss(labels=torch.tensor([0, 1, 2, 3, 4, 0])), ("[0, 3]", "4")),
    ("loss: label negative", lambda: loss(labels=torch.tensor([0, 1, -100, 3, 0, 0])), ("[0, 3]", "-100")),
    ("loss: labels float", lambda: loss(labels=torch.zeros(6)), ("int64", "float32")),
    ("loss: labels int32", lambda: loss(labels=torch.zeros(6, dtype=torch.int32)), ("int64", "int32")),
    ("loss: labels one-hot", lambda: loss(labels=torch.zeros(6, 4, dtype=torch.int64)), ("(6,)", "(6, 4)")),
    ("loss: labels too few", lambda: loss(labels=torch.zeros(5, dtype=torch.int64)), ("(6,)", "(5,)")),
    ("loss: no labels", lambda: loss(labels=None), ("labels", "pixel_values")),
    ("loss: no images", lambda: loss(pixel_values=None), ("pixel_values", "labels")),
    ("forward: no labels in training", lambda: model()(noise_batch()["pixel_values"]), ("labels", "pixel_values")),
    # predict
    ("predict: no step", lambda: predict(steps=0), ("steps", ">= 1", "0")),
    ("predict: negative steps", lambda: predict(steps=-2), ("steps", ">= 1", "-2")),
    ("predict: no seed", lambda: predict(seeds=0), ("seeds", ">= 1", "0")),
    ("predict: feedback", lambda: predict(feedback="mean"), ("'mean'", "soft", "hard")),
    ("predict: grid", lambda: predict(steps=2, grid="linear"), ("'linear'", "equal-quantile", "karras")),
    # samples
    ("samples: of a classifier", lambda: draw(model()), ("DiT", "diffusion models")),
    ("samples: no image", lambda: draw(diffusion(), count=0), ("count", ">= 1", "got 0")),
    ("samples: label too big", lambda: draw(diffusion(), labels=[1, 5]), ("[0, 4]", "null class", "1 to 5")),
    ("samples: label negative", lambda: draw(diffusion(), labels=[-2]), ("[0, 4]", "-2")),
    ("samples: seed negative", lambda: draw(diffusion(), seed=-1), ("seed", "from 0", "-1")),
    (
        "samples: labels of an unconditional model",
        lambda: draw(diffusion(num_classes=0), labels=[1]),
        ("DiT is unconditional", "leave them out"),
    ),
    (
        "samples: guidance of an unconditional model",
        lambda: draw(diffusion(num_classes=0), setting=Setting(steps=2, guidance=2.0)),
        ("guidance = 2", "null class", "model is unconditional", "set guidance to 1"),
    ),
    (
        "samples: guidance without label dropout",
        lambda: draw(diffusion(label_dropout=0.0), setting=Setting(steps=2, guidance=2.0)),
        ("guidance = 2", "null class", "label_dropout = 0", "set guidance to 1"),
    ),
    (
        "samples: one label, not in a list",
        lambda: diffusion().sample(labels=3, steps=1),  # type: ignore[arg-type]
        ("labels must be a list", "got 3", "labels=[3]"),
    ),
    # recipes
    (
        "recipe: a task that nobody registered",
        lambda: recipe(evaluate={"kind": "ink-error"}),
        ("evaluate.kind must be samples for DiT", "got ink-error", "import the package that registers it"),
    ),
    (
        "recipe: steps of a recipe in epochs",
        lambda: recipe(train={"steps": 3, "epochs": 2}),
        ("got steps = 3, epochs = 2", "set one of them to null"),
    ),
    (
        "recipe: accuracy of a diffusion model",
        lambda: recipe(evaluate={"kind": "accuracy", "steps": [1], "seeds": [1]}),
        ("evaluate.kind must be samples for DiT", "got accuracy"),
    ),
    (
        "recipe: samples of a classifier",
        lambda: recipe(model={"type": CLASSES[0]}),
        ("evaluate.kind must be accuracy", CLASSES[0], "got samples"),
    ),
    (
        "recipe: trunk in epochs, blocks in steps",
        lambda: recipe(trunk={"epochs": 3}),
        ("trunk and train", "both in epochs"),
    ),
    (
        "recipe: trunk without a length",
        lambda: recipe(trunk={"lr": 1e-3}),
        ("trunk and train", "both be given in steps"),
    ),
    (
        "recipe: trunk of layers that do not divide",
        lambda: trunk_recipe(recipe(trunk={"steps": 3}, model={"type": "DiT", "config": {"num_layers": 4}})),
        ("4 layers, 3 blocks", "[1, 2, 4]"),
    ),
    (
        "recipe: trunk of an unknown number of layers",
        lambda: trunk_recipe(recipe(trunk={"steps": 3}, model={"type": "DiT"})),
        ("model.config.num_layers",),
    ),
    (
        "recipe: a classifier for latents",
        lambda: recipe(data={"kind": "latents", "source": "there"}),
        ("evaluate.features: classifier", "inception", "null"),
    ),
    (
        "recipe: latents to classify",
        lambda: recipe(data={"kind": "latents", "source": "there"}, model={"type": CLASSES[0]}, evaluate={}),
        (CLASSES[0], "latents is for diffusion models"),
    ),
]


@pytest.mark.parametrize(("act", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused_with_the_value_and_what_is_allowed(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        act()
    message = str(error.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"the message lacks {missing}: {message}"


@pytest.mark.parametrize("wrong", ["google/vit-base-patch16-224", None, ViTConfig, {"a": 1}])
def test_what_is_no_module_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module") as error:
        db.convert(wrong)
    assert type(wrong).__name__ in str(error.value)


def test_configs_and_processes_cannot_be_changed_after_validation() -> None:
    config = BlocksConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.num_blocks = 7
    with pytest.raises(AttributeError):
        config.noise.p_std = 0.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        model().partition.layers = (3,)  # type: ignore[misc]


def test_a_refusal_draws_no_random_number() -> None:
    g = seeded()
    before = g.get_state()
    with pytest.raises(ValueError, match="labels"):
        model().loss({"pixel_values": noise_batch()["pixel_values"]}, block=0, generator=g)
    assert torch.equal(g.get_state(), before)


# ---- regressions ----------------------------------------------------------------------------------------------------

UNREFUSED: list[tuple[str, Callable[[], Any], tuple[str, ...]]] = [
    # Regression: comparisons with nan are false, so nan levels pass and the loss is nan.
    ("loss: level nan", lambda: loss(level=levels(*[0.3] * 5, float("nan"))), ("nan",)),
    # Regression: rho nan makes levels nan, rho inf makes equal levels.
    ("grid: rho nan", lambda: NOISE.levels(4, "karras", rho=float("nan")), ("rho", "nan")),
    ("grid: rho infinite", lambda: NOISE.levels(4, "karras", rho=float("inf")), ("rho", "inf")),
    # Regression: nan boundaries pass the check that they ascend.
    ("boundaries nan", lambda: Partition((0.1, float("nan"), 1.0), (1, 1), ((0.1, 1.0),) * 2), ("nan",)),
    # Regression: fractions that add up are rounded down, and layers are lost: (2.5, 3.5) -> (2, 3).
    ("layers: fractions", lambda: partition(num_layers=6, num_blocks=2, layers=(2.5, 3.5)), ("2.5",)),
    # Regression: an interval outside the range, or upside down, gives its end over and over.
    ("sample: outside the range", lambda: NOISE.sample(3, (100.0, 200.0), generator=seeded()), ("100",)),
    ("sample: upside down", lambda: NOISE.sample(3, (5.0, 1.0), generator=seeded()), ("5.0", "1.0")),
    # Regression: a mass outside [0, 1] gives nan.
    ("mass outside [0, 1]", lambda: NOISE.icdf(levels(0.5, 2.0)), ("2", "[0, 1]")),
    # Regression: so little mass in the range that quantiles of different masses are one level; the message
    # is about boundaries, which the user did not give, and levels() gives [80, 80, 80, 80, 0.002].
    ("range without mass", lambda: EDM(p_mean=-30.0).levels(4), ("p_mean",)),
    # Regression: feedback="" falls back to the config's in silence.
    ("predict: feedback empty", lambda: predict(feedback=""), ("''", "soft", "hard")),
]


@pytest.mark.parametrize(("act", "words"), [case[1:] for case in UNREFUSED], ids=[case[0] for case in UNREFUSED])
def test_should_be_refused_too(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    test_refused_with_the_value_and_what_is_allowed(act, words)
