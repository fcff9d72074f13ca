"""What the tests of building share: sources of tiny models, and comparison to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DIT_FAMILIES,
    FAMILIES,
    POLICIES,
    same_states,
    tiny,
)
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks import families as families
from diffusionblocks.core.weights import Fresh

ALL = (*FAMILIES, *DIT_FAMILIES)
CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dit": "DiT",
    "diffusers-dit": "DiTTransformer2DModel",
}
LAYERS = 6

each_family = pytest.mark.parametrize("family", ALL)


def fresh(family: str, seed: int = 0, layers: int = LAYERS, **overrides: Any) -> Fresh:
    return Fresh(CLASSES[family], tiny(family, layers=layers, **overrides).config, seed=seed)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every alias of every parameter and buffer, those that no file holds included."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = tensors(a), tensors(b)
    return same_states(left, right) and all(left[n].requires_grad == right[n].requires_grad for n in left)


def policies_of(family: str) -> list[str]:
    # A fresh DiT's head is zero, so freezing it is refused.
    return [policy for policy in POLICIES if (family, policy) != ("dit", "frozen")]


def saved(
    path: Path, family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **overrides: Any
) -> nn.Module:
    model: Any = nn.Module.to(tiny(family, layers=LAYERS, seed=4, **overrides), dtype=dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model  # type: ignore[no-any-return]


def reference(family: str, path: Path, config: db.BlocksConfig, **values: Any) -> db.DiffusionBlocks:
    return db.convert(families.pretrained(CLASSES[family], path, values), config)
