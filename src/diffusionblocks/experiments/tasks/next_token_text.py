"""The task of autoregressive text models, converted or not: cross-entropies by level, and what they write."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field

from ...common.fields import (
    FEEDBACK_NAMES,
    MOST_LENGTH,
    MOST_LEVELS,
    MOST_SAMPLES,
    Float,
    Int,
    Length,
    Levels,
    NonNegative,
    Samples,
    Seed,
    TokenCombination,
    TokenFeedback,
    check_count,
)
from .task import (
    PROMPT,
    TEMPERATURE,
    EvaluateSection,
    LevelGrid,
    RunResult,
    SampleOption,
    Task,
    baselines_in,
    register_task,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...data import TextChunks, TextCodec
    from ...data.dataset import Dataset
    from ...evaluation.cross_entropy import LanguageRow
    from ...evaluation.perplexity import GeneratedText
    from ...sampling import Continuations
    from ..experiment import Experiment
    from ..recipe import Recipe


class LanguageConfig(EvaluateSection):
    """An autoregressive text model: cross-entropy of the test text by level, and measures of what it writes.

    Attributes:
        batch_size: Sequences at a time.
        limit: Number of sequences of the test text, the first; null takes all.
        seed: Seed of the noise, and of the first continuation; continuation i has seed `seed` + i.
        levels: Levels at which the cross-entropy is measured.
        samples: Number of continuations, of as many prompts, the first of the test text.
        generation_batch_size: Continuations that are written together; null takes batch_size. It changes no text. On a
            GPU a token of hundreds of them takes about as long as a token of one.
        cuda_graph: Capture the chain of a token, all blocks of it, as one CUDA graph that every further token replays.
            It is for the blocks' rows, and pays from some tens of tokens on. Without effect on a CPU.
        prompt_length: Tokens of a prompt; 0 writes from nothing.
        new_tokens: Tokens of a continuation.
        combine: How what the blocks say of a token is combined where texts are written, and which of the measured rows
            stands for the run: `mean` or `probabilities` of their context logits, or `chain`, the paper's. null: `mean`
            where blocks have context logits, else `chain`.
        steps: Denoising steps per token; null: one for each block.
        grid: Level grid, one that suits the noise process: of EDM `equal-quantile` or `karras`.
        feedback: What a prediction feeds to the next step: `soft`, `hard`, `sampled` or `top-k`; null takes that of the
            model.
        temperature: Temperature of the tokens' distribution; 0 takes the likeliest.
        top_p: Draw from the likeliest tokens of this total probability only; 1 draws from all.
        teacher: Folder or hub name of a causal language model, for generative perplexity; null: none.
        teacher_tokens: Whether the teacher has the tokenizer of the data; else it is given the text.
        mauve: Folder or hub name of the model whose features MAUVE compares (the reference takes gpt2-large); null:
            none.
        references: A text file whose first documents MAUVE compares with, as many as `samples` and cut to as many
            tokens as a text has; null: the test text, from the same places as the prompts.
        references_separator: What stands between documents of `references`.
    """

    kind: Literal["language"] = "language"
    batch_size: Samples = 32
    limit: Int | None = Field(default=None, ge=2, le=MOST_SAMPLES)
    seed: Seed = 0
    levels: Int = Field(default=16, ge=2, le=MOST_LEVELS)
    samples: Samples = 16
    generation_batch_size: Samples | None = None
    cuda_graph: bool = False
    prompt_length: Int = Field(default=50, ge=0, le=MOST_LENGTH)
    new_tokens: Length = 50
    combine: TokenCombination | None = None
    steps: Levels | None = None
    grid: LevelGrid = "equal-quantile"
    feedback: TokenFeedback | None = Field(default=None, validation_alias=FEEDBACK_NAMES)
    temperature: NonNegative = 1.0
    top_p: Float = Field(default=1.0, gt=0, le=1)
    teacher: str | None = None
    teacher_tokens: bool = True
    mauve: str | None = None
    references: Path | None = None
    references_separator: str = Field(default="\n<|endoftext|>\n", min_length=1)


@dataclass(frozen=True)
class LanguageResult:
    """A row of the table: what the model knows of the test text, and what it writes.

    Attributes:
        known: cross-entropies.
        written: measures of its continuations.
        tokens_per_second: of writing them, in batches of `evaluate.generation_batch_size`.
        combine: how what blocks, or the members of an ensemble, say was brought together; None: there is one network,
            or no context logits. An ensemble writes no texts, blocks in the row that stands for the run.
    """

    cross_entropies: LanguageRow
    texts: GeneratedText | None = None
    tokens_per_second: float | None = None
    combine: str | None = None

    def without_levels(self) -> LanguageResult:
        """The row beside another one of the same model, which has what is measured at each level."""
        return dataclasses.replace(self, cross_entropies=dataclasses.replace(self.cross_entropies, by_level=()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = self.cross_entropies.to_dict()
        if self.combine is not None:
            values["combine"] = self.combine
        if self.texts is not None:
            values |= {name: value for name, value in self.texts.to_dict().items() if name != "name"}
        return values | {"tokens_per_second": self.tokens_per_second}


@register_task
class NextTokenText(Task[LanguageConfig]):
    """Measures what autoregressive models know of a text, and what they write."""

    target = "next-token"
    section = LanguageConfig
    takes = ("characters", "tokens")
    does = "generates text"
    score = "cross_entropy"
    makes = "continued text"
    examples = "texts"
    classes = "different tokens"
    of_text = True
    shares_work = True
    fits_levels = ("rise", "loss")
    plain_training = True
    least_examples = 2
    sample_options = (
        TEMPERATURE,
        PROMPT,
        SampleOption(
            "chat",
            "continued text: --prompt is what a user says, written as the model's chat template has it",
            {"action": "store_const", "const": True},
        ),
        SampleOption(
            "combine",
            "continued text: how what the blocks say is combined (default: the recipe's)",
            {"choices": get_args(TokenCombination)},
        ),
        SampleOption("new_tokens", "continued text: how many tokens (default: the recipe's)", {"type": int}),
        SampleOption("top_p", "continued text: draw from this share only (default: the recipe's)", {"type": float}),
        SampleOption(
            "feedback",
            "continued text: what a prediction feeds to the next step (default: the model's)",
            {"choices": get_args(TokenFeedback)},
            aliases=("bridge",),
        ),
    )

    # ---- checks ------------------------------------------------------------------------------------------------

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse blocks that would keep fixed what nothing has trained."""
        blocks = recipe.blocks
        if recipe.method != "diffusionblocks" or recipe.trunk is not None or recipe.model.pretrained is not None:
            return
        name = "vocabulary = frozen" if blocks.vocabulary == "frozen" else "target.context = trunk"
        if blocks.vocabulary == "frozen" or (blocks.target is not None and blocks.target.reads_trunk):
            raise ValueError(
                f"blocks.{name}: in a fresh model that is random numbers; give the recipe a section trunk, which "
                "trains them first, or model.pretrained"
            )

    def mend_shape(self, model: tuple[int, ...], pretrained: bool) -> str:
        """Set the length of the examples."""
        return f"--set data.length={model[0]}"

    def calls(self, experiment: Experiment, model: nn.Module, test: Dataset) -> int:
        """Those of the cross-entropies, and of the continuations."""
        options = self.options(experiment)
        levels, steps = 1, 1
        if experiment.of_blocks(model):
            blocks = experiment.blocks_of(model).partition.num_blocks
            levels, steps = options.levels + blocks, options.steps or blocks
        sequences = min(len(test), options.limit or len(test))
        return sequences * levels + options.samples * options.new_tokens * steps

    def test_examples(self, experiment: Experiment) -> int | None:
        """The sequences of `limit`, or those that the prompts and what follows them are of, whichever are more."""
        from ...data.text_config import TextSection

        options, data = self.options(experiment), experiment.recipe.data
        if options.limit is None or not isinstance(data, TextSection):
            return None
        of_prompts = options.samples * (options.prompt_length + options.new_tokens)
        return max(options.limit, math.ceil(of_prompts / data.length))

    def check_settings(self, experiment: Experiment, model: nn.Module) -> None:
        """Refuse texts that outgrow the model, too few prompts, and teachers that are not there."""
        from ...evaluation.mauve import reference_texts, require_mauve
        from ...evaluation.teachers import check_teacher
        from ...families.generation_config import stop_criterion, stop_strings_of
        from ...sampling import check_combination

        for holder in [model] if experiment.of_blocks(model) else _networks(model):
            if strings := stop_strings_of(holder):
                stop_criterion(strings, experiment.codec.library_tokenizer())
        options = self.options(experiment)
        self.check_room(experiment, model, options.prompt_length, options.new_tokens)
        if "test" in experiment.splits:
            check_prompts(options, experiment.splits["test"])
        if options.references is not None:
            reference_texts(options.references, options.samples, options.references_separator)
        if options.mauve is not None:
            require_mauve()
            check_teacher(options.mauve, "evaluate.mauve", tokenizer=True, causal=False)
        if options.teacher is not None:
            check_teacher(options.teacher, "evaluate.teacher", tokenizer=not options.teacher_tokens)
        from_nothing = experiment.of_blocks(model) and getattr(model.target, "shift", 1) == 0
        if options.combine not in (None, "chain") and experiment.of_blocks(model):
            contexts = experiment.blocks_of(model).block(0).adds_likelihood
            check_combination(options.combine, contexts=contexts, name="evaluate.combine")
        if options.prompt_length == 0 and not from_nothing:
            raise ValueError(
                "evaluate.prompt_length = 0: only blocks of two streams write from nothing; this model needs at least 1"
            )

    def check_room(self, experiment: Experiment, model: nn.Module, longest: int, new_tokens: int) -> None:
        """Refuse texts that grow longer than the model has positions, converted or not.

        Args:
            experiment: of an autoregressive model.
            model: a `DiffusionBlocks`, or an `EndToEnd`, on any device.
            longest: tokens of the longest prompt.
            new_tokens: tokens that follow it.
        """
        config = experiment.config_of(model)
        (most,) = experiment.family.example_shape(config)
        name = "max_position_embeddings" if hasattr(config, "max_position_embeddings") else "sequence_length"
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

    # ---- measures ----------------------------------------------------------------------------------------------

    def measure(self, experiment: Experiment, model: nn.Module) -> list[LanguageResult]:
        """Cross-entropies on the test text, and measures of continuations of its first sequences."""
        from ...common.modules import computes_on, evaluating
        from ...evaluation.cross_entropy import language_rows, plain_language_rows, voted_rows

        options, data, device = self.options(experiment), experiment.data("test"), computes_on(model)
        batches: Any = functools.partial(
            experiment.recipe.data.evaluation_batches,
            data.first(options.limit),
            batch_size=options.batch_size,
            device=device,
        )
        voted: dict[str, LanguageRow] = {}
        work = experiment.work
        with experiment.precision(model):
            if experiment.of_blocks(model):
                blocks = experiment.blocks_of(model)
                base_rows = language_rows(blocks, batches, levels=options.levels, seed=options.seed, work=work)
                if blocks.block(0).adds_likelihood:
                    voted = voted_rows(blocks, batches, seed=options.seed, work=work)
            elif len(_networks(model)) > 1:
                with evaluating(model):
                    return [
                        LanguageResult(row, combine=way)
                        for way in ("mean", "probabilities")
                        for row in plain_language_rows(functools.partial(_answer, model, way), batches, work=work)
                    ]
            else:
                answer, skip = _repeatable(model, options.seed, device)
                with evaluating(model):
                    base_rows = plain_language_rows(answer, batches, skip=skip, work=work)
            texts = write(experiment, options, model, prompts_of(options, data))
            if not work.leads:
                return []
            (cross_entropies,) = base_rows
            measures = _measures(experiment, options, texts, data)
            if not voted:
                return [LanguageResult(cross_entropies, measures, texts.tokens_per_second)]
            # What is measured at each level, and of other contexts, is of the blocks, however they are combined.
            rows = {"chain": LanguageResult(cross_entropies, combine="chain")}
            for rule, row in voted.items():
                score: dict[str, Any] = {"cross_entropy": row.cross_entropy, "standard_error": row.standard_error}
                rows[rule] = LanguageResult(dataclasses.replace(cross_entropies, **score), combine=rule)
            first = options.combine or "mean"
            stands = dataclasses.replace(rows.pop(first), texts=measures, tokens_per_second=texts.tokens_per_second)
            return [stands, *(row.without_levels() for row in rows.values())]

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Cross-entropy, the context gap, and measures of the texts."""
        columns = {
            "cross-entropy": f"{row['cross_entropy']:.4f} +- {row['standard_error']:.4f}",
            "combined by": row.get("combine") or "-",
            "context gap": "-" if row["context_gap"] is None else f"{row['context_gap']:.3f}",
            "distinct-2": "-" if row.get("distinct_2") is None else f"{row['distinct_2']:.3f}",
        }
        if row.get("perplexity") is not None:
            name = Path(row["teacher"]).name  # figures under one teacher say nothing about another
            columns[f"perplexity under {name}"] = f"{row['perplexity']['perplexity']:.2f}"
        speed = row["tokens_per_second"]
        return columns | {"tokens/s": "-" if speed is None else f"{speed:.0f}"}

    def draw(
        self,
        experiment: Experiment,
        table: Sequence[Mapping[str, Any]],
        results: Mapping[str, RunResult],
        folder: Path,
    ) -> None:
        """Texts of every row, and the blocks' cross-entropies by level beside the baselines'."""
        from ...reports.figures import draw_levels

        for key, result in results.items():
            if not experiment.of_blocks(result.model) and len(_networks(result.model)) > 1:
                continue  # an ensemble writes no texts
            write_continuations(experiment, result.model, folder / key / "samples")
        baselines = baselines_in(table, "cross_entropy")
        for key in ("diffusionblocks", "diffusionblocks-branched"):
            if key in results:
                blocks, (row, *_) = experiment.blocks_of(results[key].model), results[key].rows
                assert isinstance(row, LanguageResult)
                draw_levels(row.cross_entropies, blocks.partition, folder / key / "levels.png", baselines)

    def sample(
        self, experiment: Experiment, model: nn.Module, folder: Path, values: Mapping[str, Any], *, progress: bool
    ) -> list[Path]:
        """Continue prompts, or the starts of the test text."""
        names = ("count", "seed", "steps", "grid", "temperature", "new_tokens", "top_p", "feedback", "combine", "chat")
        options = {name: values[name] for name in names}
        path = write_continuations(experiment, model, folder, prompts=values["prompt"], progress=progress, **options)
        return [path]

    # ---- models --------------------------------------------------------------------------------------------------

    def settle(self, experiment: Experiment, model: nn.Module) -> None:
        """Let the configs of a model say which tokens end the texts that it learns.

        That is the `END` of the recipe's tokenizer, and what a pretrained folder or the recipe's own `model.config`
        names; none of characters. A class's default is an id of another vocabulary.
        """
        holders: list[Any] = [model] if experiment.of_blocks(model) else _networks(model)
        for holder in holders:
            self._settle(experiment, holder, converted=experiment.of_blocks(model))

    def _settle(self, experiment: Experiment, holder: Any, *, converted: bool) -> None:
        from ...families.generation_config import as_ids, end_tokens, rebuilt_generation_config

        recipe = experiment.recipe
        own = end_tokens(holder) if recipe.model.pretrained else as_ids(recipe.model.config.get("eos_token_id"))
        end = recipe.data.codec().end
        ids = list(dict.fromkeys([*own, *([] if end is None else [end])]))
        ends = None if not ids else ids[0] if len(ids) == 1 else ids
        if hasattr(holder.config, "eos_token_id"):
            holder.config.eos_token_id = ends
        if getattr(holder, "generation_config", None) is not None:
            holder.generation_config.eos_token_id = ends
        elif ends is not None and converted:
            holder.generation_config = rebuilt_generation_config({"eos_token_id": ends}, recipe.name)


def _networks(model: nn.Module) -> list[Any]:
    """The unconverted language models in a baseline."""
    return [unit.module.model for unit in model.units()]  # type: ignore[operator]


def _answer(model: nn.Module, way: str, tokens: Tensor) -> Tensor:
    """The logits (batch, length, vocab_size) that the members of an ensemble give together."""
    return model.answers(tokens)[way]  # type: ignore[operator, no-any-return]


def _repeatable(
    model: nn.Module, seed: int, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], object] | None]:
    """The model as a function of tokens, and what makes its draws alone.

    The states that a recurrence starts from come from the seed; other models draw nothing.
    """
    import torch

    from ...models import RecurrentDepth

    if not isinstance(model.model, RecurrentDepth):
        return model, None
    original, generator = model.model, torch.Generator(device).manual_seed(seed)
    answer = functools.partial(original, generator=generator)
    return answer, lambda tokens: original.initial_state(original.embed(tokens), generator)


# ---- prompts ---------------------------------------------------------------------------------------------------


def prompts_of(options: LanguageConfig, data: TextChunks) -> list[Tensor]:
    """The starts of the test text's first sequences."""
    return [row[: options.prompt_length] for row in _sequences(options, data)]


def check_prompts(options: LanguageConfig, data: Any) -> None:
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


def _sequences(options: LanguageConfig, data: TextChunks) -> list[Tensor]:
    """The first pieces of the text, int64, each of a prompt and what follows it."""
    import torch

    from ...data import evaluation_chunks

    check_prompts(options, data)
    count, length = options.samples, options.prompt_length + options.new_tokens
    (batch,) = evaluation_chunks(
        dataclasses.replace(data.text, ids=data.text.ids[: count * length]),
        length,
        batch_size=count,
        device=torch.device("cpu"),
    )
    return list(batch["input_ids"])


# ---- texts -----------------------------------------------------------------------------------------------------


def write(
    experiment: Experiment,
    options: LanguageConfig,
    model: nn.Module,
    prompts: list[Tensor],
    *,
    seed: int | None = None,
    progress: bool = False,
) -> Continuations:
    """Continue prompts as an `evaluate` section says; continuation i has seed `seed` + i.

    A text ends with the end of a document (`END` of the tokenizer; characters have none), and of a pretrained model of
    tokens also with any of its own eos ids and stop strings. On ranks but the first there are none.
    """
    import torch

    from ...families.generation_config import end_tokens, stop_strings_of
    from ...sampling import Continuations, continue_plainly

    codec, converted = experiment.codec, experiment.of_blocks(model)
    original: Any = None
    if not converted:
        original, *others = _networks(model)
        if others:
            raise ValueError(
                f"an ensemble of {len(others) + 1} networks writes no texts; take one of them, with method: end-to-end "
                "and its sub-folder, as in --model RUN/model/member-0"
            )
    stops: tuple[int, ...] = () if codec.end is None else (codec.end,)
    if stops and experiment.recipe.model.pretrained is not None:  # its chat may end a turn otherwise than a document
        stops += end_tokens(model if converted else original)
    tokenizer = codec.library_tokenizer() if stop_strings_of(model if converted else original) else None
    first = options.seed if seed is None else seed
    together, work = options.generation_batch_size or options.batch_size, experiment.work

    def write_some(start: int) -> dict[str, Tensor]:
        some = prompts[start : start + together]
        common: dict[str, Any] = {
            "seeds": range(first + start, first + start + len(some)),
            "temperature": options.temperature,
            "top_p": options.top_p,
            "stop_tokens": stops,
            "tokenizer": tokenizer,
            "num_tokens": codec.vocab_size,  # the model may have more: its vocabulary padded to a round number
            "progress": progress and work.leads,
        }
        if converted:
            more: dict[str, Any] = {"steps": options.steps, "grid": options.grid, "feedback": options.feedback}
            more |= {"combine": options.combine, "cuda_graph": options.cuda_graph}
            texts = experiment.blocks_of(model).continue_texts(some, options.new_tokens, **common, **more)
        else:
            texts = continue_plainly(original, some, max_new_tokens=options.new_tokens, **common)
        return {
            "tokens": torch.cat(texts.tokens),
            "lengths": torch.tensor([[len(row) for row in texts.tokens], texts.prompt_lengths]),
            "seconds": torch.tensor(texts.seconds, dtype=torch.float64),
        }

    rows: list[Tensor] = []
    prompt_lengths: list[int] = []
    seconds: list[float] = []
    for results in work.in_order(range(0, len(prompts), together), write_some):
        lengths, of_prompts = results["lengths"].tolist()
        rows += results["tokens"].split(lengths)
        prompt_lengths += of_prompts
        seconds.append(float(results["seconds"]))
    if converted:
        experiment.blocks_of(model).release_graphs()  # what follows needs the memory
    return Continuations(rows, prompt_lengths, work.seconds(seconds))


def _measures(experiment: Experiment, options: LanguageConfig, texts: Continuations, data: TextChunks) -> GeneratedText:
    from ...evaluation.mauve import HiddenFeatures, mauve_score
    from ...evaluation.perplexity import generated_text, generative_perplexity
    from ...evaluation.teachers import load_teacher_tokenizer, teacher_tokens

    codec, device, lengths = experiment.codec, experiment.device, texts.prompt_lengths
    after = [row[length:] for row, length in zip(texts.tokens, lengths, strict=True)]
    perplexity = None
    if options.teacher is not None:
        tokens: Sequence[Any] = texts.tokens
        if not options.teacher_tokens:
            prompts = [codec.decode(row[:length]) for row, length in zip(texts.tokens, lengths, strict=True)]
            tokenizer = load_teacher_tokenizer(options.teacher)
            tokens, lengths = teacher_tokens(tokenizer, prompts, [codec.decode(row) for row in after])
        start = codec.end if options.teacher_tokens else None
        perplexity = generative_perplexity(
            options.teacher, tokens, lengths, start=start, batch_size=options.batch_size, device=device
        )
    mauve: Any = ()
    if options.mauve is not None:
        features = HiddenFeatures(options.mauve, batch_size=options.batch_size, device=device)
        references = _references(options, codec, data)
        mauve = mauve_score(features(references), features([codec.decode(row) for row in texts.tokens]))
    return generated_text(
        experiment.recipe.name,
        after,
        teacher=options.teacher,
        perplexity=perplexity,
        features=options.mauve,
        mauve=mauve,
    )


def _references(options: LanguageConfig, codec: TextCodec, data: TextChunks) -> list[str]:
    """What MAUVE compares with: real texts, of as many tokens as prompt and continuation."""
    from ...evaluation.mauve import reference_texts

    if options.references is None:
        return [codec.decode(row) for row in _sequences(options, data)]
    texts = reference_texts(options.references, options.samples, options.references_separator)
    length = options.prompt_length + options.new_tokens
    return [codec.decode(codec.encode(text)[:length]) for text in texts]


def write_continuations(
    experiment: Experiment,
    model: nn.Module,
    folder: Path,
    *,
    prompts: list[str] | None = None,
    chat: bool | None = None,
    count: int | None = None,
    seed: int | None = None,
    progress: bool = False,
    **changes: Any,
) -> Path:
    """Write continuations to `folder`/samples.txt, each after its prompt, an empty line between them.

    Args:
        experiment: of an autoregressive model; says all that is not given.
        model: a `DiffusionBlocks`, or an `EndToEnd`.
        folder: where the file goes.
        prompts: texts to go on from, in turn; None takes the starts of the test text's sequences.
        chat: whether each prompt is what a user says, to be written by the tokenizer's chat template.
        count: how many continuations; None: one a prompt, or `evaluate.samples`.
        seed: of the first continuation; the next count up.
        progress: show a progress bar.
        changes: other values for the fields of `LanguageConfig` (temperature, top_p, feedback, steps, ...).

    Returns:
        The file; of several ranks the first writes it.

    Raises:
        ValueError: no autoregressive model, count < 1, or a value out of range.
    """
    from ...common.files import check_writable, whole_file
    from ...data.text_config import TextSection

    task = experiment.task
    if not isinstance(task, NextTokenText):
        raise ValueError(f"only autoregressive models go on from prompts; {experiment.recipe.model.type} is none")
    values = {name: value for name, value in changes.items() if value is not None}
    if count is not None:
        check_count("count", count, MOST_SAMPLES)
    check_writable(folder, "the samples' folder")
    if prompts is None and count is not None:
        values["samples"] = count
    options = LanguageConfig.model_validate(experiment.recipe.evaluate.model_dump() | values)
    codec = experiment.codec
    if chat and prompts is None:
        raise ValueError(
            "--chat says how to read --prompt: give what the user says, as in --chat --prompt 'Who are you?'"
        )
    if prompts is None:
        # Of other settings, which may read more of the text.
        other = experiment.derive(experiment.recipe.model_copy(update={"evaluate": options}), same_run=True)
        data = other.data("test")
        task.check_examples(experiment, model, data)
        starts = prompts_of(options, data)
    else:
        text = experiment.recipe.data
        encode = text.chat_tokens if chat and isinstance(text, TextSection) else codec.encode
        encoded = [encode(prompt) for prompt in prompts]
        starts = [encoded[i % len(prompts)] for i in range(count or len(prompts))]
    task.check_room(experiment, model, max(map(len, starts)), options.new_tokens)
    texts = write(experiment, options, model, starts, seed=seed, progress=progress)
    path = folder / "samples.txt"
    if not experiment.work.leads:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text("\n\n".join(_lines(texts, codec)) + "\n", encoding="utf-8")
    return path


def _lines(texts: Continuations, codec: Any) -> Iterator[str]:
    for row, length in zip(texts.tokens, texts.prompt_lengths, strict=True):
        yield f"{codec.decode(row[:length])}|{codec.decode(row[length:])}"
