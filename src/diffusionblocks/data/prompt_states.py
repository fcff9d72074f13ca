"""States of prompts, as text encoders give them: what a diffusion model reads of a text, computed once and cached."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.formats import read_json
from ..common.progress import without_loading_bars
from ..targets.image import MASK, POOLED, STATES

__all__ = ["PromptEncoder", "load_prompt_encoder"]

#: What `encode_prompt` of a pipeline returns, in its order; "" is the same of the negative prompt, None is not cached.
_RETURNS: dict[str, tuple[str | None, ...]] = {
    "StableDiffusion3Pipeline": (STATES, "", POOLED, ""),
    "FluxPipeline": (STATES, POOLED, None),
    "Flux2Pipeline": (STATES, None),
    "AuraFlowPipeline": (STATES, None, "", None),  # its mask is as large as the states, and read by nothing
    "PixArtAlphaPipeline": (STATES, MASK, "", ""),
    "PixArtSigmaPipeline": (STATES, MASK, "", ""),
    "SanaPipeline": (STATES, MASK, "", ""),
    "Lumina2Pipeline": (STATES, MASK, "", ""),
    "QwenImagePipeline": (STATES, MASK),
    "PRXPipeline": (STATES, MASK, "", ""),
    "WanPipeline": (STATES, ""),
    "LTXPipeline": (STATES, MASK, "", ""),
    "HunyuanVideoPipeline": (STATES, POOLED, MASK),
}

#: Options of `encode_prompt` whose defaults are those of a pipeline's call, which differ from its own.
_OF_THE_CALL = ("max_sequence_length", "clean_caption", "complex_human_instruction")

#: Options of `encode_prompt` that say how many tokens a prompt has; a pipeline has one of them.
_LENGTHS = ("max_sequence_length", "tokenizer_max_length")

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
        return self._as_kept(self._states(list(prompts)))

    def empty(self) -> dict[str, Tensor]:
        """The states of the empty prompt, from which guidance leads away, as `__call__` gives those of one prompt."""
        return self._as_kept(self._negative())

    def _as_kept(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        states = {name: value.cpu() for name, value in states.items()}
        for name, value in states.items():
            states[name] = value.bool() if name == MASK else value.to(torch.bfloat16)
            if not bool(states[name].isfinite().all()):
                raise ValueError(f"text encoder {self.name!r}: {name} has values that are not finite in bfloat16")
        return self._of_one_length(states)

    def _states(self, prompts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _negative(self) -> dict[str, Tensor]:
        return self._states([""])

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
        import inspect

        self._parameters = inspect.signature(pipeline.encode_prompt).parameters
        of_call = inspect.signature(type(pipeline).__call__).parameters
        self._options = {
            option: of_call[option].default
            for option in _OF_THE_CALL
            if option in of_call and option in self._parameters
        }
        super().__init__(name, length or self._options.get("max_sequence_length"))
        of_length = next(option for option in _LENGTHS if option in self._parameters)
        self._options |= {of_length: self.length, "device": device}
        self._options |= {option: None for option in ("prompt_2", "prompt_3") if option in self._parameters}
        self._pipeline, self._names = pipeline.to(device), _RETURNS[type(pipeline).__name__]

    def _states(self, prompts: list[str]) -> dict[str, Tensor]:
        returned = self._encode(prompts, guidance=False)
        return self._by_name([value for name, value in zip(self._names, returned, strict=True) if name])

    def _negative(self) -> dict[str, Tensor]:
        """Some pipelines put words around a prompt, but none around a negative one."""
        if "do_classifier_free_guidance" not in self._parameters:
            return self._states([""])
        returned = self._encode([""], guidance=True, negative_prompt=[""])
        return self._by_name([value for name, value in zip(self._names, returned, strict=True) if name == ""])

    @torch.no_grad()
    def _encode(self, prompts: list[str], *, guidance: bool, **options: Any) -> tuple[Any, ...]:
        if "do_classifier_free_guidance" in self._parameters:
            options["do_classifier_free_guidance"] = guidance
        return tuple(self._pipeline.encode_prompt(prompt=prompts, **self._options, **options))

    def _by_name(self, values: list[Any]) -> dict[str, Tensor]:
        states = dict(zip(filter(None, self._names), values, strict=True))
        if MASK in states and states[MASK] is None:  # every place counts
            states[MASK] = torch.ones(states[STATES].shape[:2], dtype=torch.bool)
        return states


class _OfEncoder(PromptEncoder):
    """States by one text encoder: its last hidden states, zero where a text has ended, and its pooled state."""

    def __init__(self, encoder: Any, tokenizer: Any, name: str, length: int, device: torch.device) -> None:
        super().__init__(name, length)
        self._encoder, self._tokenizer, self._device = encoder.to(device), tokenizer, device

    @torch.no_grad()
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
    if kind == "PRXPipeline" and find_spec("ftfy") is None:  # else it fails at the first prompt
        raise ImportError(f"text encoder {name!r} is a PRXPipeline, which cleans prompts with ftfy: pip install ftfy")
    parts = {part: None for part in _NOT_OF_TEXT if part in index}
    with without_loading_bars():
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
