"""Tiny text encoders with random weights: of transformers, and of pipelines of diffusers with their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers_models import tiny_diffuser
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "red", "blue", "small", "large", "cat", "dog"]


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One word, one token, with an end of text behind them."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **names)


def t5(width: int) -> T5EncoderModel:
    """A T5 encoder."""
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(1)
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), **sizes)).eval()


def clip(width: int, seed: int = 2) -> CLIPTextModelWithProjection:
    """CLIP's text encoder."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 8, "projection_dim": width}
    ids = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=len(WORDS), **sizes, **ids)).eval()


def save_encoder(folder: Path, width: int = 24, length: int = 8) -> Path:
    """A T5 encoder with its tokenizer, in one folder."""
    t5(width).save_pretrained(folder)
    tokenizer(length).save_pretrained(folder)
    return folder


def sd3_pipeline(**parts: Any) -> Any:
    """StableDiffusion3Pipeline with tiny text encoders: states of width 24, pooled states of 20."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    encoders = {"text_encoder": clip(8), "text_encoder_2": clip(12, seed=3), "text_encoder_3": t5(24)}
    tokenizers = {"tokenizer": tokenizer(8), "tokenizer_2": tokenizer(8), "tokenizer_3": tokenizer(8)}
    others = {"transformer": None, "vae": None, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return StableDiffusion3Pipeline(**{**encoders, **tokenizers, **others, **parts})


def clip_text(width: int, length: int) -> CLIPTextModel:
    """CLIP's text encoder without its projection."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": length, "projection_dim": width}
    torch.manual_seed(2)
    ids = {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(WORDS), **sizes, **ids)).eval()


def wan_pipeline(**parts: Any) -> Any:
    """WanPipeline with a tiny text encoder of UMT5's class: states of width 24."""
    from diffusers import WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 24, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(1)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), **sizes)).eval()
    others = {"transformer": None, "vae": None, "scheduler": shifted()}
    return WanPipeline(**{"text_encoder": encoder, "tokenizer": tokenizer(8), **others, **parts})


# ---- every pipeline whose prompts are known, with the transformer that it tells of them -----------------------


#: Of a decoder of states of width 24.
DECODER: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 24, "intermediate_size": 16, "head_dim": 12}
DECODER |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4, "pad_token_id": 0}
DECODER |= {"bos_token_id": 3, "eos_token_id": 1}


def shifted() -> Any:
    """A scheduler with a shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)  # type: ignore[no-untyped-call]


def shifted_by_resolution() -> Any:
    """A scheduler whose shift follows the resolution."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)  # type: ignore[no-untyped-call]


def decoder(name: str, **values: Any) -> Any:
    """A model of transformers whose states are of width 24, of the class `NAMEModel`."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**DECODER | values)
    return getattr(transformers, f"{name}Model")(config).eval()


def seeing_decoder(name: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """A language model that sees pictures, too, of the class `NAMEForConditionalGeneration`."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(text_config=DECODER | text, vision_config=vision)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


def chat_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template."""
    result = tokenizer(length)
    parts = "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    result.chat_template = "{% for m in messages %}{{ m['role'] }} " + parts + " {% endfor %}"
    return result


def t5_gemma() -> Any:
    """The encoder of T5Gemma."""
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    torch.manual_seed(1)
    return T5GemmaEncoder(T5GemmaConfig(encoder=DECODER, decoder=DECODER, vocab_size=len(WORDS)).encoder).eval()


def _parts(kind: str) -> dict[str, Any]:
    """Text encoders, tokenizers and scheduler of a pipeline."""
    if kind == "StableDiffusion3Pipeline":
        encoders = {"text_encoder": clip(8), "text_encoder_2": clip(12, seed=3), "text_encoder_3": t5(24)}
        return {**encoders, **{f"tokenizer{n}": tokenizer(8) for n in ("", "_2", "_3")}, "scheduler": shifted()}
    if kind == "FluxPipeline":
        encoders = {"text_encoder": clip_text(20, 8), "text_encoder_2": t5(24)}
        return {**encoders, "tokenizer": tokenizer(8), "tokenizer_2": tokenizer(512)}
    if kind == "Flux2Pipeline":  # three layers' states of width 8 side by side, the last of them the 30th
        vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        text = {"model_type": "mistral", "hidden_size": 8, "head_dim": 4, "num_hidden_layers": 31}
        return {"text_encoder": seeing_decoder("Mistral3", text, vision), "tokenizer": chat_tokenizer(512)}
    if kind == "QwenImagePipeline":
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
        text = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
        encoder = seeing_decoder("Qwen2_5_VL", text, vision | {"fullatt_block_indexes": [0]})
        return {"text_encoder": encoder, "tokenizer": tokenizer(2048)}
    if kind == "HunyuanVideoPipeline":
        encoders = {"text_encoder": decoder("Llama"), "text_encoder_2": clip_text(20, 77)}
        return {**encoders, "tokenizer": tokenizer(2048), "tokenizer_2": tokenizer(77), "scheduler": shifted()}
    if kind == "PRXPipeline":
        return {"text_encoder": t5_gemma(), "tokenizer": tokenizer(16), "scheduler": shifted()}
    if kind in ("SanaPipeline", "Lumina2Pipeline"):
        return {"text_encoder": decoder("Gemma2"), "tokenizer": tokenizer(512), "scheduler": shifted()}
    if kind == "WanPipeline":
        whole = wan_pipeline()
        return {"text_encoder": whole.text_encoder, "tokenizer": tokenizer(512), "scheduler": shifted()}
    return {"text_encoder": t5(24), "tokenizer": tokenizer(512)}  # T5


#: Pipelines, each with its transformer.
TRANSFORMERS = {
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "FluxPipeline": "FluxTransformer2DModel",
    "Flux2Pipeline": "Flux2Transformer2DModel",
    "AuraFlowPipeline": "AuraFlowTransformer2DModel",
    "PixArtAlphaPipeline": "PixArtTransformer2DModel",
    "PixArtSigmaPipeline": "PixArtTransformer2DModel",
    "SanaPipeline": "SanaTransformer2DModel",
    "Lumina2Pipeline": "Lumina2Transformer2DModel",
    "QwenImagePipeline": "QwenImageTransformer2DModel",
    "PRXPipeline": "PRXTransformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
    "LTXPipeline": "LTXVideoTransformer3DModel",
    "HunyuanVideoPipeline": "HunyuanVideoTransformer3DModel",
}


def pipeline_of(kind: str) -> Any:
    """A pipeline of a class with tiny text encoders and its tiny transformer, without an autoencoder."""
    import diffusers

    parts = {"scheduler": shifted_by_resolution(), "vae": None, **_parts(kind)}
    if kind == "AuraFlowPipeline":
        parts["scheduler"] = shifted()
    if kind.startswith("PixArt"):
        parts["scheduler"] = diffusers.DPMSolverMultistepScheduler()  # type: ignore[no-untyped-call]
    longer = {"axes_lens": (300, 8, 8)} if kind == "Lumina2Pipeline" else {}  # places of a prompt
    return getattr(diffusers, kind)(**parts, transformer=tiny_diffuser(TRANSFORMERS[kind], **longer))


def save_pipeline(pipeline: Any, folder: Path) -> Path:
    """Save a pipeline as its weights are published."""
    pipeline.save_pretrained(folder)
    if type(pipeline).__name__ == "PRXPipeline":  # there its encoder's config is that of the whole T5Gemma
        from transformers import T5GemmaConfig

        whole = T5GemmaConfig(encoder=DECODER, decoder=DECODER, vocab_size=len(WORDS))
        whole.save_pretrained(folder / "text_encoder")
    return folder
