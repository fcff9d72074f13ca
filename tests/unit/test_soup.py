"""Soups of blocks: the mean of their weights as a model of one block."""

from pathlib import Path

import pytest
import torch
from helpers import POLICIES, convert, noise_batch, same_states, seeded, tiny, toy_batch, train_a_little
from torch import nn

import diffusionblocks as db
from diffusionblocks.cli import main
from diffusionblocks.core.soup import average_with_trunk, greedy_soup, soup

HELD_OUT = toy_batch(100, seed=77)


def branched(seed: int | None = 0, shared: str = "replicated") -> tuple[db.DiffusionBlocks, db.DiffusionBlocks]:
    """A trunk and its branches, which were trained on from different data."""
    trunk = convert("vit", layers=2, num_blocks=1, shared=shared)
    train_a_little(trunk, toy_batch)
    model = db.branch(trunk, 3)
    if seed is not None:
        train_a_little(model, toy_batch, steps=4)
    return trunk, model


def score(model: db.DiffusionBlocks) -> float:
    """The negative NLL of held-out images."""
    logits = model.predict(HELD_OUT["pixel_values"], generator=seeded()).logits
    return -nn.functional.nll_loss(logits, HELD_OUT["labels"]).item()


@pytest.mark.parametrize("shared", POLICIES)
def test_the_soup_of_equal_blocks_is_the_block(shared: str) -> None:
    trunk, model = branched(None, shared)
    mixed = soup(model)
    assert same_states(mixed.state_dict(), trunk.state_dict())
    assert mixed.partition.layers == (2,)
    assert not mixed.training
    images = noise_batch()["pixel_values"]
    assert torch.equal(mixed.predict(images).logits, trunk.predict(images).logits)


def test_weights_weigh(tmp_path: Path) -> None:
    _, model = branched()
    names = [next(n for n in model.block(b).state_dict() if n.endswith("q_proj.weight")) for b in range(3)]
    parts = [model.block(b).state_dict()[name] for b, name in enumerate(names)]
    assert not torch.equal(parts[0], parts[1])
    mixed = soup(model, [1, 3, 0])
    ours = next(t for n, t in mixed.block(0).state_dict().items() if n.endswith("q_proj.weight"))
    torch.testing.assert_close(ours, (parts[0] + 3 * parts[1]) / 4)
    mixed.save_pretrained(tmp_path / "soup")
    assert score(db.load(tmp_path / "soup").eval()) == score(mixed)


def test_a_greedy_soup_is_never_worse_than_the_best_block() -> None:
    _, model = branched()
    alone = [score(soup(model, [float(b == other) for other in range(3)])) for b in range(3)]
    mixed, blocks = greedy_soup(model, score)
    assert score(mixed) >= max(alone)
    assert blocks[0] == alone.index(max(alone))
    assert score(mixed) == score(soup(model, [float(b in blocks) for b in range(3)]))
    worst, taken = greedy_soup(model, lambda m: -score(m))  # the positive control: the score decides
    assert score(worst) <= min(alone)
    assert taken[0] == alone.index(min(alone))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"one shape.*layers = \[1, 2\]"):
        soup(db.convert(tiny("vit"), db.BlocksConfig(num_blocks=2, layers=(1, 2))))
    _, model = branched(None)
    for weights in ([1.0], [0.0] * 3, [1, -1, 1], [float("nan"), 1, 1]):
        with pytest.raises(ValueError, match="weights must be 3 finite numbers"):
            soup(model, weights)


def test_blocks_are_averaged_with_their_trunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trunk, model = branched()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixed = average_with_trunk(model, trunk, [1, 0.25, 0])
    assert same_states(model.state_dict(), before), "what is averaged stays as it is"
    assert mixed.partition == model.partition
    images = noise_batch()["pixel_values"]
    assert same_states(mixed.block(2).state_dict(), model.block(2).state_dict())
    # The first block computes what the trunk does, at every level of its own.
    level, z = model.partition.interval(0)[1], torch.randn_like(model.target.encode(noise_batch()))
    with torch.no_grad():
        outputs = [one.eval().denoise({"pixel_values": images}, z, level) for one in (mixed, trunk)]
    torch.testing.assert_close(*outputs)
    names = [
        next(n for n in one.state_dict() if n.endswith("q_proj.weight")) for one in (model.block(1), trunk.block(0))
    ]
    own, other = model.block(1).state_dict()[names[0]], trunk.block(0).state_dict()[names[1]]
    assert not torch.equal(own, other)
    torch.testing.assert_close(mixed.block(1).state_dict()[names[0]], 0.75 * own + 0.25 * other)

    model.save_pretrained(tmp_path / "model")
    trunk.save_pretrained(tmp_path / "trunk")
    folders = [str(tmp_path / "model"), "--trunk", str(tmp_path / "trunk"), "--out", str(tmp_path / "out")]
    assert main(["average", *folders, "--shares", "1", "0.25", "0"]) == 0
    assert same_states(db.load(tmp_path / "out").state_dict(), mixed.state_dict())
    assert main(["average", *folders, "--shares", "1", "0.25"]) == 2
    assert "shares must be 3 numbers from 0 to 1, one a block; got [1.0, 0.25]" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a trunk has one block on all levels, this model has 3"):
        average_with_trunk(model, model, [0.5] * 3)
    with pytest.raises(ValueError, match=r"block 0 has .*, the trunk .*: give the trunk that it was copied from"):
        average_with_trunk(model, convert("vit", layers=2, num_blocks=1, conditioning_dim=16), [0.5] * 3)
    with pytest.raises(ValueError, match="a block of 2 layers cannot be copied from a trunk of 1"):
        average_with_trunk(model, convert("vit", layers=1, num_blocks=1), [0.5] * 3)
    with pytest.raises(ValueError, match="experts have all layers of their trunk, 2, and this trunk has 3"):
        average_with_trunk(db.branch(trunk, 2, split="experts"), convert("vit", num_blocks=1), [0.5] * 2)
    with pytest.raises(ValueError, match="shared = joint"):
        average_with_trunk(branched(None, "joint")[1], trunk, [0.5] * 3)


def test_a_shorter_block_is_averaged_with_the_layers_that_it_was_copied_from() -> None:
    trunk = convert("vit", layers=4, num_blocks=1)
    model = db.branch(trunk, 2, layers=(2, 4))
    train_a_little(model, toy_batch, steps=2)
    mixed = average_with_trunk(model, trunk, [0.5, 1])
    name = "network.vit.layers.{}.layernorm_before.weight"
    theirs = trunk.block(0).state_dict()
    own, mean = (one.block(0).state_dict()[name.format(1)] for one in (model, mixed))
    assert not torch.equal(theirs[name.format(3)], theirs[name.format(1)])
    torch.testing.assert_close(mean, (own + theirs[name.format(3)]) / 2)
    assert torch.equal(mixed.block(1).state_dict()[name.format(3)], theirs[name.format(1)])
