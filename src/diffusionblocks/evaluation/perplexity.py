"""Measures of generated text: perplexity under a teacher, and diversity. (`mauve.py` has MAUVE.)

None stands alone. Text that repeats itself pleases a teacher ("the the the"), so perplexity goes beside `distinct_n`
and `repetition_rate`; all depend on how much text there is, so compare equal numbers of continuations of equal length,
and measure real continuations of the same prompts beside them.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.modules import evaluating
from .mauve import Mauve
from .row import Row
from .teachers import Ids, as_ids, check_counts, check_ids, load_teacher

_CHUNK = 64  # positions of a batch whose logits are widened to float32 at once


@dataclass(frozen=True)
class Perplexity:
    """What generated continuations cost a teacher.

    Attributes:
        perplexity: exp of the mean over all continuations' tokens of their cross-entropy.
        standard_error: of it, over texts; None for a single one, or where the perplexity is infinite.
        cross_entropy: that mean, in nats per token of the teacher's.
        tokens: how many were scored.
        texts: how many continuations they are of.
    """

    perplexity: float
    standard_error: float | None
    cross_entropy: float
    tokens: int
    texts: int


@dataclass(frozen=True)
class GeneratedText(Row):
    """A row: all measures of one set of continuations.

    Attributes:
        name: whose they are, such as a model's, or "test text".
        continuations: how many.
        distinct_2: see `distinct_n`; None where every continuation is shorter than 2.
        repetition_4: see `repetition_rate`; None where every continuation is shorter than 4.
        self_bleu_4: see `self_bleu`; None where fewer than two continuations have 4 tokens.
        teacher: name of the perplexity's model.
        perplexity: under it; None without teacher.
        features: name of MAUVE's model.
        mauve: one for each scaling; empty without features.
    """

    name: str
    continuations: int
    distinct_2: float | None
    repetition_4: float | None
    teacher: str | None = None
    perplexity: Perplexity | None = None
    features: str | None = None
    mauve: tuple[Mauve, ...] = ()
    self_bleu_4: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; an infinite perplexity (of a token that the teacher rules out) has none, and is null."""
        values = super().to_dict()
        if self.perplexity is not None and not math.isfinite(self.perplexity.perplexity):
            mean = self.perplexity.cross_entropy
            values["perplexity"] |= {"perplexity": None, "cross_entropy": mean if math.isfinite(mean) else None}
        return values


def generated_text(
    name: str,
    continuations: Sequence[Ids],
    *,
    teacher: str | None = None,
    perplexity: Perplexity | None = None,
    features: str | None = None,
    mauve: Sequence[Mauve] = (),
) -> GeneratedText:
    """The row of a set of continuations: diversity is measured here, the rest is as given.

    Args:
        name: whose they are.
        continuations: their tokens, without their prompts.
        teacher, perplexity, features, mauve: see `GeneratedText`.
    """
    lengths = [len(text) for text in continuations]
    longest = max(lengths, default=0)
    return GeneratedText(
        name,
        len(lengths),
        distinct_n(continuations, 2) if longest >= 2 else None,
        repetition_rate(continuations, 4) if longest >= 4 else None,
        teacher,
        perplexity,
        features,
        tuple(mauve),
        self_bleu(continuations, 4) if sum(length >= 4 for length in lengths) >= 2 else None,
    )


# ---- perplexity under a teacher ----------------------------------------------------------------------------


def generative_perplexity(
    teacher: nn.Module | str | Path,
    tokens: Sequence[Ids],
    prompt_lengths: Sequence[int] | int,
    *,
    start: int | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Perplexity:
    """What generated continuations cost a teacher, given their prompts: exp of the mean cross-entropy of their tokens.

    The mean is over the tokens of all continuations, so a long one counts for more; its standard error is that of a
    ratio, over texts. It depends on the teacher and its tokens: compare figures of one teacher only.

    Args:
        teacher: a causal language model of transformers, or a folder or hub name of one (see `load_teacher`).
        tokens: for each text prompt and continuation as the teacher's ids. For a teacher with another tokenizer than
            the generator's see `teachers.teacher_tokens`.
        prompt_lengths: how many of them are prompt, >= 0, for each text or for all.
        start: an id before each text that the teacher takes for its beginning, not scored itself. Without it the first
            token of a text without prompt is not scored, because nothing stands before it.
        batch_size: texts at a time, >= 1.
        device: where a teacher that is loaded goes; one that is given stays where it is.

    Raises:
        ValueError: no token to score, lengths that do not fit, ids that the teacher does not have, a text longer
            than it takes, or a teacher whose logits are NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    lengths = [prompt_lengths] * len(tokens) if isinstance(prompt_lengths, int) else list(prompt_lengths)
    check_counts("prompt_lengths", len(lengths), len(tokens))
    model = load_teacher(teacher, device) if isinstance(teacher, (str, Path)) else teacher
    texts = [as_ids(text) for text in tokens]
    for index, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        if not 0 <= length <= len(text):
            raise ValueError(f"prompt_lengths[{index}] = {length}: must be from 0 to {len(text)}, the text's tokens")
    if start is not None:
        begin = torch.tensor([start])
        texts, lengths = [torch.cat([begin, text]) for text in texts], [length + 1 for length in lengths]
    # What stands first is predicted from nothing, and not scored.
    some = [(text, max(length, 1)) for text, length in zip(texts, lengths, strict=True) if len(text) > max(length, 1)]
    if not some:
        raise ValueError("no continuation has a token to score: give longer ones, or a start token")
    check_ids(model, [text for text, _ in some])
    with torch.no_grad(), evaluating(model):
        nll = torch.cat([_nll(model, some[i : i + batch_size]) for i in range(0, len(some), batch_size)]).cpu()
    if bool(nll.isnan().any()):
        place = int(nll.isnan().nonzero()[0])
        raise ValueError(
            f"the teacher {type(model).__name__} gives NaN for the tokens of text {place}: its weights are damaged, or "
            "overflow in their precision; choose another teacher, or load this one in float32"
        )
    counts = torch.tensor([len(text) - length for text, length in some], dtype=torch.float64)
    mean = float(nll.sum() / counts.sum())
    perplexity, error = math.exp(mean) if mean < 700 else math.inf, None
    if len(some) > 1 and math.isfinite(perplexity):
        residuals = (nll - mean * counts).square().sum()
        error = perplexity * float((residuals * len(some) / (len(some) - 1)).sqrt() / counts.sum())
    return Perplexity(perplexity, error, mean, int(counts.sum()), len(some))


def _nll(model: nn.Module, texts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Negative log-likelihood of the continuation of each text, float64 (n,), on the model's device."""
    longest = max(len(text) for text, _ in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    there, scored = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (text, length) in enumerate(texts):
        ids[row, : len(text)] = text
        there[row, : len(text)] = 1
        scored[row, length : len(text)] = 1
    device = next(model.parameters()).device
    ids, there, scored = ids.to(device), there.to(device), scored.to(device)
    # Logits at the position before the first that is scored, and from there on.
    first = min(length for _, length in texts)
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = longest - first + 1
    logits = model(input_ids=ids, attention_mask=there, use_cache=False, **options).logits[:, -(longest - first + 1) :]
    total = torch.zeros(len(texts), dtype=torch.float64, device=device)
    for begin in range(first, longest, _CHUNK):
        end = min(begin + _CHUNK, longest)
        some, labels = logits[:, begin - first : end - first].float(), ids[:, begin:end]
        losses = F.cross_entropy(some.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        # Not by multiplication: an impossible token in a prompt would give inf * 0.
        total += torch.where(scored[:, begin:end] == 1, losses, 0.0).double().sum(dim=1)
    return total


# ---- diversity ---------------------------------------------------------------------------------------------


def distinct_n(sequences: Sequence[Sequence[Hashable] | Tensor], n: int = 2) -> float:
    """Different n-grams as a share of all n-grams, over all sequences together: 1 is no n-gram twice.

    That is distinct-n of Li et al. 2016 (arXiv 1510.03055) with n-grams in the denominator. The other usual definition
    averages each sequence's own share, and does not see that all sequences are alike. This one falls as there is more
    text: compare equal amounts.

    Args:
        sequences: continuations, without their prompts, as ids or words. (Of a string, the characters.)
        n: >= 1.

    Raises:
        ValueError: n < 1, or no sequence has n items.
    """
    grams = [gram for sequence in sequences for gram in _grams(sequence, n)]
    if not grams:
        raise ValueError(f"no sequence has {n} items, of {len(sequences)} sequences: give longer ones")
    return len(set(grams)) / len(grams)


def repetition_rate(sequences: Sequence[Sequence[Hashable] | Tensor], n: int = 4) -> float:
    """The share of a sequence's n-grams that occurred before in the same sequence, mean over sequences: 0 is none.

    Sequences of fewer than n items are left out.

    Args:
        sequences: as for `distinct_n`.
        n: >= 1.

    Raises:
        ValueError: n < 1, or no sequence has n items.
    """
    repeats = [1 - len(set(grams)) / len(grams) for sequence in sequences if (grams := _grams(sequence, n))]
    if not repeats:
        raise ValueError(f"no sequence has {n} items, of {len(sequences)} sequences: give longer ones")
    return statistics.fmean(repeats)


def self_bleu(sequences: Sequence[Sequence[Hashable] | Tensor], n: int = 4) -> float:
    """How much each sequence repeats the others: mean BLEU-n of each with all others as references (arXiv 1802.01886).

    1 is a set whose sequences are all alike; lower is more diverse. Sequences of fewer than n items are left out, and a
    sequence without a common n-gram counts 0 (no smoothing). It rises with the number of sequences: compare equal ones.

    Args:
        sequences: as for `distinct_n`.
        n: the longest n-grams, >= 1, all lengths up to it weighing the same.

    Raises:
        ValueError: n < 1, or fewer than two sequences have n items.
    """
    texts = [sequence for sequence in sequences if _grams(sequence, n)]
    if len(texts) < 2:
        raise ValueError(f"self-BLEU needs two sequences of {n} items, of {len(sequences)} there are {len(texts)}")
    logs = [0.0] * len(texts)
    for order in range(1, n + 1):
        counts = [Counter(_grams(text, order)) for text in texts]
        most: dict[tuple[Hashable, ...], tuple[int, int, int]] = {}  # of each: highest count, whose it is, the second
        for owner, grams in enumerate(counts):
            for gram, count in grams.items():
                first, whose, second = most.get(gram, (0, -1, 0))
                most[gram] = (count, owner, first) if count > first else (first, whose, max(second, count))
        for owner, grams in enumerate(counts):
            common = 0
            for gram, count in grams.items():
                first, whose, second = most[gram]
                common += min(count, second if whose == owner else first)
            logs[owner] += math.log(common / grams.total()) / n if common else -math.inf
    lengths = [len(text) for text in texts]
    nearest = [min(lengths[:i] + lengths[i + 1 :], key=lambda r: (abs(r - c), r)) for i, c in enumerate(lengths)]
    penalties = [min(0.0, 1 - r / c) for c, r in zip(lengths, nearest, strict=True)]
    return statistics.fmean(math.exp(log + penalty) for log, penalty in zip(logs, penalties, strict=True))


def _grams(sequence: Sequence[Hashable] | Tensor, n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    items: Sequence[Hashable] = sequence.tolist() if isinstance(sequence, Tensor) else sequence
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
