"""Classes of transformers and diffusers, tiny, and what comes of converting each: prints docs/models.md.

    PYTHONPATH=src python tests/model_classes.py > docs/models.md

`CLASSES` is the one list. A class that is added here is tried by `tests/unit/test_supported_classes.py`, which holds
the table to what happens.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers_models import TINY, batch_for
from torch import Tensor, nn

import diffusionblocks as db

INTRODUCTION = """# Models

What becomes of the classes of transformers and diffusers. *works*: a tiny model of the class was converted, and each of
its blocks trained. Else the line with which it is refused. A class works in the variants of its config that are exact;
others are refused, and the message names the field. A family for a class of your own: [extending](extending.md).
`DINOv3ViTForImageClassification` is `diffusionblocks.models`' own: transformers has the trunk alone.

Mixtures of experts train without the auxiliary loss of their experts' load, as the library trains them by default
(`output_router_logits` false).

A masked language model is told which of its tokens is the mask: `noise=db.Masking(vocab_size=..., mask_token_id=...)`.

Classes of text to image and text to video read what their own `forward` is given, as entries of the batch by its names
(`encoder_hidden_states`, `pooled_projections`, `guidance`, masks), and `pixel_values`, the latents. Positions follow
from sizes as in the class's pipeline. A block is the class itself on its own layers, so one block is the class bit for
bit. They are trained by flow matching (PixArt by `ddpm`), from Python or on cached prompts
([text to image](text_to_image.md)).

This page is made by `tests/model_classes.py`, and `tests/unit/test_supported_classes.py` holds it to what happens.
"""

TEXT = {
    "vocab_size": 27,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 4,
}
DIT = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "num_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Tried:
    """A class, and the values of a tiny config of it.

    Args:
        name: of the class.
        values: of its config.
        parts: names of parts of its config that take the values instead.
        noise: the noise process, which is to name the mask.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    noise: db.Masking | None = None


def _text(*names: str, **values: Any) -> list[Tried]:
    return [Tried(name, TEXT | values) for name in names]


def _masked(*names: str, **values: Any) -> list[Tried]:
    noise = db.Masking(vocab_size=27, mask_token_id=26)
    return [Tried(name, TEXT | {"pad_token_id": 0} | values, noise=noise) for name in names]


def _image(*names: str, **values: Any) -> list[Tried]:
    return [Tried(name, IMAGE | values) for name in names]


#: What a model is for -> the classes that are tried.
CLASSES: dict[str, list[Tried]] = {
    "Language models (next token)": [
        *_text("LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "Ministral3ForCausalLM"),
        *_text("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        *_text("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        *_text("GraniteForCausalLM", "SmolLM3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"),
        *_text("OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Starcoder2ForCausalLM"),
        *_text("MixtralForCausalLM", num_local_experts=4),
        *_text("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", **EXPERTS, shared_expert_intermediate_size=24),
        *_text("GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2),
        *_text("OlmoeForCausalLM", num_experts=4, num_experts_per_tok=2),
        *_text("GPTNeoXForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "BloomForCausalLM"),
        *_text("OPTForCausalLM", word_embed_proj_dim=32),
        *_text("FalconForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "StableLmForCausalLM"),
        *_text("GlmForCausalLM", "Glm4ForCausalLM", "Exaone4ForCausalLM"),
        *_text("GraniteMoeForCausalLM", num_local_experts=4),
        *_text("DeepseekV3ForCausalLM", "MambaForCausalLM"),
    ],
    "Image classifiers (label)": [
        *_image("ViTForImageClassification", "DeiTForImageClassification"),
        *_image("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification", mlp_ratio=2),
        *_image("ViTMSNForImageClassification", "BeitForImageClassification", "IJepaForImageClassification"),
        *(
            Tried(f"{name}ForImageClassification", IMAGE | {"num_channels": 3}, ("vision_config",))
            for name in ("CLIP", "MetaClip2", "Siglip")
        ),
        Tried("Siglip2ForImageClassification", IMAGE | {"num_patches": 4}, ("vision_config",)),
        *_image("DINOv3ViTForImageClassification", "DINOv3ViTModel"),
        *_image("SwinForImageClassification", "ConvNextForImageClassification"),
        *_image("ResNetForImageClassification", "HieraForImageClassification", "PvtV2ForImageClassification"),
    ],
    "Masked language models (masked tokens)": [
        *_masked("BertForMaskedLM", "RobertaForMaskedLM", "XLMRobertaForMaskedLM", "CamembertForMaskedLM"),
        *_masked("ModernBertForMaskedLM", "ElectraForMaskedLM"),
        *_masked("DistilBertForMaskedLM", hidden_dim=48),
        *_masked("AlbertForMaskedLM", "DebertaV2ForMaskedLM"),
    ],
    "Diffusion transformers (image)": [
        Tried("DiTTransformer2DModel", DIT | {"attention_head_dim": 16, "num_embeds_ada_norm": 4}),
        *(Tried(name, {"sample_size": 8}) for name in ("UNet2DModel", "UNet2DConditionModel")),
    ],
    "Text to image and text to video (image)": [
        *(Tried(tiny.name, tiny.config) for tiny in TINY.values()),
        *(Tried(name) for name in ("ChromaTransformer2DModel", "CogVideoXTransformer3DModel")),
        Tried("HunyuanDiT2DModel", {"in_channels": 4, "patch_size": 2, "num_layers": 4}),
    ],
}


def build(tried: Tried) -> nn.Module:
    """A tiny model of a class; one that no family knows on the meta device, in whatever size it comes."""
    import diffusers
    import transformers

    from diffusionblocks import models
    from diffusionblocks.families import supported_classes

    known = tried.name in supported_classes()
    model_class: Any = next(
        getattr(library, tried.name) for library in (transformers, diffusers, models) if hasattr(library, tried.name)
    )
    values = dict(tried.values)
    if hasattr(model_class, "config_class"):
        values = dict.fromkeys(tried.parts, values) | {"num_labels": 4} if tried.parts else values
        if not known:
            values = {}
        config = model_class.config_class(**values)
        with torch.device("cpu" if known else "meta"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model_class(config)  # type: ignore[no-any-return]
    with torch.device("cpu" if known else "meta"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(**values)  # type: ignore[no-any-return]


def batch_of(model: db.DiffusionBlocks) -> dict[str, Tensor]:
    """A batch that its blocks train on."""
    if model.model_class in TINY:
        return batch_for(model, model.model_class)
    batch = model.family.empty_batch(model.config, 2)
    generator = torch.Generator().manual_seed(1)
    for name, values in batch.items():
        if values.is_floating_point():
            batch[name] = torch.randn(values.shape, generator=generator)
        else:
            shape = (2, 12) if values.dim() == 2 else values.shape
            batch[name] = torch.randint(4, shape, generator=generator)
    return batch


def outcome(tried: Tried) -> str:
    """`works`, or the line with which the class is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(tried)
    try:
        blocks = db.convert(model, db.BlocksConfig(num_blocks=2, noise=tried.noise))
    except (TypeError, ValueError) as error:
        return str(error)
    batch = batch_of(blocks)
    for block in range(2):
        loss = blocks.loss(batch, block, torch.Generator().manual_seed(0))
        assert loss.isfinite().all(), tried.name
        loss.mean().backward()
    return "works"


def line(result: str) -> str:
    """An outcome as the table has it: without the list of what else there is."""
    return result.partition("; supported:")[0].replace("|", "\\|")


def page() -> str:
    """The page of the table."""
    parts = [INTRODUCTION]
    for kind, classes in CLASSES.items():
        rows = "\n".join(f"| `{tried.name}` | {line(outcome(tried))} |" for tried in classes)
        parts.append(f"## {kind}\n\n| class | |\n| --- | --- |\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
