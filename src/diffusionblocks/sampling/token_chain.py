"""The chain of network calls that makes one token of text after another, and what is drawn from their logits."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common.finite import FiniteCheck, all_finite
from ..common.precision import without_autocast
from ..noise import GaussianProcess, one_level
from ..targets import NextTokenTarget
from .chain import at_temperature, draw_tokens, running_sums
from .solvers import euler
from .static_calls import SideBySide, StaticSteps
from .votes import LogitVotes

#: Chains whose steps stay compiled or captured: that of all batches, and that of a last one, which is smaller.
_MOST_CHAINS = 2


def _compiler_options() -> dict[str, Any]:
    """Options of torch.compile for what is made of logits.

    Where inductor joins sums of rows and sums of columns into one kernel, it fails an assertion on a kernel that has
    both sums of rows and one of everything, whether all is finite, in parts (torch 2.11, on a GPU). Versions before
    2.10 do not join them.
    """
    from torch._inductor.config import triton  # takes a second to import

    name = "mix_order_reduction"
    return {f"triton.{name}": False} if hasattr(triton, name) else {}


class Network(Protocol):
    """Runs the block that owns a level, on new tokens of a text."""

    def __call__(self, inputs: Mapping[str, Any], z: Tensor, level: float, /) -> Tensor:
        """Logits (n, positions, vocab_size), one for each position of z.

        Args:
            inputs: `input_ids` (new clean tokens, right-padded), `counts` (how many of them are tokens, (n,)), `past`.
            z: (n, positions, dim).
            level: of all rows.
        """

    def begin(self) -> None:
        """Bring up to date whatever is made of the weights alone: a text begins. Where it stays, it stays in place."""


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn from logits: see `continue_texts`."""

    temperature: float
    top_p: float
    feedback: str
    top_k: int
    combine: str
    context: bool
    num_tokens: int | None

    @property
    def votes(self) -> bool:
        """Whether a token is drawn from what all steps say; a step's own draw is then at temperature 1."""
        return self.combine != "chain"

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities, float64, of logits (n, vocab_size) that a token is drawn from."""
        return filtered(ruled_out(logits, self.num_tokens), self.temperature, self.top_p)


class Step(NamedTuple):
    """One step of a chain: what it multiplies by, (1, 1) each, on the device, so that one graph serves all steps.

    Attributes:
        level: that it starts from.
        evidence: of z, what z says of the target.
        of_z, of_denoised: of z and D, what the next step starts from.
    """

    level: float
    evidence: Tensor
    of_z: Tensor
    of_denoised: Tensor

    @classmethod
    def between(cls, level: float, following: float, noise: GaussianProcess, device: torch.device) -> Step:
        """The step of `euler` from one level to the next."""
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        of_z = euler(lambda *_: zero, one, [level, following], noise)
        of_denoised = euler(lambda *_: one, zero, [level, following], noise)
        evidence = noise.evidence(one.float(), one_level(level, one.float()))
        return cls(level, *(factor.to(device, torch.float32) for factor in (evidence, of_z, of_denoised)))


def next_z(drawing: Drawing, step: Step, logits: Tensor, z: Tensor, uniform: Tensor, table: Tensor) -> Tensor:
    """What the next step of a chain starts from (n, dim), by logits (n, vocab_size), z (n, dim), and a uniform each."""
    logits = posterior(drawing, step, logits, z, table)
    # Where steps vote, what a chain feeds is as in training, at temperature 1.
    act = (1.0, 1.0) if drawing.votes else (drawing.temperature, drawing.top_p)
    probabilities = filtered(ruled_out(logits, drawing.num_tokens), *act)
    token = draw_tokens(probabilities, uniform)
    denoised = feedback_rows(probabilities, token, table, drawing.feedback, drawing.top_k)
    return step.of_z * z + step.of_denoised * denoised


def token_of(
    drawing: Drawing, step: Step, logits: Sequence[Tensor], z: Tensor, uniform: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """The token (n,) of a chain, by the logits (n, vocab_size) of all steps, and the last step and its z.

    Also whether the logits of each step are finite, bool (steps,).
    """
    good = torch.stack([all_finite(each) for each in logits])
    if drawing.votes:
        votes = LogitVotes((drawing.combine,))
        for each in logits:
            votes.add(each)
        answer = votes.answer(drawing.combine)
    else:
        answer = posterior(drawing, step, logits[-1], z, table)
    return draw_tokens(drawing.probabilities(answer), uniform), good


def posterior(drawing: Drawing, step: Step, logits: Tensor, z: Tensor, table: Tensor) -> Tensor:
    """Logits (n, vocab_size) of a step, with what z (n, dim) says added where they are context logits."""
    if not drawing.context:
        return logits
    with without_autocast(z):  # in bfloat16 neighbouring rows are one
        return torch.addmm(logits.float(), step.evidence * z, table.T)


class Pasts:
    """What has been seen of the clean tokens of `rows` texts, made when it is first asked for.

    Args:
        make: (rows, capacity, device) -> an empty `past`.
        owner: level -> whose past the step from it reads, where there are two streams.
        rows: texts.
        capacity: most tokens of a text.
    """

    def __init__(
        self, make: Callable[[int, int, torch.device], Any], owner: Callable[[float], int], rows: int, capacity: int
    ) -> None:
        self.owner, self.rows, self._make, self._capacity = owner, rows, make, capacity
        self._pasts: dict[int, Any] = {}

    def get(self, key: int, device: torch.device) -> Any:
        """One of them."""
        if key not in self._pasts:
            self._pasts[key] = self._make(self.rows, self._capacity, device)
        return self._pasts[key]

    def clear(self) -> None:
        """Forget all texts; the memory stays where it is."""
        for past in self._pasts.values():
            past.clear()

    def fix_shapes(self) -> None:
        """Let the steps of all further tokens have the same shapes."""
        for past in self._pasts.values():
            past.static = True


class TokenChain:
    """Denoises one token of some texts after another, batch after batch of them.

    Args:
        network, owner, target, noise, levels: see `continue_texts`.
        pasts: what has been seen of the texts.
        drawing: how tokens are drawn.
        device: where the network is.
        feeds: whether a step feeds the next; else the steps are apart, and a GPU runs them side by side.
        graph: run all steps for the tokens behind the first from static memory, on a GPU as one CUDA graph.
        compile: torch.compile what is made of logits there.

    Attributes:
        check: what sees to it that logits are finite.
        more_draws: uniforms that a token takes beside one for each step.
        preparation_seconds: what compiling and capturing took since `begin`.
    """

    def __init__(
        self,
        network: Network,
        pasts: Pasts,
        owner: Callable[[float], int],
        target: NextTokenTarget,
        noise: GaussianProcess,
        levels: Sequence[float],
        drawing: Drawing,
        device: torch.device,
        *,
        feeds: bool,
        graph: bool,
        compile: bool,
    ) -> None:
        self._network, self._pasts, self._target, self._noise = network, pasts, target, noise
        self._levels, self._drawing, self._device, self._feeds = list(levels), drawing, device, feeds
        self._steps = [Step.between(*pair, noise, device) for pair in itertools.pairwise(levels)]
        self._two_streams, self._static = target.shift == 0, graph or compile
        self._keys = [pasts.owner(s.level) if self._two_streams else number for number, s in enumerate(self._steps)]
        self._scale, self._table = noise.alpha_sigma(levels[0])[1], target.table.detach()
        self.check, self.more_draws = FiniteCheck(owner=owner), int(drawing.votes)
        self._next_z: Callable[..., Tensor] = next_z
        self._token_of: Callable[..., tuple[Tensor, Tensor]] = token_of
        if compile:
            options = _compiler_options()
            self._next_z = torch.compile(next_z, dynamic=False, options=options)
            self._token_of = torch.compile(token_of, dynamic=False, options=options)
        # Calls that share a past, or feed each other, go in turn.
        apart = not feeds and len(set(self._keys)) == len(self._keys)
        self._side_by_side = SideBySide(len(self._steps), device) if graph and apart else None
        self._ones = torch.ones(pasts.rows, dtype=torch.int64, device=device)
        self._following = StaticSteps(self._after) if graph else self._after
        self._unprepared = StaticSteps.calls_to_prepare if graph and device.type == "cuda" else int(compile)
        self._prompt_noise, self.preparation_seconds = torch.empty(0), 0.0

    def begin(self, prompt_noise: Tensor) -> None:
        """Start with other texts, and with the weights as they are now.

        Args:
            prompt_noise: (n, positions, dim), of the tokens that a text starts with, where there is one stream.
        """
        self._prompt_noise, self.preparation_seconds = prompt_noise, 0.0
        self._network.begin()
        self._pasts.clear()
        self.check.clear()
        with torch.no_grad():
            self._table.copy_(self._target.table)

    def next(self, clean: Tensor, counts: Tensor, prior: Tensor, uniforms: Tensor) -> Tensor:
        """The token (n,) after clean tokens (n, new), of which the first `counts` of each row are no padding.

        `prior` (n, dim) is where its chain starts, `uniforms` (n, draws) are what is drawn along it.
        """
        return self._chain(clean, counts, prior, uniforms, next_z, token_of)

    def follow(self, token: Tensor, prior: Tensor, uniforms: Tensor) -> Tensor:
        """The token (n,) after the one before it (n,)."""
        if not self._static:
            return self._chain(token[:, None], self._ones, prior, uniforms, next_z, token_of)
        self._pasts.fix_shapes()
        start = time.perf_counter()
        token = self._following(token, prior, uniforms)
        if self._unprepared:
            self._unprepared -= 1
            self.preparation_seconds += time.perf_counter() - start
        return token

    def _after(self, token: Tensor, prior: Tensor, uniforms: Tensor) -> Tensor:
        return self._chain(token[:, None], self._ones, prior, uniforms, self._next_z, self._token_of)

    def _chain(
        self,
        clean: Tensor,
        counts: Tensor,
        prior: Tensor,
        uniforms: Tensor,
        next_z: Callable[..., Tensor],
        token_of: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        z, keys = self._scale * prior, set[int]()
        calls = []
        for step, key in zip(self._steps, self._keys, strict=True):
            news = clean if key not in keys else clean[:, :0]
            inputs = {"input_ids": news, "past": self._pasts.get(key, self._device)}
            inputs["counts"] = counts if news.shape[1] else torch.zeros_like(counts)
            keys.add(key)
            calls.append((inputs, step.level))
        if self._side_by_side is not None and clean.shape[1] == 1:
            logits = self._side_by_side([functools.partial(self._ask, inputs, z, level) for inputs, level in calls])
        else:
            logits = []
            for number, (step, (inputs, level)) in enumerate(zip(self._steps, calls, strict=True)):
                logits.append(self._ask(inputs, z, level))
                if self._feeds and number < len(calls) - 1:
                    z = next_z(self._drawing, step, logits[-1], z, uniforms[:, number], self._table)
        token, good = token_of(self._drawing, self._steps[-1], logits, z, uniforms[:, -1], self._table)
        self.check.steps(good, self._levels[:-1])
        return token

    def _ask(self, inputs: dict[str, Any], z: Tensor, level: float) -> Tensor:
        """Logits (n, vocab_size) of the wanted position. Of one stream it is the last of the new ones; those before it
        have their tokens, noised as in training."""
        clean, last = inputs["input_ids"], inputs["counts"] - 1
        if self._two_streams or clean.shape[1] == 1:
            return self._network(inputs, z[:, None], level)[:, 0]
        rows, at = self._target.rows(clean[:, 1:]), torch.arange(len(z), device=z.device)
        states = self._noise.corrupt(rows, one_level(level, rows), self._prompt_noise)
        states = torch.cat([states, z[:, None]], dim=1).index_put((at, last), z)
        return self._network(inputs, states, level)[at, last]


class TokenChains:
    """Chains that are compiled or captured, with their memory, for further calls of the same shape and settings.

    A captured step reads the weights where they were when it was captured. So chains of another version, which says
    where the weights are, are forgotten before any is used. A copy of a model begins without chains.
    """

    def __init__(self) -> None:
        self._chains: list[tuple[Any, TokenChain]] = []
        self._version: Any = None

    def __reduce__(self) -> Any:
        return TokenChains, ()

    def __len__(self) -> int:
        return len(self._chains)

    def get(self, key: Any, version: Any, make: Callable[[], TokenChain]) -> TokenChain:
        """The chain of a key (whatever has `==`) and version, made where there is none; the latest two stay."""
        if version != self._version:
            self.release()
        self._version = version
        same = [chain for other, chain in self._chains if other == key]
        others = [pair for pair in self._chains if pair[0] != key]
        self._chains = others[-(_MOST_CHAINS - 1) :]  # before another is made: its memory is free then
        self._chains.append((key, same[0] if same else make()))
        return self._chains[-1][1]

    def release(self) -> None:
        """Forget all of them, and free their memory."""
        self._chains.clear()


def ruled_out(logits: Tensor, num_tokens: int | None) -> Tensor:
    """Logits (n, vocab_size) that leave no probability to ids from `num_tokens` on; None: to all of them."""
    if num_tokens is None or num_tokens == logits.shape[-1]:
        return logits
    return logits.index_fill(-1, torch.arange(num_tokens, logits.shape[-1], device=logits.device), -math.inf)


def filtered(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities, float64, of logits (n, vocab_size) under a temperature, cut to the fewest that have a share."""
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return (torch.arange(logits.shape[-1], device=logits.device) == best).double()
    probabilities = at_temperature(logits, temperature)
    if top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    ordered = ordered * (running_sums(ordered) - ordered < top_p)  # what is before it has less than the share
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
