"""8-bit AdamW: torchao's arithmetic, compiled once instead of at every step of every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import seeded, without_generated_code
from torch import Tensor, nn

from diffusionblocks.training import TrainConfig
from diffusionblocks.training import optim as ours

adam = pytest.importorskip("torchao.optim.adam")
STEPS = 4


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    ours._adamw_8bit.cache_clear()
    yield
    ours._adamw_8bit.cache_clear()


def parameters() -> list[nn.Parameter]:
    shapes = [(64, 64), (64,), (32, 256), (8192,), (64, 64)]  # the second is too small for 8 bits
    return [nn.Parameter(torch.randn(shape, generator=seeded(i))) for i, shape in enumerate(shapes)]


def counted_compiles(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    real = torch.compile

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", counting)
    return calls


def gradients(step: int, like: list[nn.Parameter]) -> list[Tensor]:
    generator = seeded(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in like]


@pytest.mark.slow
@pytest.mark.parametrize("in_backward", [False, True])
def test_steps_are_torchaos_own(in_backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(
        steps=STEPS,
        batch_size=1,
        lr=1e-2,
        optimizer="adamw-8bit",
        gradient_clip=None,
        optimizer_in_backward=in_backward,
    )
    moved, expected = parameters(), parameters()
    compiles = counted_compiles(monkeypatch)
    updater = ours.Updater(moved, STEPS, 0, config, [])
    updater.allocate()
    owner = ours.ParameterSet(moved, updater.moments(), [])
    lr = torch.tensor(0.0)
    reference = adam.AdamW8bit(expected, lr=lr, betas=config.betas, weight_decay=config.weight_decay)
    with without_generated_code():
        compiles.clear()
        for step in range(STEPS):
            updater.prepare(owner)
            used = len(moved) - (step % 2)  # the last has no gradient at times: it does not step then
            loss = sum((p * g).sum() for p, g in zip(moved[:used], gradients(step, moved), strict=False))
            assert isinstance(loss, Tensor)
            loss.backward()
            updater.update()
            assert in_backward == all(p.grad is None for p in moved)
            for p in moved:
                p.grad = None
        assert not compiles  # the one was made with the optimizer

        owner.steps = 0
        for step in range(STEPS):
            lr.fill_(updater.learning_rate(owner))
            owner.steps += 1
            for p, g in zip(expected[: len(expected) - step % 2], gradients(step, expected), strict=False):
                p.grad = g
            reference.step()
            reference.zero_grad()
        assert len(compiles) > STEPS
    for i, (p, q) in enumerate(zip(moved, expected, strict=True)):
        assert torch.equal(p, q)
        for key, value in reference.state[q].items():
            for name, part in ours._parts(key, value).items():
                assert torch.equal(owner.moments[i][name], part)
    assert [int(moments["step"]) for moments in owner.moments] == [4, 4, 4, 4, 2]
    assert "exp_avg.codes" in owner.moments[0]


def test_the_update_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiles = counted_compiles(monkeypatch)
    config = TrainConfig(steps=1, batch_size=1, lr=1e-2, optimizer="adamw-8bit")
    for p in parameters():
        ours.way_to_step([p], config).make([p], lr=torch.tensor(0.0))
    assert len(compiles) == 1


def test_another_torchao_keeps_its_own_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours._adamw_8bit() is not adam.AdamW8bit
    ours._adamw_8bit.cache_clear()
    monkeypatch.setattr(adam, "single_param_adam", lambda p, grad: None)
    assert ours._adamw_8bit() is adam.AdamW8bit
    ours._adamw_8bit.cache_clear()
    monkeypatch.delattr(adam, "single_param_adam")
    assert ours._adamw_8bit() is adam.AdamW8bit


def test_another_torchao_cannot_round_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(adam, "single_param_adam")
    config = TrainConfig(steps=1, batch_size=1, optimizer="adamw-8bit", weights="bfloat16")
    weights = [nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))]
    with pytest.raises(ImportError, match=r"or --set train.optimizer=adamw"):
        ours.Updater(weights, 1, 0, config, [])
    ours.Updater(weights, 1, 0, config.model_copy(update={"optimizer": "adamw"}), [])  # the advice


def test_another_torchao_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(adam, "single_param_adam")
    config = TrainConfig(steps=1, batch_size=1, optimizer="adamw-8bit", cuda_graph=True)
    with pytest.raises(ImportError, match=r"or --set train.cuda_graph=false"):
        ours.Updater(parameters(), 1, 0, config, [])
    ours.Updater(parameters(), 1, 0, config.model_copy(update={"cuda_graph": False}), [])  # the advice
