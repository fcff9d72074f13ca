"""Tokens by unmasking: the ancestral sampler of masked diffusion (MD4, arXiv 2406.04329), and infilling.

In a step from level t to s each token that is still masked is revealed with probability
(alpha(s) - alpha(t)) / (1 - alpha(t)), and then drawn from the denoiser's distribution at its position. Whether a
token is revealed depends on nothing else, so its step is known before the chain starts: one uniform r a position, and
the token is still masked at level s where r < (1 - alpha(s)) / (1 - alpha(start)). A second uniform draws the token
itself. So a sequence takes two uniforms a position, however many steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..common.finite import FiniteCheck
from ..common.messages import span
from ..noise import Masking
from .chain import (
    Callback,
    Denoiser,
    at_temperature,
    check_levels,
    check_num_tokens,
    check_seeds,
    check_temperature,
    draw_tokens,
    generators_of,
)


def sample_tokens(
    denoiser: Denoiser,
    process: Masking,
    length: int,
    levels: Sequence[float],
    seeds: Sequence[int],
    *,
    template: Tensor | None = None,
    temperature: float = 1.0,
    num_tokens: int | None = None,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    owner: Callable[[float], int] | None = None,
) -> Tensor:
    """Sample sequences from all masked (or from a template), without gradients.

    A sequence depends on its seed, its template and the denoiser alone: a batch of n is n single sequences, if the
    denoiser computes each row by itself.

    Args:
        denoiser: maps z, int64 (n, length) with `process.mask_id` in it, and its level to logits, any floating dtype,
            (n, length, vocab_size); called once a step, at every level but the last.
        process: the masking process.
        length: tokens of a sequence, >= 1.
        levels: descending in [0, 1], at least two, such as `Masking.levels` gives; the first counts as all masked, and
            the last step reveals whatever is left.
        seeds: one a sequence, whole numbers from 0 to 2^63 - 1; drawn on the CPU, so the same on every device.
        template: tokens, int64 (length,) or (n, length), with `process.mask_id` in the places to be sampled; the others
            never change. Levels then tell the denoiser the share that is masked of the tokens to be sampled.
        temperature: divides the logits, >= 0; 0 takes the most probable token.
        num_tokens: only ids below this are drawn, >= 1; default all.
        device: where the denoiser is; default the CPU.
        callback: called once a step with (step, level, z, logits), before the tokens of the step are revealed.
        progress: show a progress bar, one tick a step.
        owner: level -> block, which an error then names.

    Returns:
        Token ids, int64, shape (len(seeds), length), none of them masked.

    Raises:
        ValueError: an argument is not as above, or the denoiser gives logits of another shape, or logits without a
            softmax: NaN, inf, or -inf alone. (A logit of -inf rules a token out.)
    """
    _check(length, levels, seeds, temperature)
    check_num_tokens(num_tokens, process.vocab_size)
    shape = (len(seeds), length)
    start = process.prior(shape) if template is None else _rows(template, process, shape)
    # Steps and places are kept on the CPU: the host then knows what is revealed when without asking the device.
    reveal, draw = _uniforms(seeds, length)
    step_of = _steps(process, levels, reveal).masked_fill(start != process.mask_id, -1)
    z = start.to(device)
    check = FiniteCheck(owner=owner)
    with torch.no_grad():
        for step, level in enumerate(tqdm(levels[:-1], disable=not progress, unit="step")):
            logits = denoiser(z, level)
            if logits.shape != (*shape, process.vocab_size):
                raise ValueError(
                    f"the denoiser must give logits of shape {(*shape, process.vocab_size)} (n, length, vocab_size), "
                    f"without the mask; got {tuple(logits.shape)}"
                )
            if callback is not None:
                callback(step, level, z, logits)
            check.logits(logits, level)
            here = step_of == step
            uniforms = draw[here].to(device, non_blocking=True)
            rows, columns = (places.to(device, non_blocking=True) for places in here.nonzero(as_tuple=True))
            z = z.index_put((rows, columns), _choose(logits[rows, columns, :num_tokens], uniforms, temperature))
    check.read()
    return z


def _uniforms(seeds: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
    """Two uniforms a position, float64 (n, length) each, row i from seeds[i] alone."""
    rows = [torch.rand(2, length, generator=generator, dtype=torch.float64) for generator in generators_of(seeds)]
    both = torch.stack(rows)
    return both[:, 0].contiguous(), both[:, 1]


def _steps(process: Masking, levels: Sequence[float], reveal: Tensor) -> Tensor:
    """In which step each position is revealed, int64, shape of `reveal`: it counts the levels where it stays masked."""
    masked = process.masked(torch.tensor(levels, dtype=torch.float64))
    # Without the last level, which is where all are revealed. Ascending, as searchsorted needs it.
    shares = (masked / masked[0])[1:-1].flip(0).contiguous()
    return len(shares) - torch.searchsorted(shares, reveal, right=True)


def _choose(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """A token for each row of logits (k, vocab_size), int64 (k,): the quantile at its uniform."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return draw_tokens(at_temperature(logits, temperature), uniforms)


def _rows(template: Tensor, process: Masking, shape: tuple[int, int]) -> Tensor:
    """The template on the CPU, one row a sequence."""
    if template.dtype != torch.int64 or tuple(template.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"template must be int64 of shape {shape[1:]} or {shape}, got {template.dtype} {tuple(template.shape)}: "
            f"pad it with the mask, {process.mask_id}"
        )
    rows = template.cpu().expand(shape).contiguous()
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= max(process.vocab_size, process.mask_id + 1):
        most = max(process.vocab_size - 1, process.mask_id)
        raise ValueError(
            f"the template's tokens must be from 0 to {most} ({process.mask_id}: the mask), got {span(low, high)}"
        )
    return rows


def _check(length: int, levels: Sequence[float], seeds: Sequence[int], temperature: float) -> None:
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    check_levels(levels)
    if not (levels[0] <= 1 and levels[-1] >= 0):
        raise ValueError(f"levels must be in [0, 1], got {levels[0]} to {levels[-1]}")
    check_temperature(temperature)
    check_seeds(seeds)
