"""Loops that know nothing of blocks: a plain five-line loop and transformers.Trainer, unchanged."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LENGTH,
    NUM_LABELS,
    POLICIES,
    convert,
    image_batch,
    same_states,
    seeded,
    tiny,
    token_batch,
    toy_batch,
)
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

import diffusionblocks as db
from diffusionblocks.model import UnlabelledBlocks
from diffusionblocks.models import RecurrentDepth

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


# ---- models that are measured by their loss alone --------------------------------------------------------------


def unlabelled(name: str) -> tuple[db.DiffusionBlocks, dict[str, torch.Tensor]]:
    """A converted model whose only measure is its loss, and 20 examples of what it is given."""
    if name == "images without classes":
        original = tiny("dit", num_classes=0)
        return db.convert(original, db.BlocksConfig()), {"pixel_values": image_batch(20)["pixel_values"]}
    if name == "dit":
        return convert("dit"), image_batch(20)
    if name == "recurrent":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "mlp_size": 48, "mean_recurrence": 2}
        original = RecurrentDepth(vocab_size=27, sequence_length=LENGTH, **sizes)
        return db.convert(original, db.BlocksConfig(num_blocks=1)), token_batch(20)
    return convert(name), token_batch(20)


MEASURED_BY_LOSS = ("llama", "masked", "recurrent", "dit", "images without classes")


@pytest.mark.parametrize("name", MEASURED_BY_LOSS)
def test_transformers_trainer_reports_the_models_own_mean_loss(name: str, tmp_path: Path) -> None:
    model, batch = unlabelled(name)
    examples = [{key: value[i] for key, value in batch.items()} for i in range(20)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=8, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, eval_dataset=examples)
    assert trainer.args.label_names is None
    torch.manual_seed(5)
    reported = trainer.evaluate()["eval_loss"]
    # By hand, with the same draws: every block's losses, over all examples; the last batch is smaller.
    model.eval()
    torch.manual_seed(5)
    losses = []
    with torch.no_grad():
        for some in trainer.get_eval_dataloader():
            every = [model.loss(dict(some), block=b) for b in range(model.partition.num_blocks)]
            losses.append(torch.stack(every).mean(dim=0))
    assert [len(part) for part in losses] == [8, 8, 4]
    assert reported == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    torch.manual_seed(6)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(reported, rel=1e-5)  # the draws matter


@pytest.mark.parametrize("name", MEASURED_BY_LOSS)
def test_accumulated_batches_count_as_one(name: str, tmp_path: Path) -> None:
    model, batch = unlabelled(name)
    # Data sets often have a label, which Trainer's collator passes on as `labels`, whether the model wants it or not.
    label = {} if "labels" in batch else {"label": 0}
    examples = [{key: value[i] for key, value in batch.items()} | label for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    seen: list[float] = []
    hook = model.register_forward_hook(lambda module, given, output: seen.append(output.loss.item()))
    trainer = Trainer(model=model, args=arguments, train_dataset=examples)
    result = trainer.train()
    hook.remove()
    assert len(seen) == 2
    assert result.training_loss == pytest.approx(sum(seen) / 2, rel=1e-4)  # twice that, were the loss not divided


def test_labels_are_ignored_where_a_model_has_none_and_return_loss_may_be_declined() -> None:
    model, batch = unlabelled("llama")
    model.train()
    losses = [
        model(**batch, generator=seeded()).loss,
        model(**batch, labels=batch["input_ids"], generator=seeded()).loss,
        model(**batch, return_loss=True, generator=seeded()).loss,
    ]
    assert len({loss.item() for loss in losses}) == 1
    assert model(**batch, return_loss=False).loss is None
    with pytest.raises(TypeError, match=r"LlamaForCausalLM: forward takes no \['attention_mask'\]"):
        model(**batch, attention_mask=torch.ones(20, LENGTH))


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_models_kind_survives_copying_saving_and_branching(name: str, tmp_path: Path) -> None:
    model = convert(name, num_blocks=1)
    kind = UnlabelledBlocks if name == "llama" else db.DiffusionBlocks
    model.save_pretrained(tmp_path / "m")
    for made in (model, copy.deepcopy(model), db.load(tmp_path / "m"), db.branch(model, 2)):
        assert type(made) is kind
        assert isinstance(made, db.DiffusionBlocks)
