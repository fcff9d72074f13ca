"""The models of the benchmarks, their recipes and synthetic data, and a fast way to build them.

What weights and images hold matters neither for memory nor for time, so models are laid out on the meta device and
filled where they are wanted with small random numbers, none of them zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.modules import bytes_of
from ..core.model import DiffusionBlocks
from ..core.partition import even_layers
from ..data import ImageData, LatentData, TextChunks, TextData
from ..data.dataset import Dataset
from ..data.text_config import TextSection
from ..experiments.experiment import Experiment
from ..experiments.recipe import Recipe, parse_recipe
from ..families import family_named, rebuild_config
from .methods import METHODS, Spec, check_names

#: So long that no run of a benchmark comes to its end.
_STEPS = 20_000
#: Numbers that weights are filled with, again and again; prime, so that rows of a matrix differ.
_PATTERN = 1_048_573


@dataclass(frozen=True)
class BenchModel:
    """A model to measure.

    Attributes:
        type: its class.
        config: values of the class's config, without the number of layers; of a class with two lists of layers these
            have the numbers of both, whose proportion other depths keep.
        layers: number of layers.
        batch_size: samples of a step.
        tiny: changes of `config` for a toy of the same shape.
        tiny_layers: layers of the toy.
        length: tokens of a sample; None: samples are images.
        tiny_length: of the toy.
        train: what its recipes say of training, beside the benchmarks' own settings.
    """

    type: str
    config: dict[str, Any]
    layers: int
    batch_size: int
    tiny: dict[str, Any]
    tiny_layers: int
    length: int | None = None
    tiny_length: int = 16
    train: dict[str, Any] = field(default_factory=dict)


_TINY_DIT = {"sample_size": 8, "hidden_size": 32, "num_attention_heads": 2, "num_classes": 4}


def _dit(hidden: int, heads: int, layers: int, batch_size: int) -> BenchModel:
    config = {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_classes": 1000,
    }
    return BenchModel("DiT", config, layers, batch_size, _TINY_DIT, 12)


MODELS: dict[str, BenchModel] = {
    "dit-l-2": _dit(1024, 16, 24, 64),
    "vit-h": BenchModel(
        "ViTForImageClassification",
        {
            "hidden_size": 1280,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
            "image_size": 224,
            "patch_size": 14,
            "num_channels": 3,
            "num_labels": 1000,
        },
        32,
        64,
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 4,
        },
        8,
    ),
    "dit-s-2": _dit(384, 6, 12, 256),
    "llama-7b": BenchModel(
        "LlamaForCausalLM",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
        },
        32,
        8,
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16,
        },
        8,
        length=1024,
        train={"weights": "bfloat16"},
    ),
    "flux": BenchModel(
        "FluxTransformer2DModel",
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": [16, 56, 56],
        },
        57,
        1,
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 1,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": [4, 6, 6],
        },
        6,
        train={"weights": "bfloat16"},
    ),
}

_TINY_BATCH = 4


def layers_of(spec: Spec) -> int:
    """Layers of the whole model."""
    model = MODELS[spec.model]
    return spec.depth or (model.tiny_layers if spec.tiny else model.layers)


def batch_size_of(spec: Spec) -> int:
    """Samples of a step."""
    return spec.batch_size or (_TINY_BATCH if spec.tiny else MODELS[spec.model].batch_size)


def recipe_of(spec: Spec) -> Recipe:
    """The recipe of a measurement; of an alternative, with our own AdamW in place of its optimizer.

    Raises:
        ValueError: an unknown model or method, or more blocks than layers.
    """
    check_names("model", [spec.model], list(MODELS))
    check_names("method", [spec.method], list(METHODS))
    model, method = MODELS[spec.model], METHODS[spec.method]
    family = family_named(model.type)
    layers = layers_of(spec)
    if not 1 <= spec.blocks <= layers:
        raise ValueError(f"blocks = {spec.blocks}: {spec.model} has {layers} layers; choose from 1 to {layers}")
    parts = even_layers(layers, spec.blocks)
    config = model.config | (model.tiny if spec.tiny else {})
    train: dict[str, Any] = {
        "steps": _STEPS,
        "batch_size": batch_size_of(spec),
        "lr": 1e-4,
        "lr_schedule": "constant",
        "gradient_clip": None,
        "precision": "bfloat16",
        # Whole, a model of 24 layers takes minutes to compile, for every depth anew.
        "compile": "layers" if spec.compile else False,
        "cuda_graph": spec.cuda_graph,
        "schedule": "round-robin",
        "steps_per_switch": spec.steps_per_switch,
        "offload": spec.offload,
        "log_every": 50,
        **model.train,
        **method.train,
    }
    values = {
        "name": f"bench-{spec.model}",
        "method": "diffusionblocks" if method.kind == "blocks" else "end-to-end",
        "model": {
            "type": model.type,
            "config": family.with_depth(config, parts[0] if method.kind == "short" else layers),
        },
        "data": _data(family.target, config, length_of(spec)),
        "train": train,
        "evaluate": _EVALUATE[family.target],
        "device": spec.device,
    }
    if spec.task == "fits" and method.train.get("resident") == "active":
        train["blocks"] = [0]  # the largest: the others wait on the host
    if method.kind == "blocks":
        values["blocks"] = {"num_blocks": spec.blocks, "layers": parts if len(set(parts)) > 1 else None}
    return parse_recipe(values, f"the benchmark of {spec.model}")


#: What recipes say of evaluation, which no benchmark runs, by their family's target.
_EVALUATE: dict[str, dict[str, Any]] = {
    "label": {"kind": "accuracy"},
    "image": {"kind": "samples", "features": None, "grid": ["equal-quantile"]},
    "next-token": {"prompt_length": 8, "new_tokens": 8},
}


def length_of(spec: Spec) -> int | None:
    """Tokens of a sample; None: samples are images."""
    model = MODELS[spec.model]
    return model.tiny_length if model.length and spec.tiny else model.length


def _data(target: str, config: dict[str, Any], length: int | None) -> dict[str, Any]:
    if length is not None:
        return {"kind": "topics", "length": length, "placement": "device"}
    if target == "image":
        return {"kind": "latents", "source": "synthetic", "placement": "device"}
    return {
        "kind": "images",
        "source": "synthetic",
        "image_size": config["image_size"],
        "num_classes": config["num_labels"],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "placement": "device",
    }


def examples_of(recipe: Recipe) -> int:
    """How many examples the synthetic data have: two batches."""
    return 2 * recipe.train.batch_size


def bytes_of_data(data: Dataset) -> int:
    """Bytes of the data where they are kept, in whatever form they have there."""
    return bytes_of(data.tensors())


def splits_of(recipe: Recipe) -> dict[str, Dataset]:
    """Random training data that fit the recipe."""
    config, count = recipe.model.config, examples_of(recipe)
    generator = torch.Generator().manual_seed(0)
    family = family_named(recipe.model.type)
    if isinstance(recipe.data, TextSection):
        size, words = (count + 1) * recipe.data.length, config["vocab_size"]
        ids = torch.randint(words, (size,), generator=generator).to(torch.uint16)
        return {"train": TextChunks(TextData(ids, words), recipe.data.length)}
    classes = config.get(family.class_count_field, 1)
    labels = torch.arange(count) % classes
    names = tuple(map(str, range(classes)))
    if family.target == "label":
        shape = (count, 3, config["image_size"], config["image_size"])
        return {"train": ImageData(torch.randint(256, shape, dtype=torch.uint8, generator=generator), labels, names)}
    batch = family.empty_batch(rebuild_config(recipe.model.type, config), count)
    mean = torch.randn(batch.pop("pixel_values").shape, generator=generator).half()
    states = {name: torch.ones_like(value) for name, value in batch.items() if name != "labels"}  # of prompts
    return {
        "train": LatentData(
            (mean,),
            (torch.full_like(mean, 0.1),),
            labels,
            names,
            "synthetic",
            1.0,
            states={name: (value,) for name, value in states.items()},
            empty={name: value[0] for name, value in states.items()},
        )
    }


def build(recipe: Recipe, device: torch.device) -> nn.Module:
    """Build the recipe's model on a device, as `Experiment.build` does but for its weights (see above)."""
    model = Experiment(recipe).outline
    if isinstance(model, DiffusionBlocks) and recipe.train.blocks is not None:
        for index in recipe.train.blocks:
            fill(model.blocks[index], device)
    else:
        fill(model, device)
    return model.train()


def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Give a model that lies on the meta device memory on `device`, and small random numbers."""
    model.to_empty(device=device)
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(device)
    patterns = {torch.float32: pattern}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point():
                tensor.zero_()
                continue
            values = patterns.setdefault(tensor.dtype, pattern.to(tensor.dtype))
            for piece in tensor.view(-1).split(_PATTERN):
                piece.copy_(values[: len(piece)])
    return model
