"""What a recipe measures of an autoregressive model, converted or not, and the texts that it writes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.fields import MOST_SAMPLES, check_count
from ..common.files import check_writable, whole_file
from ..common.modules import computes_on, evaluating
from ..core.model import DiffusionBlocks
from ..data import TextChunks, evaluation_chunks
from ..data.data_config import DataSection
from ..evaluation.cross_entropy import LanguageRow, language_row, plain_language_row
from ..evaluation.mauve import HiddenFeatures, Mauve, mauve_score
from ..evaluation.perplexity import GeneratedText, Perplexity, generated_text, generative_perplexity
from ..evaluation.teachers import Ids, load_teacher_tokenizer, teacher_tokens
from ..families import family_named
from ..families.causal_lm import attention_window
from ..families.generation_config import end_tokens
from ..models import RecurrentDepth
from ..sampling import Continuations, continue_plainly
from ..training import EndToEnd
from .recipe import LanguageConfig, Recipe
from .sources import check_data, device_of, text_codec


@dataclass(frozen=True)
class LanguageResult:
    """A row of the table: what the model knows of the test text, and what it writes.

    Attributes:
        known: cross-entropies.
        written: measures of its continuations.
        tokens_per_second: of writing them, in batches of `evaluate.generation_batch_size`.
    """

    known: LanguageRow
    written: GeneratedText
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        written = {name: value for name, value in self.written.to_dict().items() if name != "name"}
        return {**self.known.to_dict(), **written, "tokens_per_second": self.tokens_per_second}


def measure(recipe: Recipe, options: LanguageConfig, model: nn.Module, data: TextChunks) -> LanguageResult:
    """Cross-entropies on the test text, and measures of continuations of its first sequences.

    Args:
        recipe: of an autoregressive model.
        options: its `evaluate` section.
        model: a `DiffusionBlocks`, or an `EndToEnd`.
        data: the test text.
    """
    device = computes_on(model)
    section: DataSection = recipe.data
    batches = functools.partial(
        section.evaluation_batches, data.first(options.limit), batch_size=options.batch_size, device=device
    )
    if isinstance(model, DiffusionBlocks):
        known = language_row(model, batches, levels=options.levels, seed=options.seed)
    else:
        assert isinstance(model, EndToEnd)
        with evaluating(model):
            known = plain_language_row(_repeatable(model, options.seed, device), batches)
    made = write(recipe, options, model, prompts_of(options, data))
    return LanguageResult(known, _of_texts(recipe, options, made, data), made.tokens_per_second)


def _repeatable(model: EndToEnd, seed: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model as a function of tokens; the states that a recurrence starts from come from the seed."""
    if isinstance(model.model, RecurrentDepth):
        return functools.partial(model.model, generator=torch.Generator(device).manual_seed(seed))
    return model


def prompts_of(options: LanguageConfig, data: TextChunks) -> list[Tensor]:
    """The starts of the test text's first sequences."""
    return [row[: options.prompt_length] for row in _sequences(options, data)]


def check_prompts(options: LanguageConfig, data: TextChunks) -> None:
    """Refuse a test text that has fewer prompts, and what follows each, than are to be continued."""
    length = options.prompt_length + options.new_tokens
    available = len(data.text) // length
    if available < options.samples:
        raise ValueError(
            f"evaluate.samples = {options.samples} prompts with {length} tokens each (prompt_length + new_tokens): the "
            f"test text has only {available} of them; set evaluate.samples to at most {available}"
            if available
            else f"evaluate.prompt_length + new_tokens = {length}: the test text has only {len(data.text)} tokens; set "
            "evaluate.prompt_length and evaluate.new_tokens lower"
        )


def check_room(recipe: Recipe, model: nn.Module, longest: int, new_tokens: int) -> None:
    """Refuse texts that grow longer than the model has positions, or than it attends over, converted or not.

    Args:
        recipe: of an autoregressive model.
        model: a `DiffusionBlocks`, or an `EndToEnd`, on any device.
        longest: tokens of the longest prompt.
        new_tokens: tokens that follow it.
    """
    config: Any = model.config if isinstance(model, DiffusionBlocks) else model.model.config  # type: ignore[union-attr]
    family = family_named(recipe.model.type)
    (most,) = family.example_shape(config)
    name = "max_position_embeddings" if hasattr(config, "max_position_embeddings") else "sequence_length"
    window = attention_window(config) if isinstance(model, DiffusionBlocks) else None
    if window is not None and window < most:
        most, name = window, "sliding_window"
    if longest + new_tokens > most:
        raise ValueError(
            f"a prompt of {longest} tokens and evaluate.new_tokens = {new_tokens} are {longest + new_tokens}, more "
            f"than the model's {most} ({name}): "
            + (
                f"set evaluate.new_tokens to at most {most - longest}"
                if longest < most
                else f"set evaluate.prompt_length below {most}, or give a shorter prompt"
            )
        )


def _sequences(options: LanguageConfig, data: TextChunks) -> list[Tensor]:
    """The first pieces of the text, int64, each of a prompt and what follows it."""
    check_prompts(options, data)
    count, length = options.samples, options.prompt_length + options.new_tokens
    (batch,) = evaluation_chunks(
        dataclasses.replace(data.text, ids=data.text.ids[: count * length]),
        length,
        batch_size=count,
        device=torch.device("cpu"),
    )
    return list(batch["input_ids"])


def write(
    recipe: Recipe,
    options: LanguageConfig,
    model: nn.Module,
    prompts: list[Tensor],
    *,
    seed: int | None = None,
    progress: bool = False,
) -> Continuations:
    """Continue prompts as the recipe's `evaluate` section says; continuation i has seed `seed` + i.

    A text ends with the end of a document (`END` of the tokenizer; characters have none), and of a pretrained model of
    tokens also with any of its own eos ids.
    """
    codec = text_codec(recipe)
    stops: tuple[int, ...] = () if codec.end is None else (codec.end,)
    if stops and recipe.model.pretrained is not None:  # its chat may end a turn otherwise than a document
        stops += end_tokens(model if isinstance(model, DiffusionBlocks) else model.model)
    first = options.seed if seed is None else seed
    whole: list[Continuations] = []
    together = options.generation_batch_size or options.batch_size
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        seeds = range(first + start, first + start + len(some))
        common: dict[str, Any] = {
            "seeds": seeds,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "stop_tokens": stops,
            "num_tokens": codec.vocab_size,  # the model may have more: its vocabulary padded to a round number
            "progress": progress,
        }
        if isinstance(model, DiffusionBlocks):
            more: dict[str, Any] = {"steps": options.steps, "grid": options.grid, "feedback": options.feedback}
            whole.append(model.continue_texts(some, options.new_tokens, **common, **more))
        else:
            assert isinstance(model, EndToEnd)
            whole.append(continue_plainly(model.model, some, max_new_tokens=options.new_tokens, **common))
    return Continuations(
        [row for part in whole for row in part.tokens],
        [length for part in whole for length in part.prompt_lengths],
        sum(part.seconds for part in whole),
    )


def _of_texts(recipe: Recipe, options: LanguageConfig, made: Continuations, data: TextChunks) -> GeneratedText:
    codec = text_codec(recipe)
    after = [row[length:] for row, length in zip(made.tokens, made.prompt_lengths, strict=True)]
    perplexity: Perplexity | None = None
    device = device_of(recipe)
    if options.teacher is not None:
        tokens: Sequence[Ids] = made.tokens
        lengths = made.prompt_lengths
        if not options.teacher_tokens:
            prompts = [codec.decode(row[:length]) for row, length in zip(made.tokens, lengths, strict=True)]
            tokenizer = load_teacher_tokenizer(options.teacher)
            tokens, lengths = teacher_tokens(tokenizer, prompts, [codec.decode(row) for row in after])
        start = codec.end if options.teacher_tokens else None
        perplexity = generative_perplexity(
            options.teacher, tokens, lengths, start=start, batch_size=options.batch_size, device=device
        )
    mauve: tuple[Mauve, ...] = ()
    if options.mauve is not None:
        features = HiddenFeatures(options.mauve, batch_size=options.batch_size, device=device)
        references = [codec.decode(row) for row in _sequences(options, data)]
        mauve = mauve_score(features(references), features([codec.decode(row) for row in made.tokens]))
    return generated_text(
        recipe.name, after, teacher=options.teacher, perplexity=perplexity, features=options.mauve, mauve=mauve
    )


def write_continuations(
    recipe: Recipe,
    model: nn.Module,
    folder: Path,
    *,
    prompts: list[str] | None = None,
    count: int | None = None,
    seed: int | None = None,
    data: TextChunks | None = None,
    progress: bool = False,
    **changes: Any,
) -> Path:
    """Write continuations to `folder`/samples.txt, each after its prompt, an empty line between them.

    Args:
        recipe: of an autoregressive model; says all that is not given.
        model: a `DiffusionBlocks`, or an `EndToEnd`.
        folder: where the file goes.
        prompts: texts to go on from, in turn; None takes the starts of the test text's sequences.
        count: how many continuations; None: one a prompt, or `evaluate.samples`.
        seed: of the first continuation; the next count up.
        data: the test text, where no prompts are given.
        progress: show a progress bar.
        changes: other values for the fields of `LanguageConfig` (temperature, top_p, feedback, steps, ...).

    Returns:
        The file.

    Raises:
        ValueError: no autoregressive model, count < 1, or a value out of range.
    """
    if not isinstance(recipe.evaluate, LanguageConfig):
        raise ValueError(f"only autoregressive models go on from prompts; {recipe.model.type} is none")
    given = {name: value for name, value in changes.items() if value is not None}
    if count is not None:
        check_count("count", count, MOST_SAMPLES)
    check_writable(folder, "the samples' folder")
    if prompts is None and count is not None:
        given["samples"] = count
    options = LanguageConfig.model_validate(recipe.evaluate.model_dump() | given)
    codec = text_codec(recipe)
    if prompts is None:
        assert data is not None, "without prompts the test text is needed"
        check_data(recipe, model, data)
        starts = prompts_of(options, data)
    else:
        given_prompts = [codec.encode(prompt) for prompt in prompts]
        starts = [given_prompts[i % len(prompts)] for i in range(count or len(prompts))]
    check_room(recipe, model, max(map(len, starts)), options.new_tokens)
    made = write(recipe, options, model, starts, seed=seed, progress=progress)
    path = folder / "samples.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text("\n\n".join(_shown(made, codec)) + "\n", encoding="utf-8")
    return path


def _shown(made: Continuations, codec: Any) -> Iterator[str]:
    for row, length in zip(made.tokens, made.prompt_lengths, strict=True):
        yield f"{codec.decode(row[:length])}|{codec.decode(row[length:])}"
