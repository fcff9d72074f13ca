"""NoProp: the schedule in closed form, its loss, and its networks as blocks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import seeded
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.common.messages import warn_once
from diffusionblocks.models import NoPropCNN
from diffusionblocks.noise.discrete_steps import DiscreteSteps
from diffusionblocks.targets import LabelTarget
from diffusionblocks.training.local_learning import LocalConfig, LocalLearning
from diffusionblocks.training.noprop_steps import DenoisingStep, NoProp

LABELS = 4


def cnn(layers: int = 3, seed: int = 0, **options: float) -> NoPropCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"image_size": 8, "num_channels": 3, "num_labels": LABELS, "hidden_size": 16, "num_filters": 2}
        return NoPropCNN(num_layers=layers, **(sizes | options))


def batch(size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    images = torch.randn(size, 3, 8, 8, generator=seeded(seed))
    return {"pixel_values": images, "labels": torch.arange(size) % LABELS}


# ---- schedule and loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_steps_keep_the_marginals_of_the_schedule(steps: int) -> None:
    """z_t of z_(t-1) and u has mean sqrt(abar_t) u and variance 1 - abar_t, from pure noise on."""
    schedule = DiscreteSteps.cosine(steps)
    assert schedule.abar[0] == 0
    assert 0.999 < schedule.abar[-1] < 1
    assert list(schedule.abar) == sorted(schedule.abar)
    for t in range(1, steps + 1):
        a, b, c = schedule.coefficients(t)
        before, now = schedule.abar[t - 1], schedule.abar[t]
        assert a + b * math.sqrt(before) == pytest.approx(math.sqrt(now))
        assert b**2 * (1 - before) + c == pytest.approx(1 - now)
    total = sum(schedule.loss_weight(t, 0.1) for t in range(1, steps + 1))
    assert total == pytest.approx(steps / 2 * 0.1 * schedule.snr(steps))


def test_the_loss_of_a_step_is_the_weighted_squared_error_of_the_embedding() -> None:
    model = cnn()
    step = NoProp(model).denoising_steps[1]
    assert isinstance(step, DenoisingStep)
    entries = batch()
    losses = step.eval().loss(entries, seeded(3))
    u = torch.eye(LABELS)[entries["labels"]]
    schedule = DiscreteSteps.cosine(3)
    z = schedule.abar[1] ** 0.5 * u + (1 - schedule.abar[1]) ** 0.5 * torch.randn(u.shape, generator=seeded(3))
    errors = (model.layers[1](entries["pixel_values"], z).softmax(-1) - u).square().sum(-1)
    weight = 3 / 2 * 0.1 * (schedule.snr(2) - schedule.snr(1))
    torch.testing.assert_close(losses, weight * errors)


def test_no_unit_moves_another_and_together_they_are_all() -> None:
    model = cnn()
    units = NoProp(model).units()
    assert [unit.name for unit in units] == ["network 0", "network 1", "network 2", "read-out"]
    names = {id(p): name for name, p in model.named_parameters()}
    reached: list[str] = []
    for unit in units:
        unit.module.loss(batch(), seeded()).mean().backward()  # type: ignore[operator]
        own = {names[id(p)] for p in unit.own}
        assert own == {name for name, p in model.named_parameters() if p.grad is not None}
        reached += own
        model.zero_grad()
    assert sorted(reached) == sorted(names.values())


def test_the_chain_is_drawn_from_the_images_in_evaluation_and_anew_in_training() -> None:
    model = cnn().eval()
    one, two = (model(batch(seed=seed)["pixel_values"]).logits for seed in (0, 0))
    assert torch.equal(one, two)
    assert not torch.equal(one, model(batch()["pixel_values"], seeded(1)).logits)
    model.train()
    assert not torch.equal(*(model(batch()["pixel_values"]).logits for _ in range(2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 1}, "num_labels must be at least 2, got 1"),
        ({"image_size": 3}, "image_size must be at least 4, got 3"),
        ({"hidden_size": 5}, "hidden_size must be even, got 5"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"eta": 0.0}, "eta must be > 0, got 0.0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cnn(**options)


# ---- as blocks -----------------------------------------------------------------------------------------------------


def blocks(**config: object) -> db.DiffusionBlocks:
    target = {"embedding": "one-hot"} | config.pop("target", {})  # type: ignore[dict-item]
    values = {"num_blocks": 3, "target": target} | config
    return db.convert(cnn(), db.BlocksConfig(**values))  # type: ignore[arg-type]


def test_a_fresh_block_is_its_network_at_every_level_and_learns_to_tell_levels_apart() -> None:
    model = blocks(target={"likelihood": "learned"}).eval()
    entries, z, level = batch(), torch.randn(8, LABELS, generator=seeded(1)), torch.full((8,), 0.7)
    inputs = {"pixel_values": entries["pixel_values"]}
    for b in range(3):
        expected = cnn().eval().layers[b](entries["pixel_values"], model.noise.scaled(z, level))
        assert torch.equal(model.block(b)(inputs, z, level), expected)
    block = model.block(0)
    torch.nn.init.normal_(block.shared.extra["level"].weight, generator=seeded(2))
    # The same network input at another level: only what it is told of the level differs.
    other = torch.full((8,), 3.0)
    z_there = z * (model.noise.scaled(z, level) / model.noise.scaled(z, other))
    assert not torch.allclose(block(inputs, z, level), block(inputs, z_there, other))


def test_one_hot_rows_are_those_of_the_identity_and_need_as_many_dimensions() -> None:
    assert torch.equal(blocks().target.table, torch.eye(LABELS))
    assert torch.equal(LabelTarget(2, 3, learned=False, seed=0, one_hot=True).table, torch.eye(2, 3))
    with pytest.raises(ValueError, match="one-hot needs a dimension for each of 4 labels, the model has 3"):
        LabelTarget(4, 3, learned=False, seed=0, one_hot=True)


def test_statistics_are_saved_and_an_export_has_all_but_the_read_out(tmp_path: Path) -> None:
    model = blocks()
    for b in range(3):
        model.loss(batch(), b, seeded())
    model.eval().save_pretrained(tmp_path)
    again = db.load(tmp_path).eval()
    state = model.state_dict()
    assert any("running_mean" in name and tensor.any() for name, tensor in state.items())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    images = batch()["pixel_values"]
    assert torch.equal(model.predict(images).probabilities, again.predict(images).probabilities)
    exported = model.export_initialisation()
    assert isinstance(exported, NoPropCNN)
    assert {name for name in exported.state_dict() if name.startswith("classifier")}
    layer = exported.layers[2].state_dict()
    assert all(torch.equal(tensor, state[f"blocks.2.network.layers.2.{name}"]) for name, tensor in layer.items())


def test_what_would_move_the_statistics_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="BatchNorm1d, whose running statistics would move twice a step; leave it off"):
        blocks().activation_checkpointing_enable()


@pytest.mark.parametrize(("name", "value"), [("token", "linear"), ("noise_input", False), ("self_conditioning", True)])
def test_what_needs_tokens_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"target\.{name} = {value}: the networks of a NoPropCNN have no tokens"):
        blocks(target={name: value})


def test_a_frozen_map_of_the_level_is_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()  # which tells it once in a process
    blocks(shared="frozen")
    assert "blocks will never be told the noise level: shared = frozen" in caplog.text


def test_local_learning_of_it_is_refused() -> None:
    with pytest.raises(ValueError, match="which NoPropFamily does not do for a NoPropCNN"):
        LocalLearning(cnn(), LocalConfig(), 3)
