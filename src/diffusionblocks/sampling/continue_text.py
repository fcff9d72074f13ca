"""Text token by token: every next token is denoised by a chain of network calls, from the highest level that is read.

Where the blocks vote, every call of the chain says what its block thinks of the token, whatever z is (its context
logits), and the token is drawn from what all of them say together. The chain then only makes z what it was in training.

Where the chain decides, randomness enters: at every level the logits are divided by the temperature and cut to their
most probable tokens (top-p), and the feedback makes of these probabilities what the next step is drawn towards. At the
end of the chain it would be too late: the last distribution is all but a point mass (c_skip -> 1 as sigma -> 0).

The clean tokens' keys and values are kept (`two_streams.Past`), so a network call runs over what is new only: the one
wanted position, and at a block's first call for a token the token before it. `token_chain.py` has the chain.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..common.fields import MOST_LENGTH, TokenFeedback, check_count
from ..common.finite import FiniteCheck
from ..common.modules import evaluating
from ..families.generation_config import end_tokens, stop_criterion, stop_strings_of
from ..noise import GaussianProcess
from ..targets import NextTokenTarget
from .chain import check_levels, check_num_tokens, check_temperature, draw_tokens, generators_of
from .static_calls import global_state
from .stops import TextEnds
from .token_chain import Drawing, Network, Pasts, TokenChain, TokenChains, filtered, ruled_out

FEEDBACKS: tuple[str, ...] = get_args(TokenFeedback)

#: Tokens whose randomness a row draws at once. A constant: the numbers depend on how many are drawn together.
_AHEAD = 32

#: Places of texts whose steps have one shape are a multiple of this.
_PLACES = 256

#: On a GPU, tokens from one look at whether all texts have ended to the next.
_LOOKS = 8


@dataclass(frozen=True)
class Continuations:
    """What was generated.

    Attributes:
        tokens: of each row the prompt and what follows it, int64 (length,), on the CPU; what ended it is kept.
        prompt_lengths: tokens of each prompt.
        seconds: taken.
        preparation_seconds: of these, what compiling and capturing took; 0 where an earlier call had done it.
        tokens_per_second: generated tokens (up to the stops) over seconds.
    """

    tokens: list[Tensor]
    prompt_lengths: list[int]
    seconds: float
    preparation_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """See above."""
        new = sum(len(row) for row in self.tokens) - sum(self.prompt_lengths)
        return new / max(self.seconds, 1e-9)


def continue_texts(
    network: Network,
    make_past: Callable[[int, int, torch.device], Any],
    owner: Callable[[float], int],
    target: NextTokenTarget,
    noise: GaussianProcess,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    levels: Sequence[float],
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    feedback: str = "sampled",
    top_k: int = 8,
    combine: str = "chain",
    context: bool = False,
    feeds: bool = True,
    one_past: bool = False,
    check_length: Callable[[int], None] | None = None,
    stop_tokens: Sequence[int] = (),
    stop_criterion: Any = None,
    num_tokens: int | None = None,
    device: torch.device | str = "cpu",
    cuda_graph: bool = False,
    compile: bool = False,
    chains: TokenChains | None = None,
    version: Any = None,
    progress: bool = False,
) -> Continuations:
    """Continue prompts, in one batch, without gradients.

    A row depends on its prompt, its seed and the network alone.

    Args:
        network: runs the block that owns a level, see `token_chain.Network`.
        make_past: (rows, capacity, device) -> an empty `past`.
        owner: level -> block, whose `past` it is. (With one stream every step has a past of its own: there the clean
            tokens' states depend on the level.)
        target: what is denoised; its `shift` says whether there are two streams (0) or one (1).
        noise: the noise process.
        prompts: tokens of each row, int64, lengths may differ; none of them empty where there is one stream.
        max_new_tokens: >= 1.
        levels: descending, at least two, such as `NoiseProcess.levels` gives: a network call at each but the last.
        seeds: one a row.
        temperature: divides the logits, >= 0; 0 takes the most probable token.
        top_p: keep the fewest most probable tokens that have this share of the probability, in (0, 1].
        feedback: one of `FEEDBACKS`, see `NextTokenTargetConfig`.
        top_k: of the feedback `top-k`, >= 1.
        combine: `chain`: a token is what the last step draws. Else one of `LogitVotes.answer`: it is drawn from what
            the steps say together; temperature and top-p then act on that alone.
        context: whether the network gives context logits, to which what z says is added here; votes need them.
        feeds: whether a step feeds the next; not where blocks vote and are shown no z.
        one_past: whether all blocks read one `past`, that of a frozen trunk: then the first call for a token fills it.
        check_length: raises ValueError for a text of more tokens than the network takes; asked before the first token
            where nothing ends a text before `max_new_tokens`, or where steps have one shape: then the network does
            not count.
        stop_tokens: a row ends with the first of these that it generates.
        stop_criterion: or where a string ends, see `TextEnds`; None: there are no strings.
        num_tokens: only ids below it are generated, of a vocabulary that is padded beyond its tokenizer's; None: all.
        device: where the network is.
        cuda_graph: on a GPU, capture the whole chain of a token once and replay it for all that follow. Attention then
            runs over the places of the longest text from the first token on, empty ones masked.
        compile: torch.compile what is made of logits, for steps of one shape. (The network compiles itself.)
        chains: where chains that are captured or compiled stay for further calls; None: nowhere.
        version: equal for two calls of `chains` if one network stands for the other, weights and their places included.
        progress: show a progress bar, one tick a token.

    Raises:
        ValueError: an argument is not as above, or logits are not finite.
        RuntimeError: a network that cannot be captured.
    """
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device="cpu").flatten() for prompt in prompts]
    _check(rows, target, max_new_tokens, levels, seeds, temperature, top_p, feedback, top_k)
    check_num_tokens(num_tokens, len(target.embedding))
    device, lengths = torch.device(device), [len(row) for row in rows]
    longest = max(lengths)
    capacity, static = longest + max_new_tokens, cuda_graph or compile
    ends = TextEnds(rows, max_new_tokens, stop_tokens, stop_criterion, device)
    if check_length is not None and (static or not ends.any):
        try:
            check_length(capacity - target.shift)
        except ValueError as error:
            raise ValueError(
                f"{error}: the longest prompt has {longest}, and max_new_tokens = {max_new_tokens}; give fewer, or a "
                "shorter prompt"
            ) from None
    if static:  # texts of about one length have one shape
        capacity = -(-(capacity + 1) // _PLACES) * _PLACES - 1
    settings = Drawing(temperature, top_p, feedback, top_k, combine, context, num_tokens)

    def make() -> TokenChain:
        pasts = Pasts(make_past, (lambda level: 0) if one_past else owner, len(rows), capacity)
        return TokenChain(
            network,
            pasts,
            owner,
            target,
            noise,
            levels,
            settings,
            device,
            feeds=feeds,
            graph=cuda_graph,
            compile=compile,
        )

    if static and chains is not None:
        owners = [owner(level) for level in levels[:-1]]
        shape = (
            len(rows),
            capacity,
            device,
            list(levels),
            owners,
            noise,
            settings,
            feeds,
            one_past,
            cuda_graph,
            compile,
        )
        chain = chains.get((*shape, *global_state(device)), version, make)
    else:
        chain = make()
    generators = generators_of(seeds)
    chain.begin(_prompt_noise(generators, lengths, target).to(device))
    new = torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, place in zip(rows, new, strict=True):
        place[: len(row)] = row
    clean, counts = new.to(device), torch.tensor(lengths, device=device)

    def tokens() -> Iterator[Tensor]:
        draws = _draws(generators, max_new_tokens, target, len(levels) - 1 + chain.more_draws, device)
        token = chain.next(clean, counts, *next(draws))
        yield token
        for prior, uniforms in draws:
            token = chain.follow(token, prior, uniforms)
            yield token

    result = _grown(tokens(), rows, max_new_tokens, ends, chain.check, progress)
    return dataclasses.replace(result, preparation_seconds=chain.preparation_seconds)


def continue_plainly(
    model: nn.Module,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] | None = None,
    tokenizer: Any = None,
    num_tokens: int | None = None,
    progress: bool = False,
) -> Continuations:
    """The same by an ordinary language model, in evaluation mode: the baseline.

    Args:
        model: a causal language model of transformers, which keeps keys and values, or a `RecurrentDepth`, which reads
            everything anew for each token. The states that its recurrence starts from are drawn for the batch, from
            the first seed: there a row depends, a little, on its batch.
        prompts, max_new_tokens, seeds, temperature, top_p, num_tokens, progress: see `continue_texts`; no prompt may be
            empty, and a row draws one uniform a token.
        stop_tokens, stop_strings, tokenizer: see `DiffusionBlocks.generate`; None takes the model's own.

    Raises:
        ValueError: an empty prompt, an argument that `continue_texts` refuses, or logits without a softmax: NaN, inf,
            or -inf alone. (A logit of -inf rules a token out.)
    """
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device="cpu").flatten() for prompt in prompts]
    _check_options(rows, max_new_tokens, seeds, temperature, top_p)
    if not all(len(row) for row in rows):
        raise ValueError("an empty prompt: an ordinary language model needs at least one token to go on from")
    _check_tokens(rows, int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    check_num_tokens(num_tokens, int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    device = next(model.parameters()).device
    criterion = stop_criterion(stop_strings_of(model) if stop_strings is None else stop_strings, tokenizer)
    states = torch.Generator(device).manual_seed(seeds[0])
    uniforms = torch.stack(
        [torch.rand(max_new_tokens, generator=generator, dtype=torch.float64) for generator in generators_of(seeds)]
    ).to(device)
    lengths, library = [len(row) for row in rows], hasattr(model, "generate")
    longest = max(lengths)
    text = torch.zeros(len(rows), longest + max_new_tokens, dtype=torch.int64)
    there = torch.zeros_like(text)
    for r, row in enumerate(rows):  # a library's cache wants padding on the left, the other reading on the right
        start = longest - len(row) if library else 0
        text[r, start : start + len(row)], there[r, start : longest + max_new_tokens] = row, 1
    text, there = text.to(device), there.to(device)
    places, at = torch.arange(len(rows), device=device), torch.tensor(lengths, device=device)
    check = FiniteCheck(type(model).__name__)

    def tokens() -> Iterator[Tensor]:
        past: Any = None
        for step in range(max_new_tokens):
            end = longest + step
            if library:
                first = 0 if past is None else end - 1
                mask = there[:, :end]
                where = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, first:]
                options = {"attention_mask": mask, "position_ids": where, "past_key_values": past, "use_cache": True}
                output = model(input_ids=text[:, first:end], **options)
                logits, past = output.logits[:, -1], output.past_key_values
            else:
                logits = model(text[:, :end], generator=states)[places, at + step - 1]
            token = draw_tokens(
                filtered(ruled_out(check.logits(logits), num_tokens), temperature, top_p), uniforms[:, step]
            )
            yield token
            text[places, torch.full_like(at, end) if library else at + step] = token

    with evaluating(model):
        stops = end_tokens(model) if stop_tokens is None else stop_tokens
        ends = TextEnds(rows, max_new_tokens, stops, criterion, device)
        return _grown(tokens(), rows, max_new_tokens, ends, check, progress)


def _grown(
    tokens: Iterator[Tensor], rows: list[Tensor], count: int, ends: TextEnds, check: FiniteCheck, progress: bool
) -> Continuations:
    """Rows with `count` tokens (n,) each behind them, fewer where they end; taken without gradients, and timed.

    `check` was given the logits that they were drawn from.
    """
    news: list[Tensor] = []
    looks = 1 if ends.lengths.device.type == "cpu" else _LOOKS  # to look is to wait; what is too much is cut off
    start = time.perf_counter()
    with torch.no_grad():
        for token in tqdm(tokens, total=count, disable=not progress, unit="token"):
            news.append(token)
            all_ended = ends.hear(token) if ends.any else None
            if all_ended is not None and len(news) % looks == 0 and bool(all_ended):
                break
    grown = torch.stack(news, dim=1).cpu()  # waits for the device
    check.read()
    seconds = time.perf_counter() - start
    lengths = ends.lengths.tolist()
    whole = [torch.cat([row, after[:length]]) for row, after, length in zip(rows, grown, lengths, strict=True)]
    return Continuations(whole, [len(row) for row in rows], seconds)


def _prompt_noise(generators: Sequence[torch.Generator], lengths: Sequence[int], target: NextTokenTarget) -> Tensor:
    """Noise of the prompts' own tokens, each but the first (n, longest - 1, dim); none where there are two streams."""
    dim = target.embedding.shape[-1]
    noise = torch.zeros(len(lengths), max(0, max(lengths) - 1) if target.shift else 0, dim)
    for row, length, generator in zip(noise, lengths, generators, strict=True):
        if target.shift:
            row[: length - 1] = torch.randn(length - 1, dim, generator=generator)
    return noise


def _draws(
    generators: Sequence[torch.Generator], count: int, target: NextTokenTarget, steps: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each token: noise of its chain (n, dim), and uniforms (n, steps)."""
    dim = target.embedding.shape[-1]
    for start in range(0, count, _AHEAD):
        prior = _to_device(torch.stack([torch.randn(_AHEAD, dim, generator=g) for g in generators]), device)
        uniforms = torch.stack([torch.rand(_AHEAD, steps, generator=g, dtype=torch.float64) for g in generators])
        uniforms = _to_device(uniforms, device)
        for i in range(min(_AHEAD, count - start)):
            yield prior[:, i], uniforms[:, i]


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, behind whatever it has to do; a GPU is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _check(
    rows: list[Tensor],
    target: NextTokenTarget,
    max_new_tokens: int,
    levels: Sequence[float],
    seeds: Sequence[int],
    temperature: float,
    top_p: float,
    feedback: str,
    top_k: int,
) -> None:
    _check_options(rows, max_new_tokens, seeds, temperature, top_p)
    _check_tokens(rows, len(target.embedding))
    if target.shift and not all(len(row) for row in rows):
        raise ValueError("an empty prompt: this model needs at least one token to go on from")
    check_levels(levels)
    if feedback not in FEEDBACKS:
        raise ValueError(f"unknown feedback {feedback!r}; allowed: {', '.join(FEEDBACKS)}")
    if top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")


def _check_tokens(rows: list[Tensor], vocabulary: int) -> None:
    for row in rows:
        if len(row) and not (int(row.min()) >= 0 and int(row.max()) < vocabulary):
            raise ValueError(f"prompt tokens must be in [0, {vocabulary - 1}], got {row.tolist()}")


def _check_options(
    rows: list[Tensor], max_new_tokens: int, seeds: Sequence[int], temperature: float, top_p: float
) -> None:
    if not rows or len(rows) != len(seeds):
        raise ValueError(f"got {len(rows)} prompts and {len(seeds)} seeds; give at least one prompt, and a seed each")
    check_count("max_new_tokens", max_new_tokens, MOST_LENGTH)
    check_temperature(temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
