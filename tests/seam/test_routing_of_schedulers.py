"""diffusers' schedulers call, at each of their steps, the block that was trained on that level.

A scheduler's sigma is t', the time after the shift; boundaries and training intervals are in t, before it. Routing by
t' as if it were t is the positive control: it calls other blocks than those that were trained there.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_models import batch_for, tiny_diffuser

import diffusionblocks as db

#: levels this close to a boundary may go to either block
TIE = 1e-4
STEPS = (4, 5, 8, 20, 30, 50, 60)


def flow_euler(shift: float, steps: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    return scheduler


def dynamic(shift: float, steps: int) -> Any:
    """As FluxPipeline sets it, by the mu of a resolution."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=math.log(shift))
    return scheduler


def unipc(shift: float, steps: int) -> Any:
    from diffusers import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler: Any = UniPCMultistepScheduler(**flow)
    scheduler.set_timesteps(steps)
    return scheduler


def dpmpp(shift: float, steps: int) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler: Any = DPMSolverMultistepScheduler(**flow)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("scheduler", [flow_euler, dynamic, unipc, dpmpp])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, math.exp(1.15)])
def test_each_step_is_the_block_that_was_trained_on_its_level(
    scheduler: Callable[[float, int], Any], shift: float
) -> None:
    noise = db.FlowMatching(shift=shift)
    control = 0
    for steps, blocks in itertools.product(STEPS, (2, 3, 4)):
        partition = db.Partition.build(noise, 12, blocks)
        intervals = [partition.training_interval(b) for b in range(blocks)]
        times = scheduler(shift, steps).sigmas[:-1].tolist()
        assert len(times) == steps
        calls: Counter[int] = Counter()
        for time in times:
            level = noise.unshifted(min(time, 1.0))
            block = partition.block_of(level)
            low, high = intervals[block]
            assert low * (1 - TIE) <= level <= high * (1 + TIE)
            calls[block] += 1
            low, high = (noise.shifted(torch.tensor(end, dtype=torch.float64)).item() for end in intervals[block])
            assert low * (1 - TIE) <= time <= high * (1 + TIE)  # what the network is told was told in training
            wrong = intervals[partition.block_of(time)]  # t' as if it were t
            control += not wrong[0] * (1 - TIE) <= level <= wrong[1] * (1 + TIE)
        edges = [noise.shifted(torch.tensor(edge, dtype=torch.float64)).item() for edge in partition.boundaries]
        for b in range(blocks):  # counted, by t' alone
            low, high = edges[blocks - 1 - b], edges[blocks - b]
            inside = sum(low + TIE < time < high - TIE for time in times)
            near = sum(min(abs(time - low), abs(time - high)) <= TIE for time in times)
            assert inside <= calls[b] <= inside + near
        assert sum(calls.values()) == steps
    assert (control == 0) == (shift == 1)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_sampler_calls_the_blocks_that_the_scheduler_would(shift: float) -> None:
    """Counted on the blocks themselves."""
    name, steps = "SD3Transformer2DModel", 9
    noise = db.FlowMatching(shift=shift)
    model = db.convert(tiny_diffuser(name), db.BlocksConfig(num_blocks=4, noise=noise)).eval()
    calls: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block.index))
    inputs = {n: v for n, v in batch_for(model, name).items() if n != "pixel_values"}
    model.sample(seeds=[1, 2], steps=steps, inputs=inputs, sizes=(8, 8))
    times = flow_euler(shift, steps).sigmas[:-1].tolist()
    assert calls == [model.partition.block_of(noise.unshifted(min(time, 1.0))) for time in times]
    assert {*calls} == {0, 1, 2, 3}


@pytest.mark.parametrize("ratio", [0.875, 0.9, 0.417])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("scheduler", [flow_euler, unipc])
def test_a_pair_splits_as_wan_pipelines_boundary_ratio(
    scheduler: Callable[[float, int], Any], shift: float, ratio: float
) -> None:
    """The pipeline runs `transformer` while t' * 1000 >= boundary_ratio * 1000, and then `transformer_2`."""
    noise = db.FlowMatching(shift=shift)
    partition = db.Partition.build(noise, 4, 2, split="experts", boundaries=[noise.unshifted(ratio)])
    control = 0
    for steps in STEPS:
        schedule = scheduler(shift, steps)
        boundary = ratio * schedule.config.num_train_timesteps
        theirs = [0 if t >= boundary else 1 for t in schedule.timesteps]
        times = schedule.sigmas[:-1].tolist()
        ours = [partition.block_of(noise.unshifted(min(time, 1.0))) for time in times]
        assert len(ours) == len(theirs) == steps
        for time, mine, pipelines in zip(times, ours, theirs, strict=True):
            # UniPC rounds its timesteps down to whole ones, by which the pipeline goes.
            tie = 1.1e-3 if scheduler is unipc else TIE
            assert mine == pipelines or abs(time - ratio) < tie
        control += [partition.block_of(min(time, 1.0)) for time in times] != theirs
    assert control > 0 or shift == 1
