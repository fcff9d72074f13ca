"""What z says of a label or token, added to the logits in closed form: Bayes' rule, and who learns what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FAMILIES, HIDDEN, NUM_LABELS, convert, noise_batch, randomise_adaptive, seeded, tiny, token_batch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

import diffusionblocks as db
from diffusionblocks.noise import EDM, FlowMatching, GaussianProcess
from diffusionblocks.targets import LabelTarget, NextTokenTarget

PROCESSES = (EDM(p_mean=1.0), FlowMatching(shift=3.0))


def label_target(classes: int = 7, *, learned: bool = False) -> LabelTarget:
    return LabelTarget(classes, 16, learned=learned, seed=0)


def log_densities(z: Tensor, rows: Tensor, level: Tensor, noise: GaussianProcess) -> Tensor:
    """log N(z; alpha * e_v, sigma^2 I) for each v: (batch, count), without the part that all have in common."""
    alpha, sigma = noise.alpha(level)[:, None, None], noise.sigma(level)[:, None]
    return -(z[:, None] - alpha * rows).square().sum(dim=-1) / (2 * sigma**2)


def block_of(kind: str = "vit", /, **target: Any) -> db.Block:
    """The middle block of three (the one of two, of text), with adaptive norms that do something."""
    model = convert(kind, target=target) if kind in FAMILIES else convert(kind, layers=2, num_blocks=2, target=target)
    randomise_adaptive(model)
    return model.block(1)


# ---- closed form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", PROCESSES, ids=lambda noise: noise.kind)
def test_of_uniform_context_the_posterior_is_that_of_bayes(noise: GaussianProcess) -> None:
    """Each sample has a level of its own; a prior that is not uniform multiplies."""
    target = label_target()
    rows = target.table.double()
    labels = torch.arange(140) % 7
    level = noise.icdf(torch.linspace(0.01, 0.99, 140, dtype=torch.float64))
    z = noise.corrupt(rows[labels], level, torch.randn(140, 16, generator=seeded(), dtype=torch.float64))
    expected = log_densities(z, rows, level, noise)
    posterior = target.posterior(torch.full((140, 7), 3.0, dtype=torch.float64), noise.evidence(z, level))
    torch.testing.assert_close(posterior.softmax(dim=-1), expected.softmax(dim=-1), rtol=1e-4, atol=1e-6)
    prior = torch.randn(140, 7, generator=seeded(1), dtype=torch.float64)
    posterior = target.posterior(prior, noise.evidence(z, level))
    torch.testing.assert_close(posterior.softmax(dim=-1), (prior + expected).softmax(dim=-1), rtol=1e-4, atol=1e-6)
    assert (posterior.softmax(dim=-1) - prior.softmax(dim=-1)).abs().max() > 0.5, "z says something"


@pytest.mark.parametrize("noise", PROCESSES, ids=lambda noise: noise.kind)
def test_at_the_highest_level_the_posterior_is_the_context(noise: GaussianProcess) -> None:
    target = label_target()
    context, level = torch.randn(5, 7, generator=seeded()), torch.full((5,), noise.level_max)
    z = noise.noised(target.table[:5], level, seeded(1))
    difference = target.posterior(context, noise.evidence(z, level)).softmax(dim=-1) - context.softmax(dim=-1)
    assert difference.abs().max() < 0.02
    assert (noise.kind == "edm") or difference.abs().max() == 0.0, "alpha is 0 there"


@pytest.mark.parametrize("noise", PROCESSES, ids=lambda noise: noise.kind)
def test_at_no_noise_the_posterior_is_the_row(noise: GaussianProcess) -> None:
    """Nor does a sigma of 0 give NaN."""
    target = label_target()
    level = torch.full((7,), noise.level_min)
    z = noise.corrupt(target.table, level, torch.zeros(7, 16))
    posterior = target.posterior(torch.randn(7, 7, generator=seeded()), noise.evidence(z, level)).softmax(dim=-1)
    torch.testing.assert_close(posterior, torch.eye(7), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_the_loss_of_the_exact_classifier_is_its_closed_form(sigma: float) -> None:
    """Of two classes: d = log-odds + D^2 / (2 sigma^2) + D / sigma * n, with D their rows' distance and n normal."""
    share = torch.tensor([0.3, 0.7])
    model = db.convert(tiny(layers=3, num_labels=2), db.BlocksConfig(num_blocks=3)).eval()
    block = model.block(1)
    head = block.network.get_submodule("classifier")
    with torch.no_grad():  # what it says of an image is then log p(v): labels have nothing to do with images here
        head.weight.zero_()
        head.bias.copy_(share.log() + 5.0)
    count = 20_000
    labels = (torch.rand(count, generator=seeded(2)) < 0.7).long()
    with torch.no_grad():
        images = torch.zeros(1, 3, 8, 8).expand(count, -1, -1, -1)
        result = block.losses_at({"pixel_values": images, "labels": labels}, sigma, seeded(3))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    rows = block.target.table.double()
    distance = (rows[0] - rows[1]).norm().item()
    exact = 0.0
    for label, p in enumerate(share.tolist()):
        odds = math.log(p / (1 - p)) + distance**2 / (2 * sigma**2) + distance / sigma * nodes
        exact += p * float((weights * np.logaddexp(0.0, -odds)).sum())
        of_label = result.losses[labels == label].double()
        assert abs(of_label.mean() - (weights * np.logaddexp(0.0, -odds)).sum()) < 4 * of_label.std() / math.sqrt(
            len(of_label)
        )
    error = result.losses.double().std().item() / math.sqrt(count)
    assert abs(result.losses.double().mean().item() - exact) < 4 * error + 1e-3
    entropy = -float((share * share.log()).sum())
    assert exact < entropy - 4 * error, "what z says is worth something"
    assert result.context is not None
    torch.testing.assert_close(result.context, (share.log() + 5.0).expand(count, 2))


# ---- what a block gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILIES, "llama"])
def test_a_block_gives_context_or_posterior(kind: str) -> None:
    block = block_of(kind, **({"kind": "next-token"} if kind == "llama" else {})).eval()
    batch = token_batch() if kind == "llama" else noise_batch()
    inputs = {name: batch[name] for name in block.input_names}
    y = block.target.encode(batch)
    level = torch.tensor([0.05, 0.1, 0.2, 0.5, 1.0, 2.0])
    z = block.noise.noised(y, level, seeded())
    with torch.no_grad():
        context, posterior = block(inputs, z, level, context=True), block(inputs, z, level)
        of_sigma = level.view(-1, *[1] * (z.dim() - 1))
        added = z @ block.target.table.T / of_sigma**2
        torch.testing.assert_close(posterior, context + added, rtol=1e-5, atol=1e-3)
        assert torch.equal(posterior, block.posterior(context, z, level))
        assert torch.equal(block.losses_at(batch, level, noise=(z - y) / of_sigma).losses.isfinite(), level > 0)
        # F is read without skip: the head's own logits of what the layers give.
        condition = block.shared.noise_embedding(block.noise.condition(level))
        hidden, raw = block.family.hidden(block.call(condition, inputs, block.noise.scaled(z, level)))
        call = block._readout_call(condition)
        assert torch.equal(context, block.family.readout(call, hidden, raw))


def test_a_model_gives_context_or_posterior_of_the_block_that_owns_a_level() -> None:
    model = convert().eval()
    inputs, z = {"pixel_values": noise_batch()["pixel_values"]}, torch.randn(6, HIDDEN, generator=seeded())
    level = 0.4
    owner = model.block(model.partition.block_of(level))
    with torch.no_grad():
        context = model.denoise(inputs, z, level, context=True)
        assert torch.equal(context, owner(inputs, z, torch.full((6,), level), context=True))
        assert torch.equal(model.posterior(context, z, level), model.denoise(inputs, z, level))


@pytest.mark.parametrize("kind", ["label", "image"])
def test_without_an_added_likelihood_there_is_no_context(kind: str) -> None:
    model = convert(target={"likelihood": "learned"}) if kind == "label" else convert("dit")
    z = torch.randn(2, *((HIDDEN,) if kind == "label" else (3, 8, 8)))
    inputs = {"pixel_values": noise_batch(2)["pixel_values"]} if kind == "label" else {"labels": torch.arange(2)}
    with pytest.raises(ValueError, match=r"no context logits: .*likelihood: added"):
        model.denoise(inputs, z, 0.4, context=True)
    with pytest.raises(ValueError, match="no context logits"):
        model.posterior(torch.zeros(2, NUM_LABELS), z, 0.4)


def test_the_clean_stream_is_a_plain_language_model() -> None:
    """Only noisy positions have z; the others' logits are what the head gives."""
    model = convert("llama", layers=2, num_blocks=2, target={"kind": "next-token", "clean_weight": 0.5}).train()
    block, batch = model.block(1), token_batch()
    level = torch.full((6,), 0.1)
    z = block.noise.noised(block.target.encode(batch), level, seeded())
    posterior, context = (block(batch, z, level, context=context) for context in (False, True))
    length = z.shape[1]
    assert posterior.shape[1] == 2 * length
    assert torch.equal(posterior[:, length:], context[:, length:])
    assert not torch.equal(posterior[:, :length], context[:, :length])
    assert torch.equal(block.losses_at(batch, level, noise=torch.zeros_like(z)).output[:, length:], context[:, length:])


# ---- who learns what ---------------------------------------------------------------------------------------------


def test_gradients_reach_the_context_alone() -> None:
    target = label_target(learned=True)
    noise, labels, level = EDM(), torch.tensor([0, 3, 3, 6]), torch.tensor([0.1, 0.5, 1.0, 2.0])
    context = torch.randn(4, 7, generator=seeded(), requires_grad=True)
    z = noise.noised(target.encode({"labels": labels}), level, seeded(1))
    assert z.requires_grad
    posterior = target.posterior(context, noise.evidence(z, level))
    target.loss(posterior, {"labels": labels}).sum().backward()
    torch.testing.assert_close(context.grad, posterior.detach().softmax(dim=-1) - F.one_hot(labels, 7))
    assert target.embedding.grad is None


def test_a_block_hands_the_embedding_no_gradient_through_what_is_added() -> None:
    """Positive control: with a learned likelihood it has one, through what the network is shown."""
    gradients = {}
    for likelihood in ("added", "learned"):
        model = convert(shared="joint", target={"likelihood": likelihood, "token": "linear"})
        block = model.block(1)
        block.loss(noise_batch(), seeded()).sum().backward()
        gradients[likelihood] = block.target.embedding.grad
    assert gradients["added"] is None or not gradients["added"].any(), "the map starts at zero: z is not seen"
    assert gradients["learned"] is not None
    assert gradients["learned"].abs().max() > 0


# ---- precision, compilation --------------------------------------------------------------------------------------


def test_under_autocast_what_is_added_stays_float32() -> None:
    block = block_of("vit").eval()
    level, context = torch.full((4,), 0.05), torch.zeros(4, NUM_LABELS)
    z = block.noise.noised(block.target.table, level, seeded())
    expected = block.posterior(context, z, level)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block.posterior(context, z, level), expected)
        assert torch.equal(block.posterior(context.bfloat16(), z, level), expected)
        rounded = block.noise.evidence(z, level) @ block.target.table.T
        images = {"pixel_values": noise_batch(4)["pixel_values"]}
        context = block(images, z, level, context=True)
        assert context.dtype == torch.bfloat16
        assert torch.equal(block(images, z, level), block.posterior(context, z, level))
    assert (rounded.float() - expected).abs().max() > 0.1, "in bfloat16 it would be another"


@pytest.mark.parametrize("kind", ["vit", "llama"])
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "layers"])
def test_compiled_equals_eager(kind: str, parts: bool) -> None:
    target: dict[str, Any] = {"kind": "next-token", "clean_weight": 0.5} if kind == "llama" else {}
    batch = token_batch() if kind == "llama" else noise_batch()
    results = []
    for compiled in (False, True):
        block = block_of(kind, **target).train()
        if compiled:
            torch._dynamo.reset()
            block.compile_parts(backend="aot_eager") if parts else block.compile(backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            losses = block.loss(batch, seeded())
        losses.sum().backward()
        gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        results.append((losses, gradients))
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-3)
    torch._dynamo.reset()


# ---- where z enters, or not --------------------------------------------------------------------------------------


def test_a_linear_map_of_z_starts_at_zero_and_learns() -> None:
    block = convert("vit", target={"token": "linear"}).block(1)
    inputs, level = {"pixel_values": noise_batch()["pixel_values"]}, torch.full((6,), 0.5)
    z = torch.randn(6, HIDDEN, generator=seeded())
    assert torch.equal(block(inputs, z, level, context=True), block(inputs, -z, level, context=True))
    block.loss(noise_batch(), seeded()).sum().backward()
    linear = block.shared.extra["label_token"].linear
    assert linear.weight.grad.abs().max() > 0
    with torch.no_grad():
        linear.weight.add_(torch.eye(HIDDEN))
    assert not torch.equal(block(inputs, z, level, context=True), block(inputs, -z, level, context=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_a_block_that_sees_no_noise_is_an_ordinary_model(
    family: str, layers: tuple[int, ...] | None, tmp_path: Path
) -> None:
    config = db.BlocksConfig(
        num_blocks=3 if layers is None else 2, layers=layers, shared="joint", target={"noise_input": False}
    )
    model = db.convert(tiny(family), config).eval()
    batch = noise_batch()
    with torch.no_grad():
        for parameter in model.parameters():  # as if trained
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=seeded(1)))
    model.save_pretrained(tmp_path / "model")
    again = db.load(tmp_path / "model").eval()
    for index in range(model.partition.num_blocks):
        ordinary: Any = again.export_block(index)
        assert type(ordinary) is type(tiny(family))
        assert ordinary.config.num_hidden_layers == len(model.partition.layer_range(index))
        block = model.block(index)
        assert not {name for name, _ in block.named_parameters() if not name.startswith(("network.", "shared.target."))}
        for level in (0.05, 3.0):
            z = torch.randn(6, HIDDEN, generator=seeded())
            levels = torch.full((6,), level)
            with torch.no_grad():
                context = block({"pixel_values": batch["pixel_values"]}, z, levels, context=True)
                assert torch.equal(context, ordinary(batch["pixel_values"]).logits)
        block.loss(batch, seeded()).sum().backward()
        assert all(p.grad is not None for layer in block.layers() for p in layer.parameters())
        assert block.target.embedding.grad is None
    assert model.predict(batch["pixel_values"], steps=3).probabilities.isfinite().all()


def test_no_other_block_is_exported() -> None:
    with pytest.raises(ValueError, match="block"):
        convert(target={"noise_input": False}).export_block(3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"target": {"noise_input": False, "likelihood": "learned"}},
            "noise_input = false needs .*leave likelihood out",
        ),
        ({"target": {"noise_input": False, "token": "linear"}}, "token = linear: .*leave token out"),
        (
            {"target": {"noise_input": False, "embedding": "learned"}, "shared": "joint"},
            "embedding = learned: .*leave embedding out",
        ),
        (
            {"target": {"noise_input": False}, "conditioning_dim": 32},
            "conditioning_dim = 32: .*leave conditioning_dim out",
        ),
    ],
)
def test_settings_that_nothing_would_use_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        db.BlocksConfig.model_validate(config)


def test_defaults_may_be_written_out() -> None:
    config = db.BlocksConfig.model_validate({"target": {"noise_input": False}})
    assert db.BlocksConfig.model_validate(config.model_dump(mode="json")) == config
    assert convert(shared="joint", target={"noise_input": False}).blocks_config.target.embedding == "frozen"


def test_tokens_have_the_same_posterior_as_labels() -> None:
    """(batch, length) positions at once, of which each sample has one level."""
    target = NextTokenTarget(9, 16, learned=False, seed=0)
    noise, level = EDM(), torch.tensor([0.1, 2.0])
    tokens = torch.randint(9, (2, 5), generator=seeded())
    z = noise.noised(target.encode({"input_ids": tokens}), level, seeded(1))
    context = torch.randn(2, 5, 9, generator=seeded(2))
    posterior = target.posterior(context, noise.evidence(z, level))
    for place in range(5):
        expected = context[:, place] + log_densities(z[:, place], target.table, level, noise)
        torch.testing.assert_close(posterior[:, place].softmax(-1), expected.softmax(-1), rtol=1e-3, atol=1e-5)
