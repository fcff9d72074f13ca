"""What an autoregressive model knows of a text: cross-entropy of the next token, by noise level.

The figure to rank by is the cross-entropy at the highest level that is read, `read_max`. There z tells less than
1 / (2 sigma^2) nats, so it is a next-token cross-entropy, and stands beside an unconverted model's. A mean over levels
would rank models backwards: most levels are low, where the target can be read off z.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..common.fields import LogitCombination
from ..common.finite import FiniteCheck
from ..common.modules import evaluating
from ..common.precision import without_autocast
from ..common.seeds import keyed_generator
from ..core.inference import Continuing
from ..core.model import DiffusionBlocks
from ..noise import GaussianProcess, NoiseProcess, one_level
from ..targets import NextTokenTarget, cross_entropies, mean_of_counted, resolve_texts
from .row import Row
from .work import ALONE, Work

#: Makes the batches {"input_ids": int64 (n, length)} anew; `labels` and `attention_mask` beside them say which tokens
#: count, as in training (`NextTokenTarget.resolve`).
Batches = Callable[[], Iterable[Mapping[str, Tensor]]]

_TOKENS = 1024  # whose similarity to every row is computed at once
_SAMPLE = 4096  # tokens, the first of the text, over which the decodable share is averaged
_QUANTILES = 64  # levels at equal steps of their quantile, over which the decodable share is averaged


@dataclass(frozen=True)
class Level:
    """At one noise level.

    Attributes:
        level: sigma.
        block: that owns it.
        cross_entropy: NLL in nats per token.
        scrambled: the same where the context is that of another sequence: the one before, for the first the second.
        decodable: share of the tokens whose own row is the nearest to z.
    """

    level: float
    block: int
    cross_entropy: float
    scrambled: float
    decodable: float


@dataclass(frozen=True)
class LanguageRow(Row):
    """A row: the cross-entropy of a text's tokens, each sequence's first left out, for nothing stands before it.

    Attributes:
        cross_entropy: NLL in nats per token; of blocks at the highest level that is read, or of their votes.
        standard_error: of it, over sequences.
        tokens: how many were counted.
        context_gap: how much worse it is with another sequence's context; 0 for a model that ignores its context. None
            for an unconverted model.
        decodable_share: of training's levels those at which z alone gives the token away, of the text's first tokens.
        by_level: blocks: over the levels that are read, from the highest.
    """

    cross_entropy: float
    standard_error: float
    tokens: int
    context_gap: float | None = None
    decodable_share: float | None = None
    by_level: tuple[Level, ...] = ()


def language_row(model: DiffusionBlocks, batches: Batches, *, levels: int = 16, seed: int = 0) -> LanguageRow:
    """Measure an autoregressive model, in evaluation mode, each level by the block that owns it.

    Args:
        model: with a `NextTokenTarget`.
        batches: the text, in sequences of at least two tokens, two sequences at least.
        levels: how many, >= 2: even (in log sigma, or t) over those that are read, the highest first.
        seed: of the noise, keyed by (seed, batch); a token has the same noise at all levels.

    Raises:
        ValueError: another target, levels < 2, sequences as `_texts` refuses them, or logits that are not finite.
    """
    return language_rows(model, batches, levels=levels, seed=seed)[0]


def language_rows(
    model: DiffusionBlocks, batches: Batches, *, levels: int = 16, seed: int = 0, work: Work = ALONE
) -> list[LanguageRow]:
    """As `language_row`, by whoever computes which batch of `work`: one row, and none on ranks but the first."""
    target, noise = model.target, model.noise
    if not isinstance(target, NextTokenTarget) or not isinstance(noise, GaussianProcess):
        raise ValueError(f"cross-entropy by level is for autoregressive models, not for a {model.model_class}")
    if levels < 2:
        raise ValueError(f"levels must be >= 2, got {levels}")
    top, bottom = (math.log(end) if noise.logarithmic else end for end in (noise.read_max, noise.read_min))
    grid = torch.linspace(top, bottom, levels, dtype=torch.float64)
    grid = grid.exp() if noise.logarithmic else grid
    grid[0], grid[-1] = noise.read_max, noise.read_min  # free of rounding
    check = FiniteCheck(owner=model.partition.block_of)
    table = check.values(target.table, "rows of the target")
    first = 1 - target.shift  # a token without context is left out
    facts = _TextFacts(target.shift)

    def measure(piece: tuple[int, _Text, Tensor]) -> dict[str, Tensor]:
        index, (tokens, loss_mask), before = piece
        batch = {"input_ids": tokens}
        eps = _noise(target.encode(batch), seed, index)
        labels = tokens[:, target.shift :]
        other = torch.cat([before, tokens[:-1]])
        losses: dict[str, list[Tensor]] = {"matched": [], "scrambled": [], "decodable": []}
        for level in grid.tolist():
            block = model.block(model.partition.block_of(level))
            for name, context in (("matched", tokens), ("scrambled", other)):
                result = block.losses_at(batch, level, noise=eps, inputs={"input_ids": context})
                logits = check.logits(result.output, level)
                losses[name].append(_token_loss(logits[:, first:], labels[:, first:], loss_mask[:, 1:]))
            near = _is_decodable(result.z, labels, table).view(labels.shape)
            losses["decodable"].append(torch.where(loss_mask[:, target.shift :], near, 0.0).sum().double())
        return {name: torch.stack(values) for name, values in losses.items()}

    with torch.no_grad(), evaluating(model):
        parts = list(work.in_order(facts.pieces(batches), measure, checks=[check]))
    if not work.leads:
        return []
    check.read()
    rows, others = (
        [_row(torch.cat([p[name][i] for p in parts]), facts.counts) for i in range(levels)]
        for name in ("matched", "scrambled")
    )
    shares = torch.stack([part["decodable"] for part in parts]).sum(dim=0) / facts.labels
    by_level = tuple(
        Level(level, model.partition.block_of(level), a.cross_entropy, b.cross_entropy, share)
        for level, a, b, share in zip(grid.tolist(), rows, others, shares.tolist(), strict=True)
    )
    return [
        dataclasses.replace(
            rows[0],
            context_gap=_row(
                torch.cat([p["scrambled"][0] - p["matched"][0] for p in parts]), facts.counts
            ).cross_entropy,
            decodable_share=decodable_share(noise, target, torch.cat(facts.sample)[:_SAMPLE], seed=seed),
            by_level=by_level,
        )
    ]


#: Tokens (n, length), and which of them count, bool (n, length); of the first, which nothing stands before, there is no
#: loss all the same.
_Text = tuple[Tensor, Tensor]


class _TextFacts:
    """What is known of a text once all its batches have gone by.

    Args:
        shift: of the target; labels are the tokens after so many of the first ones.

    Attributes:
        labels: how many of them count.
        counts: of each batch the tokens that count in each sequence, (n,).
        sample: the first labels that count, `_SAMPLE` or a few more.
    """

    def __init__(self, shift: int = 1) -> None:
        self.labels = 0
        self.counts: list[Tensor] = []
        self.sample: list[Tensor] = []
        self._shift = shift

    def noted(self, texts: Iterable[_Text]) -> Iterator[_Text]:
        """The same texts, of which this takes note as they go by."""
        for tokens, loss_mask in texts:
            self.counts.append(loss_mask[:, 1:].sum(dim=1))
            labels = tokens[:, self._shift :][loss_mask[:, self._shift :]]
            if self.labels < _SAMPLE:
                self.sample.append(labels)
            self.labels += len(labels)
            yield tokens, loss_mask

    def pieces(self, batches: Batches) -> Iterator[tuple[int, _Text, Tensor]]:
        """(number, text, the sequence before it) of each batch."""
        # The second sequence stands before the first one; so batches of one have another context, too.
        before = torch.cat([tokens for tokens, _ in itertools.islice(_texts(batches), 2)])[1:2]
        for index, (tokens, loss_mask) in enumerate(self.noted(_texts(batches))):
            yield index, (tokens, loss_mask), before
            before = tokens[-1:]


def voted_rows(
    model: DiffusionBlocks, batches: Batches, *, seed: int = 0, work: Work = ALONE
) -> dict[str, LanguageRow]:
    """Measure what an autoregressive model's blocks say together: the cross-entropy of their averaged context logits.

    Each block is asked once for a text, at its noisiest level: one pass of all layers. What it is shown of a token
    follows from noise and from the text before it alone (`vote_on_texts`).

    Args:
        model: with a `NextTokenTarget`, and context logits (`target.likelihood: added`).
        batches: as of `language_row`.
        seed: of the noise, keyed by (seed, batch).
        work: who computes which batch.

    Returns:
        A row for each rule of `LogitVotes`, `mean` and `probabilities`; none on ranks but the first.

    Raises:
        ValueError: a model without context logits, sequences as `_texts` refuses them, or logits that are not finite.
    """
    blocks = model.inference
    if not isinstance(blocks, Continuing):
        raise ValueError(f"votes on next tokens are for autoregressive models, not for a {model.model_class}")
    check, shift = FiniteCheck(owner=model.partition.block_of), blocks.target.shift
    facts = _TextFacts()

    def measure(piece: tuple[int, _Text]) -> dict[str, Tensor]:
        index, (tokens, loss_mask) = piece
        generator = keyed_generator(seed, 0, index, "votes", tokens.device)
        votes = blocks.vote({"input_ids": tokens}, generator, check)
        return {
            rule: _token_loss(votes.answer(rule)[:, 1 - shift :], tokens[:, 1:], loss_mask[:, 1:])
            for rule in get_args(LogitCombination)
        }

    with torch.no_grad(), evaluating(model):
        parts = list(work.in_order(enumerate(facts.noted(_texts(batches))), measure, checks=[check]))
    if not work.leads:
        return {}
    check.read()
    return {rule: _row(torch.cat([part[rule] for part in parts]), facts.counts) for rule in parts[0]}


def plain_language_row(model: Callable[[Tensor], Tensor], batches: Batches) -> LanguageRow:
    """The same of an unconverted model, which maps tokens (n, length) to logits (n, length, vocab_size).

    Raises:
        ValueError: sequences as `_texts` refuses them, or a cross-entropy that is not finite.
    """
    return plain_language_rows(model, batches)[0]


def plain_language_rows(
    model: Callable[[Tensor], Tensor],
    batches: Batches,
    *,
    skip: Callable[[Tensor], object] | None = None,
    work: Work = ALONE,
) -> list[LanguageRow]:
    """As `plain_language_row`, by whoever computes which batch of `work`: one row, and none on ranks but the first.

    Args:
        model, batches: see there.
        skip: makes the draws that the model would make of tokens, where it makes any.
        work: who computes which batch.
    """
    check = FiniteCheck(_name_of(model))
    facts = _TextFacts()

    def measure(text: _Text) -> dict[str, Tensor]:
        tokens, loss_mask = text
        losses = _token_loss(model(tokens)[:, :-1], tokens[:, 1:], loss_mask[:, 1:])
        return {"losses": check.values(losses, "cross-entropies")}

    pass_over = None if skip is None else lambda text: skip(text[0])
    with torch.no_grad():
        pieces = facts.noted(_texts(batches))
        parts = [results["losses"] for results in work.in_order(pieces, measure, skip=pass_over, checks=[check])]
    if not work.leads:
        return []
    check.read()
    return [_row(torch.cat(parts), facts.counts)]


def _row(means: Tensor, counts: Sequence[Tensor]) -> LanguageRow:
    """The row of sequences' mean losses (n,), which are of so many tokens each: the mean over all of these.

    Its standard error over sequences is that of a ratio; of equal counts it is that of a mean.
    """
    many, weights = len(means), torch.cat(list(counts)).to(means)
    total = weights.sum()
    if bool((weights == weights[0]).all()):
        mean, error = means.mean(), means.std() / math.sqrt(many)
    else:
        mean = (means * weights).sum() / total
        error = (((means - mean) * weights).square().sum() * many / (many - 1)).sqrt() / total
    return LanguageRow(float(mean), float(error), int(total))


def decodable_share(noise: NoiseProcess, target: NextTokenTarget, tokens: Tensor, *, seed: int = 0) -> float:
    """The share of training's levels at which z alone decodes the target: its own row is nearer than all others.

    Args:
        noise: says how levels are drawn in training.
        target: has the rows.
        tokens: int64, any shape, of the text: frequent ones count as often as they come.
        seed: of the noise.

    Returns:
        Mean over the quantiles and over the tokens, in [0, 1].

    Raises:
        ValueError: no tokens.
    """
    if not tokens.numel():
        raise ValueError("there are no tokens to decode: give at least one")
    table, y = target.table, target.rows(tokens.flatten())
    middles = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    eps = _noise(y, seed, 0)
    with torch.no_grad():
        shares = [
            _is_decodable(noise.corrupt(y, one_level(level, y), eps), tokens.flatten(), table).mean()
            for level in noise.icdf(middles).tolist()
        ]
    return float(torch.stack(shares).mean())


def _texts(batches: Batches) -> Iterator[_Text]:
    """Each batch, resolved.

    Raises:
        ValueError: fewer than two sequences, of several lengths, or of a single token; or what `resolve_texts` refuses.
    """
    count, length = 0, None
    for batch in batches():
        entries = {name: batch[name] for name in ("input_ids", "labels", "attention_mask") if name in batch}
        text = resolve_texts(entries, 1)
        tokens, loss_mask = text["input_ids"], text.get("loss_mask")
        length = length or tokens.shape[1]
        if tokens.shape[1] != length:
            raise ValueError(f"all sequences must have one length; got {tokens.shape[1]} after {length}")
        if length < 2:
            raise ValueError("sequences have 1 token, and the first is not counted: make them longer")
        count += len(tokens)
        yield tokens, torch.ones_like(tokens, dtype=torch.bool) if loss_mask is None else loss_mask
    if count < 2:
        raise ValueError(f"a standard error needs at least two sequences, got {count}: give more text")


def _name_of(model: Callable[[Tensor], Tensor]) -> str:
    """The class of a model, or of one within it."""
    return type(getattr(model, "model", model)).__name__


def _is_decodable(z: Tensor, tokens: Tensor, table: Tensor) -> Tensor:
    """1 where the nearest of unit rows is the token's own, float32, flat."""
    flat, labels = z.flatten(0, -2), tokens.flatten()
    with without_autocast(z):  # in bfloat16 neighbouring rows are one
        nearest = [(some @ table.T).argmax(dim=-1) for some in flat.split(_TOKENS)]
    return (torch.cat(nearest) == labels).float()


def _token_loss(logits: Tensor, tokens: Tensor, loss_mask: Tensor) -> Tensor:
    """Mean loss per counted token of each sequence, float64 (n,)."""
    return mean_of_counted(cross_entropies(logits, tokens).double(), loss_mask)


def _noise(like: Tensor, seed: int, index: int) -> Tensor:
    generator = keyed_generator(seed, 0, index, "next token", like.device)
    return torch.randn(like.shape, generator=generator, device=like.device)
