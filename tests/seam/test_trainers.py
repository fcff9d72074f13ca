"""Loops that know nothing of blocks: a plain five-line loop and transformers.Trainer, unchanged."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import NUM_LABELS, POLICIES, convert, same_states, tiny, toy_batch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import diffusionblocks as db

TEST = toy_batch(100, seed=999)


def accuracy(logits: Any, labels: Any) -> float:
    return float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())


@pytest.mark.parametrize("shared", POLICIES)
def test_plain_loop(shared: str) -> None:
    model = convert("vit", shared=shared)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    for step in range(240):
        model(**toy_batch(16, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert accuracy(model(**TEST).logits, TEST["labels"]) > 0.6  # chance: 0.25


def dataset(size: int, seed: int) -> list[dict[str, Any]]:
    batch = toy_batch(size, seed)
    return [
        {"pixel_values": image, "labels": label}
        for image, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True)
    ]


def trainer_for(model: nn.Module, folder: Path, **overrides: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **(
            {
                "max_steps": 4,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 10,
                "learning_rate": 3e-3,
                "save_strategy": "steps",
                "save_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "logging_steps": 1,
                "use_cpu": True,
                "report_to": [],
                "disable_tqdm": True,
                "seed": 0,
            }
            | overrides
        ),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset(64, 0),
        eval_dataset=dataset(20, 1),
        compute_metrics=lambda p: {"accuracy": accuracy(p.predictions, p.label_ids)},
    )


@pytest.mark.parametrize("shared", POLICIES)
def test_transformers_trainer_trains_saves_evaluates_and_predicts(shared: str, tmp_path: Path) -> None:
    model = convert("vit", shared=shared)
    start = copy.deepcopy(model.state_dict())
    trainer = trainer_for(model, tmp_path)
    result = trainer.train()
    assert result.global_step == 4
    assert np.isfinite(result.training_loss)
    assert not same_states(model.state_dict(), start)

    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert same_states(saved, model.state_dict())
    fresh = db.convert(tiny(seed=3), model.blocks_config)
    fresh.load_state_dict(saved)
    assert same_states(fresh.state_dict(), model.state_dict())

    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert 0.0 <= metrics["eval_accuracy"] <= 1.0
    predictions = trainer.predict(trainer.eval_dataset)
    assert predictions.predictions.shape == (20, NUM_LABELS)
    np.testing.assert_allclose(np.exp(predictions.predictions).sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("shared", ["joint", "replicated"])
def test_transformers_trainer_resumes_to_the_same_weights(shared: str, tmp_path: Path) -> None:
    straight = convert("vit", shared=shared)
    trainer_for(straight, tmp_path / "run").train()
    resumed = convert("vit", seed=1, shared=shared)
    trainer_for(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


def test_transformers_trainer_learns(tmp_path: Path) -> None:
    model = convert("vit")
    trainer = trainer_for(
        model, tmp_path, max_steps=200, save_strategy="no", eval_strategy="no", lr_scheduler_type="constant"
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.6  # chance: 0.25
