"""Loops that know nothing of blocks: a plain five-line loop and transformers.Trainer, unchanged."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import (
    LENGTH,
    NUM_LABELS,
    POLICIES,
    convert,
    image_batch,
    noise_batch,
    run_ranks,
    same_states,
    seeded,
    tiny,
    token_batch,
    toy_batch,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import diffusionblocks as db
from diffusionblocks.common.seeds import TrainingDraws, of_batch
from diffusionblocks.core.model import UnlabelledBlocks
from diffusionblocks.models import RecurrentDepth

TEST = toy_batch(100, seed=999)


def accuracy(logits: Any, labels: Any) -> float:
    return float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["joint", "replicated"])
def test_transformers_trainer_resumes_to_the_same_weights(shared: str, tmp_path: Path) -> None:
    straight = convert("vit", shared=shared)
    trainer_for(straight, tmp_path / "run").train()
    resumed = convert("vit", seed=1, shared=shared)
    trainer_for(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


@pytest.mark.slow
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
    reported = trainer.evaluate()["eval_loss"]
    # By hand, with the same draws: every block's losses, over all examples; the last batch is smaller.
    model.eval()
    losses, others = [], []
    with torch.no_grad():
        for some in trainer.get_eval_dataloader():
            for kept, generator in ((losses, of_batch(0, some, torch.device("cpu"))), (others, seeded(1))):
                every = [model.loss(dict(some), b, generator) for b in range(model.partition.num_blocks)]
                kept.append(torch.stack(every).mean(dim=0))
    assert [len(part) for part in losses] == [8, 8, 4]
    assert reported == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert reported != pytest.approx(float(torch.cat(others).mean()), rel=1e-5)  # the draws matter


@pytest.mark.parametrize("name", MEASURED_BY_LOSS)
def test_accumulated_batches_count_as_one(name: str, tmp_path: Path) -> None:
    model, batch = unlabelled(name)
    # Data sets often have a label, which Trainer's collator passes on as `labels`, whether the model wants it or not.
    label = {"label": 0} if name == "images without classes" else {}
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


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_accumulated_batches_move_weights_as_one_large_batch(name: str, tmp_path: Path) -> None:
    """Trainer multiplies the loss of models that divide it themselves, which it takes from `**kwargs` of a forward."""
    model = convert(name, num_blocks=1)
    batch = noise_batch(8) if name == "vit" else token_batch(8)
    expected = copy.deepcopy(model).train()
    examples = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    given: list[dict[str, torch.Tensor]] = []
    hook = model.register_forward_pre_hook(lambda module, args, named: given.append(named), with_kwargs=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1.0)
    Trainer(model=model, args=arguments, train_dataset=examples, optimizers=(sgd, constant)).train()
    hook.remove()
    assert [len(next(iter(part.values()))) for part in given] == [4, 4]
    # By hand: the same examples and draws, eight losses and one mean.
    torch.manual_seed(arguments.seed)
    draws = TrainingDraws()
    losses = [expected.loss(part, 0, draws.next(torch.device("cpu"))[1]) for part in given]
    torch.cat(losses).mean().backward()
    moved = 0
    for trained, start in zip(model.parameters(), expected.parameters(), strict=True):
        step = 0 if start.grad is None else 0.1 * start.grad
        moved += not torch.equal(trained, start)
        assert torch.allclose(trained, start - step, atol=1e-6, rtol=1e-4)
    assert moved > 10


def test_labels_that_say_nothing_new_change_nothing_and_return_loss_may_be_declined() -> None:
    model, batch = unlabelled("llama")
    model.train()
    losses = [
        model(**batch, generator=seeded()).loss,
        model(**batch, labels=batch["input_ids"], generator=seeded()).loss,
        model(**batch, attention_mask=torch.ones(20, LENGTH, dtype=torch.int64), generator=seeded()).loss,
        model(**batch, return_loss=True, generator=seeded()).loss,
    ]
    assert [loss.item() for loss in losses] == pytest.approx([losses[0].item()] * 4, rel=1e-6)
    assert model(**batch, return_loss=False).loss is None


PAD = 0


def padded_examples() -> list[dict[str, Any]]:
    """Texts of several lengths, padded to LENGTH, whose first two tokens are a prompt."""
    examples = []
    for i in range(8):
        ids = torch.randint(1, 27, (LENGTH,), generator=seeded(i))
        ids[5 + i % 4 :] = PAD
        mask = (ids != PAD).long()
        labels = ids.masked_fill(ids == PAD, -100)
        labels[:2] = -100
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return examples


@pytest.mark.parametrize("name", ["llama", "recurrent"])
def test_transformers_trainer_passes_on_what_says_which_tokens_count(name: str, tmp_path: Path) -> None:
    model, _ = unlabelled(name)
    seen: list[tuple[str, ...]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(tuple(sorted(kwargs))), with_kwargs=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=padded_examples(), eval_dataset=padded_examples())
    assert np.isfinite(trainer.train().training_loss)
    torch.manual_seed(5)
    reported = trainer.evaluate()["eval_loss"]
    assert set(seen) == {("attention_mask", "input_ids", "labels")}
    model.eval()
    with torch.no_grad():
        torch.manual_seed(5)
        (by_hand,) = [model(**batch).loss for batch in trainer.get_eval_dataloader()]
        torch.manual_seed(5)
        (of_all,) = [model(input_ids=batch["input_ids"]).loss for batch in trainer.get_eval_dataloader()]
    assert reported == pytest.approx(by_hand.item(), rel=1e-5)
    assert reported != pytest.approx(of_all.item(), rel=1e-3)


@pytest.mark.slow
def test_transformers_trainer_with_what_a_text_model_cannot_follow(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    plain = {"input_ids": torch.arange(LENGTH)}
    for name, entry, message, error in (
        ("llama", {"label": 0}, r"labels must be whole numbers of the shape of input_ids, \(8, 12\)", ValueError),
        ("masked", {"label": 0}, "MaskedTransformer: forward takes no labels: it reads", TypeError),
        ("llama", {"position_ids": torch.arange(LENGTH)}, "takes no position_ids.*positions follow from", TypeError),
    ):
        examples = [plain | entry for _ in range(8)]
        with pytest.raises(error, match=message):
            Trainer(model=unlabelled(name)[0], args=arguments, train_dataset=examples).train()


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_models_kind_survives_copying_saving_and_branching(name: str, tmp_path: Path) -> None:
    model = convert(name, num_blocks=1)
    kind = UnlabelledBlocks if name == "llama" else db.DiffusionBlocks
    model.save_pretrained(tmp_path / "m")
    for made in (model, copy.deepcopy(model), db.load(tmp_path / "m"), db.branch(model, 2)):
        assert type(made) is kind
        assert isinstance(made, db.DiffusionBlocks)


# ---- what evaluation must not touch, and what ranks must not share -----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_evaluation_between_the_steps_does_not_change_the_training(name: str, tmp_path: Path) -> None:
    """Neither what the model draws in evaluation, nor what the loaders that Trainer opens for it draw."""
    model, batch = (convert("vit"), image_batch(20)) if name == "vit" else unlabelled("llama")
    examples = [{key: value[i] for key, value in batch.items()} for i in range(20)]
    weights = []
    for number, overrides in enumerate(({"eval_strategy": "no"}, {"eval_strategy": "steps", "eval_steps": 1})):
        chosen = copy.deepcopy(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(number)),
            max_steps=6,
            per_device_train_batch_size=8,  # three steps an epoch: evaluation at its end, too
            learning_rate=3e-3,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **overrides,  # type: ignore[arg-type]
        )
        Trainer(model=chosen, args=arguments, train_dataset=examples, eval_dataset=examples[:8]).train()
        weights.append(chosen.state_dict())
    assert same_states(*weights)
    assert not same_states(weights[0], model.state_dict())


@pytest.mark.parametrize("name", ["vit", *MEASURED_BY_LOSS])
def test_the_same_batch_has_the_same_loss_twice(name: str) -> None:
    model, batch = (convert("vit"), image_batch(20)) if name == "vit" else unlabelled(name)
    model.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        first = model(**batch)
        torch.rand(3)
        again = model(**batch)
        assert first.loss == again.loss
        torch.set_rng_state(state)
        model(**batch)
        assert torch.equal(torch.get_rng_state(), state)
        # Another batch has other draws: were they the same, the mean over a data set would be of a few levels alone.
        reversed_rows = {key: value.flip(0) for key, value in batch.items()}
        assert model(**reversed_rows).loss == pytest.approx(first.loss.item(), rel=0.5)
        halves = [of_batch(0, {key: value[some] for key, value in batch.items()}, torch.device("cpu")).initial_seed()
                  for some in (slice(10), slice(10, 20))]  # fmt: skip
        assert halves[0] != halves[1]
        given = [model(**batch, generator=seeded(s)).loss.item() for s in (1, 1, 2)]
    assert given[0] == given[1] != given[2]  # an explicit generator decides


def test_training_draws_follow_the_seed_and_the_number_of_the_call() -> None:
    model, batch = unlabelled("llama")
    model.train()

    def losses(count: int, between: Any = lambda: None) -> list[float]:
        made = []
        for _ in range(count):
            made.append(model(**batch).loss.item())
            between()
        return made

    torch.manual_seed(3)
    first = losses(6)
    assert len(set(first)) == 6
    torch.manual_seed(3)
    assert losses(6, lambda: torch.rand(5)) == first  # whatever else is drawn
    torch.manual_seed(4)
    assert losses(6) != first
    torch.manual_seed(3)
    part = losses(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        losses(1)
    saved, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert part + losses(4) == first
    model, _ = unlabelled("llama")  # as in another process
    model.load_state_dict(saved)
    torch.manual_seed(9)
    torch.set_rng_state(state)
    assert part + losses(4) == first
    del saved["_extra_state"]  # as older states are
    model.load_state_dict(saved)


def test_training_draws_do_not_depend_on_the_default_device() -> None:
    draws = TrainingDraws()
    torch.manual_seed(0)
    with torch.device("meta"):
        seeds = [draws.next(torch.device("cpu"))[1].initial_seed() for _ in range(3)]
        again = TrainingDraws()
        again.restore(draws.state())
    assert len(set(seeds)) == 3
    assert again.next(torch.device("cpu"))[1].initial_seed() == draws.next(torch.device("cpu"))[1].initial_seed()


def train_as_rank(rank: int, folder: Path) -> None:
    """What each of two processes does: six steps of one model on one batch; leaves what it drew and its gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, batch = unlabelled("llama")
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append((block.index, args[2].clone())))
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(6):
        parallel(**batch).loss.backward()
        torch.rand(1 + 3 * rank)  # of other things ranks do not draw the same numbers
    gradient = sum(p.grad.double().abs().sum() for p in model.parameters() if p.grad is not None)
    blocks, levels = zip(*seen, strict=True)
    torch.save({"blocks": list(blocks), "levels": torch.stack(levels), "gradient": gradient}, folder / f"rank-{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are forked here, which CUDA does not survive")
def test_ranks_draw_one_block_and_noise_of_their_own(tmp_path: Path) -> None:
    run_ranks(train_as_rank, tmp_path, timeout=60)
    first, second = (torch.load(tmp_path / f"rank-{rank}", weights_only=True) for rank in range(2))
    assert first["blocks"] == second["blocks"]
    assert len(set(first["blocks"])) > 1
    assert not torch.isclose(first["levels"], second["levels"]).any()
    assert first["gradient"] == second["gradient"]
