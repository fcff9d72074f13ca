"""Text token by token: every next token is denoised by a chain of network calls, from the highest level that is read.

Where the blocks vote, every call of the chain says what its block thinks of the token, whatever z is (its context
logits), and the token is drawn from what all of them say together. The chain then only makes z what it was in training.

Where the chain decides, randomness enters: at every level the logits are divided by the temperature and cut to their
most probable tokens (top-p), and the feedback makes of these probabilities what the next step is drawn towards. At the
end of the chain it would be too late: the last distribution is all but a point mass (c_skip -> 1 as sigma -> 0).

The clean tokens' keys and values are kept (`two_streams.Past`), so a network call runs over what is new only: the one
wanted position, and at a block's first call for a token the token before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..common.fields import MOST_LENGTH, TokenFeedback, check_count
from ..common.finite import FiniteCheck
from ..common.modules import evaluating
from ..common.precision import without_autocast
from ..families.generation_config import end_tokens, stop_criterion, stop_strings_of
from ..noise import GaussianProcess, one_level
from ..targets import NextTokenTarget
from .chain import check_levels, check_num_tokens, check_temperature, draw_tokens, generators_of
from .solvers import euler
from .static_calls import StaticSteps
from .stops import TextEnds
from .votes import LogitVotes

FEEDBACKS: tuple[str, ...] = get_args(TokenFeedback)

#: Tokens whose randomness a row draws at once. A constant: the numbers depend on how many are drawn together.
_AHEAD = 32

#: Runs the block that owns a level: (inputs, z, level) -> logits (n, positions, vocab_size).
Network = Callable[[Mapping[str, Any], Tensor, float], Tensor]

#: Posterior logits of context logits (..., positions, vocab_size), z (..., positions, dim) and its level.
Posterior = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Continuations:
    """What was generated.

    Attributes:
        tokens: of each row the prompt and what follows it, int64 (length,), on the CPU; what ended it is kept.
        prompt_lengths: tokens of each prompt.
        seconds: taken.
        tokens_per_second: generated tokens (up to the stops) over seconds.
    """

    tokens: list[Tensor]
    prompt_lengths: list[int]
    seconds: float

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
    posterior: Posterior | None = None,
    one_past: bool = False,
    stop_tokens: Sequence[int] = (),
    stop_criterion: Any = None,
    num_tokens: int | None = None,
    device: torch.device | str = "cpu",
    cuda_graph: bool = False,
    progress: bool = False,
) -> Continuations:
    """Continue prompts, in one batch, without gradients.

    A row depends on its prompt, its seed and the network alone.

    Args:
        network: runs the block that owns a level on inputs `input_ids` (new clean tokens, right-padded), `counts` (how
            many of them are tokens, (n,)) and `past`. Where the blocks vote, it gives context logits.
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
        posterior: where the blocks vote, makes the posterior of a step, from which its feedback is drawn; None: the
            network is shown no z, so there is nothing to feed.
        one_past: whether all blocks read one `past`, that of a frozen trunk: then the first call for a token fills it.
        stop_tokens: a row ends with the first of these that it generates.
        stop_criterion: or where a string ends, see `TextEnds`; None: there are no strings.
        num_tokens: only ids below it are generated, of a vocabulary that is padded beyond its tokenizer's; None: all.
        device: where the network is.
        cuda_graph: on a GPU, capture the whole chain of a token once and replay it for all that follow. Attention then
            runs over the places of the longest text from the first token on, empty ones masked.
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
    generators = generators_of(seeds)
    of_prompts = _prompt_noise(generators, lengths, target).to(device)
    past_of = (lambda level: 0) if one_past else owner
    chain = _Chain(
        network, make_past, past_of, target, noise, list(levels), longest + max_new_tokens, of_prompts, device
    )
    check = FiniteCheck(owner=owner)
    choose = _Chooser(target, temperature, top_p, feedback, top_k, check, num_tokens)
    rule: _Rule = _LastOfChain(choose)
    if combine != "chain":
        feed = _Chooser(target, 1.0, 1.0, feedback, top_k, check, num_tokens)
        rule = _Vote(combine, choose, feed, posterior)
    new = torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, place in zip(rows, new, strict=True):
        place[: len(row)] = row
    clean, counts = new.to(device), torch.tensor(lengths, device=device)

    ones = torch.ones_like(counts)

    def follow(token: Tensor, prior: Tensor, uniforms: Tensor) -> Tensor:
        return chain.next(token[:, None], ones, prior, uniforms, rule)

    def tokens() -> Iterator[Tensor]:
        following = StaticSteps(follow) if cuda_graph else follow
        draws = _draws(generators, max_new_tokens, target, len(levels) - 1 + rule.more_draws, device)
        token = chain.next(clean, counts, *next(draws), rule)
        yield token
        if cuda_graph:
            chain.keep_shapes()
        for prior, uniforms in draws:
            token = following(token, prior, uniforms)
            yield token

    ends = TextEnds(rows, max_new_tokens, stop_tokens, stop_criterion, device)
    return _grown(tokens(), rows, max_new_tokens, ends, check, progress)


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
                filtered(_ruled_out(check.logits(logits), num_tokens), temperature, top_p), uniforms[:, step]
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
    start = time.perf_counter()
    with torch.no_grad():
        for token in tqdm(tokens, total=count, disable=not progress, unit="token"):
            news.append(token)
            if ends.any and bool(ends.hear(token)):
                break
    grown = torch.stack(news, dim=1).cpu()  # waits for the device
    check.read()
    seconds = time.perf_counter() - start
    lengths = ends.lengths.tolist()
    whole = [torch.cat([row, after[:length]]) for row, after, length in zip(rows, grown, lengths, strict=True)]
    return Continuations(whole, [len(row) for row in rows], seconds)


class _Chooser:
    """From logits to the token that a step chooses, and to D, which the solver feeds on."""

    def __init__(
        self,
        target: NextTokenTarget,
        temperature: float,
        top_p: float,
        feedback: str,
        top_k: int,
        check: FiniteCheck,
        num_tokens: int | None,
    ) -> None:
        self.target, self.temperature, self.top_p = target, temperature, top_p
        self.feedback, self.top_k, self.check, self.num_tokens = feedback, top_k, check, num_tokens
        self.table = target.table

    def __call__(self, logits: Tensor, level: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, vocab_size) at a level and a uniform each (n,) -> tokens (n,) and D (n, dim)."""
        probabilities = self._probabilities(self.check.logits(logits, level))
        token = draw_tokens(probabilities, uniform)
        return token, feedback_rows(probabilities, token, self.table, self.feedback, self.top_k)

    def token(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The token alone, of logits that were looked at before."""
        return draw_tokens(self._probabilities(logits), uniform)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return filtered(_ruled_out(logits, self.num_tokens), self.temperature, self.top_p)


class _Rule(Protocol):
    """How the steps of a chain become a token.

    Attributes:
        more_draws: uniforms that it takes beside one for each step.
    """

    more_draws: int

    def hear(self, logits: Tensor, z: Tensor, level: float, uniform: Tensor, *, last: bool) -> Tensor | None:
        """Take the logits (n, vocab_size) of a step for z (n, dim); returns D (n, dim), None where nobody needs it."""

    def token(self, uniform: Tensor) -> Tensor:
        """The token (n,) of the steps since the last one; `uniform` (n,) is the last draw of all."""


class _LastOfChain:
    """The token is what the last step draws."""

    more_draws = 0

    def __init__(self, choose: _Chooser) -> None:
        self._choose = choose
        self._token: Tensor | None = None

    def hear(self, logits: Tensor, z: Tensor, level: float, uniform: Tensor, *, last: bool) -> Tensor:
        self._token, denoised = self._choose(logits, level, uniform)
        return denoised

    def token(self, uniform: Tensor) -> Tensor:
        assert self._token is not None
        return self._token


class _Vote:
    """The token is drawn from what all steps say, of the text alone."""

    more_draws = 1

    def __init__(self, combine: str, choose: _Chooser, feed: _Chooser, posterior: Posterior | None) -> None:
        self._combine, self._choose, self._feed, self._posterior = combine, choose, feed, posterior
        self._votes = LogitVotes((combine,))

    def hear(self, logits: Tensor, z: Tensor, level: float, uniform: Tensor, *, last: bool) -> Tensor | None:
        self._votes.add(self._choose.check.logits(logits, level))
        if last or self._posterior is None:
            return None
        return self._feed(self._posterior(logits[:, None], z[:, None], level)[:, 0], level, uniform)[1]

    def token(self, uniform: Tensor) -> Tensor:
        votes, self._votes = self._votes, LogitVotes((self._combine,))
        return self._choose.token(votes.answer(self._combine), uniform)


def _ruled_out(logits: Tensor, num_tokens: int | None) -> Tensor:
    """Logits (n, vocab_size) that leave no probability to ids from `num_tokens` on."""
    if num_tokens is None or num_tokens == logits.shape[-1]:
        return logits
    return logits.index_fill(-1, torch.arange(num_tokens, logits.shape[-1], device=logits.device), -math.inf)


def filtered(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities, float64, of logits (n, vocab_size) under a temperature, cut to the fewest that have a share."""
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    probabilities = (logits.double() / temperature).softmax(dim=-1)
    if top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    ordered = ordered * (ordered.cumsum(dim=-1) - ordered < top_p)  # what is before it has less than the share
    cut = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return cut / cut.sum(dim=-1, keepdim=True)


def feedback_rows(probabilities: Tensor, token: Tensor, table: Tensor, feedback: str, top_k: int) -> Tensor:
    """D (n, dim), float32: what probabilities (n, vocab_size), and the token drawn from them, feed to the next step.

    `soft` is the expected row, which is shorter than 1 where there is doubt; `hard` and `sampled` are rows; `top-k` is
    the expected row of the most probable tokens, at unit length.
    """
    if feedback == "soft":
        with without_autocast(probabilities):  # z stays float32
            return probabilities.float() @ table
    if feedback == "top-k":
        best, places = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
        return F.normalize((best.float()[..., None] * table[places]).sum(dim=-2), dim=-1)
    return table[token if feedback == "sampled" else probabilities.argmax(dim=-1)]


class _Chain:
    """Denoises one token after another; keeps what each block has seen of the clean ones."""

    def __init__(
        self,
        network: Network,
        make_past: Callable[[int, int, torch.device], Any],
        owner: Callable[[float], int],
        target: NextTokenTarget,
        noise: GaussianProcess,
        levels: list[float],
        capacity: int,
        prompt_noise: Tensor,
        device: torch.device,
    ) -> None:
        self.network, self.target, self.noise, self.levels = network, target, noise, levels
        self.make_past, self.capacity, self.prompt_noise, self.device = make_past, capacity, prompt_noise, device
        self.two_streams = target.shift == 0
        self.keys = [owner(level) if self.two_streams else step for step, level in enumerate(levels[:-1])]
        self.pasts: dict[int, Any] = {}

    def keep_shapes(self) -> None:
        """Let the steps of all further tokens have the same shapes."""
        for past in self.pasts.values():
            past.static = True

    def next(self, clean: Tensor, counts: Tensor, prior: Tensor, uniforms: Tensor, rule: _Rule) -> Tensor:
        """The token (n,) after clean tokens (n, new), of which the first `counts` of each row are no padding.

        `prior` (n, dim) is where its chain starts, `uniforms` (n, draws) are what is drawn along it.
        """
        z = self.noise.alpha_sigma(self.levels[0])[1] * prior
        current: set[int] = set()
        for step, (level, following) in enumerate(zip(self.levels[:-1], self.levels[1:], strict=True)):
            key = self.keys[step]
            if key not in self.pasts:
                self.pasts[key] = self.make_past(len(clean), self.capacity, self.device)
            news = clean if key not in current else clean[:, :0]
            current.add(key)
            inputs = {"input_ids": news, "past": self.pasts[key]}
            inputs["counts"] = counts if news.shape[1] else torch.zeros_like(counts)
            if self.two_streams:
                logits = self.network(inputs, z[:, None], level)[:, 0]
            else:
                logits = self._one_stream(inputs, z, level)
            denoised = rule.hear(logits, z, level, uniforms[:, step], last=step == len(self.keys) - 1)
            if denoised is not None:
                z = euler(lambda *_, result=denoised: result, z, [level, following], self.noise)
        return rule.token(uniforms[:, -1])

    def _one_stream(self, inputs: dict[str, Any], z: Tensor, level: float) -> Tensor:
        """Of the new positions the last wants its token; those before it have theirs, noised as in training."""
        clean, last = inputs["input_ids"], inputs["counts"] - 1
        states = z[:, None]
        if clean.shape[1] > 1:
            rows = self.target.rows(clean[:, 1:])
            states = torch.cat([self.noise.corrupt(rows, one_level(level, rows), self.prompt_noise), states], dim=1)
            states = states.index_put((torch.arange(len(z), device=z.device), last), z)
        logits = self.network(inputs, states, level)
        return logits[torch.arange(len(z), device=z.device), last]


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
        prior = torch.stack([torch.randn(_AHEAD, dim, generator=g) for g in generators]).to(device)
        uniforms = torch.stack([torch.rand(_AHEAD, steps, generator=g, dtype=torch.float64) for g in generators])
        uniforms = uniforms.to(device)
        for i in range(min(_AHEAD, count - start)):
            yield prior[:, i], uniforms[:, i]


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
