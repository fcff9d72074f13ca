"""Text token by token: chains of the exact posterior, what temperature and top-p do, rows apart, caches, controls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import HIDDEN, VOCAB, convert, randomise_adaptive, seeded
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import diffusionblocks as db
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.noise import EDM
from diffusionblocks.sampling import Continuations, continue_plainly, continue_texts, token_chain
from diffusionblocks.sampling.token_chain import feedback_rows, filtered
from diffusionblocks.targets import NextTokenTarget

PRIOR = torch.tensor([0.40, 0.28, 0.17, 0.10, 0.05], dtype=torch.float64)
MANY = 2_000
CHI_SQUARE = 18.47  # four degrees of freedom: exceeded once in a thousand
NOISE = EDM()
FAMILIES = ("llama", "recurrent", "one-stream")
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


# ---- the posterior of a known prior --------------------------------------------------------------------------------


def known(shift: int = 0) -> NextTokenTarget:
    return NextTokenTarget(5, 8, learned=False, seed=0, shift=shift)


class Posterior:
    """p(token | z) of a categorical prior, exactly; a temperature at the last call alone, where it is asked for."""

    def __init__(self, target: NextTokenTarget, last: float = 0.0, temperature: float = 1.0) -> None:
        self.target, self.last, self.temperature = target, last, temperature

    def __call__(self, inputs: Mapping[str, Any], z: Tensor, level: float) -> Tensor:
        logits = PRIOR.log() + z.double() @ self.target.table.double().T / level**2
        return logits / self.temperature if level <= self.last else logits

    def begin(self) -> None:
        """It has no weights."""


def draw(
    levels: Sequence[float], network: Posterior | None = None, *, many: int = MANY, first: int = 0, **options: Any
) -> Tensor:
    """One new token of each of many rows, (many,)."""
    target = known()
    made = continue_texts(
        network or Posterior(target),
        lambda *_: None,
        lambda level: 0,
        target,
        NOISE,
        [[]] * many,
        max_new_tokens=1,
        levels=levels,
        seeds=range(first, first + many),
        **options,
    )
    return torch.cat(made.tokens)


def shares(tokens: Tensor) -> Tensor:
    return tokens.bincount(minlength=5).double() / len(tokens)


def chi_square(tokens: Tensor, expected: Tensor) -> float:
    return float((len(tokens) * (shares(tokens) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("grid", ["equal-quantile", "karras"])
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_sampled_chains_give_the_prior_at_any_number_of_steps(steps: int, grid: str) -> None:
    """(z, a token of the posterior) is distributed as (z, the token behind z), so an Euler step keeps the marginal."""
    tokens = draw(NOISE.levels(steps, grid))
    assert chi_square(tokens, PRIOR) < CHI_SQUARE
    assert chi_square(tokens, PRIOR.flip(0)) > 10 * CHI_SQUARE


def test_soft_chains_give_the_prior_after_many_steps() -> None:
    """They follow the probability-flow ODE; with few steps they do not."""
    assert chi_square(draw(NOISE.levels(64, "karras"), feedback="soft"), PRIOR) < CHI_SQUARE
    assert chi_square(draw(NOISE.levels(3, "karras"), feedback="soft"), PRIOR) > CHI_SQUARE


def test_one_step_has_the_filtered_prior() -> None:
    levels = NOISE.levels(1)
    assert bool((draw(levels, temperature=0) == 0).all())
    flat = PRIOR.sqrt() / PRIOR.sqrt().sum()
    assert chi_square(draw(levels, temperature=2.0), flat) < CHI_SQUARE < chi_square(draw(levels), flat)
    cut = shares(draw(levels, top_p=0.6))
    assert cut[2:].sum() == 0
    assert abs(float(cut[0]) - 0.4 / 0.68) < 4 * math.sqrt(0.25 / MANY)


def test_over_several_steps_temperature_and_top_p_act() -> None:
    levels = NOISE.levels(4)
    of_mode = [float(shares(draw(levels, temperature=t))[0]) for t in (0.0, 0.5, 1.0, 2.0)]
    apart = 4 * math.sqrt(0.5 / MANY)
    assert all(colder > warmer + apart for colder, warmer in itertools.pairwise(of_mode[1:]))
    assert of_mode[0] > of_mode[2] + apart
    of_two = [float(shares(draw(levels, top_p=p))[:2].sum()) for p in (0.6, 0.9, 1.0)]
    assert of_two[0] > of_two[1] > of_two[2] - apart
    assert of_two[0] > of_two[2] + apart


def test_at_the_end_of_the_chain_temperature_does_nothing() -> None:
    """Why randomness enters at every level: the last distribution is a point mass, which no temperature changes."""
    levels = NOISE.levels(16, "karras")
    tokens = draw(levels)
    last_only = draw(levels, Posterior(known(), last=levels[-2], temperature=2.0))
    everywhere = draw(levels, Posterior(known(), last=levels[0], temperature=2.0))
    assert torch.equal(last_only, tokens)
    assert torch.equal(everywhere, draw(levels, temperature=2.0))
    assert float((everywhere != tokens).double().mean()) > 0.1


# ---- from logits to D ----------------------------------------------------------------------------------------------


def test_bridges() -> None:
    table = known().table
    assert torch.allclose(table.norm(dim=1), torch.ones(5))
    p = torch.stack([PRIOR, PRIOR.flip(0), F.one_hot(torch.tensor(2), 5).double()])
    token = torch.tensor([3, 0, 2])
    soft = feedback_rows(p, token, table, "soft", 8)
    assert torch.allclose(soft, torch.stack([sum(q[v] * table[v] for v in range(5)) for q in p]).float(), atol=1e-6)
    assert bool((soft.norm(dim=1)[:2] < 0.95).all())
    assert soft[2].norm().item() == pytest.approx(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feedback_rows(p, token, table, "soft", 8), soft)
    assert torch.equal(feedback_rows(p, token, table, "hard", 8), table[torch.tensor([0, 4, 2])])
    assert torch.equal(feedback_rows(p, token, table, "sampled", 8), table[token])
    two = feedback_rows(p, token, table, "top-k", 2)
    expected = torch.stack([0.40 * table[0] + 0.28 * table[1], 0.40 * table[4] + 0.28 * table[3], table[2]])
    assert torch.allclose(two, expected / expected.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(feedback_rows(p, token, table, "top-k", 99), F.normalize(soft, dim=1), atol=1e-6)


def test_filtered() -> None:
    logits = torch.randn(50, 11, generator=seeded())
    plain = filtered(logits, 0.7, 1.0)
    assert torch.allclose(plain, (logits.double() / 0.7).softmax(dim=1))
    for share in (0.05, 0.3, 0.8, 0.99):
        kept = filtered(logits, 0.7, share)
        assert torch.allclose(kept.sum(dim=1), torch.ones(50, dtype=torch.float64))
        for row, whole in zip(kept.tolist(), plain.tolist(), strict=True):
            ordered = sorted(range(11), key=lambda v: -whole[v])
            count = next(n for n in range(1, 12) if sum(whole[v] for v in ordered[:n]) >= share)  # the smallest set
            total = sum(whole[v] for v in ordered[:count])
            expected = [whole[v] / total if v in ordered[:count] else 0 for v in range(11)]
            assert row == pytest.approx(expected)
    assert torch.equal(filtered(logits, 0, 0.5), F.one_hot(logits.argmax(dim=1), 11).double())


@pytest.mark.parametrize("temperature", [1e-307, 1e-310, 5e-324])
def test_a_temperature_may_be_as_low_as_a_float(temperature: float) -> None:
    """Logits divided by it overflow: of infinities alone there is no probability, and the last token was drawn."""
    logits = torch.tensor([[3.0, 9.0, 8.0], [-9.0, -math.inf, -8.0]])
    assert filtered(logits, temperature, 1.0).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_filtered_keeps_as_few_as_it_can_of_ties() -> None:
    kept = filtered(torch.zeros(1, 4), 1.0, 0.5)
    assert sorted(kept[0].tolist()) == [0, 0, 0.5, 0.5]
    assert sorted(filtered(torch.zeros(1, 4), 1.0, 0.51)[0].tolist()) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert filtered(torch.zeros(1, 4), 1.0, 1e-9).max() == 1


# ---- tiny real models ----------------------------------------------------------------------------------------------


def original(family: str, vocab_size: int = VOCAB) -> Any:
    """A tiny model whose weights are large enough for its context to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "recurrent":
            sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "mlp_size": 48, "mean_recurrence": 3}
            layers = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1}
            model: Any = RecurrentDepth(VOCAB, 32, **sizes, **layers)
        else:
            config = LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=HIDDEN,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                initializer_range=0.2,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=None,
            )
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def converted(family: str) -> db.DiffusionBlocks:
    blocks = 1 if family == "recurrent" else 2
    target: Any = {"kind": "next-token", "logit_scale": 8.0, "noise_input": family != "one-stream"}
    model = db.convert(original(family), db.BlocksConfig(num_blocks=blocks, overlap=0.1, target=target))
    randomise_adaptive(model)
    return model.eval()


def lists(made: Continuations) -> list[list[int]]:
    return [row.tolist() for row in made.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_apart(family: str) -> None:
    model = converted(family)
    options: dict[str, Any] = {"steps": 4, "temperature": 0.8, "top_p": 0.9}
    batch = lists(model.continue_texts(PROMPTS, 12, seeds=[7, 8, 9], **options))
    singles = [
        lists(model.continue_texts([p], 12, seeds=[s], **options))[0] for p, s in zip(PROMPTS, (7, 8, 9), strict=True)
    ]
    assert batch == singles
    assert [row[: len(p)] for row, p in zip(batch, PROMPTS, strict=True)] == PROMPTS
    assert [len(row) for row in batch] == [len(p) + 12 for p in PROMPTS]
    assert lists(model.continue_texts(PROMPTS, 12, seeds=[1, 2, 3], **options)) != batch
    turned = [[5, 1, 4, 1, 3], [1], [2, 6, 5, 3, 5, 8, 7, 9]]  # the context counts
    other = lists(model.continue_texts(turned, 12, seeds=[7, 8, 9], **options))
    assert [row[-12:] for row in other] != [row[-12:] for row in batch]


def uncached(model: db.DiffusionBlocks, prompt: list[int], new: int, seed: int, levels: list[float]) -> list[int]:
    """Everything anew at every step, with training's forward pass: the whole text, the last position the wanted one.

    Of two streams the other noisy positions do not matter, nor does the token that stands where the wanted one will;
    of one stream each earlier position has at each level the state that it had there.
    """
    target, g = model.target, seeded(seed)
    assert isinstance(target, NextTokenTarget)
    dim = target.table.shape[1]
    states: list[list[Tensor]] = [[] for _ in levels[:-1]]
    if target.shift:
        eps = torch.randn(len(prompt) - 1, dim, generator=g)
        rows = target.rows(torch.tensor(prompt[1:], dtype=torch.int64))
        states = [list(rows + level * eps) for level in levels[:-1]]
    priors = torch.randn(32, dim, generator=g)  # as many tokens as the sampler draws for at once
    uniforms = torch.rand(32, len(levels) - 1, generator=g, dtype=torch.float64)
    text = list(prompt)
    for number in range(new):
        z = levels[0] * priors[number]
        for step, (level, following) in enumerate(itertools.pairwise(levels)):
            states[step].append(z)
            shown = torch.stack(states[step]) if target.shift else torch.randn(len(text) + 1, dim, generator=seeded(5))
            shown[-1] = z
            with torch.no_grad():
                logits = model.denoise({"input_ids": torch.tensor([[*text, 0]])}, shown[None], level)[0, -1]
            cumulative = logits.double().softmax(dim=0).cumsum(dim=0)
            token = int((cumulative <= uniforms[number, step] * cumulative[-1]).sum())
            z = z + (following - level) * (z - target.table[token]) / level
        text.append(token)
    return text


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached(family: str, steps: int) -> None:
    model = converted(family)
    made = lists(model.continue_texts(PROMPTS, 8, seeds=[3, 4, 5], combine="chain", steps=steps))
    levels = model.noise.levels(steps)
    assert made == [uncached(model, p, 8, s, levels) for p, s in zip(PROMPTS, (3, 4, 5), strict=True)]
    assert len({token for row in made for token in row[-8:]}) > 5, "the model writes the same whatever it reads"


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_one_shape_give_the_same_texts(family: str, steps: int) -> None:
    """What a GPU captures: attention over the places of the longest text, empty ones masked, from static memory."""
    model = converted(family)
    plain = model.generate(PROMPTS, 9, steps=steps, cuda_graph=False)
    assert lists(model.generate(PROMPTS, 9, steps=steps, cuda_graph=True)) == lists(plain)


class EagerSteps:
    """Runs a step as it is, each time."""

    calls_to_prepare = 0

    def __init__(self, step: Any) -> None:
        self.step = step

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.step(*inputs)  # type: ignore[no-any-return]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"temperature": 0.0}, {"num_tokens": VOCAB - 2}])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_graphs_give_the_texts_of_eager_tokens(family: str, autocast: bool, options: dict[str, Any]) -> None:
    """Against steps of the same shapes, so that products are the same kernels; twice, as nothing may be left over."""
    model = converted(family).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        graph, again = (model.generate(PROMPTS, 24, steps=3, cuda_graph=True, **options) for _ in range(2))
        model.release_graphs()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_chain, "StaticSteps", EagerSteps)
            eager = model.generate(PROMPTS, 24, steps=3, cuda_graph=True, **options)
        there = model.generate([torch.tensor(row, device="cuda") for row in PROMPTS], 24, steps=3, **options)
    assert lists(graph) == lists(again) == lists(eager)
    assert [len(row) for row in there.tokens] == [len(row) for row in eager.tokens]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_graphs_say_which_block_is_not_finite() -> None:
    model = converted("llama").cuda()
    next(model.block(1).parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="block 1: logits at level"):
        model.generate(PROMPTS, 24, steps=3, cuda_graph=True)


def test_two_streams_go_on_from_nothing() -> None:
    model = converted("llama")
    batch = lists(model.continue_texts([[], [4, 2]], 6, seeds=[0, 1], combine="chain"))
    assert batch[0] == uncached(model, [], 6, 0, model.noise.levels(2))
    assert batch[1][:2] == [4, 2]


@pytest.mark.parametrize("family", ["llama", "one-stream"])
def test_texts_beyond_the_model_are_refused_before_any_is_drawn(family: str) -> None:
    model = converted(family)
    most = model.family.longest(model.block(0).network)  # type: ignore[attr-defined]
    fits = most - 8 + model.target.shift  # type: ignore[union-attr]
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    longest = rf"{most + 1} tokens, but the model takes {most} .*: the longest prompt has 8, and max_new_tokens = "
    with pytest.raises(ValueError, match=f"{longest}{fits + 1}; give fewer, or a shorter prompt"):
        model.generate(PROMPTS, fits + 1, steps=1)
    assert not calls
    assert max(map(len, model.generate(PROMPTS, fits, steps=1).tokens)) == 8 + fits
    assert calls
    every = model.generate(PROMPTS, fits + 1, steps=1, stop_tokens=range(VOCAB))  # which end before
    assert [len(row) for row in every.tokens] == [len(prompt) + 1 for prompt in PROMPTS]


def test_a_stop_ends_its_row_alone() -> None:
    model = converted("llama")
    free = lists(model.continue_texts(PROMPTS, 20, steps=2))
    stop = free[0][len(PROMPTS[0]) + 3]
    made = model.continue_texts(PROMPTS, 20, steps=2, stop_tokens=[stop])
    for row, whole, prompt in zip(lists(made), free, PROMPTS, strict=True):
        after = whole[len(prompt) :]
        assert row == prompt + (after[: after.index(stop) + 1] if stop in after else after)
    assert len(made.tokens[0]) < len(free[0])
    assert len({len(row) - len(p) for row, p in zip(lists(made), PROMPTS, strict=True)}) > 1
    every = model.continue_texts(PROMPTS, 20, steps=2, stop_tokens=range(VOCAB))
    assert [len(row) for row in every.tokens] == [len(p) + 1 for p in PROMPTS]
    assert every.tokens_per_second == pytest.approx(3 / every.seconds)


def test_a_prompts_stop_token_does_not_end_it() -> None:
    model = converted("llama")
    free = lists(model.continue_texts([[1, 2]], 6))[0]
    unused = next(v for v in range(VOCAB) if v not in free)
    assert len(lists(model.continue_texts([[unused, 2]], 1, stop_tokens=[unused]))[0]) == 3


def test_the_mode_of_the_model_is_kept() -> None:
    model = converted("llama").train()
    first = lists(model.continue_texts(PROMPTS, 3))
    assert model.training
    assert lists(model.eval().continue_texts(PROMPTS, 3)) == first
    assert not model.training


# ---- the control ---------------------------------------------------------------------------------------------------


def test_greedy_is_the_librarys() -> None:
    model = original("llama")
    made = lists(continue_plainly(model, PROMPTS, max_new_tokens=10, seeds=[0, 1, 2], temperature=0))
    for row, prompt in zip(made, PROMPTS, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=10,
            pad_token_id=0,
        )
        assert row == theirs[0].tolist()


def test_greedy_recurrence_is_a_plain_loop() -> None:
    model = original("recurrent")
    made = lists(continue_plainly(model, PROMPTS[2:], max_new_tokens=6, seeds=[4], temperature=0))
    text, g = list(PROMPTS[2]), seeded(4)
    for _ in range(6):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text]), generator=g)[0, -1].argmax()))
    assert made == [text]
    torch.manual_seed(99)  # the global generator has no part in it
    assert lists(continue_plainly(model, PROMPTS[2:], max_new_tokens=6, seeds=[4], temperature=0)) == made


def test_shorter_prompts_are_read_whole_by_the_recurrence() -> None:
    """Of padded rows each goes on behind its own last token; the drawn states are those of the whole batch."""
    model = original("recurrent")
    batch = lists(continue_plainly(model, PROMPTS, max_new_tokens=5, seeds=[0, 1, 2], temperature=0))
    g = seeded(0)
    texts = [list(p) for p in PROMPTS]
    longest = max(map(len, texts))
    for step in range(5):
        padded = torch.zeros(3, longest + step, dtype=torch.int64)
        for place, text in zip(padded, texts, strict=True):
            place[: len(text)] = torch.tensor(text)
        with torch.no_grad():
            logits = model(padded, generator=g)
        for row, text in zip(logits, texts, strict=True):
            text.append(int(row[len(text) - 1].argmax()))
    assert batch == texts


def test_plain_draws_have_the_models_probabilities() -> None:
    model = original("llama")
    many = 3_000
    made = continue_plainly(model, [[3, 1]] * many, max_new_tokens=1, seeds=range(many), temperature=2.0)
    with torch.no_grad():
        expected = (model(torch.tensor([[3, 1]])).logits[0, -1].double() / 2).softmax(dim=0)
    found = torch.stack(made.tokens)[:, -1].bincount(minlength=VOCAB).double() / many
    assert bool(((found - expected).abs() < 4.5 * (expected * (1 - expected) / many).sqrt() + 1e-3).all())


def test_plain_rows_are_apart_and_stop() -> None:
    model = original("llama")
    seeds = [5, 6, 7]
    batch = lists(continue_plainly(model, PROMPTS, max_new_tokens=9, seeds=seeds, temperature=1.5, top_p=0.9))
    for row, prompt, seed in zip(batch, PROMPTS, seeds, strict=True):
        alone = continue_plainly(model, [prompt], max_new_tokens=9, seeds=[seed], temperature=1.5, top_p=0.9)
        assert lists(alone) == [row]
    stop = batch[1][3]
    ended = continue_plainly(
        model, PROMPTS, max_new_tokens=9, seeds=seeds, temperature=1.5, top_p=0.9, stop_tokens=[stop]
    )
    for row, whole, prompt in zip(lists(ended), batch, PROMPTS, strict=True):
        after = whole[len(prompt) :]
        assert row == prompt + (after[: after.index(stop) + 1] if stop in after else after)
    assert len(ended.tokens[1]) < len(batch[1])


# ---- refusals ------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompts": []}, "got 0 prompts and 1 seeds"),
    ({"seeds": [1, 2]}, "got 1 prompts and 2 seeds"),
    ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
    ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
    ({"temperature": math.nan}, "temperature must be a finite number >= 0, got nan"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
    ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
]
CHAINS: list[tuple[dict[str, Any], str]] = [
    ({"prompts": [[5]]}, r"prompt tokens must be in \[0, 4\], got \[5\]"),
    ({"prompts": [[-1]]}, r"prompt tokens must be in \[0, 4\], got \[-1\]"),
    ({"levels": [80.0]}, r"levels must be at least two, descending; got \[80.0\]"),
    ({"levels": [1.0, 2.0]}, r"levels must be at least two, descending; got \[1.0, 2.0\]"),
    ({"feedback": "firm"}, "unknown feedback 'firm'; allowed: soft, hard, sampled, top-k"),
    ({"top_k": 0}, "top_k must be >= 1, got 0"),
    ({"prompts": [[]], "target": known(shift=1)}, "an empty prompt: this model needs at least one token"),
]


@pytest.mark.parametrize(("change", "message"), [*OPTIONS, *CHAINS])
def test_refused(change: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {"prompts": [[1]], "seeds": [0], "max_new_tokens": 1, "levels": [80.0, 0.1]}
    given = plain | {"target": known(), "noise": NOISE} | change
    with pytest.raises(ValueError, match=message):
        continue_texts(Posterior(known()), lambda *_: None, lambda level: 0, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *OPTIONS,
        ({"prompts": [[]]}, "an empty prompt: an ordinary language model needs at least one token"),
        ({"prompts": [[VOCAB]]}, rf"prompt tokens must be in \[0, {VOCAB - 1}\], got \[{VOCAB}\]"),
    ],
)
def test_plainly_refused(change: dict[str, Any], message: str) -> None:
    plain: dict[str, Any] = {"prompts": [[1]], "seeds": [0], "max_new_tokens": 1}
    with pytest.raises(ValueError, match=message):
        continue_plainly(original("llama"), **(plain | change))


def test_refused_by_the_model() -> None:
    model = converted("llama")
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        model.continue_texts([[1]], 1, steps=0)
    with pytest.raises(ValueError, match="unknown level grid 'cosine'"):
        model.continue_texts([[1]], 1, grid="cosine")
    with pytest.raises(
        ValueError, match="generate needs prompts and max_new_tokens: this LlamaForCausalLM goes on from prompts"
    ):
        model.generate()
    with pytest.raises(ValueError, match="continue_texts is for autoregressive models; this MaskedTransformer"):
        convert("masked", num_blocks=1, noise={"kind": "masking", "vocab_size": VOCAB}).continue_texts([[1]], 1)
