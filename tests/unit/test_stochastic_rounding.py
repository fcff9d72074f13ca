"""Rounding by chance: neighbours and probabilities in closed form, and steps that rounding to nearest loses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import seeded
from torch import nn

from diffusionblocks.training import TrainConfig
from diffusionblocks.training.optim import ParameterSet, Updater
from diffusionblocks.training.stochastic_rounding import Draws, RoundedAdamW, round_stochastically


@pytest.mark.parametrize("value", [1.0009765625, -1.0009765625, 3.1415927, 1e-39, -2.3e-8, 0.0, 65280.5])
def test_the_two_neighbours_are_drawn_with_their_probabilities(value: float) -> None:
    many = 20_000
    x = torch.full((many,), value)
    rounded = torch.empty(many, dtype=torch.bfloat16)
    round_stochastically(rounded, x, seeded(1))
    bits = x[:1].view(torch.int32)
    near, fraction = (bits >> 16 << 16).view(torch.float32), (bits & 0xFFFF).item() / 2**16
    far = ((bits >> 16 << 16) + 2**16).view(torch.float32)
    values = set(rounded.float().tolist())
    assert values <= {near.item(), far.item()}
    share = (rounded.float() == far).float().mean().item()
    assert abs(share - fraction) <= 5 * (fraction * (1 - fraction) / many) ** 0.5
    if fraction == 0:
        assert values == {near.item()}


def test_what_bfloat16_holds_and_what_is_not_finite_stays() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.5, -0.0])
    x = torch.cat([x, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])  # NaNs of all bits
    for seed in range(8):
        rounded = torch.empty(7, dtype=torch.bfloat16)
        round_stochastically(rounded, x, seeded(seed))
        assert torch.equal(rounded[[0, 1, 3, 4]].float(), x[[0, 1, 3, 4]])
        assert rounded[[2, 5, 6]].isnan().all()
    exact = torch.empty(7)
    round_stochastically(exact, x, seeded())
    assert torch.equal(exact[:2], x[:2])


def steps_of(dtype: torch.dtype, count: int, **config: Any) -> tuple[nn.Parameter, ParameterSet]:
    """A weight of 1 under a constant gradient: each step is `lr` downwards."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    train = TrainConfig(steps=count, batch_size=1, lr=1e-4, lr_schedule="constant", weight_decay=0.0, **config)
    updater = Updater([parameter], count, 0, train, [])
    updater.allocate()
    owner = ParameterSet([parameter], updater.moments(), [])
    for step in range(count):
        updater.prepare(owner, seeded(step))
        parameter.grad = torch.full_like(parameter, 0.01)
        updater.update()
    return parameter, owner


def test_small_steps_arrive_on_average_and_are_lost_to_nearest() -> None:
    exact, _ = steps_of(torch.float32, 40)
    lost, _ = steps_of(torch.bfloat16, 40)
    moved, owner = steps_of(torch.bfloat16, 40, weights="bfloat16")
    assert lost.float().mean().item() == 1.0
    # 40 steps of 1e-4; below 1 neighbours are 2^-8 apart, so a weight's variance is at most 0.004 * 2^-8.
    bound = 5 * (0.004 / 2**8 / moved.numel()) ** 0.5
    assert abs(moved.float().mean().item() - exact.mean().item()) < bound
    assert {value.dtype for name, value in owner.moments[0].items() if name != "step"} == {torch.bfloat16}
    again, _ = steps_of(torch.bfloat16, 40, weights="bfloat16")
    assert torch.equal(moved, again)


def test_a_second_moment_moves_that_rounding_to_nearest_leaves() -> None:
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    draws = Draws(torch.device("cpu"))
    optimizer = RoundedAdamW([parameter], draws, lr=torch.tensor(0.0), betas=(0.9, 0.999), weight_decay=0.0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    second = optimizer.state[parameter]["exp_avg_sq"]
    second.fill_(1.0)
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(100):
        optimizer.step()
    assert second.float().mean().item() == pytest.approx(0.999**100, rel=0.005)
    assert (torch.ones(1, dtype=torch.bfloat16) * 0.999).item() == 1.0  # the positive control


def test_in_float32_it_is_torchs_adamw() -> None:
    mine, theirs = (nn.Parameter(torch.randn(8, 9, generator=seeded())) for _ in range(2))
    options: dict[str, Any] = {"lr": torch.tensor(1e-2), "betas": (0.9, 0.99), "weight_decay": 0.1}
    pair = RoundedAdamW([mine], Draws(torch.device("cpu")), **options), torch.optim.AdamW([theirs], **options)
    for step in range(5):
        for parameter, optimizer in zip((mine, theirs), pair, strict=True):
            parameter.grad = torch.randn(8, 9, generator=seeded(step + 1))
            optimizer.step()
    torch.testing.assert_close(mine, theirs)
