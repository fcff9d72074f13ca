"""Self-conditioning: what a block is shown of the label so far, in training and by the chain of a prediction."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import convert, noise_batch, same_states, seeded
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.common.messages import warn_once
from diffusionblocks.core.block import Block
from diffusionblocks.targets import HINT, LabelTarget

TARGET = {"kind": "label", "self_conditioning": True}


def blocks(family: str = "vit", **changes: Any) -> db.DiffusionBlocks:
    """Whose map of the hint is not zero any more."""
    model = convert(family, num_blocks=3, target=TARGET | changes)
    for b in range(3):
        torch.nn.init.normal_(model.block(b).shared.extra["hint_token"].linear.weight, std=0.5, generator=seeded(b))  # type: ignore[arg-type, union-attr]
    return model


def inputs_of(block: Block, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    x, z, level = block.corrupted(noise_batch(), generator)
    return dict(x), z, level


@pytest.mark.parametrize("family", ["vit", "dinov2"])
@pytest.mark.parametrize("changes", [{}, {"token": "linear"}, {"token": "replace-cls"}, {"noise_input": False}])
def test_a_hint_says_nothing_at_first_and_is_read_once_its_map_has_learned(
    family: str, changes: dict[str, Any]
) -> None:
    fresh = convert(family, num_blocks=3, target=TARGET | changes).block(1)
    trained = blocks(family, **changes).block(1)
    target = fresh.target
    assert isinstance(target, LabelTarget)
    hint = target.denoised(3 * torch.randn(6, 4, generator=seeded()), "soft")
    x = {"pixel_values": noise_batch()["pixel_values"]}
    z, level = torch.randn(6, 32, generator=seeded()), torch.full((6,), 0.5)
    for block, reads in ((fresh, False), (trained, True)):
        without, zeros, shown = (block(x | entry, z, level) for entry in ({}, {HINT: 0 * hint}, {HINT: hint}))
        assert torch.equal(without, zeros)
        assert torch.equal(without, shown) != reads
    assert without.shape == (6, 4)


def test_training_shows_half_of_the_samples_what_the_block_itself_says() -> None:
    block = blocks().block(1).eval()
    batch = noise_batch(400)
    x, z, level = block.corrupted(batch, seeded())
    shown = x[HINT][:, 0] != 0
    assert 0.4 < shown.float().mean() < 0.6
    first = {"pixel_values": x["pixel_values"]}
    target = block.target
    assert isinstance(target, LabelTarget)
    with torch.no_grad():
        hint = target.denoised(block(first, z, level, context=True), "soft") * shown[:, None]
        expected = target.loss(block(first | {HINT: hint}, z, level), batch)
    torch.testing.assert_close(block.losses(batch, x, z, level), expected)
    plain = target.loss(block(first, z, level), batch)
    torch.testing.assert_close(expected[~shown], plain[~shown])
    assert not torch.allclose(expected[shown], plain[shown])


def test_the_first_pass_has_no_gradient_and_blocks_stay_apart() -> None:
    """The gradient is that of the second pass with its hint as a constant, of this block alone."""
    model = blocks()
    block = model.block(1)
    x, z, level = block.corrupted(noise_batch(), seeded())
    block.losses(noise_batch(), x, z, level).sum().backward()
    ours = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    model.zero_grad()
    target = block.target
    assert isinstance(target, LabelTarget)
    first = {"pixel_values": x["pixel_values"]}
    with torch.no_grad():
        hint = target.denoised(block(first, z, level, context=True), "soft") * x[HINT]
    target.loss(block(first | {HINT: hint}, z, level), noise_batch()).sum().backward()
    assert ours.keys() == {name for name, p in block.named_parameters() if p.grad is not None}
    for name, p in block.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[name], p.grad)
    assert all(p.grad is None for b in (0, 2) for p in model.block(b).parameters())


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model = blocks()
    model.save_pretrained(tmp_path)
    assert same_states(model.state_dict(), db.load(tmp_path).state_dict())


def test_such_a_block_is_no_ordinary_classifier() -> None:
    with pytest.raises(ValueError, match="is shown what other blocks say"):
        blocks(noise_input=False).export_block(1)


def test_it_needs_context_logits() -> None:
    with pytest.raises(ValueError, match=r"target.self_conditioning = true needs target.likelihood = added"):
        db.LabelTargetConfig(self_conditioning=True, likelihood="learned")
    with pytest.raises(ValueError, match="takes no hint"):
        convert("vit", num_blocks=3).block(0)(
            {"hint": torch.zeros(6, 32)} | noise_batch(), torch.zeros(6, 32), torch.ones(6)
        )


def test_a_map_that_starts_at_zero_and_is_frozen_is_refused_or_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"target.self_conditioning = true with shared = frozen: .*could never learn"):
        convert("vit", target=TARGET, shared="frozen")
    warn_once.cache_clear()  # which tells it once in a process
    convert("vit", target={"kind": "label", "token": "linear"}, shared="frozen")
    assert "blocks will never be told z (target.token = linear): shared = frozen" in caplog.text


def test_a_chain_shows_each_block_the_mean_of_what_was_said_before_it() -> None:
    model = blocks().eval()
    images = noise_batch()["pixel_values"]
    target, noise = model.target, model.noise
    assert isinstance(target, LabelTarget)
    prediction = model.predict(images, generator=seeded(1))
    z = noise.prior((6, 32), generator=seeded(1), level=prediction.levels[0])  # type: ignore[attr-defined]
    assert prediction.contexts is not None
    said: list[Tensor] = []
    levels = [*prediction.levels, 0.0]
    with torch.no_grad():
        for level, following in itertools.pairwise(levels):
            x = {"pixel_values": images}
            if said:
                x[HINT] = target.denoised(torch.stack(said).mean(0), "soft")
            context = model.denoise(x, z, level, context=True)
            torch.testing.assert_close(prediction.contexts[len(said)], context.log_softmax(-1), atol=1e-5, rtol=1e-4)
            said.append(context.log_softmax(-1))
            denoised = target.denoised(model.posterior(context, z, level), "soft")
            z = denoised + (z - denoised) * following / level
    assert len(said) == 3
