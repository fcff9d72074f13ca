"""Classification by denoising: chains from noise down to a label, and how what their blocks say is combined."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from ..common.fields import MOST_LEVELS, Combination, check_count
from ..common.finite import FiniteCheck
from ..common.seeds import Generators
from ..noise import GaussianProcess
from ..targets import LabelTarget
from .solvers import euler

#: (z, level, context logits of the chain so far) -> (context logits, posterior logits), each (batch, num_classes); None
#: for context logits that are not known apart.
LabelNetwork = Callable[[Tensor, float, Sequence[Tensor]], tuple[Tensor | None, Tensor]]

#: Probabilities and their logarithm, each (batch, num_classes).
Answer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Votes:
    """What the calls of one or more chains say of the labels, summed over the chains; votes can be added.

    Attributes:
        chains: number of chains, >= 1.
        owners: index of the block that was asked at each step.
        posteriors: probabilities from the input and z, float32, shape (steps, batch, num_classes).
        contexts: log-probabilities from the input alone, same shape; None where they are not known apart.
        context_probabilities: the same as probabilities; None likewise.
    """

    chains: int
    owners: tuple[int, ...]
    posteriors: Tensor
    contexts: Tensor | None = None
    context_probabilities: Tensor | None = None

    def __add__(self, other: Votes) -> Votes:
        return Votes(
            self.chains + other.chains,
            self.owners,
            self.posteriors + other.posteriors,
            _sum(self.contexts, other.contexts),
            _sum(self.context_probabilities, other.context_probabilities),
        )

    def answer(self, combine: str) -> Answer:
        """The probabilities that a rule of `COMBINATIONS` makes of the votes, and their logarithm.

        Raises:
            ValueError: an unknown rule, or one that needs context logits which are not known apart.
        """
        return COMBINATIONS[check_combination(combine, contexts=self.contexts is not None)](self)

    def context_means(self) -> Tensor:
        """Log-probabilities (steps, batch, num_classes) of each step's context logits, their mean over the chains."""
        assert self.contexts is not None
        return (self.contexts / self.chains).log_softmax(dim=-1)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


def _averaged(probabilities: Tensor) -> Answer:
    return probabilities, probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()


def _voted(logits: Tensor) -> Answer:
    return logits.softmax(dim=-1), logits.log_softmax(dim=-1)


def _mean(votes: Votes) -> Answer:
    return _voted(votes.context_means().mean(dim=0))


def _product(votes: Votes) -> Answer:
    means = votes.context_means()
    steps = {block: [step for step, owner in enumerate(votes.owners) if owner == block] for block in votes.owners}
    return _voted(torch.stack([means[places].mean(dim=0) for places in steps.values()]).sum(dim=0))


def _probabilities(votes: Votes) -> Answer:
    assert votes.context_probabilities is not None
    return _averaged(votes.context_probabilities.mean(dim=0) / votes.chains)


def _chain(votes: Votes) -> Answer:
    return _averaged(votes.posteriors[-1] / votes.chains)


#: Rules by name: see `DiffusionBlocks.predict`.
COMBINATIONS: dict[str, Callable[[Votes], Answer]] = {
    "mean": _mean,
    "product": _product,
    "probabilities": _probabilities,
    "chain": _chain,
}


def check_combination(combine: str, *, contexts: bool, name: str = "combine", chain: str = "chain") -> str:
    """Return the name of a rule, if there are the votes that it needs.

    Args:
        combine: the name.
        contexts: whether context logits are known apart.
        name: of the setting, for the message.
        chain: how that setting is written for the rule `chain` alone.

    Raises:
        ValueError: an unknown rule, or one that needs context logits where there are none.
    """
    if not isinstance(combine, str) or combine not in COMBINATIONS:
        raise ValueError(f"unknown {name} {combine!r}; allowed: {', '.join(get_args(Combination))}")
    if combine != "chain" and not contexts:
        raise ValueError(
            f"{name} = {combine!r} needs the blocks' context logits, which blocks trained with target.likelihood = "
            f"learned do not have: use {name} = {chain}, or train with target.likelihood = added"
        )
    return combine


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of a batch of images.

    Attributes:
        probabilities: float32, shape (batch, num_classes), rows sum to 1.
        logits: their logarithm, same shape.
        levels: the steps' levels, descending; none of a model that does not denoise.
        trajectory: on request, the posterior probabilities at every step, shape (steps, batch, num_classes), averaged
            over the seeds.
        contexts: each step's own vote: log-probabilities of its context logits, shape (steps, batch, num_classes),
            averaged over the seeds; None where there are none (`target.likelihood: learned`).
        votes: what all answers are made of: `votes.answer("product")` combines the same network calls by another rule.
            None of a model that does not denoise.
    """

    probabilities: Tensor
    logits: Tensor
    levels: tuple[float, ...]
    trajectory: Tensor | None = None
    contexts: Tensor | None = None
    votes: Votes | None = field(default=None, repr=False)


def predict_labels(
    network: LabelNetwork,
    target: LabelTarget,
    noise: GaussianProcess,
    levels: Sequence[float],
    *,
    batch_size: int,
    device: torch.device,
    owner: Callable[[float], int],
    combine: str = "chain",
    seeds: int = 1,
    feedback: str = "soft",
    generator: Generators | None = None,
    return_trajectory: bool = False,
) -> Prediction:
    """Run a chain of network calls down the levels from each of `seeds` noise seeds, and combine what they say.

    Args:
        network: maps z (batch, dim), a level and the context logits of the chain's earlier calls, as log-probabilities,
            to context logits, or None, and posterior logits.
        target: the label target, whose space z lives in.
        noise: the noise process.
        levels: descending, at least two; the network is called at each but the last.
        batch_size: number of samples.
        device: where to run.
        owner: level -> block.
        combine: a rule of `COMBINATIONS`, see `DiffusionBlocks.predict`.
        seeds: chains, >= 1.
        feedback: `soft` or `hard`: what a prediction feeds to the next step.
        generator: source of the starting noise, or one for each sample.
        return_trajectory: return the posterior probabilities of every step.

    Raises:
        ValueError: seeds < 1, unknown feedback or rule, a rule without the logits it needs, or logits that are not
            finite.
    """
    check_count("seeds", seeds, MOST_LEVELS)
    if feedback not in ("soft", "hard"):
        raise ValueError(f"unknown feedback {feedback!r}; allowed: soft, hard")
    check = FiniteCheck(owner=owner)
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "feedback": feedback, "generator": generator}
    with torch.no_grad():
        chains = (run_chain(network, target, noise, levels, check=check, **options) for _ in range(seeds))
        votes = functools.reduce(Votes.__add__, chains)
        check.read()
        probabilities, logits = votes.answer(combine)
        return Prediction(
            probabilities,
            logits,
            levels=tuple(levels[:-1]),
            trajectory=votes.posteriors / seeds if return_trajectory else None,
            contexts=None if votes.contexts is None else votes.context_means(),
            votes=votes,
        )


def run_chain(
    network: LabelNetwork,
    target: LabelTarget,
    noise: GaussianProcess,
    levels: Sequence[float],
    *,
    batch_size: int,
    device: torch.device,
    check: FiniteCheck,
    feedback: str = "soft",
    generator: Generators | None = None,
) -> Votes:
    """Run one chain of network calls down the levels, and take the vote of each.

    Args:
        network, target, noise, levels, batch_size, device, feedback, generator: see `predict_labels`.
        check: what sees to it that logits are finite; its `owner` names the block of a level.
    """
    assert check.owner is not None
    posteriors: list[Tensor] = []
    contexts: list[Tensor] = []

    def denoise(z: Tensor, level: float) -> Tensor:
        context, posterior = network(z, level, contexts)
        if context is not None:
            contexts.append(check.logits(context.float(), level).log_softmax(dim=-1))
        logits = check.logits(posterior.float(), level)
        posteriors.append(logits.softmax(dim=-1))
        return target.denoised(logits, feedback)

    def start(size: int, generator: torch.Generator | None) -> Tensor:
        return starting_noise(target, noise, levels[0], size, device, generator)

    if generator is None or isinstance(generator, torch.Generator):
        z = start(batch_size, generator)
    else:
        z = torch.cat([start(1, each) for each in generator])
    euler(denoise, z, levels, noise)
    logs = torch.stack(contexts) if contexts else None
    owners = tuple(check.owner(level) for level in levels[:-1])
    return Votes(1, owners, torch.stack(posteriors), logs, None if logs is None else logs.exp())


def starting_noise(
    target: LabelTarget,
    noise: GaussianProcess,
    level: float,
    size: int,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """z (size, dim) at the level where a chain starts: all that a chain draws."""
    return noise.prior((size, target.embedding.shape[-1]), generator=generator, device=device, level=level)
