"""Causal language models of others that judge generated text: loading them, and texts as their tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..common.finite import require_finite
from ..families import check_attention
from ..families.libraries import CannotReadInParts, cached_file, safetensors_keys

#: Ids of a text: a tensor (n,), or whole numbers.
Ids = Tensor | Sequence[int]


#: Files of which a tokenizer has one.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_teacher(name: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A causal language model of transformers, for evaluation, in the dtype of its file.

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        name: folder or hub name.
        device: where it goes.

    Raises:
        OSError, ValueError: there is none, or its weights are not finite.
    """
    from transformers import AutoModelForCausalLM  # takes seconds to import

    check_foreign_attention(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True, trust_remote_code=False)
    require_finite(model.state_dict().items(), f"the teacher {name}", "choose another one, or load it again")
    return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


@functools.cache  # every trainer of a run asks, and a name on the hub is looked up there
def check_teacher(name: str | Path, field: str, *, tokenizer: bool, causal: bool = True) -> None:
    """Refuse a model that cannot be read, before work that would be lost to it: config, files' headers, tokenizer.

    Args:
        name: folder or hub name; from the hub its files are downloaded to the cache now.
        field: what the message calls it.
        tokenizer: whether its tokenizer will be needed.
        causal: whether it must be a causal language model.

    Raises:
        ValueError: neither a folder with such a model nor the hub (or its cache) has it; or a file of it is missing or
            damaged.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field} = {name}: no model of transformers is there; give a folder with config.json and "
            f"model.safetensors, or a name on the hub ({str(error).splitlines()[0]})"
        ) from error
    check_attention(config, f"{field} = {name}: ")
    if causal and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{field} = {name} is a {config.model_type}, which is no causal language model; name another")
    try:
        safetensors_keys(name, "model.safetensors")
    except (CannotReadInParts, OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{field} = {name}: its weights cannot be read ({error}); load it again, or name another"
        ) from error
    if tokenizer:
        try:
            words = load_teacher_tokenizer(name)
        except Exception as error:  # the library has no error of its own for a tokenizer that is damaged or not there
            raise ValueError(
                f"{field} = {name}: its tokenizer cannot be read ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); give a folder with tokenizer.json"
            ) from error
        if causal and not getattr(words, "is_fast", False):
            raise ValueError(f"{field} = {name}: {type(words).__name__} gives no offsets of its tokens; name another")


def check_foreign_attention(name: str | Path) -> None:
    """Refuse a model whose config asks for an attention of some repository's, whose code would be run."""
    from transformers import AutoConfig

    check_attention(AutoConfig.from_pretrained(name, trust_remote_code=False), f"{name}: ")


def load_teacher_tokenizer(name: str | Path) -> Any:
    """The tokenizer beside a teacher (`AutoTokenizer`); no code that comes with it is run.

    Raises:
        ValueError: there is no file of one: the library would make one without words, and texts have no tokens then.
    """
    from transformers import AutoTokenizer

    if not any(cached_file(name, file) for file in _TOKENIZERS):
        raise ValueError(f"{name} has no tokenizer: none of {', '.join(_TOKENIZERS)} is there")

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def teacher_tokens(
    tokenizer: Any, prompts: Sequence[str], continuations: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """Texts as a teacher's tokens, where the generator has others.

    Prompt and continuation are tokenised together, as they would stand in a text. A token that reaches from the prompt
    into the continuation belongs to the continuation.

    Args:
        tokenizer: the teacher's, a fast one of transformers. Where it has a token for the beginning of a text, that
            stands before each, as part of the prompt.
        prompts: n texts, which may be empty.
        continuations: n texts.

    Returns:
        Ids of each text, and how many of them are prompt: for `generative_perplexity`.

    Raises:
        ValueError: not as many prompts as continuations, or a tokenizer that cannot say where its tokens are.
    """
    check_counts("prompts", len(prompts), len(continuations))
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets of its tokens: use a fast tokenizer")
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    tokens, lengths = [], []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        encoding = tokenizer(prompt + continuation, add_special_tokens=False, return_offsets_mapping=True)
        tokens.append(begin + list(encoding["input_ids"]))
        lengths.append(len(begin) + sum(end <= len(prompt) for _, end in encoding["offset_mapping"]))
    return tokens, lengths


def as_ids(text: Ids) -> Tensor:
    """int64 (n,) on the CPU; ValueError for anything but whole numbers."""
    ids = text.detach().cpu() if isinstance(text, Tensor) else torch.tensor(list(text), dtype=torch.int64)
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"a text must be whole numbers (n,), got {ids.dtype} {tuple(ids.shape)}")
    return ids.long()


def check_ids(model: Any, texts: Sequence[Tensor]) -> None:
    """Refuse ids and lengths that would fail in the middle of a GPU kernel."""
    size = model.get_input_embeddings().num_embeddings
    low, high = min(int(text.min()) for text in texts), max(int(text.max()) for text in texts)
    if low < 0 or high >= size:
        raise ValueError(
            f"ids from {low} to {high}: the model has 0 to {size - 1}; give it texts of its own tokenizer's ids"
        )
    most, longest = getattr(model.config, "max_position_embeddings", None), max(len(text) for text in texts)
    if most is not None and longest > most:
        raise ValueError(f"a text has {longest} tokens, the model takes at most {most}: give shorter texts")


def check_counts(name: str, count: int, texts: int) -> None:
    """Refuse lists of different lengths."""
    if count != texts:
        raise ValueError(f"{name}: {count} for {texts} texts; give one for each")
