"""Sound inputs, which the fuzz suite then damages: tiny models, runs, data and recipes, made by the project itself.

Each builder fills a workspace, a folder in which commands run: `recipe.yaml`, and beside it what the recipe names.
"""

from __future__ import annotations

import copy
import io
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Values = dict[str, Any]

_TRAIN: Values = {"steps": 2, "batch_size": 8, "lr": 1e-3, "log_every": 1}
_LANGUAGE: Values = {
    "kind": "language", "samples": 2, "limit": 4, "levels": 2, "prompt_length": 4, "new_tokens": 4, "steps": 2,
}  # fmt: skip

VIT: Values = {
    "name": "vit",
    "model": {
        "type": "ViTForImageClassification",
        "config": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10,
        },
    },
    "blocks": {"num_blocks": 2},
    "data": {"kind": "digits"},
    "train": _TRAIN,
    "evaluate": {"limit": 12, "steps": [2], "seeds": [1]},
    "device": "cpu",
}  # fmt: skip

DIT: Values = {
    "name": "dit",
    "model": {
        "type": "DiT",
        "config": {
            "sample_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "num_layers": 2,
            "num_attention_heads": 2, "mlp_ratio": 1.0, "num_classes": 10,
        },
    },
    "blocks": {"num_blocks": 2, "target": {"kind": "image", "label_dropout": 0.1}},
    "data": {"kind": "digits"},
    "train": _TRAIN,
    "evaluate": {"kind": "samples", "samples": 3, "steps": [2], "features": None, "grid_images": 3},
    "device": "cpu",
}  # fmt: skip

MASKED: Values = {
    "name": "masked",
    "model": {
        "type": "MaskedTransformer",
        "config": {
            "vocab_size": 27, "sequence_length": 8, "embedding_size": 8, "hidden_size": 16, "num_layers": 2,
            "num_attention_heads": 2, "mlp_size": 16,
        },
    },
    "blocks": {"num_blocks": 2, "noise": {"kind": "masking", "vocab_size": 27}, "target": {"kind": "tokens"}},
    "data": {"kind": "text", "length": 8, "source": "data"},
    "train": _TRAIN,
    "evaluate": {"kind": "bits", "limit": 4, "samples": 2, "steps": 2},
    "device": "cpu",
}  # fmt: skip

LLAMA: Values = {
    "name": "llama",
    "model": {
        "type": "LlamaForCausalLM",
        "config": {
            "vocab_size": 27, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
            "tie_word_embeddings": False,
        },
    },
    "blocks": {"num_blocks": 2, "target": {"kind": "next-token"}},
    "data": {"kind": "text", "length": 8, "source": "data"},
    "train": _TRAIN,
    "evaluate": _LANGUAGE,
    "device": "cpu",
}  # fmt: skip

RECURRENT: Values = {
    "name": "recurrent",
    "model": {
        "type": "RecurrentDepth",
        "config": {
            "vocab_size": 27, "sequence_length": 16, "hidden_size": 16, "num_prelude_layers": 1, "num_core_layers": 1,
            "num_coda_layers": 1, "num_attention_heads": 2, "mlp_size": 16, "mean_recurrence": 2, "backprop_depth": 1,
        },
    },
    "blocks": {"num_blocks": 1, "overlap": 0.0, "target": {"kind": "next-token"}},
    "data": {"kind": "text", "length": 8, "source": "data"},
    "train": _TRAIN,
    "evaluate": _LANGUAGE,
    "device": "cpu",
}  # fmt: skip


def changed(values: Values, **changes: Any) -> Values:
    """A copy of a recipe's values with others at dotted names; `__` stands for the dot."""
    result = copy.deepcopy(values)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return result


_TOKENS = {"kind": "tokens", "length": 8, "source": "data", "cache": "cache", "vocab_size": 280}
TOKENS = changed(LLAMA, name="tokens", data=_TOKENS, model__config__vocab_size=280)
JOINT = changed(VIT, name="joint", blocks__shared="joint")
TRUNK = changed(DIT, name="trunk", blocks__num_blocks=1, model__config__num_layers=1)
IMAGES = changed(
    VIT,
    name="images",
    data={"kind": "images", "source": "data", "image_size": 8, "channels": 1, "mean": [0.5], "std": [0.5]},
    model__config__num_labels=3,
)
LATENTS = changed(
    DIT,
    name="latents",
    data={"kind": "latents", "source": "data", "test_split": "validation"},
    model__config__sample_size=4,
    model__config__num_classes=3,
)
CONTROL = changed(VIT, name="control", method="end-to-end")
LANGUAGE_CONTROL = changed(LLAMA, name="language-control", method="end-to-end")
#: what is trained first, and checkpoints on the way
_LONG = {"train__steps": 4, "train__checkpoint_every": 3, "train__keep_checkpoints": 9}
RUN = changed(VIT, name="run", train__ema_decay=0.9, **_LONG)
RUN_JOINT = changed(JOINT, name="run-joint", **_LONG)
RUN_FITTED = changed(VIT, name="run-fitted", fit={"steps": 2, "rounds": 2, "grid": 5, "examples": 16}, **_LONG)
RUN_BRANCHED = changed(DIT, name="run-branched", trunk={"steps": 2}, **_LONG)
RUN_CONTROL = changed(CONTROL, name="run-control", **_LONG)


def write_recipe(values: Values, folder: Path) -> None:
    """The YAML of a workspace."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


# ---- data ----------------------------------------------------------------------------------------------------

_TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n\n"


def write_text(folder: Path) -> None:
    """A corpus: plain and packed files."""
    folder.mkdir()
    (folder / "train-0.txt").write_text(_TEXT * 6)
    with lzma.open(folder / "train-1.txt.xz", "wt") as file:
        file.write(_TEXT[::-1] * 6)
    (folder / "test.txt").write_text(_TEXT * 3)


def write_images(folder: Path) -> None:
    """Parquet in the schema of the hub: two shards of train, one of test."""
    import datasets
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    names = ["cat", "dog", "owl"]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, count in (("train-0", 12), ("train-1", 12), ("test", 12)):
        images = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = {"img": images, "label": [i % len(names) for i in range(count)]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(folder / f"{split}.parquet"))


def write_latents(folder: Path) -> None:
    """Latents of two splits, in shards."""
    import torch

    from diffusionblocks.data.latent_data import LatentScale
    from diffusionblocks.data.latent_shards import write_shards

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        mean, std = (torch.rand(12, 1, 4, 4, generator=generator) for _ in range(2))
        rows = [(mean, std, torch.arange(12) % 3)]
        names = ["cat", "dog", "owl"]
        write_shards(folder, split, rows, shard_rows=8, class_names=names, vae="none", scale=LatentScale(1.0))


# ---- workspaces ----------------------------------------------------------------------------------------------


def model(values: Values, data: Callable[[Path], None] | None = None, *, apart: bool = False) -> Callable[[Path], None]:
    """A workspace with a saved model, and with a folder a block where blocks were trained `apart`."""

    def make(folder: Path) -> None:
        import torch

        from diffusionblocks.experiments.experiment import Experiment
        from diffusionblocks.experiments.recipe import load_recipe

        write_recipe(values, folder)
        if data is not None:
            data(folder / "data")
        recipe = load_recipe(folder / "recipe.yaml")
        experiment = Experiment(recipe)
        built = experiment.build()
        generator = torch.Generator().manual_seed(values.get("train", {}).get("seed", 0))
        with torch.no_grad():
            for parameter in built.parameters():  # what starts at zero would hide what is read wrongly
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        experiment.data("train")
        experiment.save(built, folder / "model")
        if apart:
            for block in range(values["blocks"]["num_blocks"]):
                alone = recipe.model_copy(update={"train": recipe.train.model_copy(update={"blocks": (block,)})})
                experiment.derive(alone).save(built, folder / f"apart-{block}")

    return make


def branched(values: Values) -> Callable[[Path], None]:
    """A workspace with a trunk, and with blocks that were copied from it and moved."""

    def make(folder: Path) -> None:
        import torch

        import diffusionblocks as db

        model(values)(folder)
        (folder / "model").rename(folder / "trunk")
        blocks = db.branch(db.load(folder / "trunk"), 2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in blocks.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        blocks.save_pretrained(folder / "model")

    return make


def pictures(folder: Path) -> None:
    """A workspace with images, and with an autoencoder that makes latents of them."""
    import torch
    from diffusers import AutoencoderKL

    write_images(folder / "data")
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(folder / "vae")


def run(values: Values) -> Callable[[Path], None]:
    """A workspace with a run that was killed: its last checkpoint and what comes after it are not there."""

    def make(folder: Path) -> None:
        from diffusionblocks.cli import main

        write_recipe(values, folder)
        recipe, out = str(folder / "recipe.yaml"), folder / "run"
        if main(["train", recipe, "--out", str(out), "--quiet"]) != 0:
            raise RuntimeError("a sound recipe must train")
        shutil.rmtree(sorted((out / "checkpoints").glob("iteration-*"))[-1])
        shutil.rmtree(out / "model")
        (out / "result.json").unlink()

    return make


def report(values: Values, *commands: list[str]) -> Callable[[Path], None]:
    """A workspace with what commands left in the folder `run`, but for weights: no page reads them."""

    def make(folder: Path) -> None:
        import os

        from diffusionblocks.cli import main

        write_recipe(values, folder)
        os.chdir(folder)
        for command in commands:
            if main(command) != 0:
                raise RuntimeError(f"a sound command must work: {command}")
        for path in [*Path("run").rglob("*.safetensors"), *Path("run").rglob(".lock")]:
            path.unlink()
        for path in [*Path("run").rglob("checkpoints"), *Path("run").rglob("images")]:
            shutil.rmtree(path)

    return make


def data(values: Values, write: Callable[[Path], None]) -> Callable[[Path], None]:
    """A workspace with data, and with what a first training left in a cache."""

    def make(folder: Path) -> None:
        from diffusionblocks.cli import main

        write_recipe(values, folder)
        write(folder / "data")
        if values["data"].get("cache"):
            import os

            os.chdir(folder)
            if main(["train", "recipe.yaml", "--out", "first", "--quiet"]) != 0:
                raise RuntimeError("a sound recipe must train")
            shutil.rmtree(folder / "first")

    return make


def recipe(values: Values, write: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """A workspace with a recipe, and the data it needs."""

    def make(folder: Path) -> None:
        write_recipe(values, folder)
        if write is not None:
            write(folder / "data")

    return make


def _seeded(values: Values) -> Values:
    return changed(values, train__seed=1)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "model-vit": model(VIT, apart=True),
    "model-joint": model(JOINT),
    "model-dit": model(DIT, apart=True),
    "model-trunk": model(TRUNK),
    "model-branched": branched(TRUNK),
    "model-masked": model(MASKED, write_text),
    "model-llama": model(LLAMA, write_text),
    "model-tokens": model(TOKENS, write_text),
    "model-recurrent": model(RECURRENT, write_text),
    "model-control": model(CONTROL),
    "model-language-control": model(LANGUAGE_CONTROL, write_text),
    "run-plain": run(RUN),
    "run-joint": run(RUN_JOINT),
    "run-fitted": run(RUN_FITTED),
    "run-branched": run(RUN_BRANCHED),
    "run-control": run(RUN_CONTROL),
    "report-run": report(
        changed(VIT, evaluate__combine=["mean", "chain"]),
        ["train", "recipe.yaml", "--out", "run", "--quiet"],
        ["evaluate", "run", "--by-level", "--json", "run/levels.json"],
    ),
    "report-samples": report(
        RUN_BRANCHED,
        ["train", "recipe.yaml", "--out", "run", "--quiet"],
        ["sample", "run", "--count", "2", "--quiet"],
    ),
    "report-comparison": report(
        VIT, ["compare", "recipe.yaml", "--out", "run", "--quiet", "--rows", "end-to-end-1-x2", "diffusionblocks"]
    ),
    "report-ablation": report(
        VIT,
        ["ablate", "recipe.yaml", "--out", "run", "--quiet", "--over", "blocks.overlap=0,0.1", "--seeds", "0,1"],
    ),
    "data-text": data(changed(MASKED, data__cache="cache"), write_text),
    "data-tokens": data(TOKENS, write_text),
    "data-images": data(changed(IMAGES, data__cache="cache"), write_images),
    "data-latents": data(LATENTS, write_latents),
    "data-pictures": pictures,
    "recipe-vit": recipe(VIT),
    "recipe-fitted": recipe(RUN_FITTED),
    "recipe-dit": recipe(DIT),
    "recipe-branched": recipe(RUN_BRANCHED),
    "recipe-masked": recipe(MASKED, write_text),
    "recipe-llama": recipe(LLAMA, write_text),
    "recipe-tokens": recipe(TOKENS, write_text),
    "recipe-recurrent": recipe(RECURRENT, write_text),
    "recipe-control": recipe(CONTROL),
    "recipe-images": recipe(IMAGES, write_images),
    "recipe-latents": recipe(LATENTS, write_latents),
}
#: the same models from other seeds, to swap files with
BUILDERS |= {
    "other-vit": model(_seeded(VIT)),
    "other-dit": model(_seeded(DIT)),
    "other-llama": model(_seeded(LLAMA), write_text),
    "other-control": model(_seeded(CONTROL)),
}
