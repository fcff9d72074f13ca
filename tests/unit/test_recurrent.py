"""Recurrent depth: its random depth and state, truncated gradients, causality, a cache, and that it learns."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HIDDEN, LENGTH, VOCAB, seeded, token_batch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionblocks.data.character_text import python_topics
from diffusionblocks.families.libraries import OURS
from diffusionblocks.layers.two_streams import Past, Streams, two_streams
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.models.recurrent_depth import depth_generator, draw_depth, layer_passes

CUT_STD = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))  # of a normal at 3


def fresh(**overrides: Any) -> RecurrentDepth:
    sizes = {"vocab_size": VOCAB, "sequence_length": LENGTH, "hidden_size": HIDDEN, "num_attention_heads": 2}
    layers = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1, "mlp_size": 48}
    depth = {"mean_recurrence": 6, "backprop_depth": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RecurrentDepth(**(sizes | layers | depth | overrides))


def tiny(**overrides: Any) -> RecurrentDepth:
    """No parameter zero or one, as in a trained model."""
    model = fresh(**overrides)
    g = seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return model


TOKENS = token_batch(4)["input_ids"]


# ---- the random depth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1, 8, 32])
def test_depth_has_the_mean_and_variance_of_the_mixture(mean: int) -> None:
    """Total variance: that of a Poisson of the mean rate, and that of the rate."""
    g, many = seeded(), 40_000
    n = torch.tensor([draw_depth(mean, g) for _ in range(many)], dtype=torch.float64)
    variance = mean + mean**2 * math.expm1(0.25)
    assert n.min() >= 1
    assert abs(n.mean().item() - (mean + 1)) < 4 * math.sqrt(variance / many)
    # The kurtosis of the mixture is below 9, the rate's own, so this is five standard errors.
    assert n.var().item() == pytest.approx(variance, rel=5 * math.sqrt(8 / many))
    assert n.var() > 1.15 * mean  # a Poisson of a fixed rate has the variance `mean`


def test_the_depth_is_keyed_by_the_generators_state() -> None:
    """Equal states give equal depths and are not moved; another state gives another depth."""
    depths = []
    for seed in range(20):
        g, again = seeded(seed), seeded(seed)
        before = g.get_state()
        depths.append(draw_depth(32, depth_generator(g)))
        assert torch.equal(g.get_state(), before)
        assert draw_depth(32, depth_generator(again)) == depths[-1]
        torch.rand(1, generator=again)
        moved = depth_generator(again)
        assert moved.initial_seed() != depth_generator(g).initial_seed()
    assert len(set(depths)) > 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = (depth_generator(None) for _ in range(2))
        assert [draw_depth(32, first) for _ in range(5)] != [draw_depth(32, second) for _ in range(5)]


def test_a_loop_with_one_generator_draws_many_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    model, g, seen = fresh(), seeded(), []
    recur = model.recur
    monkeypatch.setattr(model, "recur", lambda s, c, r, n: seen.append(n) or recur(s, c, r, n))
    with torch.no_grad():
        for _ in range(12):
            model.loss({"input_ids": TOKENS}, g)
    assert len(set(seen)) > 3
    g = seeded()
    model.loss({"input_ids": TOKENS}, g)
    assert seen[-1] == seen[0]  # the same key, the same depth


def test_layer_passes() -> None:
    assert layer_passes(2, 4, 2, 33, 8) == (2 + 4 * 33 + 2, 2 + 4 * 8 + 2)
    assert layer_passes(2, 4, 2, 5, 8) == (24, 24)


def test_layer_passes_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    forward, backward = [], []
    for layer in [*model.prelude, *model.core, *model.coda]:
        layer.register_forward_hook(lambda *_: forward.append(1))
        layer.register_full_backward_hook(lambda *_: backward.append(1))
    for n in (2, 7):
        forward.clear()
        backward.clear()
        model(TOKENS, n, seeded()).sum().backward()
        assert (len(forward), len(backward)) == layer_passes(1, 2, 1, n, 3)


# ---- the initial state and the weights -------------------------------------------------------------------


def test_the_state_is_a_cut_normal_of_variance_two_fifths() -> None:
    model = fresh()
    state = model.initial_state(torch.zeros(200, 50, HIDDEN), seeded()).double()
    limit = 3 * math.sqrt(2 / 5)
    assert 0.99 * limit < state.abs().max() <= limit * (1 + 1e-5)
    assert state.std().item() == pytest.approx(CUT_STD * math.sqrt(2 / 5), rel=0.005)
    assert abs(state.mean()) < 0.005
    within = (state.abs() < math.sqrt(2 / 5)).double().mean().item()
    assert within == pytest.approx(math.erf(1 / math.sqrt(2)) / math.erf(3 / math.sqrt(2)), abs=0.003)
    for dtype in (torch.bfloat16, torch.float64):
        drawn = model.initial_state(torch.zeros(1, 5, HIDDEN, dtype=dtype), seeded())
        assert drawn.dtype == dtype
        assert torch.equal(drawn, model.initial_state(torch.zeros(1, 5, HIDDEN), seeded()).to(dtype))


def test_initialisation() -> None:
    """std sqrt(2 / 5d), and 1 / sqrt(2 depth) of it for what adds to the stream, depth = 2 + 4 * 32 + 2."""
    model = fresh(hidden_size=128, num_attention_heads=4, mlp_size=256, num_core_layers=4, mean_recurrence=32)
    std = math.sqrt(2 / (5 * 128)) * CUT_STD
    small = std / math.sqrt(2 * (1 + 4 * 32 + 1))
    layer: Any = model.core[2]
    gate, up = layer.mlp.gate_up.weight.chunk(2)
    for weight in (model.adapter.weight, layer.attn.query_key.weight, layer.attn.value.weight, gate):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    for weight in (layer.attn.proj.weight, up, layer.mlp.down.weight):
        assert weight.std().item() == pytest.approx(small, rel=0.03)
    assert model.embed(torch.arange(VOCAB)[None]).std().item() == pytest.approx(CUT_STD * math.sqrt(2 / 5), rel=0.05)
    assert not layer.attn.query_key.bias.any()


def test_the_papers_shape() -> None:
    """A layer: 4 d^2 and biases on queries and keys; 3 d * 2048; four norms. The head is the embedding."""
    with torch.device("meta"):
        model = RecurrentDepth()
    d = 512
    layer = 4 * d * d + 2 * d + 3 * d * 2048 + 4 * d
    assert sum(p.numel() for p in model.parameters()) == 8 * layer + 2 * d * d + d + 32_000 * d
    assert model.core_norm is model.final_norm
    assert not [name for name in model.state_dict() if name.startswith(("head", "core_norm"))]


# ---- gradients -------------------------------------------------------------------------------------------


def explicit(model: RecurrentDepth, tokens: Tensor, iterations: int, cut: int, generator: torch.Generator) -> Tensor:
    """The logits, the state being detached before the last `cut` iterations."""
    rotation = model.positions(tokens)
    context = model.embed(tokens)
    for layer in model.prelude:
        context = layer(context, rotation)
    state = model.initial_state(context, generator)
    for i in range(iterations):
        if i == iterations - cut:
            state = state.detach()
        state = model.adapter(torch.cat([state, context], dim=-1)).to(context.dtype)
        for layer in model.core:
            state = layer(state, rotation)
    x = model.core_norm(state)
    for layer in model.coda:
        x = layer(x, rotation)
    return model.head(model.final_norm(x))


def gradients(model: RecurrentDepth, logits: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), TOKENS[:, 1:].flatten())
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_is_that_of_an_explicit_loop_with_detach(autocast: bool) -> None:
    model = tiny()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = model(TOKENS, 7, seeded())
        cut = explicit(model, TOKENS, 7, 3, seeded())
        full = explicit(model, TOKENS, 7, 7, seeded())
    assert torch.equal(ours, cut)
    assert torch.equal(ours, full)
    found, wanted, other = (gradients(model, logits) for logits in (ours, cut, full))
    for name in found:
        # Sums over iterations may be taken in another order.
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-7, msg=name)
    for name in ("core.0.attn.proj.weight", "adapter.weight", "prelude.0.mlp.down.weight"):
        assert not torch.allclose(found[name], other[name], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3])
def test_few_iterations_are_backpropagated_in_full(n: int) -> None:
    """So the gradient reaches the initial state, which it does not after one iteration more."""
    model = tiny()
    context = torch.randn(2, LENGTH, HIDDEN, generator=seeded())
    rotation = model.positions(TOKENS)
    state = torch.randn(2, LENGTH, HIDDEN, generator=seeded(2)).requires_grad_()
    (gradient,) = torch.autograd.grad(model.recur(state, context, rotation, n).square().sum(), state, allow_unused=True)
    assert gradient is not None
    assert gradient.abs().max() > 1e-6
    longer = model.recur(state, context, rotation, 4).square().sum()
    assert torch.autograd.grad(longer, state, allow_unused=True) == (None,)


def test_the_loss_is_that_of_the_next_tokens_for_each_sample() -> None:
    model = tiny()
    n = draw_depth(6, depth_generator(seeded()))
    loss = model.loss({"input_ids": TOKENS}, seeded())
    logits = model(TOKENS[:, :-1], n, seeded()).double()
    nats = -logits.log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, nats.mean(dim=1).float())
    assert loss.shape == (4,)
    with torch.no_grad():
        assert torch.equal(model.loss({"input_ids": TOKENS}, seeded()), loss)
        assert not torch.allclose(model.loss({"input_ids": TOKENS}, seeded(1)), loss, atol=1e-4)


# ---- what sees what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 5])
def test_no_position_sees_what_comes_after_it(iterations: int) -> None:
    model = tiny()
    with torch.no_grad():
        before = model(TOKENS[:1], iterations, seeded())
        for i in range(LENGTH):
            changed = TOKENS[:1].clone()
            changed[0, i] = (changed[0, i] + 1) % VOCAB
            moved = (model(changed, iterations, seeded()) - before).abs().amax(dim=-1)[0]
            assert (moved[:i] == 0).all()
            assert (moved[i:] > 1e-6).all()  # the control: itself and all that follow


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 4, 2], [LENGTH]])
def test_a_layer_continues_from_its_past(pieces: list[int]) -> None:
    model = tiny()
    layer, (cos, sin) = model.core[0], model.positions(TOKENS)
    x = torch.randn(2, LENGTH, HIDDEN, generator=seeded())
    past, parts, start = Past(2, LENGTH), [], 0
    with torch.no_grad():
        for size in pieces:
            stop = start + size
            streams = Streams(0, size, torch.device("cpu"), past=past)
            attend = functools.partial(two_streams, streams=streams)
            parts.append(layer(x[:, start:stop], (cos[start:stop], sin[start:stop]), attend))
            past.advance(streams.counts, size)
            start = stop
        torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, (cos, sin)), atol=2e-6, rtol=1e-5)


def test_iterations_and_the_state_matter() -> None:
    model = tiny()
    with torch.no_grad():
        default = model(TOKENS, generator=seeded())
        assert torch.equal(default, model(TOKENS, 6, seeded()))
        assert default.shape == (4, LENGTH, VOCAB)
        assert not torch.allclose(default, model(TOKENS, 2, seeded()), atol=1e-3)
        assert not torch.allclose(model(TOKENS, 1, seeded()), model(TOKENS, 1, seeded(1)), atol=1e-3)


# ---- as a model ------------------------------------------------------------------------------------------


def test_it_is_saved_and_read_back(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    again = RecurrentDepth.from_pretrained(tmp_path)
    values = OURS.values(RecurrentDepth, model.config)
    assert OURS.values(RecurrentDepth, again.config) == values
    assert OURS.values(RecurrentDepth, OURS.config(RecurrentDepth, values)) == values
    with torch.no_grad():
        assert torch.equal(again(TOKENS, 3, seeded()), model(TOKENS, 3, seeded()))


def test_bfloat16() -> None:
    model = tiny()
    half = copy.deepcopy(model).bfloat16()
    assert half(TOKENS, 3, seeded()).dtype == torch.bfloat16
    loss = half.loss({"input_ids": TOKENS}, seeded())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss({"input_ids": TOKENS}, seeded()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 1}, "vocab_size must be >= 2, got 1"),
        ({"num_core_layers": 0}, "num_core_layers must be > 0, got 0"),
        ({"backprop_depth": 0}, "backprop_depth must be > 0, got 0"),
        ({"num_attention_heads": 32}, "even multiple of num_attention_heads = 32 .*got 32"),
    ],
)
def test_sizes_that_cannot_be(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(**values)


def test_what_it_cannot_read() -> None:
    model = fresh()
    with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
        model(TOKENS, 0)
    with pytest.raises(ValueError, match=r"length >= 2; got \(4, 1\)"):
        model.loss({"input_ids": TOKENS[:, :1]})
    with pytest.raises(ValueError, match=r"must be in \[0, 26\], got 27$"):
        model.loss({"input_ids": torch.full((1, 4), 27)})


@pytest.mark.slow
def test_it_learns_text() -> None:
    """40 steps on Python's own documentation: held-out text is better predicted than by the letters' frequencies."""
    ids = python_topics("train").ids.long()
    frequency = torch.bincount(ids, minlength=VOCAB).double() / len(ids)
    unigram = -(frequency * frequency.log()).sum().item()
    model = fresh(hidden_size=64, num_attention_heads=4, mlp_size=128, mean_recurrence=4, backprop_depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    g = seeded()
    for _ in range(40):
        starts = torch.randint(len(ids) - 32, (16,), generator=g)
        loss = model.loss({"input_ids": ids[starts[:, None] + torch.arange(32)]}, g).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = python_topics("test").ids.long()[: 64 * 32].view(64, 32)
    with torch.no_grad():
        nats = F.cross_entropy(model(held_out, generator=g)[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).item()
    assert nats < unigram - 0.4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_step_never_waits_for_the_device() -> None:
    model, batch = fresh().cuda(), {"input_ids": TOKENS.cuda()}
    generator = torch.Generator("cuda").manual_seed(0)
    model.loss(batch, generator).mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        depths = [depth_generator(generator).initial_seed()]
        model.loss(batch, generator).mean().backward()
        depths.append(depth_generator(generator).initial_seed())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert depths[0] != depths[1]
