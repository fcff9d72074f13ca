"""Tiny text encoders with random weights: of transformers, and of pipelines of diffusers with their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

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


def wan_pipeline(**parts: Any) -> Any:
    """WanPipeline with a tiny text encoder of UMT5's class: states of width 24."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 24, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(1)
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(WORDS), **sizes)).eval()
    others = {"transformer": None, "vae": None, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return WanPipeline(**{"text_encoder": encoder, "tokenizer": tokenizer(8), **others, **parts})


def sana_pipeline(**parts: Any) -> Any:
    """SanaPipeline with a tiny text encoder of Gemma's class: states of width 24."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
    from transformers import Gemma2Config, Gemma2Model

    sizes = {
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    torch.manual_seed(1)
    encoder = Gemma2Model(Gemma2Config(vocab_size=len(WORDS), **sizes)).eval()
    others = {"transformer": None, "vae": None, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    return SanaPipeline(**{"text_encoder": encoder, "tokenizer": tokenizer(512), **others, **parts})
