"""Ancestral sampling of tokens: the right distribution with exact posteriors, infilling, seeds, one call a step."""

import itertools

import pytest
import torch
from helpers import seeded
from torch import Tensor

from diffusionblocks.noise import Masking
from diffusionblocks.sampling.unmask_tokens import sample_tokens

V, LENGTH, MASK = 3, 3, 3
PROCESS = Masking(vocab_size=V)
SEEDS = range(4000)

# A chain of three tokens whose neighbours mostly repeat.
FIRST = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
NEXT = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
CHAIN = FIRST[SEQUENCES[:, 0]] * NEXT[SEQUENCES[:, 0], SEQUENCES[:, 1]] * NEXT[SEQUENCES[:, 1], SEQUENCES[:, 2]]
ONE_HOT = torch.nn.functional.one_hot(SEQUENCES, V).double()


def exact(z: Tensor, level: float) -> Tensor:
    """Log posterior of every position given the tokens that show, by enumeration."""
    agrees = ((z[:, None] == MASK) | (z[:, None] == SEQUENCES)).all(-1)
    weights = agrees * CHAIN
    return torch.einsum("ns,slv->nlv", weights / weights.sum(1, keepdim=True), ONE_HOT).log()


def independent() -> Tensor:
    marginals = torch.einsum("s,slv->lv", CHAIN, ONE_HOT)
    return torch.stack([marginals[i, SEQUENCES[:, i]] for i in range(LENGTH)]).prod(0)


def chi_square(drawn: Tensor, p: Tensor) -> float:
    codes = (drawn * torch.tensor([V * V, V, 1])).sum(1)
    counts = torch.bincount(codes, minlength=V**LENGTH).double()
    expected = p * len(drawn)
    return float(((counts - expected) ** 2 / expected)[expected > 0].sum())


# 26 degrees of freedom: below this with probability 0.999.
CRITICAL = 54.05


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("grid", ["equal-quantile", "cosine"])
def test_many_steps_give_the_joint_distribution(schedule: str, grid: str) -> None:
    process = Masking(vocab_size=V, schedule=schedule)
    drawn = sample_tokens(exact, process, LENGTH, process.levels(300, grid), SEEDS)
    assert drawn.dtype == torch.int64
    assert chi_square(drawn, CHAIN) < CRITICAL
    assert chi_square(drawn, independent()) > 10 * CRITICAL  # the test can tell the two apart


def test_one_step_gives_independent_draws() -> None:
    drawn = sample_tokens(exact, PROCESS, LENGTH, PROCESS.levels(1), SEEDS)
    assert chi_square(drawn, independent()) < CRITICAL
    assert chi_square(drawn, CHAIN) > 10 * CRITICAL


def test_two_steps_give_the_mixture_of_both() -> None:
    """Each token is in the first half with probability one half: the sum over the eight halves, in closed form."""
    process = Masking(vocab_size=V, epsilon=1e-9)
    p = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for early in itertools.product([True, False], repeat=LENGTH):
        shown = torch.where(torch.tensor(early), SEQUENCES, MASK)
        blank = exact(torch.full_like(SEQUENCES, MASK), 1.0).exp()
        later = exact(shown, 0.5).exp()
        per_place = torch.where(torch.tensor(early)[:, None], blank, later)
        p += per_place.gather(-1, SEQUENCES[..., None])[..., 0].prod(1) / 2**LENGTH
    drawn = sample_tokens(exact, process, LENGTH, process.levels(2), SEEDS)
    assert p.sum().item() == pytest.approx(1.0)
    assert chi_square(drawn, p) < CRITICAL
    assert chi_square(drawn, CHAIN) > 3 * CRITICAL


def test_infilling_conditions_on_what_is_given() -> None:
    given = torch.tensor([MASK, 2, MASK])
    drawn = sample_tokens(exact, PROCESS, LENGTH, PROCESS.levels(50), SEEDS, template=given)
    assert drawn[:, 1].unique().tolist() == [2]
    conditional = torch.where(SEQUENCES[:, 1] == 2, CHAIN, 0.0)
    # 8 degrees of freedom: below 26.1 with probability 0.999.
    assert chi_square(drawn, conditional / conditional.sum()) < 26.1


def test_given_tokens_are_there_at_every_step_and_never_change() -> None:
    given = torch.tensor([[0, MASK, 1], [MASK, MASK, MASK], [2, 1, 0]])
    seen: list[Tensor] = []
    drawn = sample_tokens(
        exact,
        PROCESS,
        LENGTH,
        PROCESS.levels(4),
        [1, 2, 3],
        template=given,
        callback=lambda *step: seen.append(step[2]),
    )
    for z in [*seen, drawn]:
        assert torch.equal(z[given != MASK], given[given != MASK])
    assert torch.equal(seen[0], given)
    assert drawn[2].tolist() == [2, 1, 0]
    assert torch.equal(given, torch.tensor([[0, MASK, 1], [MASK, MASK, MASK], [2, 1, 0]]))


def test_tokens_are_revealed_as_alpha_says_and_stay() -> None:
    process = Masking(vocab_size=V, schedule="cosine")
    levels = [1.0, 0.8, 0.35, 0.1, 0.0]
    seen: list[tuple[int, float, Tensor]] = []
    final = sample_tokens(
        lambda z, level: torch.zeros(*z.shape, V),
        process,
        50,
        levels,
        range(400),
        callback=lambda step, level, z, logits: seen.append((step, level, z)),
    )
    assert [(step, level) for step, level, _ in seen] == list(enumerate(levels[:-1]))
    masked = process.masked(torch.tensor(levels, dtype=torch.float64))
    n = 400 * 50
    for (_, _, z), share in zip(seen, (masked / masked[0]).tolist(), strict=False):
        # (1 - alpha(s)) / (1 - alpha(1)) is the product of the steps' chances to stay masked.
        assert (z == MASK).double().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    states = [*(z for _, _, z in seen), final]
    for before, after in itertools.pairwise(states):
        assert torch.equal(after[before != MASK], before[before != MASK])
        assert bool((after != before).any())
    assert int((final == MASK).sum()) == 0


def test_one_call_a_step_at_the_levels_given() -> None:
    calls: list[tuple[float, tuple[int, ...]]] = []

    def counting(z: Tensor, level: float) -> Tensor:
        calls.append((level, tuple(z.shape)))
        return exact(z, level)

    levels = PROCESS.levels(7)
    sample_tokens(counting, PROCESS, LENGTH, levels, range(5))
    assert calls == [(level, (5, LENGTH)) for level in levels[:-1]]


def test_a_batch_is_its_single_sequences() -> None:
    given = torch.tensor([[MASK, MASK, 1], [MASK] * 3, [0, MASK, MASK]])
    levels = PROCESS.levels(5)
    together = sample_tokens(exact, PROCESS, LENGTH, levels, [7, 8, 9], template=given)
    for i, seed in enumerate([7, 8, 9]):
        alone = sample_tokens(exact, PROCESS, LENGTH, levels, [seed], template=given[i])
        assert torch.equal(alone[0], together[i])
    assert sample_tokens(exact, PROCESS, LENGTH, levels, [4] * 30).unique(dim=0).shape[0] == 1
    assert sample_tokens(exact, PROCESS, LENGTH, levels, range(30)).unique(dim=0).shape[0] > 5


def test_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])

    def constant(z: Tensor, level: float) -> Tensor:
        return logits.expand(*z.shape, V)

    for temperature in (0.5, 1.0, 3.0):
        drawn = sample_tokens(constant, PROCESS, 50, PROCESS.levels(4), range(400), temperature=temperature)
        share = torch.bincount(drawn.flatten(), minlength=V) / drawn.numel()
        assert share.tolist() == pytest.approx((logits / temperature).softmax(0).tolist(), abs=0.015)
    greedy = sample_tokens(constant, PROCESS, 50, PROCESS.levels(4), range(3), temperature=0)
    assert greedy.unique().tolist() == [0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf])
    drawn = sample_tokens(lambda z, t: logits.expand(*z.shape, V), PROCESS, 50, PROCESS.levels(3), range(100))
    assert drawn.unique().tolist() == [1]


def test_no_gradients_and_any_float_dtype() -> None:
    head = torch.randn(V + 1, V, generator=seeded(), requires_grad=True)
    drawn = sample_tokens(lambda z, t: head[z].bfloat16(), PROCESS, 8, PROCESS.levels(3), [0], progress=True)
    assert not drawn.requires_grad
    assert drawn.shape == (1, 8)


GOOD: dict[str, object] = {"length": 3, "levels": [1.0, 0.5, 0.0], "seeds": [0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length must be >= 1, got 0"),
        ({"levels": [1.0]}, "at least two, descending"),
        ({"levels": [0.0, 1.0]}, "at least two, descending"),
        ({"levels": [80.0, 0.0]}, r"levels must be in \[0, 1\]"),
        ({"seeds": []}, "got none"),
        ({"seeds": [-1]}, "got -1"),
        ({"seeds": [True]}, "got True"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"template": torch.zeros(4, dtype=torch.int64)}, r"shape \(3,\) or \(1, 3\)"),
        ({"template": torch.zeros(3)}, "template must be int64"),
        ({"template": torch.tensor([0, 4, 0])}, "from 0 to 3"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(exact, PROCESS, **(GOOD | change))  # type: ignore[arg-type]


def test_logits_with_an_entry_for_the_mask_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(1, 3, 3\).*got \(1, 3, 4\)"):
        sample_tokens(lambda z, t: torch.zeros(*z.shape, 4), PROCESS, 3, [1.0, 0.0], [0])
