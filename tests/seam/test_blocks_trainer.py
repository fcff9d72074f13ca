"""BlocksTrainer: transformers.Trainer with block schedules, checkpoints that load, fixed evaluation noise."""

import copy
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
from helpers import LENGTH, convert, run_ranks, same_states, seeded, tiny, token_batch, toy_batch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import diffusionblocks as db
from diffusionblocks.common.seeds import keyed_generator
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


def test_the_best_model_is_loaded_at_the_end_and_a_callback_serves_other_trainers(tmp_path: Path) -> None:
    model = convert("vit")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.3, **options
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint or "")
    assert best.name != "checkpoint-6"  # steps that large make it worse
    assert same_states(db.load(best / "model").state_dict(), model.state_dict())

    plain = convert("vit")
    args = arguments(tmp_path / "plain", save_strategy="steps", save_steps=3)
    Trainer(plain, args, train_dataset=rows(batch_of("vit")), callbacks=[db.BlocksCallback()]).train()
    opened = db.load(tmp_path / "plain" / "checkpoint-6" / "model")
    opened.set_extra_state(plain.get_extra_state())  # what a plain Trainer draws from is in its own files
    assert same_states(opened.state_dict(), plain.state_dict())


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


def test_what_blocks_cannot_follow_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    for overrides, message in (
        ({"use_liger_kernel": True}, "use_liger_kernel = True rewrites whole models"),
        ({"push_to_hub": True}, "push_to_hub = True uploads files"),
        ({"neftune_noise_alpha": 1.0}, "embeds no tokens of a context"),
        ({"schedule": "shuffled"}, "schedule = 'shuffled'; allowed: random, round-robin, sequential"),
        ({"resident": "none"}, "resident = 'none'; allowed: all, active"),
        ({"steps_per_switch": 0}, "steps_per_switch must be a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(convert("vit"), tmp_path, **overrides)
    with pytest.raises(TypeError, match=r"trains what diffusionblocks.convert makes, not a ViTForImageClassification"):
        trainer_of(tiny("vit"), tmp_path)
    with pytest.raises(ValueError, match="compute_loss_func cannot be followed"):
        db.BlocksTrainer(convert("vit"), arguments(tmp_path), compute_loss_func=lambda *_: None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="a MaskedTransformer has none: leave it out"):
        db.BlocksTrainer(convert("masked"), arguments(tmp_path), processing_class=tokenizer)
    packed = [row | {"position_ids": torch.arange(LENGTH)} for row in rows(token_batch(8))]
    with pytest.raises(TypeError, match=r"takes no position_ids.*positions follow from"):
        db.BlocksTrainer(convert("llama"), arguments(tmp_path), train_dataset=packed).train()


def test_a_plain_trainer_says_why_it_cannot_smooth_labels(tmp_path: Path) -> None:
    texts = [row | {"labels": row["input_ids"]} for row in rows(token_batch(8))]
    for name, data, error in (("vit", rows(batch_of("vit")), ValueError), ("llama", texts, KeyError)):
        with pytest.raises(error, match=r"label_smoothing_factor.*BlocksTrainer does not"):
            Trainer(convert(name), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=data).train()


@pytest.mark.parametrize("options", [{}, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}])
def test_supervised_fine_tuning_of_trl(options: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    class BlocksSFT(db.BlocksTrainer, trl.SFTTrainer):
        """Both in one."""

    letters = {"<pad>": 0, "<eos>": 1} | {chr(97 + i): 2 + i for i in range(25)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(letters, [])), pad_token="<pad>", eos_token="<eos>"
    )
    data = Dataset.from_list([{"prompt": "abc", "completion": "defg"[: 2 + i % 2]} for i in range(16)])
    if options:
        data = Dataset.from_list([{"text": "hello" * (1 + i % 3)} for i in range(16)])
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "bf16": False}

    def trainer(model: nn.Module, **more: Any) -> Any:
        config = trl.SFTConfig(output_dir=str(tmp_path), save_steps=3, **(common | options | more))
        return BlocksSFT(model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer)

    model = convert("llama")
    turns = watched(model)
    mine = trainer(model)
    mine.train()
    assert sorted(turns) == [0, 1, 2]
    assert mine.evaluate()["eval_loss"] == mine.evaluate()["eval_loss"]
    assert db.load(tmp_path / "checkpoint-3" / "model").model_class == "LlamaForCausalLM"
    for more, message in (
        ({"packing": True, "packing_strategy": "bfd"}, "told apart by position_ids that blocks do not read"),
        ({"loss_type": "dft"}, "loss_type = 'dft' is computed from a whole model's logits"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(convert("llama"), **more)


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
from helpers import convert
from test_blocks_trainer import trainer_of
trainer = trainer_of(convert("vit"), Path({folder!r}), "vit", ddp_backend="gloo", save_strategy="steps", save_steps=6)
assert trainer.args.world_size == 2
trainer.train()
"""


@pytest.mark.slow
def test_accelerate_launches_two_processes(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = tmp_path / "train.py"  # with `--cpu` accelerate would ask for MPI
    script.write_text(LAUNCHED.format(paths=paths, folder=str(tmp_path)))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    done = subprocess.run([*launch, *options, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert db.load(tmp_path / "checkpoint-6" / "model").partition.num_blocks == 3
