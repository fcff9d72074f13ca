"""8-bit AdamW in one kernel: its quantisation is torchao's to the bit, its steps are torchao's up to rounding."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from diffusionblocks.training import TrainConfig
from diffusionblocks.training.optim import ParameterSet, Updater, together, way_to_step

adam = pytest.importorskip("torchao.optim.adam")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its interpreter runs the kernel"
)
SHAPES = [(64, 64), (64,), (48, 256), (8192,), (16, 255)]  # two are too small for 8 bits, or no multiple of a block


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s, generator=seeded(i)).to(DEVICE)) for i, s in enumerate(SHAPES)]


def gradients(step: int) -> list[Tensor]:
    return [torch.randn(s, generator=seeded(100 * step + i)).to(DEVICE) for i, s in enumerate(SHAPES)]


def torchaos_step(weights: list[nn.Parameter], states: list[dict[str, Any]], lr: Tensor, grads: list[Any]) -> None:
    """torchao's update of each parameter, not compiled."""
    for weight, state, grad in zip(weights, states, grads, strict=True):
        if grad is not None:
            state["step"] += 1
            moments = state["step"], state["exp_avg"], state["exp_avg_sq"], None
            adam.single_param_adam(weight.detach(), grad, *moments, lr, 0.9, 0.999, 0.1, 1e-8, True, False)


@needs_triton
def test_quantisation_is_torchaos_and_so_are_steps() -> None:
    from diffusionblocks.training.eight_bit_kernel import OneKernelAdamW8bit

    lr = torch.tensor(1e-2, device=DEVICE)
    weights, expected = parameters(), parameters()
    optimizer = OneKernelAdamW8bit(weights, lr=lr, betas=(0.9, 0.999), weight_decay=0.1)
    like = adam.AdamW8bit(expected)
    states = [
        {"step": torch.zeros((), device=DEVICE)}
        | {name: like._new_buffer(p, signed) for name, signed in (("exp_avg", True), ("exp_avg_sq", False))}
        for p in expected
    ]
    for p in weights:
        optimizer.state[p] = {"step": torch.zeros((), device=DEVICE)}
        optimizer.state[p] |= {"exp_avg": like._new_buffer(p, True), "exp_avg_sq": like._new_buffer(p, False)}
    for step in range(5):
        grads: list[Any] = gradients(step)
        if step == 2:
            grads[4] = None  # does not step then
        for p, grad in zip(weights, grads, strict=True):
            p.grad = grad
        optimizer.step()
        torchaos_step(expected, states, lr, grads)
        for p, q, state in zip(weights, expected, states, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            mine = optimizer.state[p]
            assert float(mine["step"]) == float(state["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                if not hasattr(state[name], "codes"):
                    torch.testing.assert_close(mine[name], state[name])
                    continue
                torch.testing.assert_close(mine[name].scale, state[name].scale)
                differing = (mine[name].codes != state[name].codes).float().mean().item()
                assert differing <= (0.0 if step == 0 else 1e-3)  # first moments alike; later rounding moves a tie
    assert [float(optimizer.state[p]["step"]) for p in weights] == [5, 5, 5, 5, 4]


@needs_triton
def test_codes_are_torchaos_to_the_bit() -> None:
    """At decays of 0 the moments are the gradient and its square, so what is written is the quantisation alone."""
    from torchao.optim.quant_utils import create_dynamic_map

    from diffusionblocks.training.eight_bit_kernel import OneKernelAdamW8bit

    values = torch.tensor(create_dynamic_map(signed=True))
    halfway = (values[1:] + values[:-1]) / 2
    random = torch.randn(64, 256, generator=seeded(3)) * 10.0 ** torch.arange(-8, 8).repeat_interleave(4)[:, None]
    rows = [values, torch.cat([halfway, torch.ones(1)]), torch.zeros(256), torch.full((256,), 1e-30), *random]
    grad = torch.stack([row.float() for row in rows]).to(DEVICE)
    weight = nn.Parameter(torch.zeros_like(grad))
    lr = torch.tensor(0.0, device=DEVICE)
    optimizer = OneKernelAdamW8bit([weight], lr=lr, betas=(0.0, 0.0))
    like = adam.AdamW8bit([weight])
    optimizer.state[weight] = {"step": torch.zeros((), device=DEVICE)}
    optimizer.state[weight] |= {name: like._new_buffer(weight, name == "exp_avg") for name in ("exp_avg", "exp_avg_sq")}
    weight.grad = grad
    optimizer.step()
    for name, moment, signed in (("exp_avg", grad, True), ("exp_avg_sq", grad.square(), False)):
        reference = like._new_buffer(weight, signed)
        reference.copy_(moment)
        assert torch.equal(optimizer.state[weight][name].codes, reference.codes)
        assert torch.equal(optimizer.state[weight][name].scale, reference.scale)
        assert len(reference.codes.unique()) > 200


@needs_triton
def test_in_the_backward_pass_groups_step_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of parameters, of which one has no gradient at times: equal to one step over all."""
    from diffusionblocks.training import eight_bit_kernel

    takes = eight_bit_kernel.OneKernelAdamW8bit.takes
    monkeypatch.setattr(eight_bit_kernel.OneKernelAdamW8bit, "takes", lambda ps: takes(ps, on_gpu=False))
    options: dict[str, Any] = {"steps": 3, "batch_size": 1, "lr": 1e-2, "optimizer": "adamw-8bit", "ema_decay": 0.9}
    options |= {"gradient_clip": None, "fused_kernels": ("adamw-8bit",)}

    def run(in_backward: bool) -> tuple[list[nn.Parameter], ParameterSet]:
        weights = parameters()
        averages = [p.detach().clone() for p in weights]
        config = TrainConfig(optimizer_in_backward=in_backward, **options)
        updater = Updater(weights, 3, 0, config, averages)
        assert all(type(one) is eight_bit_kernel.OneKernelAdamW8bit for one in updater._optimizers)
        assert len(updater._optimizers) == (len(together(weights)) if in_backward else 1)
        updater.allocate()
        owner = ParameterSet(weights, updater.moments(), averages)
        for step in range(3):
            updater.prepare(owner)
            last = len(weights) - step % 2
            torch.stack([(p * g).sum() for p, g in zip(weights[:last], gradients(step), strict=False)]).sum().backward()
            updater.update()
            for p in weights:
                assert not in_backward or p.grad is None
                p.grad = None
        return weights, owner

    (alone, one), (grouped, other) = run(False), run(True)
    assert all(torch.equal(p, q) for p, q in zip(alone, grouped, strict=True))
    for first, second in zip(one.moments, other.moments, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_groups_hold_no_more_than_the_largest_parameter() -> None:
    sizes = [5, 3, 3, 8, 1, 1, 6, 2]
    groups = together([nn.Parameter(torch.zeros(n)) for n in sizes])
    assert [list(group) for group in groups] == [[0, 1], [2], [3], [4, 5, 6], [7]]
    assert together([]) == []


def test_a_cpu_and_a_recipe_that_does_not_ask_keep_torchaos_step() -> None:
    weights = parameters()
    for kernels in ((), ("adamw-8bit",)) if DEVICE == "cpu" else ((),):
        config = TrainConfig(steps=1, optimizer="adamw-8bit", fused_kernels=kernels)
        optimizer = way_to_step(weights, config).make(weights, lr=torch.tensor(0.0, device=DEVICE))
        assert "OneKernel" not in type(optimizer).__name__


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_gpu_steps_in_one_kernel_where_it_can() -> None:
    from diffusionblocks.training.eight_bit_kernel import OneKernelAdamW8bit

    config = TrainConfig(steps=1, optimizer="adamw-8bit")
    lr = torch.tensor(0.0, device=DEVICE)
    assert type(way_to_step(parameters(), config).make(parameters(), lr=lr)) is OneKernelAdamW8bit
    lower = [nn.Parameter(p.bfloat16()) for p in parameters()]
    assert type(way_to_step(lower, config).make(lower, lr=lr)) is not OneKernelAdamW8bit
