"""Batch norms under the trainer: running statistics are each unit's own, wherever it lies and however it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, without_generated_code
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.common.seeds import key, seed_global
from diffusionblocks.data import ImageBatches, ImageData
from diffusionblocks.models import NoPropCNN
from diffusionblocks.training import EndToEnd, TrainConfig, Trainer, units_of
from diffusionblocks.training.noprop_steps import NoProp

KINDS = ("blocks", "noprop", "end-to-end")
DATA = ImageData(
    torch.randint(0, 256, (40, 3, 8, 8), generator=seeded(), dtype=torch.uint8), torch.arange(40) % 4, tuple("abcd")
)


def model_of(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cnn = NoPropCNN(image_size=8, num_labels=4, num_layers=3, hidden_size=16, num_filters=2)
    if kind == "blocks":
        return db.convert(cnn, db.BlocksConfig(num_blocks=3, target={"embedding": "one-hot"}))  # type: ignore[arg-type]
    return NoProp(cnn) if kind == "noprop" else EndToEnd(cnn)


def trainer(kind: str, folder: Path | None = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {"steps": 4, "batch_size": 6, "lr": 3e-3, "checkpoint_every": 1, "keep_checkpoints": 99}
    batches = ImageBatches(DATA, mean=[0.5] * 3, std=[0.5] * 3, augment=None, device=torch.device("cpu"))
    return Trainer(model_of(kind), batches, TrainConfig(**(values | changes)), folder=folder, progress=False)


def state(run: Trainer) -> dict[str, Tensor]:
    run.residency.flush()
    return {
        f"{owner}.{name}": tensor.detach().clone()
        for owner, tensors in run._state()
        for name, tensor in tensors.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_a_plain_loop(kind: str) -> None:
    run = trainer(kind, lr=1e-12)  # the weights stay: what follows a bias's rounding is no part of this
    run.train()
    units, _ = units_of(model_of(kind))
    for mine, plain in zip(run.units, units, strict=True):
        plain.module.train()
        for step in range(4):
            generator = torch.Generator().manual_seed(key(0, plain.index, step, "noise"))
            seed_global(key(0, plain.index, step, "dropout"), torch.device("cpu"))
            entries = run.stepper.batches(run.order(plain.index, step)[0], generator)
            plain.module.loss(entries, generator)  # type: ignore[operator]
        ours, theirs = mine.module.state_dict(), plain.module.state_dict()
        counts = [int(ours[name]) for name in theirs if name.endswith("num_batches_tracked")]
        assert counts == ([] if plain.name == "read-out" else [4] * len(counts))
        for name in theirs:
            if "running" in name:
                torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resident", ["all", "active"])
def test_resume_is_exact_with_statistics(kind: str, resident: str, tmp_path: Path) -> None:
    whole = trainer(kind, resident=resident)
    whole.train()
    parts = trainer(kind, tmp_path, resident=resident)
    parts.train(until=2 * len(parts.units) - 1)
    again = trainer(kind, tmp_path, resident="all")
    again.train()
    assert same(state(whole), state(again))
    means = [tensor for name, tensor in state(again).items() if name.endswith("running_mean")]
    assert all(mean.any() for mean in means)
    assert len({tuple(mean.flatten().tolist()) for mean in means}) == len(means)  # no two units share any


@pytest.mark.parametrize("kind", ["blocks", "noprop"])
def test_order_and_residency_do_not_change_statistics(kind: str, tmp_path: Path) -> None:
    expected = None
    for changes in (
        {},
        {"schedule": "sequential", "resident": "active"},
        {"schedule": "round-robin", "resident": "active", "offload": "disk"},
    ):
        run = trainer(kind, tmp_path / str(len(changes)), **changes)
        run.train()
        expected = expected or state(run)
        assert same(expected, state(run)), changes


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_moves_the_statistics_of_the_unit_whose_turn_it_is(kind: str) -> None:
    eager = trainer(kind)
    eager.train()
    with without_generated_code():
        run = trainer(kind, compile=True)
        run.train()
    expected, compiled = state(eager), state(run)
    for name, tensor in expected.items():
        torch.testing.assert_close(compiled[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_of_batch_norms_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"activation_checkpointing = true: .*running statistics would move twice"):
        trainer(kind, activation_checkpointing=True)
