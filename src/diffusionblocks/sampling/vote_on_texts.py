"""Votes of all blocks on every next token of texts that are known: what an ensemble's cross-entropy is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..common.finite import FiniteCheck
from ..noise import GaussianProcess
from ..targets import NextTokenTarget
from .chain import draw_tokens
from .solvers import euler
from .token_chain import feedback_rows
from .votes import LogitVotes

#: Posterior logits of context logits (..., positions, vocab_size), z (..., positions, dim) and its level.
Posterior = Callable[[Tensor, Tensor, float], Tensor]

#: Positions whose probabilities exist in float64 at once.
_POSITIONS = 2048


def vote_on_texts(
    network: Callable[[Tensor, float], Tensor],
    posterior: Posterior | None,
    target: NextTokenTarget,
    noise: GaussianProcess,
    shape: Sequence[int],
    levels: Sequence[float],
    *,
    feedback: str,
    top_k: int,
    generator: torch.Generator,
    check: FiniteCheck,
) -> LogitVotes:
    """Ask the network once at each level, for all positions of some texts at once, and collect its context logits.

    Each position has a chain of its own from noise, as where its token is generated. Nothing that is shown of a token
    follows from that token itself: z is noise, drawn towards what the network says of the text before it.

    Args:
        network: (z, level) -> context logits (batch, positions, vocab_size).
        posterior: makes what a step feeds to the next; None: the network is shown no z, so there is nothing to feed.
        target, noise: of the model.
        shape: of z, (batch, positions, dim).
        levels: descending; the network is asked at each but the last.
        feedback, top_k: what a posterior feeds to the next step, see `NextTokenTargetConfig`.
        generator: source of the noise and of what is drawn, on the model's device.
        check: what sees to it that logits are finite.
    """
    votes, table = LogitVotes(), target.table
    z = torch.randn(*shape, generator=generator, device=generator.device) * noise.alpha_sigma(levels[0])[1]
    last = levels[-2]

    def denoise(z: Tensor, level: float) -> Tensor:
        context = check.logits(network(z, level), level)
        votes.add(context)
        if posterior is None or level == last:
            return z  # nobody looks at it
        logits = posterior(context, z, level).flatten(0, 1)
        uniforms = torch.rand(len(logits), generator=generator, dtype=torch.float64, device=logits.device)
        rows = []
        for some, uniform in zip(logits.split(_POSITIONS), uniforms.split(_POSITIONS), strict=True):
            probabilities = some.double().softmax(dim=-1)
            rows.append(feedback_rows(probabilities, draw_tokens(probabilities, uniform), table, feedback, top_k))
        return torch.cat(rows).view(z.shape)

    euler(denoise, z, levels, noise)
    return votes
