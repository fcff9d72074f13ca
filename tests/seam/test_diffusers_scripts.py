"""Five lines in a training script of diffusers: each expert trains as the script trains, and two are one model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers_models import batch_for, tiny_diffuser, velocity
from torch import Tensor

import diffusionblocks as db

KIND = "SD3Transformer2DModel"
SHIFT = 3.0


def converted(transformer: Any, scheduler: Any) -> db.DiffusionBlocks:
    noise = db.FlowMatching(shift=scheduler.config.shift)
    lora = db.LoraConfig(rank=2)
    return db.convert(transformer, db.BlocksConfig(num_blocks=2, split="experts", lora=lora, noise=noise))


def script(transformer: Any, out: Path, expert: int, steps: int = 4) -> tuple[list[Tensor], list[float]]:
    """A loop in the way of these scripts on a flow model, with the five lines; returns losses and what was told."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT)  # type: ignore[no-untyped-call]
    transformer.requires_grad_(False)  # as the script does before it adds its adapter
    blocks = converted(transformer, scheduler)  # 1
    transformer = blocks.block(expert).network  # 2
    parameters = [p for p in transformer.parameters() if p.requires_grad]  # 3
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    generator = torch.Generator().manual_seed(expert)
    batch = batch_for(blocks, KIND)
    latents, states = batch["pixel_values"], {n: v for n, v in batch.items() if n != "pixel_values"}
    losses, times = [], []
    for _ in range(steps):
        noise = torch.randn(latents.shape, generator=generator)
        interval = blocks.block(expert).interval
        u = 1 - blocks.noise.sample(len(latents), interval, generator=generator)  # 4
        indices = (u * scheduler.config.num_train_timesteps).long()
        timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices].view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * noise
        prediction = transformer(hidden_states=noisy, timestep=timesteps, **states, return_dict=False)[0]
        loss = (prediction - (noise - latents)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        times += timesteps.tolist()
        if len(losses) == 1:
            check_first_loss(blocks, expert, batch, noise, timesteps, loss)
    blocks.save_pretrained(out, blocks=[expert])  # 5
    return losses, times


def check_first_loss(
    blocks: db.DiffusionBlocks, expert: int, batch: Any, noise: Tensor, timesteps: Tensor, loss: Tensor
) -> None:
    """The script's loss is the block's own at the same levels, within the optimizer's first step."""
    process: Any = blocks.noise
    levels = torch.tensor([process.unshifted(time / 1000) for time in timesteps.tolist()])
    with torch.no_grad():
        z = process.corrupt(batch["pixel_values"], levels, noise)
        inputs = blocks.block(expert).inputs_of(batch)
        before = converted(tiny_diffuser(KIND), FlowMatchEulerDiscreteScheduler(shift=SHIFT)).eval()  # type: ignore[no-untyped-call]
        denoised = before.block(expert)(inputs, z, levels)
        own = ((denoised - batch["pixel_values"]).square().flatten(1).mean(1) * process.weight(levels)).mean()
    torch.testing.assert_close(own, loss.detach(), rtol=1e-4, atol=1e-6)


def test_a_script_with_five_lines_trains_an_expert(tmp_path: Path) -> None:
    original = tiny_diffuser(KIND)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    for expert in (0, 1):
        _, times = script(copy.deepcopy(original), tmp_path / f"expert-{expert}", expert, steps=40)
        process = db.FlowMatching(shift=SHIFT)
        levels = [process.unshifted(time / 1000) for time in times]
        low, high = converted(original, FlowMatchEulerDiscreteScheduler(shift=SHIFT)).block(expert).interval  # type: ignore[no-untyped-call]
        assert low - 1e-6 <= min(levels) < max(levels) <= high + 1e-3, "to the next of the scheduler's 1000 times"
    db.merge([tmp_path / "expert-0", tmp_path / "expert-1"], tmp_path / "model")
    model = db.load(tmp_path / "model")
    updates = [dict(model.block(b).network.named_parameters()) for b in (0, 1)]
    for values in updates:
        for name, value in before.items():
            if name in values:
                assert torch.equal(values[name], value), "only low-rank updates are trained"
    moved = [name for name in updates[0] if not torch.equal(updates[0][name], updates[1][name])]
    assert moved
    assert all("lora" in name for name in moved)
    batch = {name: value for name, value in batch_for(model, KIND).items() if name != "pixel_values"}
    images = model.sample(seeds=[0, 1], steps=4, inputs=batch, sizes=(8, 8))
    z, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.9)
    block = model.block(model.partition.block_of(model.noise.unshifted(0.9)))  # type: ignore[attr-defined]
    assert bool(images.isfinite().all())
    assert not torch.equal(velocity(original, KIND, z, t, batch), velocity(block.network, KIND, z, t, batch))


def test_the_whole_range_is_not_an_interval() -> None:
    """The positive control: a draw over all levels leaves the interval of either expert."""
    blocks = converted(tiny_diffuser(KIND), FlowMatchEulerDiscreteScheduler(shift=SHIFT))  # type: ignore[no-untyped-call]
    levels = blocks.noise.sample(200, generator=torch.Generator().manual_seed(0))
    for block in blocks.blocks:
        low, high = block.interval  # type: ignore[misc]
        assert bool((levels < low - 1e-3).any() or (levels > high + 1e-3).any())


@pytest.mark.parametrize("expert", [0, 1])
def test_a_file_carries_its_interval(expert: int, tmp_path: Path) -> None:
    script(tiny_diffuser(KIND), tmp_path / "expert", expert, steps=1)
    blocks = converted(tiny_diffuser(KIND), FlowMatchEulerDiscreteScheduler(shift=SHIFT))  # type: ignore[no-untyped-call]
    index = (tmp_path / "expert" / "diffusionblocks.json").read_text()
    assert str(list(blocks.partition.boundaries)[1]) in index
