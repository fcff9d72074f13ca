"""The next token's embedding as the target: unit rows in one space for all blocks; losses written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CAUSAL_FAMILIES, HIDDEN, LENGTH, VOCAB, randomise_adaptive, seeded, tiny, token_batch
from torch import Tensor
from torch.nn import functional as F

import diffusionblocks as db
from diffusionblocks.targets import NextTokenTarget

IDS = token_batch()["input_ids"]
each_family = pytest.mark.parametrize("family", CAUSAL_FAMILIES)


def model_of(
    family: str = "llama", *, shared: str = "replicated", blocks: int = 2, **target: Any
) -> db.DiffusionBlocks:
    config = db.BlocksConfig(num_blocks=blocks, shared=shared, target={"kind": "next-token", **target})  # type: ignore[arg-type]
    return db.convert(tiny(family, layers=4), config)


def by_hand(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over the positions of -log p, in float64."""
    logp = logits.double().log_softmax(dim=-1)
    rows = [[-logp[r, i, token] for i, token in enumerate(row)] for r, row in enumerate(tokens.tolist())]
    return torch.stack([torch.stack(row).mean() for row in rows])


def test_targets_are_unit_rows_of_their_tokens() -> None:
    target = model_of().target
    y = target.encode({"input_ids": IDS})
    assert y.shape == (6, LENGTH, HIDDEN)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(6, LENGTH))
    assert torch.equal(y, target.table[IDS])  # type: ignore[union-attr]
    assert torch.equal(
        NextTokenTarget(VOCAB, HIDDEN, learned=False, seed=0, shift=1).encode({"input_ids": IDS}),
        NextTokenTarget(VOCAB, HIDDEN, learned=False, seed=0).encode({"input_ids": IDS[:, 1:]}),
    )


@pytest.mark.parametrize("weight", ["none", "edm"])
@each_family
def test_loss_is_the_mean_cross_entropy_of_the_tokens_themselves(family: str, weight: str) -> None:
    model = model_of(family, weight=weight)
    randomise_adaptive(model)
    level = torch.tensor([0.31, 0.4, 0.6, 1.0, 10.0, 80.0])
    losses = model.loss({"input_ids": IDS}, 0, seeded(3), level)
    eps = torch.randn(6, LENGTH, HIDDEN, generator=seeded(3))
    rows = tiny(family, layers=4).model.embed_tokens.weight
    y = (rows / rows.norm(dim=-1, keepdim=True))[IDS]
    logits = model.block(0)({"input_ids": IDS}, y + level[:, None, None] * eps, level)
    assert logits.shape == (6, LENGTH, VOCAB)
    expected = by_hand(logits, IDS)
    if weight == "edm":
        expected = expected * ((level**2 + 0.25) / (level * 0.5) ** 2).double()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert losses.shape == (6,)


def test_what_is_denoised_is_the_preconditioned_sum() -> None:
    """Logits by hand from F: D = c_skip z + c_out F, the final norm, scale and shift, the head, the logit scale."""
    model = model_of(logit_scale=3.0, likelihood="learned").eval()
    randomise_adaptive(model)
    block, level = model.block(1), torch.tensor([0.008, 0.01, 0.05, 0.1, 0.2, 0.3])
    z = torch.randn(6, LENGTH, HIDDEN, generator=seeded(4))
    condition = block.shared.noise_embedding(level.log() / 4)
    sigma = level[:, None, None]
    root = (sigma**2 + 0.25).sqrt()
    with torch.no_grad():
        _, raw = block.family.hidden(block.call(condition, {"input_ids": IDS}, z / root))
        denoised = 0.25 / root**2 * z + sigma * 0.5 / root * raw
        scale, shift = block.shared.final_norms.linear(F.silu(condition))[:, None].chunk(2, dim=-1)
        original: Any = tiny("llama", layers=4)
        expected = 3.0 * original.lm_head(original.model.norm(denoised) * (1 + scale) + shift)
        torch.testing.assert_close(block({"input_ids": IDS}, z, level), expected, rtol=1e-4, atol=1e-4)


@each_family
def test_the_clean_streams_loss_is_the_librarys_and_off_by_default(family: str) -> None:
    level = torch.full((6,), 1.0)
    z = torch.randn(6, LENGTH, HIDDEN, generator=seeded(4))
    without, half = model_of(family, blocks=1), model_of(family, blocks=1, clean_weight=0.5)
    assert without.block(0)({"input_ids": IDS}, z, level).shape == (6, LENGTH, VOCAB)
    assert half.block(0)({"input_ids": IDS}, z, level).shape == (6, 2 * LENGTH, VOCAB)
    plain = without.loss({"input_ids": IDS}, 0, seeded(), level)
    with torch.no_grad():
        clean = by_hand(tiny(family, layers=4)(IDS).logits[:, :-1], IDS[:, 1:])  # type: ignore[operator]
    both = half.loss({"input_ids": IDS}, 0, seeded(), level)
    torch.testing.assert_close(both.double(), plain.double() + 0.5 * clean, rtol=1e-5, atol=1e-5)
    # Measured, a block is what it denoises.
    half.eval()
    assert half.block(0)({"input_ids": IDS}, z, level).shape == (6, LENGTH, VOCAB)
    torch.testing.assert_close(half.loss({"input_ids": IDS}, 0, seeded(), level), plain)


@each_family
@pytest.mark.parametrize("shared", ["joint", "replicated", "frozen"])
def test_given_rows_are_the_models_own_embedding_in_all_blocks(family: str, shared: str) -> None:
    model = model_of(family, shared=shared)
    expected = F.normalize(tiny(family, layers=4).get_parameter("model.embed_tokens.weight"), dim=-1)
    assert model.blocks_config.target.embedding == ("learned" if shared == "joint" else "given")  # type: ignore[union-attr]
    for block in model.blocks:
        torch.testing.assert_close(block.target.table, expected)
        assert block.target.embedding.requires_grad == (shared == "joint")


def test_frozen_rows_are_random_directions_of_the_seed() -> None:
    tables = []
    for seed in (0, 0, 1):
        config = db.BlocksConfig(num_blocks=2, seed=seed, target={"kind": "next-token", "embedding": "frozen"})  # type: ignore[arg-type]
        model = db.convert(tiny("llama", layers=4), config)
        assert torch.equal(model.block(0).target.table, model.block(1).target.table)
        assert not model.block(0).target.embedding.requires_grad
        tables.append(model.target.table)  # type: ignore[union-attr]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    cosine = tables[0] @ F.normalize(tiny("llama", layers=4).get_parameter("model.embed_tokens.weight"), dim=-1).T
    assert cosine.diag().abs().mean() < 0.3


def test_learned_rows_stay_one_space() -> None:
    model = model_of(shared="joint")
    start = model.block(0).target.table.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for b in (0, 1):
        model.loss({"input_ids": IDS}, b, seeded()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.block(0).target is model.block(1).target
    table = model.block(0).target.table
    assert not torch.allclose(table, start, atol=1e-3)
    torch.testing.assert_close(table.norm(dim=-1), torch.ones(VOCAB))


def test_given_rows_stay_where_they_were_when_the_embedding_is_trained() -> None:
    model = model_of()
    start = model.block(1).target.table.clone()
    model.loss({"input_ids": IDS}, 1, seeded()).mean().backward()
    embedding = model.block(1).network.get_parameter("model.embed_tokens.weight")
    before = embedding.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1).step()
    assert not torch.allclose(embedding, before, atol=1e-4)
    assert torch.equal(model.block(1).target.table, start)


def test_bfloat16_models_have_float32_targets_and_losses() -> None:
    model = db.convert(tiny("llama", layers=4).bfloat16(), db.BlocksConfig(num_blocks=2))
    y = model.target.encode({"input_ids": IDS})
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(6, LENGTH))
    loss = model.loss({"input_ids": IDS}, 1, seeded())
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    reference = model_of().loss({"input_ids": IDS}, 1, seeded())
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS.float()}, "input_ids must be an int64 tensor"),
        ({"input_ids": IDS[0]}, "shape .batch, length."),
        ({"input_ids": IDS + 3}, r"\[0, 26\]"),
        ({"input_ids": IDS[:, :0]}, "length > 0"),
        ({}, r"lacks \['input_ids'\]"),
    ],
)
def test_bad_batches_are_refused(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of().loss(batch, 0, seeded())
