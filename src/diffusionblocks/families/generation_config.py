"""How a language model generates, as transformers notes it beside the config: kept through conversion and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rebuilt_generation_config(values: dict[str, Any], where: str) -> Any:
    """A `transformers.GenerationConfig` of plain JSON values.

    Args:
        values: as in `generation_config.json`.
        where: what they were read from, for the message.

    Raises:
        ValueError: a name that is no setting, or a value that the class refuses.
    """
    from transformers import GenerationConfig

    if wrong := sorted(name for name in values if hasattr(GenerationConfig, name)):
        raise ValueError(f"{where}: {wrong[0]} is no setting of generation; take it out")
    try:
        config = GenerationConfig.from_dict(dict(values))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: GenerationConfig refuses it: {' '.join(str(error).split())}") from None
    as_ids(config.eos_token_id, where)
    return config


def generation_values(config: Any) -> dict[str, Any] | None:
    """The plain JSON values of a `GenerationConfig`: the inverse of `rebuilt_generation_config`. None of None."""
    return None if config is None else dict(config.to_diff_dict())


def end_tokens(model: Any) -> tuple[int, ...]:
    """The ids after which a text ends: all of `generation_config.eos_token_id`, else of `config.eos_token_id`.

    Args:
        model: a language model, converted or not.

    Raises:
        ValueError: one of them is no id.
    """
    for name in ("generation_config", "config"):
        ids = getattr(getattr(model, name, None), "eos_token_id", None)
        if ids is not None:
            return as_ids(ids, name)
    return ()


def stop_strings_of(model: Any) -> tuple[str, ...]:
    """The strings whose last letter ends a text: `generation_config.stop_strings`.

    Args:
        model: a language model, converted or not.

    Raises:
        ValueError: it is no string, nor a list of strings that are not empty.
    """
    value = getattr(getattr(model, "generation_config", None), "stop_strings", None)
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or any(not isinstance(text, str) or not text for text in strings):
        raise ValueError(
            f"generation_config.stop_strings = {value!r}: must be a string, or a list of strings that are not empty"
        )
    return tuple(strings)


def stop_criterion(strings: Sequence[str], tokenizer: Any) -> Any:
    """What says of each row of ids whether one of some strings ends there: the library's own; None without strings.

    Args:
        strings: which end a text.
        tokenizer: a tokenizer of transformers, whose ids the texts are; None: there is none.

    Raises:
        ValueError: strings without a tokenizer, or strings that no tokens of it make.
    """
    if not strings:
        return None
    if tokenizer is None:
        raise ValueError(
            f"stop_strings = {list(strings)} end a text by its letters, and ids have none without their tokenizer: "
            "give generate(tokenizer=AutoTokenizer.from_pretrained(FOLDER)), or stop_strings=[] to pass over them"
        )
    from transformers import StopStringCriteria

    try:
        return StopStringCriteria(tokenizer, list(strings))
    except ValueError as error:
        raise ValueError(f"stop_strings = {list(strings)}: {' '.join(str(error).split())}") from None


def as_ids(value: Any, where: str = "model.config") -> tuple[int, ...]:
    """The ids in an `eos_token_id`: one, several or none.

    Raises:
        ValueError: it is none of these.
    """
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise ValueError(f"{where}: eos_token_id = {value!r}: must be an id, a list of ids, or null")
    return tuple(ids)
