"""States of prompts, as text encoders give them: what a diffusion model reads of a text, computed once and cached."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.formats import read_json
from ..targets.image import MASK, POOLED, STATES

__all__ = ["PromptEncoder", "load_prompt_encoder"]

#: What `encode_prompt` of a pipeline returns, in its order; "" is not cached.
_RETURNS: dict[str, tuple[str, ...]] = {
    "StableDiffusion3Pipeline": (STATES, "", POOLED, ""),
    "FluxPipeline": (STATES, POOLED, ""),
    "Flux2Pipeline": (STATES, ""),
    "AuraFlowPipeline": (STATES, MASK, "", ""),
    "PixArtAlphaPipeline": (STATES, MASK, "", ""),
    "PixArtSigmaPipeline": (STATES, MASK, "", ""),
    "SanaPipeline": (STATES, MASK, "", ""),
    "Lumina2Pipeline": (STATES, MASK, "", ""),
    "QwenImagePipeline": (STATES, MASK),
    "WanPipeline": (STATES, ""),
    "LTXPipeline": (STATES, MASK, "", ""),
    "HunyuanVideoPipeline": (STATES, POOLED, MASK),
}

#: What a pipeline's folder has beside its text encoders.
_NOT_OF_TEXT = ("transformer", "transformer_2", "vae", "image_encoder", "feature_extractor")

#: Tokens of a prompt where nobody says: of a single encoder.
_LENGTH = 128


class PromptEncoder:
    """Makes the states of prompts, all of one length; `load_prompt_encoder` gives one.

    Args:
        name: folder or hub name, for messages.
        length: tokens of a prompt; None: as many as the pipeline takes.
    """

    def __init__(self, name: str, length: int | None) -> None:
        self.name, self.length = name, length
        self._tokens: int | None = None

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The states of some prompts, on the CPU: floating ones bfloat16, the mask bool.

        Raises:
            ValueError: states of another length than before, without a mask that tells them apart, or not finite.
        """
        with torch.no_grad():
            states = {name: value.cpu() for name, value in self._states(list(prompts)).items()}
        for name, value in states.items():
            states[name] = value.bool() if name == MASK else value.to(torch.bfloat16)
            if not bool(states[name].isfinite().all()):
                raise ValueError(f"text encoder {self.name!r}: {name} has values that are not finite in bfloat16")
        return self._of_one_length(states)

    def _states(self, prompts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _of_one_length(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some pipelines pad to the longest prompt of a batch: then further places, which a mask hides, are zero."""
        tokens = states[STATES].shape[1]
        self._tokens = self._tokens or (max(tokens, self.length or 0) if MASK in states else tokens)
        if tokens == self._tokens:
            return states
        if tokens > self._tokens or MASK not in states:
            raise ValueError(
                f"text encoder {self.name!r} gives prompts of {tokens} and of {self._tokens} tokens: set "
                "--prompt-length to that of the longest"
            )
        for name in (STATES, MASK):
            old = states[name]
            states[name] = old.new_zeros(len(old), self._tokens, *old.shape[2:])
            states[name][:, :tokens] = old
        return states


class _OfPipeline(PromptEncoder):
    """States by a pipeline's own `encode_prompt`, so they are what it gives its transformer."""

    def __init__(self, pipeline: Any, name: str, length: int | None, device: torch.device) -> None:
        super().__init__(name, length)
        self._pipeline, self._device = pipeline.to(device), device

    def _states(self, prompts: list[str]) -> dict[str, Tensor]:
        import inspect

        options: dict[str, Any] = {"device": self._device}
        parameters = inspect.signature(self._pipeline.encode_prompt).parameters
        if "do_classifier_free_guidance" in parameters:
            options["do_classifier_free_guidance"] = False
        if self.length is not None:
            options["max_sequence_length"] = self.length
        if "prompt_2" in parameters:
            options["prompt_2"] = None
        if "prompt_3" in parameters:
            options["prompt_3"] = None
        returned = self._pipeline.encode_prompt(prompt=prompts, **options)
        names = _RETURNS[type(self._pipeline).__name__]
        return {name: value for name, value in zip(names, returned, strict=True) if name and value is not None}


class _OfEncoder(PromptEncoder):
    """States by one text encoder: its last hidden states, zero where a text has ended, and its pooled state."""

    def __init__(self, encoder: Any, tokenizer: Any, name: str, length: int, device: torch.device) -> None:
        super().__init__(name, length)
        self._encoder, self._tokenizer, self._device = encoder.to(device), tokenizer, device

    def _states(self, prompts: list[str]) -> dict[str, Tensor]:
        batch = self._tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self._device)
        output = self._encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        mask = batch["attention_mask"].bool()
        states = {STATES: output.last_hidden_state * mask.unsqueeze(-1), MASK: mask}
        pooled = getattr(output, "pooler_output", None)
        return states if pooled is None else states | {POOLED: pooled}


def load_prompt_encoder(name: str, length: int | None, device: torch.device) -> PromptEncoder:
    """Load what makes the states of prompts. No code and no pickle is loaded with it.

    Args:
        name: a local folder, or a name on the hub: of a pipeline of diffusers, whose own `encode_prompt` is used, or of
            a text encoder of transformers with its tokenizer (CLIP's, T5, BERT, any that `AutoModel` knows).
        length: tokens of a prompt; None: the pipeline's, or 128 of a single encoder, less where it takes less.
        device: where it runs.

    Raises:
        ValueError: a pipeline whose states are not known, nothing that can be loaded, or a length out of range.
    """
    if length is not None and length < 1:
        raise ValueError(f"--prompt-length {length}: must be at least 1")
    index = Path(name).expanduser() / "model_index.json"
    if index.is_file():
        return _OfPipeline(_pipeline(name, read_json(index)), name, length, device)
    if not Path(name).expanduser().is_dir():
        with contextlib.suppress(Exception):  # whatever the hub raises where there is no such file: then no pipeline
            from huggingface_hub import hf_hub_download

            return _OfPipeline(
                _pipeline(name, read_json(Path(hf_hub_download(name, index.name)))), name, length, device
            )
    encoder, tokenizer = _encoder(name)
    most = min(int(tokenizer.model_max_length), int(getattr(encoder.config, "max_position_embeddings", None) or 10**9))
    if length is not None and length > most:
        raise ValueError(f"--prompt-length {length}: {name!r} takes at most {most} tokens")
    return _OfEncoder(encoder, tokenizer, name, length or min(_LENGTH, most), device)


def _pipeline(name: str, index: dict[str, Any]) -> Any:
    import diffusers

    kind = str(index.get("_class_name"))
    if kind not in _RETURNS:
        raise ValueError(
            f"text encoder {name!r} is a {kind}, of which it is not known what its prompts become; allowed: "
            f"pipelines {', '.join(_RETURNS)}, or one text encoder of transformers"
        )
    parts = {part: None for part in _NOT_OF_TEXT if part in index}
    return getattr(diffusers, kind).from_pretrained(name, **parts, use_safetensors=True)


def _encoder(name: str) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel
        encoder = kind.from_pretrained(name, config=config, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"text encoder {name!r} cannot be loaded: {reason}; give a folder or hub name of a pipeline of diffusers, "
            "or of a text encoder of transformers with its tokenizer"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return encoder.eval().requires_grad_(False), tokenizer
