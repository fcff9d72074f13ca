"""BlocksTrainer: transformers.Trainer with block schedules, checkpoints that load, fixed evaluation noise."""

import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from helpers import (
    LENGTH,
    convert,
    run_ranks,
    same_states,
    seeded,
    tiny,
    token_batch,
    toy_batch,
    without_generated_code,
)
from hub_server import this_process_at
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)

import diffusionblocks as db
from diffusionblocks.common.seeds import keyed_generator
from diffusionblocks.integrations.packed_texts import unpacked
from diffusionblocks.targets import LabelLoss


def rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[i] for key, value in batch.items()} for i in range(len(next(iter(batch.values()))))]


def batch_of(name: str, size: int = 24) -> dict[str, Tensor]:
    return token_batch(size) if name in ("llama", "masked") else toy_batch(size, 0)


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    common = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(output_dir=str(folder), **(common | overrides))  # type: ignore[arg-type]


def trainer_of(model: nn.Module, folder: Path, name: str = "vit", **overrides: Any) -> db.BlocksTrainer:
    own = {key: overrides.pop(key) for key in ("schedule", "steps_per_switch", "resident") if key in overrides}
    data = rows(batch_of(name))
    return db.BlocksTrainer(model, arguments(folder, **overrides), train_dataset=data, eval_dataset=data[:16], **own)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of 25 letters, with padding and an end."""
    ids = {"<pad>": 0, "<eos>": 1} | {chr(97 + i): 2 + i for i in range(25)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(ids, [])), pad_token="<pad>", eos_token="<eos>")


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shared", "resident"),
    [
        ("vit", "replicated", "all"),
        ("llama", "joint", "all"),
        ("llama", "replicated", "active"),
        ("vit", "joint", "active"),
    ],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(
    name: str, shared: str, resident: str, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2, "resident": resident}
    start = convert(name, shared=shared)
    straight = copy.deepcopy(start)
    first = trainer_of(straight, tmp_path / "run", name, **options)
    first.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    opened = db.load(checkpoint / "model")
    assert not same_states(opened.state_dict(), straight.state_dict())
    resumed = convert(name, seed=1, shared=shared)
    torch.manual_seed(77)  # as in another process
    again = trainer_of(resumed, tmp_path / "again", name, **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert same_states(resumed.state_dict(), straight.state_dict())
    assert not same_states(resumed.state_dict(), start.state_dict())
    assert same_states(db.load(tmp_path / "again" / "checkpoint-6" / "model").state_dict(), straight.state_dict())


def test_residency_changes_no_bit_and_what_waits_is_not_with_the_optimizer(tmp_path: Path) -> None:
    models, held = [], []
    for resident in ("all", "active"):
        model = convert("llama")
        trainer = trainer_of(model, tmp_path, "llama", resident=resident, max_steps=9)

        def count(module: nn.Module, given: Any, trainer: Any = trainer, resident: str = resident) -> None:
            if resident == "active" and trainer.model.training:
                held.append(sum(s["exp_avg"].numel() for s in trainer.optimizer.state.values()))

        model.register_forward_pre_hook(count)
        trainer.train()
        models.append(model)
    assert same_states(models[0].state_dict(), models[1].state_dict())
    sizes = {sum(p.numel() for p in block.parameters() if p.requires_grad) for block in models[0].blocks}
    assert max(held) == max(sizes)  # of one block, never of all
    assert 0 in held  # a block's first step


@pytest.mark.parametrize("resident", ["all", "active"])
def test_the_best_model_is_loaded_at_the_end(resident: str, tmp_path: Path) -> None:
    model = convert("vit")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "resident": resident}
    trainer = trainer_of(model, tmp_path, learning_rate=0.3, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint or "")
    assert best.name != "checkpoint-6"  # steps that large make it worse
    assert same_states(db.load(best / "model").state_dict(), model.state_dict())


def test_a_callback_serves_other_trainers(tmp_path: Path) -> None:
    plain = convert("vit")
    args = arguments(tmp_path / "plain", save_strategy="steps", save_steps=3)
    Trainer(plain, args, train_dataset=rows(batch_of("vit")), callbacks=[db.BlocksCallback()]).train()
    opened = db.load(tmp_path / "plain" / "checkpoint-6" / "model")
    opened.set_extra_state(plain.get_extra_state())  # what a plain Trainer draws from is in its own files
    assert same_states(opened.state_dict(), plain.state_dict())


@pytest.mark.slow
def test_a_run_goes_on_in_the_order_of_its_blocks_or_is_refused(tmp_path: Path) -> None:
    """Else some blocks would have more steps than others, and a learning rate that is not theirs."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    for schedule in ("sequential", "round-robin"):
        trainer_of(convert("vit"), tmp_path / schedule, schedule=schedule, **saving).train()
    model = convert("vit")
    turns = watched(model)
    longer = trainer_of(model, tmp_path / "longer", schedule="round-robin", max_steps=9)
    longer.train(resume_from_checkpoint=str(tmp_path / "round-robin" / "checkpoint-6"))
    assert turns == [0, 1, 2]  # the same order as far as it went
    for place, step, change, message in (
        ("sequential", 6, {"max_steps": 9}, r"max_steps = 6 and not 9\): go on with the same"),
        ("sequential", 3, {"schedule": "round-robin"}, r"\(schedule = 'sequential' and not 'round-robin'\)"),
        ("round-robin", 6, {"steps_per_switch": 2}, r"\(steps_per_switch = 1 and not 2\)"),
    ):
        other = trainer_of(convert("vit"), tmp_path / "other", **({"schedule": place} | change))
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=str(tmp_path / place / f"checkpoint-{step}"))
    trainer_of(convert("vit"), tmp_path / "weights", save_only_model=True, **saving).train()
    with pytest.raises(
        ValueError, match=r"checkpoint-3 has no optimizer state \(save_only_model\).*diffusionblocks.load"
    ):
        trainer_of(convert("vit"), tmp_path).train(resume_from_checkpoint=str(tmp_path / "weights" / "checkpoint-3"))


def test_a_second_training_has_the_same_bits_for_either_residency(tmp_path: Path) -> None:
    models = [convert("llama") for _ in range(2)]
    for model, resident in zip(models, ("all", "active"), strict=True):
        trainer = trainer_of(model, tmp_path, "llama", resident=resident)
        trainer.train()
        trainer.train()  # with the optimizer state of the first
    assert same_states(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("resident", ["all", "active"])
def test_a_smaller_batch_starts_over_where_larger_ones_did_not_fit(resident: str, tmp_path: Path) -> None:
    model, expected = convert("llama"), convert("llama")
    sizes: list[int] = []

    def too_large(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        sizes.append(len(named["input_ids"]))
        if sizes[-1] > 2 and len(sizes) > 2:  # after two steps, which moved two blocks
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    model.register_forward_pre_hook(too_large, with_kwargs=True)
    options = {"resident": resident, "save_strategy": "steps", "save_steps": 6}
    trainer_of(model, tmp_path / "found", "llama", auto_find_batch_size=True, **options).train()
    assert sizes == [4, 4, 4, 3, 2, 2, 2, 2, 2, 2]
    trainer_of(expected, tmp_path / "known", "llama", per_device_train_batch_size=2, **options).train()
    assert same_states(model.state_dict(), expected.state_dict())


def test_what_makes_the_input_lies_beside_the_weights(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    model = convert("llama")
    data = rows(batch_of("llama"))
    args = arguments(tmp_path / "text", **saving)
    trainer = db.BlocksTrainer(model, args, train_dataset=data, processing_class=letters())
    trainer.train()
    trainer.save_model()
    trainer.save_model()  # in place of the first
    for folder in (tmp_path / "text", tmp_path / "text" / "checkpoint-6"):
        assert same_states(db.load(folder / "model").state_dict(), model.state_dict())
        for place in (folder, folder / "model"):
            assert PreTrainedTokenizerFast.from_pretrained(place).get_vocab() == letters().get_vocab()
    plain = Trainer(
        convert("vit"),
        arguments(tmp_path / "images", **saving),
        train_dataset=rows(batch_of("vit")),
        processing_class=ViTImageProcessor(size={"height": 8, "width": 8}),
        callbacks=[db.BlocksCallback()],
    )
    plain.train()
    place = tmp_path / "images" / "checkpoint-3" / "model"
    assert ViTImageProcessor.from_pretrained(place).size["height"] == 8
    assert db.load(place).model_class == "ViTForImageClassification"


def test_the_trainer_uploads_what_it_trained(tmp_path: Path) -> None:
    model = convert("llama")
    args = arguments(tmp_path / "trained")
    trainer = db.BlocksTrainer(model, args, train_dataset=rows(batch_of("llama")), processing_class=letters())
    trainer.train()
    with this_process_at(tmp_path, "ann") as hub:
        trainer.push_to_hub()
        assert same_states(db.from_pretrained("ann/trained").state_dict(), model.state_dict())
        assert "tokenizer.json" in hub.repositories["ann/trained"].head


def test_a_checkpoint_of_another_conversion_is_refused(tmp_path: Path) -> None:
    trainer_of(convert("vit"), tmp_path, save_strategy="steps", save_steps=6).train()
    other = trainer_of(convert("vit", num_blocks=1), tmp_path / "other")
    with pytest.raises(ValueError, match="is of another conversion than the trainer's model"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# ---- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "llama", "masked"])
def test_evaluation_noise_follows_from_each_example(name: str, tmp_path: Path) -> None:
    model, data = convert(name), rows(batch_of(name, 11))
    losses = []
    for size, examples in ((4, data), (4, data), (11, data), (3, data[::-1])):
        args = arguments(tmp_path, per_device_eval_batch_size=size)
        losses.append(db.BlocksTrainer(model, args, eval_dataset=examples).evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    plain = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=data[::-1])
    assert plain.evaluate()["eval_loss"] != pytest.approx(losses[0], rel=1e-5)  # there the batch decides


def test_padding_on_either_side_does_not_change_the_noise() -> None:
    model = convert("llama")
    model.eval()
    texts = [torch.randint(1, 27, (n,), generator=seeded(n)) for n in (5, 8, 12)]

    def losses(length: int, left: bool) -> float:
        padded, mask = torch.zeros(3, length, dtype=torch.int64), torch.zeros(3, length, dtype=torch.int64)
        for row, text in enumerate(texts):
            place = slice(length - len(text), None) if left else slice(len(text))
            padded[row, place], mask[row, place] = text, 1
        batch = {"input_ids": padded, "attention_mask": mask}
        with torch.no_grad():
            return model(**batch, generator=model.example_generators(batch)).loss.item()

    alone = []
    for text in texts:
        batch = {"input_ids": text[None]}
        with torch.no_grad():
            alone.append(model(**batch, generator=model.example_generators(batch)).loss.item())
    expected = pytest.approx(sum(alone) / 3, rel=1e-5)
    assert [losses(12, False), losses(12, True), losses(17, False), losses(17, True)] == [expected] * 4


def test_metrics_are_of_the_log_probabilities_of_predict(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(given: Any) -> dict[str, float]:
        seen.append(given)
        return {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}

    model, data = convert("vit"), batch_of("vit", 11)
    args = arguments(tmp_path, per_device_eval_batch_size=4, include_for_metrics=["inputs"])
    trainer = db.BlocksTrainer(model, args, eval_dataset=rows(data), compute_metrics=metrics)
    assert "eval_accuracy" in trainer.evaluate()
    predicted = model.predict(data["pixel_values"], generator=model.example_generators(data)).logits
    np.testing.assert_allclose(seen[0].predictions, predicted.numpy(), atol=1e-5)
    np.testing.assert_array_equal(seen[0].inputs, data["pixel_values"].numpy())
    images = [{"pixel_values": image} for image in data["pixel_values"]]
    np.testing.assert_allclose(trainer.predict(images).predictions, predicted.numpy(), atol=1e-5)


def test_what_metrics_read_can_be_made_smaller_first(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(given: Any) -> dict[str, float]:
        seen.append(given.predictions)
        return {"right": float((given.predictions == given.label_ids).mean())}

    model, data = convert("vit"), batch_of("vit", 11)
    trainer = db.BlocksTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=rows(data),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    assert "eval_right" in trainer.evaluate()
    predicted = model.predict(data["pixel_values"], generator=model.example_generators(data)).logits
    np.testing.assert_array_equal(seen[0], predicted.argmax(-1).numpy())


def test_a_text_model_reports_its_loss_whatever_labels_are_named(tmp_path: Path) -> None:
    model, data = convert("llama"), rows(batch_of("llama"))
    losses = [
        db.BlocksTrainer(model, arguments(tmp_path, **named), eval_dataset=data).evaluate()["eval_loss"]
        for named in ({}, {"label_names": ["labels"]})
    ]
    assert losses[0] == losses[1]


# ---- collators ---------------------------------------------------------------------------------------------------


def texts(count: int = 16) -> list[dict[str, list[int]]]:
    """Texts of several lengths, whose first two tokens are a prompt."""
    made = []
    for i in range(count):
        ids = torch.randint(2, 27, (5 + i % 4,), generator=seeded(i)).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def shown(model: nn.Module) -> list[dict[str, Tensor]]:
    """The tensors of each call."""
    calls: list[dict[str, Tensor]] = []

    def note(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        calls.append({name: value for name, value in named.items() if isinstance(value, Tensor)})

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("collator", ["padding", "language modeling", "seq2seq"])
def test_collators_of_the_library_say_what_is_padding(collator: str, tmp_path: Path) -> None:
    tokenizer = letters()
    data: Any = texts() if collator == "seq2seq" else [{"input_ids": text["input_ids"]} for text in texts()]
    makers: dict[str, Any] = {
        "padding": DataCollatorWithPadding(tokenizer),
        "language modeling": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
    }
    model = convert("llama")
    calls = shown(model)
    options = {"train_dataset": data, "eval_dataset": data, "data_collator": makers[collator]}
    trainer = db.BlocksTrainer(model, arguments(tmp_path, per_device_eval_batch_size=16), **options)
    trainer.train()
    expected = {"input_ids", "attention_mask"} | (set() if collator == "padding" else {"labels"})
    assert calls[0].keys() == expected
    assert (calls[0]["attention_mask"] == 0).any()
    reported = trainer.evaluate()["eval_loss"]
    alone = []
    for text in data:  # without padding
        batch = {name: torch.tensor([value]) for name, value in text.items()}
        with torch.no_grad():
            alone.append(model(**batch, generator=model.example_generators(batch)).loss.item())
    assert reported == pytest.approx(sum(alone) / len(alone), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_packed_texts_are_trained_as_if_they_were_not_packed(options: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    packed, padded = convert("llama"), convert("llama")
    calls = shown(packed)
    data = texts()
    apart = [{**text, "labels": [-100, *text["labels"][1:]]} for text in data]  # a first token follows another text
    losses = []
    for model, examples, collator in (
        (packed, Dataset.from_list(data), DataCollatorWithFlattening(**options)),
        (padded, apart, DataCollatorForSeq2Seq(letters(), label_pad_token_id=-100)),
    ):
        given = {"train_dataset": examples, "eval_dataset": examples, "data_collator": collator}
        trainer = db.BlocksTrainer(model, arguments(tmp_path), **given)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert same_states(packed.state_dict(), padded.state_dict())
    assert losses[0] == losses[1]
    assert calls[0]["input_ids"].shape == (4, 8)
    given = {"train_dataset": Dataset.from_list(data), "data_collator": DataCollatorWithFlattening()}
    plain = Trainer(convert("llama"), arguments(tmp_path), **given)
    with pytest.raises(TypeError, match=r"takes no position_ids.*BlocksTrainer takes packed texts apart"):
        plain.train()


def test_packed_texts_come_apart() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 3, 3], [0, 0, 4, 5, 6, 7, 8]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 0], [0, 0, 0, 1, 2, 0, 1]]),
        "labels": torch.tensor([[-100, 6, -100, 8, 9, -100, -100], [-100, -100, 4, 5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 2, 5, 7]),
        "other": torch.ones(2),
    }
    result = unpacked(batch)
    assert result["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9], [4, 5, 6], [7, 8, 0]]
    assert result["labels"].tolist() == [[-100, 6, -100], [-100, 8, 9], [4, 5, 6], [7, 8, -100]]
    assert result["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert result.keys() == {"input_ids", "labels", "attention_mask", "other"}  # what is unknown is refused later
    for positions in ([[1, 2, 3]], [[0, 1, 3]], [[0, 2, 0]], [[0, 0, 2]]):
        with pytest.raises(ValueError, match="position_ids must count up from 0 in each text of a row"):
            unpacked({"input_ids": torch.ones(1, 3, dtype=torch.int64), "position_ids": torch.tensor(positions)})
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 2\), but input_ids \(1, 3\)"):
        unpacked({"input_ids": torch.ones(1, 3, dtype=torch.int64), "position_ids": torch.tensor([[0, 1]])})


@pytest.mark.parametrize("kind", [Trainer, db.BlocksTrainer])
def test_a_masked_text_model_goes_with_its_tokenizer(kind: type[Trainer], tmp_path: Path) -> None:
    model = convert("masked")
    data = [{"input_ids": text["input_ids"].tolist()} for text in rows(batch_of("masked", 8))]
    trainer = kind(model, arguments(tmp_path), train_dataset=data, processing_class=letters())
    calls = shown(model)
    trainer.train()
    assert calls[0].keys() == {"input_ids", "attention_mask"}
    model.save_pretrained(tmp_path / "m")  # the special tokens that Trainer notes in the config are not of the model
    assert all(torch.equal(a, b) for a, b in zip(db.load(tmp_path / "m").parameters(), model.parameters(), strict=True))
    assert dict(db.load(tmp_path / "m").config) == dict(convert("masked").config)


# ---- the schedule ------------------------------------------------------------------------------------------------


def watched(model: db.DiffusionBlocks) -> list[int]:
    """The block of every training call."""
    turns: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: turns.append(block.index) if block.training else None)
    return turns


def test_blocks_take_turns_as_asked_and_the_others_have_no_gradient(tmp_path: Path) -> None:
    rates: dict[str, list[float]] = {}
    for order, per_switch, expected in (
        ("round-robin", 1, [0, 1, 2] * 2),
        ("round-robin", 2, [0, 0, 1, 1, 2, 2]),
        ("sequential", 1, [0, 0, 1, 1, 2, 2]),
        ("random", 1, None),
    ):
        model = convert("vit")
        turns = watched(model)
        trainer = trainer_of(model, tmp_path, schedule=order, steps_per_switch=per_switch)
        gradients, of_order = [], rates.setdefault(order, [])

        class Watch(db.BlocksCallback):
            def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
                with_gradient = [any(p.grad is not None for p in block.parameters()) for block in model.blocks]  # noqa: B023
                gradients.append(with_gradient)  # noqa: B023
                of_order.append(trainer.optimizer.param_groups[0]["lr"])  # noqa: B023

            def on_save(self, *args: Any, **_: Any) -> None: ...

        trainer.add_callback(Watch())
        trainer.train()
        assert turns == (expected or turns)
        assert sorted(turns) == [0, 0, 1, 1, 2, 2]
        assert gradients == [[b == turn for b in range(3)] for turn in turns]
    # A linear schedule of six steps, of which each block has its first and its fourth.
    assert rates["sequential"][-6:] == pytest.approx([3e-3, 1.5e-3] * 3)
    assert rates["round-robin"][:6] == pytest.approx([3e-3] * 3 + [1.5e-3] * 3)


def test_accumulated_batches_are_of_one_block_with_noise_of_their_own(tmp_path: Path) -> None:
    model = convert("llama")
    seen: list[tuple[int, float]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append((block.index, args[2].sum().item())))
    trainer_of(model, tmp_path, "llama", gradient_accumulation_steps=2, max_steps=3).train()
    blocks, levels = zip(*seen, strict=True)
    assert blocks[::2] == blocks[1::2]
    assert len(set(levels)) == 6


# ---- flags of TrainingArguments ----------------------------------------------------------------------------------


def test_label_smoothing_is_that_of_the_blocks(tmp_path: Path) -> None:
    trained = {}
    for smoothing in (0.0, 0.3):
        model = convert("vit")
        trainer = trainer_of(model, tmp_path, label_smoothing_factor=smoothing, max_steps=1, schedule="sequential")
        batches: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(lambda module, args, named: batches.append(named), with_kwargs=True)  # noqa: B023
        trained[smoothing] = trainer.train().training_loss
        assert model.block(0).label_loss is None  # afterwards
        by_hand = convert("vit").train().block(0)
        by_hand.label_loss = LabelLoss(smoothing=smoothing)
        batch = {name: batches[0][name] for name in ("pixel_values", "labels")}
        generator = keyed_generator(trainer.args.seed, 0, 0, "noise 0 of rank 0")
        assert by_hand.loss(batch, generator).mean().item() == pytest.approx(trained[smoothing], rel=1e-6)
    assert trained[0.3] != pytest.approx(trained[0.0], rel=1e-3)
    with pytest.raises(ValueError, match=r"label_smoothing_factor = 0.1 is for classifiers: a LlamaForCausalLM has no"):
        trainer_of(convert("llama"), tmp_path, "llama", label_smoothing_factor=0.1)


def test_neftune_adds_noise_in_training_alone(tmp_path: Path) -> None:
    model = convert("llama")
    seen: list[Tensor] = []
    embedding = model.input_embeddings()[0]
    trainer = trainer_of(model, tmp_path, "llama", neftune_noise_alpha=5.0, max_steps=3)

    class Watch(db.BlocksCallback):
        def on_train_begin(self, *args: Any, **_: Any) -> None:
            embedding.register_forward_hook(lambda module, args, output: seen.append(output - module.weight[args[0]]))

    trainer.add_callback(Watch())
    trainer.train()
    bound = 5.0 / (LENGTH * seen[0].shape[-1]) ** 0.5
    assert 0 < seen[0].abs().max() <= bound
    trainer.evaluate()
    assert seen[-1].abs().max() == 0
    trainer_of(model, tmp_path, "llama", max_steps=3).train()
    assert seen[-1].abs().max() == 0  # the hook is gone
    one = convert("llama", num_blocks=1)  # the plain Trainer finds the one embedding there is
    Trainer(one, arguments(tmp_path, neftune_noise_alpha=5.0, max_steps=1), train_dataset=rows(token_batch(8))).train()
    for name, message in (("llama", "has 3 input embeddings.*BlocksTrainer"), ("vit", "embeds no tokens")):
        plain = Trainer(convert(name), arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=rows(batch_of(name)))
        with pytest.raises(ValueError, match=message):
            plain.train()


def test_checkpointed_activations_change_no_weights(tmp_path: Path) -> None:
    models = []
    for flag in (False, True):
        model = convert("llama")
        trainer_of(model, tmp_path, "llama", gradient_checkpointing=flag).train()
        assert model.is_gradient_checkpointing == flag
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("resident", ["all", "active"])
def test_a_compiled_model_trains_as_it_does_eagerly(resident: str, tmp_path: Path) -> None:
    compiled, eager = convert("llama"), convert("llama")
    with without_generated_code("eager"):
        trainer_of(compiled, tmp_path, "llama", torch_compile=True, resident=resident).train()
    trainer_of(eager, tmp_path, "llama", resident=resident).train()
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("vit", {"use_liger_kernel": True}, "use_liger_kernel = True rewrites whole models"),
        ("vit", {"push_to_hub": True}, "push_to_hub = True uploads files"),
        ("vit", {"fsdp": True}, "fsdp shards all blocks together.*resident='active'"),
        ("vit", {"neftune_noise_alpha": 1.0}, "embeds no tokens of a context"),
        ("vit", {"schedule": "shuffled"}, "schedule = 'shuffled'; allowed: random, round-robin, sequential"),
        ("vit", {"resident": "none"}, "resident = 'none'; allowed: all, active"),
        ("vit", {"steps_per_switch": 0}, "steps_per_switch must be a whole number >= 1, got 0"),
        ("vit", {"optim": "schedule_free_adamw"}, "optim = 'schedule_free_adamw' counts steps for all parameters"),
        ("vit", {"optim": "stable_adamw"}, "optim = 'stable_adamw' counts steps for all parameters together"),
        ("vit", {"optim": "galore_adamw_layerwise"}, "has its state where Trainer does not save it"),
        ("vit", {"optim": "grokadamw"}, "optim = 'grokadamw' has its state where Trainer does not save it"),
        ("vit", {"optim": "apollo_adamw", "save_strategy": "steps"}, "has objects in its state.*save_only_model=True"),
        (
            "vit",
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant = True: only False is supported",
        ),
    ],
)
def test_arguments_that_blocks_cannot_follow_are_refused_at_once(
    name: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(convert(name), tmp_path, **overrides)


def test_options_that_blocks_cannot_follow_are_refused_at_once(tmp_path: Path) -> None:
    tokenizer = letters()
    tokenizer.add_special_tokens({"mask_token": "z"})
    for name, options, message in (
        ("vit", {"compute_loss_func": lambda *_: None}, "compute_loss_func cannot be followed"),
        ("llama", {"compute_metrics": lambda _: {}}, "compute_metrics is for classifiers.*read eval_loss"),
        ("vit", {"peft_config": object()}, "peft_config wraps a whole model"),
        ("llama", {"data_collator": DataCollatorForLanguageModeling(tokenizer)}, r"masks tokens \(mlm=True\)"),
        ("masked", {"data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}, "reads none: its blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            db.BlocksTrainer(convert(name), arguments(tmp_path), **options)
    for bad in (tiny("vit"), None):
        options = {"model_init": lambda: tiny("vit")} if bad is None else {}
        with pytest.raises(TypeError, match=r"trains what diffusionblocks.convert makes, not a ViTForImage"):
            db.BlocksTrainer(bad, arguments(tmp_path), **options)


def test_what_launchers_say_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path)
    args.deepspeed = "zero.json"  # TrainingArguments themselves want the package first
    with pytest.raises(ValueError, match="deepspeed shards all blocks together"):
        db.BlocksTrainer(convert("vit"), args)
    for overrides, message in (
        ({"_n_gpu": 2}, "2 GPUs in one process copy the model at every step: start a process for each GPU"),
        ({"world_size": 2}, "resident = 'active' with 2 processes"),
        ({"world_size": 2, "ddp_find_unused_parameters": False}, "blocks that wait have no gradients"),
        ({"world_size": 2, "ddp_static_graph": True}, "another block trains at each step"),
    ):

        class Args(TrainingArguments):
            world_size = overrides.pop("world_size", 1)
            n_gpu = overrides.pop("_n_gpu", 1)

        args = Args(str(tmp_path), use_cpu=True, report_to=[], **overrides)
        with pytest.raises(ValueError, match=message):
            db.BlocksTrainer(convert("vit"), args, resident="active" if "resident" in message else "all")
    args = arguments(tmp_path)
    args.parallelism_config = ParallelismConfig(cp_size=2)
    with pytest.raises(ValueError, match="parallelism_config with cp_size > 1 splits what a block computes"):
        db.BlocksTrainer(convert("llama"), args)
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"leave it out of the launcher \(ACCELERATE_USE_FSDP\)"):
        db.BlocksTrainer(convert("vit"), args)


def test_a_package_that_is_missing_is_named_before_anything_is_done(tmp_path: Path) -> None:
    for optim, package in (("adamw_8bit", "bitsandbytes"), ("lomo", "lomo_optim")):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(ImportError, match=package):
                trainer_of(convert("vit"), tmp_path, optim=optim)


def test_other_trainers_are_joined_in_the_right_order_or_refused(tmp_path: Path) -> None:
    class Generating(db.BlocksTrainer, Seq2SeqTrainer):
        """With arguments of its own."""

    class WrongOrder(Seq2SeqTrainer, db.BlocksTrainer):
        """Whose methods hide those of blocks."""

    class Rewarded(Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return 0.0

    class Both(db.BlocksTrainer, Rewarded):
        """Of two losses."""

    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], predict_with_generate=True)
    with pytest.raises(ValueError, match="predict_with_generate = True calls generate as models of transformers"):
        Generating(convert("llama"), args)
    with pytest.raises(TypeError, match=r"write class WrongOrder\(BlocksTrainer, Seq2SeqTrainer\)"):
        WrongOrder(convert("llama"), args)
    with pytest.raises(TypeError, match="Rewarded has a loss of its own"):
        Both(convert("llama"), arguments(tmp_path))


@pytest.mark.parametrize("optim", ["adafactor", "sgd", pytest.param("adamw_torch_8bit", marks=pytest.mark.slow)])
def test_other_optimizers_resume_and_wait_on_the_host_as_exactly(optim: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    models = [convert("llama", seed=seed) for seed in (0, 0, 1)]
    options = {"optim": optim, "max_steps": 9}
    trainer_of(models[0], tmp_path, "llama", save_strategy="steps", save_steps=4, **options).train()
    trainer_of(models[1], tmp_path / "active", "llama", resident="active", **options).train()
    resumed = trainer_of(models[2], tmp_path / "again", "llama", resident="active", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_states(models[0].state_dict(), models[1].state_dict())
    assert same_states(models[0].state_dict(), models[2].state_dict())


def test_hyperparameters_are_searched(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    models: list[db.DiffusionBlocks] = []

    def fresh() -> db.DiffusionBlocks:
        models.append(convert("vit"))
        return models[-1]

    args = arguments(tmp_path, save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6)
    data = rows(batch_of("vit"))
    trainer = db.BlocksTrainer(
        None, args, model_init=fresh, train_dataset=data, eval_dataset=data, resident="active", schedule="round-robin"
    )
    smoothed: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **_: Any) -> None:
            smoothed.append(models[-1].block(0).label_loss)

    trainer.add_callback(Watch())
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"label_smoothing_factor": trial.suggest_categorical("s", [0.25])}, n_trials=2
    )
    assert len(models) == 3  # at construction, and for each trial
    assert [loss.smoothing for loss in smoothed] == [0.25] * 12
    folders = sorted(tmp_path.glob("run-*/checkpoint-6/model"))
    assert len(folders) == 2
    assert same_states(db.load(folders[1]).state_dict(), models[-1].state_dict())


def test_a_plain_trainer_says_why_it_cannot_smooth_labels(tmp_path: Path) -> None:
    texts = [row | {"labels": row["input_ids"]} for row in rows(token_batch(8))]
    for name, data, error in (("vit", rows(batch_of("vit")), ValueError), ("llama", texts, KeyError)):
        with pytest.raises(error, match=r"label_smoothing_factor.*BlocksTrainer does not"):
            Trainer(convert(name), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=data).train()


CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
SAID = [{"role": "user", "content": "abc"}], [{"role": "assistant", "content": "defgh"}]


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"text": "hello"}, {}),
        ({"text": "hello"}, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
        ({"text": "hello"}, {"packing": True, "packing_strategy": "bfd", "max_length": 16}),
        ({"prompt": "abc", "completion": "defg"}, {}),
        ({"prompt": "abc", "completion": "defg"}, {"padding_free": True, "max_length": None}),
        ({"messages": SAID[0] + SAID[1]}, {}),
        ({"messages": SAID[0] + SAID[1]}, {"assistant_only_loss": True}),
        ({"prompt": SAID[0], "completion": SAID[1]}, {"schedule": "round-robin", "resident": "active"}),
    ],
)
def test_supervised_fine_tuning_of_trl(row: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    class BlocksSFT(db.BlocksTrainer, trl.SFTTrainer):
        """Both in one."""

    tokenizer = letters()
    tokenizer.chat_template = CHAT
    own = {name: value for name, value in options.items() if name in ("schedule", "resident")}
    rest = {name: value for name, value in options.items() if name not in own}
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "bf16": False}
    data = Dataset.from_list([row] * 24)
    model = convert("llama")
    turns, calls = watched(model), shown(model)
    config = trl.SFTConfig(output_dir=str(tmp_path), save_steps=3, **common, **rest)
    trainer = BlocksSFT(model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **own)
    assert "forward" not in vars(model)
    trainer.train()
    assert sorted(turns) == [0, 1, 2]
    batch = calls[0]
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    if "prompt" in row or "assistant_only_loss" in options:  # the answer alone counts
        assert (batch["labels"][:, :3] == -100).all()
        assert (batch["labels"][:, 3:] != -100).any(dim=1).all()
    if options.get("packing_strategy") == "bfd" or options.get("padding_free"):
        assert batch["input_ids"].shape[1] in (6, 8)  # "hello<eos>", "abcdefg<eos>"
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert db.load(tmp_path / "checkpoint-3" / "model").model_class == "LlamaForCausalLM"
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "checkpoint-3" / "model").chat_template == CHAT


def test_what_of_trl_is_for_whole_models_is_refused(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    class BlocksSFT(db.BlocksTrainer, trl.SFTTrainer):
        """Both in one."""

    class BlocksDPO(db.BlocksTrainer, trl.DPOTrainer):
        """Of two losses."""

    common = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "bf16": False}
    rest = {"train_dataset": Dataset.from_list([{"text": "hello"}]), "processing_class": letters()}
    with pytest.raises(ValueError, match="loss_type = 'dft' is computed from a whole model's logits"):
        BlocksSFT(convert("llama"), trl.SFTConfig(loss_type="dft", **common), **rest)
    with pytest.raises(TypeError, match="DPOTrainer has a loss of its own"):
        BlocksDPO(convert("llama"), trl.DPOConfig(**common), **rest)
    plain = trl.SFTTrainer(convert("llama"), trl.SFTConfig(max_steps=1, **common), **rest)
    with pytest.raises(TypeError, match=r"takes no use_cache.*class Mine\(diffusionblocks.BlocksTrainer, SFTTrainer\)"):
        plain.train()


# ---- several processes -------------------------------------------------------------------------------------------


def train_as_rank(rank: int, folder: Path) -> None:
    """One of two processes, as a launcher starts them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    model = convert("llama")
    seen: list[tuple[int, float]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, args: seen.append((block.index, args[2].sum().item())) if block.training else None
        )
    trainer = trainer_of(
        model, folder, "llama", ddp_backend="gloo", save_strategy="steps", save_steps=6, per_device_eval_batch_size=4
    )
    assert trainer.args.world_size == 2
    trainer.train()
    result = {"seen": seen, "eval_loss": trainer.evaluate()["eval_loss"]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    torch.save(model.state_dict(), folder / f"rank-{rank}.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive")
def test_ranks_train_one_block_with_noise_of_their_own_and_evaluate_as_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    run_ranks(train_as_rank, tmp_path, timeout=90)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    (blocks, levels), (others, other_levels) = (zip(*result["seen"], strict=True) for result in (first, second))
    assert blocks == others
    assert len(set(blocks)) == 3
    assert not set(levels) & set(other_levels)
    weights = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    assert same_states(*weights)
    model = db.load(tmp_path / "checkpoint-6" / "model")
    assert same_states(model.state_dict(), weights[0])
    alone = trainer_of(model, tmp_path / "alone", "llama", per_device_eval_batch_size=3).evaluate()["eval_loss"]
    assert first["eval_loss"] == pytest.approx(alone, rel=1e-5)


LAUNCHED = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import torch
from helpers import convert
from test_blocks_trainer import trainer_of

def run(place, resume=None):
    trainer = trainer_of(
        convert("llama"), Path({folder!r}) / place, "llama", schedule="sequential", ddp_backend="gloo",
        gradient_accumulation_steps=2, weight_decay=0.1, activation_checkpointing=True, save_strategy="steps",
        save_steps=2,
    )
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=resume)

run("straight")
run("resumed", str(Path({folder!r}) / "straight" / "checkpoint-2"))
# A rank that exits while the other still holds its end of gloo can abort it.
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def test_launchers_start_two_processes_whose_run_resumes_exactly(launcher: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(LAUNCHED.format(paths=paths, folder=str(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # With `--cpu` accelerate would ask for MPI.
    accelerate = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command = {
        "accelerate": ["accelerate.commands.launch", *accelerate, "--dynamo_backend=no", "--main_process_port", port],
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    models = [
        db.load(tmp_path / place / f"checkpoint-{step}" / "model").state_dict()
        for place, step in (("straight", 6), ("resumed", 6), ("straight", 2))
    ]
    assert same_states(models[0], models[1])
    # After two steps, of block 0: weights of the others have not even decayed.
    start = convert("llama").state_dict()
    moved = {
        name.split(".")[1] for name in start if "blocks." in name and not torch.equal(start[name], models[2][name])
    }
    assert moved == {"0"}
