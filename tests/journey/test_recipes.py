"""Every recipe that ships: parsed, inspected, and trained, evaluated and sampled at tiny size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers_models import TINY
from PIL import Image

from diffusionblocks.cli import main
from diffusionblocks.data.latent_data import LatentScale
from diffusionblocks.data.latent_shards import Prompts, write_shards
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.tasks import LanguageConfig
from diffusionblocks.families import family_named
from diffusionblocks.families.conditioned import ConditionedFamily
from diffusionblocks.planning import MARGIN, predict

FOLDER = Path(__file__).parents[2] / "recipes"
#: Those of pretrained weights need a folder: `test_cli_pretrained.py` has them.
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.stem != "finetune")
LAYERS = {
    "vit/tiny-imagenet": 12,
    "dit/digits": 6,
    "dit/digits-flow": 6,
    "dit/imagenet-latents": 24,
    "text/masked_topics": 6,
    "noprop/cifar100": 3,
    "flow/12gb": 24,
    "flow/16gb": 24,
    "flow/24gb": 38,
    "flow/flux-24gb": 57,
}
LAYERS |= {"text/autoregressive_topics": 4, "text/recurrent_topics": 2, "text/recurrent_prose": 4}  # else 12

SPEEDS = ("images_per_second", "tokens_per_second")

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def test_recipes_have_names_of_their_own() -> None:
    names = {load_recipe(path).name for path in RECIPES}
    assert len(names) == len(RECIPES), "runs of two recipes would share a folder"
    assert {name_of(path) for path in RECIPES} >= {
        "vit/digits",
        "vit/cifar10",
        "vit/cifar100",
        "vit/cifar100-released",
        "vit/tiny-imagenet",
        "dit/digits",
        "dit/cifar10",
        "dit/imagenet-latents",
        "text/masked_topics",
        "text/masked_text8",
        "text/autoregressive_topics",
        "text/autoregressive_prose",
        "text/recurrent_topics",
        "text/recurrent_prose",
    }


@each_recipe
def test_recipe_parses_and_inspects(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(path)
    fields = family_named(recipe.model.type).depth_fields
    depth = sum(recipe.model.config[field] for field in fields)
    assert depth == LAYERS.get(name_of(path), 12)
    sets = []
    if path.parent.name == "flow":  # outlines of billions of parameters take long
        depth = 4
        sets = [part for field in fields for part in ("--set", f"model.config.{field}={depth // len(fields)}")]
    assert main(["inspect", str(path), *sets]) == 0
    out = capsys.readouterr().out
    assert f"{depth} layers" in out
    rows = [line.split() for line in out.splitlines()]
    blocks = [row for row in rows if row[0].isdigit()]
    assert [row[0] for row in blocks] == [str(b) for b in range(recipe.blocks.num_blocks)]
    layers = sum(int(row[1].split("-")[1]) - int(row[1].split("-")[0]) + 1 for row in blocks)
    assert layers == depth * (recipe.blocks.num_blocks if recipe.blocks.split == "experts" else 1)


@each_recipe
def test_recipe_is_not_refused_for_what_it_writes(path: Path) -> None:
    """Its prompts and what follows them have room in its model, in blocks and end to end."""
    recipe = load_recipe(path)
    if not isinstance(recipe.evaluate, LanguageConfig):
        return
    options = recipe.evaluate.model_copy(update={"mauve": None, "teacher": None})  # which need not be installed
    for method in ("diffusionblocks", "end-to-end"):
        measured = recipe.model_copy(update={"method": method, "evaluate": options})
        experiment = Experiment(measured)
        experiment.task.check(experiment, experiment.outline)


@pytest.mark.exhaustive  # a step of real width is followed for a quarter of a minute
@pytest.mark.parametrize(("name", "size"), [("12gb", 12), ("16gb", 16), ("24gb", 24), ("flux-24gb", 24)])
def test_presets_fit_their_budget(name: str, size: int) -> None:
    recipe = load_recipe(FOLDER / f"flow/{name}.yaml", ["device=cuda"])
    assert predict(recipe).peak <= (1 - MARGIN) * size * 2**30


def test_the_papers_diffusion_transformers_have_their_published_sizes() -> None:
    """DiT-S/2 and DiT-L/2 of arXiv 2212.09748 have 33 and 458 million parameters."""
    recipes = [load_recipe(FOLDER / f"dit/{name}.yaml") for name in ("cifar10", "imagenet-latents")]
    counts = [
        sum(p.numel() for p in Experiment(recipe).original.weights().outline().parameters()) / 1e6 for recipe in recipes
    ]
    assert counts == pytest.approx([33, 458], abs=0.7)


# ---- trained at tiny size -----------------------------------------------------------------------------------


@pytest.fixture
def latents(tmp_path: Path) -> tuple[Path, Path]:
    """Random latents of 2 x 16 images, and a random autoencoder that decodes them."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    shape = (16, 4, 8, 8)
    for split in ("train", "validation"):
        write_shards(
            tmp_path / "latents",
            split,
            [(torch.randn(shape), torch.rand(shape), torch.arange(16) % 10)],
            shard_rows=10,
            class_names=[str(i) for i in range(10)],
            vae="random",
            scale=LatentScale(0.18215),
        )
    return tmp_path / "latents", tmp_path / "vae"


def with_prompts(folder: Path) -> Path:
    """Random latents of 16 images with states of prompts, as the tiny class reads them."""
    states = {"encoder_hidden_states": torch.randn(16, 5, 24), "pooled_projections": torch.randn(16, 20)}
    mean = torch.randn(16, 4, 8, 8)
    options: dict[str, Any] = {"shard_rows": 10, "class_names": ["image"], "vae": "random"}
    prompts = Prompts("none", 5, {name: value[0] for name, value in states.items()})
    rows = [(mean, mean.abs(), torch.zeros(16, dtype=torch.int64), states)]
    for split in ("train", "test"):
        write_shards(folder, split, rows, **options, scale=LatentScale(0.18215), prompts=prompts)
    return folder


def tiny(path: Path, tmp_path: Path) -> dict[str, Any]:
    """What makes a recipe small."""
    recipe = load_recipe(path)
    if isinstance(family_named(recipe.model.type), ConditionedFamily):
        # An optimizer of 8 bits is compiled first; test_eight_bit.py has it.
        counts = {"train.steps": 2, "train.batch_size": 4, "train.warmup_steps": 0, "train.optimizer": "adamw"}
        measures = {"evaluate.samples": 4, "evaluate.steps": "[2]", "evaluate.grid_images": 2}
        return {"device": "cpu", "model.config": json.dumps(TINY[recipe.model.type].config), **counts, **measures}
    changes: dict[str, Any] = {
        "device": "cpu",
        "model.config.hidden_size": 16,
        "model.config.num_attention_heads": 2,
        f"model.config.{family_named(recipe.model.type).depth_field}": 2 * recipe.blocks.num_blocks,
        "train.epochs": "null",
        "train.warmup_epochs": 0,
        "train.warmup_steps": 0,
        "train.steps": 2,
        "train.batch_size": 4,
        "train.compile": "false",
        "train.cuda_graph": "false",
        "evaluate.steps": "[1, 2]",
    }
    if recipe.trunk is not None:
        changes["trunk.steps"] = 2
    if recipe.evaluate.kind == "bits":
        length = {"model.config.sequence_length": 16, "model.config.mlp_size": 16, "data.length": 16}
        return changes | length | {"evaluate.steps": 4, "evaluate.limit": 8}
    if recipe.evaluate.kind == "language":
        counts = {"evaluate.samples": 3, "evaluate.prompt_length": 4, "evaluate.new_tokens": 5, "evaluate.levels": 2}
        sizes: dict[str, Any] = {"data.length": 16, "evaluate.steps": 2, "evaluate.limit": 8, **counts}
        if recipe.data.kind == "tokens":
            sizes |= {"data.vocab_size": 280, "model.config.vocab_size": 280, "data.cache": tmp_path / "cache"}
            sizes |= {"data.train_limit": "null", "data.train_characters": "null"}
        if recipe.model.type == "RecurrentDepth":
            shape = {"num_prelude_layers": 1, "num_coda_layers": 1, "mlp_size": 16, "mean_recurrence": 2}
        else:
            shape = {"intermediate_size": 16, "num_key_value_heads": 2}
        return changes | sizes | {f"model.config.{name}": value for name, value in shape.items()}
    if recipe.model.type == "NoPropCNN":
        del changes["model.config.num_attention_heads"]
        return changes | {"model.config.num_filters": 2, "evaluate.seeds": "[1, 2]"}
    if recipe.evaluate.kind == "accuracy":
        return changes | {"model.config.intermediate_size": 16, "evaluate.seeds": "[1, 2]"}
    return changes | {
        "evaluate.samples": 6,
        "evaluate.batch_size": 4,
        "evaluate.features_folder": tmp_path / "features",
    }


def settings(recipe: Recipe) -> int:
    """How many rows the evaluation of a tiny recipe has."""
    options = recipe.evaluate
    if options.kind == "language":  # where blocks have context logits, they vote by two rules
        target = recipe.blocks.target
        return 3 if recipe.method == "diffusionblocks" and (target is None or target.adds_likelihood) else 1
    if options.kind == "bits":
        return 1
    if options.kind == "samples":
        return len(options.solver) * len(options.steps) * len(options.grid) * len(options.guidance)
    lists = (options.combine, options.steps, options.seeds)
    return math.prod(len(values or [None]) for values in lists) if recipe.method == "diffusionblocks" else 1


@each_recipe
@pytest.mark.parametrize("method", ["diffusionblocks", pytest.param("end-to-end", marks=pytest.mark.exhaustive)])
@pytest.mark.filterwarnings("ignore:.*covariance is singular:UserWarning")
def test_recipe_trains_at_tiny_size(
    path: Path,
    method: str,
    tmp_path: Path,
    image_folder: Callable[[int, int, str], Path],
    latents: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = yaml.safe_load(path.read_text())
    changes = tiny(path, tmp_path) | {"method": method}
    kind = values["data"]["kind"]
    if kind == "images":
        classes = values["data"]["num_classes"]
        folder = image_folder(values["data"]["image_size"], classes, values["data"].get("label_column", "label"))
        changes["data.source"] = folder
        # The classifier is trained on CIFAR-10's size, and by the blocks alone.
        if load_recipe(path).evaluate.kind == "samples" and (
            method == "end-to-end" or values["data"]["image_size"] > 32
        ):
            changes["evaluate.features"] = "null"
    elif path.parent.name == "flow":
        changes |= {"data.source": with_prompts(tmp_path / "prompted"), "data.vae": latents[1]}
    elif kind == "latents":
        # 16x16 images of 8x8 latents
        changes |= {"data.source": latents[0], "data.vae": latents[1], "evaluate.features": "null"}
        changes |= {"model.config.sample_size": 8, "model.config.num_classes": 10, "model.config.in_channels": 4}
        changes["data.test_split"] = "validation"
    elif kind == "tokens":
        (tmp_path / "prose").mkdir()
        for split, many in (("train", 200), ("valid", 20), ("test", 20)):
            text = "the quick brown fox jumps over the lazy dog\n\n\n" * many
            (tmp_path / "prose" / f"{split}.txt").write_text(text)
        changes["data.source"] = tmp_path / "prose"
    elif kind == "text":
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 100)
        changes["data.source"] = tmp_path / "text.txt"
    elif values["evaluate"].get("kind") == "samples":
        changes["evaluate.features"] = "null"  # test_cli_images.py measures the digits
    sets = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    recipe = load_recipe(path, sets[1::2])
    out = tmp_path / "run"
    assert main(["train", str(path), "--out", str(out), "--quiet", *sets]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(path), "--model", str(out / "model"), "--json", str(out / "e.json"), *sets]) == 0
    table = capsys.readouterr().out
    by_level = recipe.evaluate.kind == "language" and method == "diffusionblocks"
    rows, *_ = table.partition("real test images:")
    assert len(rows.splitlines()) == 2 + settings(recipe) + (4 if by_level else 0)
    (results, again) = (json.loads((out / name).read_text())["rows"] for name in ("result.json", "e.json"))
    timeless = [[{k: v for k, v in row.items() if k not in SPEEDS} for row in rows] for rows in (results, again)]
    for row in (*timeless[0], *timeless[1]):
        if (real := row.get("real")) is not None:  # of features that the first run kept: other batches, other rounding
            real["inception_score_analogue"] = pytest.approx(real["inception_score_analogue"], rel=1e-6)
    assert timeless[0] == timeless[1], "a saved model measures as the trained one did"
    assert json.loads((out / "recipe.json").read_text())["method"] == method
    assert (out / "log.jsonl").is_file()
    if recipe.evaluate.kind == "accuracy":
        return
    arguments = ["sample", str(path), "--model", str(out / "model"), "--out", str(out / "s"), "--count", "3", *sets]
    assert main([*arguments, "--quiet"]) == 0
    if recipe.evaluate.kind == "bits":
        assert [len(line) for line in (out / "s" / "samples.txt").read_text().splitlines()] == [16] * 3
        return
    if recipe.evaluate.kind == "language":
        texts = (out / "s" / "samples.txt").read_text().rstrip("\n").split("\n\n")
        assert len(texts) == 3
        assert all("|" in text for text in texts)
        return
    measured = recipe.evaluate.features is not None
    assert all((row["fd_train"] is not None and row["fd_train"] > 0) == measured for row in results)
    (size, *_) = {Image.open(file).size for file in sorted((out / "s" / "images").iterdir())}
    assert size == {"latents": (16, 16), "digits": (8, 8)}.get(kind, (values["data"].get("image_size"),) * 2)
    assert (out / "s" / "chain.png").exists()
