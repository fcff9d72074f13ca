"""The trainer: exact resume, independence of the schedule, averages, accumulation, divergence, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import without_generated_code
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import diffusionblocks as db
from diffusionblocks.common.seeds import key
from diffusionblocks.data import AugmentConfig, ImageBatches, ImageData
from diffusionblocks.training import Diverged, EndToEnd, TrainConfig, Trainer
from diffusionblocks.training.checkpoint import checkpoints
from diffusionblocks.training.data_order import DataOrder
from diffusionblocks.training.schedules import block_schedule, lr_factor


def images(n: int = 40) -> ImageData:
    """Two classes that brightness tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    pixels = torch.randint(0, 100, (n, 1, 4, 4), generator=generator) + 120 * labels[:, None, None, None]
    return ImageData(pixels.to(torch.uint8), labels, ("dark", "bright"))


def original(layers: int = 3, dropout: float = 0.1) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=4,
            patch_size=2,
            num_channels=1,
            num_labels=2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def model_of(kind: str) -> nn.Module:
    if kind == "end-to-end":
        return EndToEnd(original())
    return db.convert(original(), db.BlocksConfig(num_blocks=3, shared=kind))  # type: ignore[arg-type]


def trainer(kind: str, folder: Path | None = None, *, model: nn.Module | None = None, **changes: object) -> Trainer:
    values: dict[str, object] = {
        "steps": 8,
        "batch_size": 5,
        "accumulation": 2,
        "lr": 3e-3,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "log_every": 4,
    }
    batches = ImageBatches(
        images(),
        mean=(0.5,),
        std=(0.3,),
        augment=AugmentConfig(crop_padding=1, flip=True, randaugment_ops=1),
        device=torch.device("cpu"),
    )
    config = TrainConfig.model_validate(values | changes)
    return Trainer(model or model_of(kind), batches, config, folder=folder, progress=False)


def everything(run: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of a run: weights, optimizer state, averages."""
    tensors = {f"model.{name}": t.clone() for name, t in run.model.state_dict().items()}
    for name, parameters in run.sets.items():
        tensors |= {f"{name}.{k}": t.clone() for k, t in parameters.state().items()}
    return tensors


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("kind", ["replicated", "joint", "frozen", "end-to-end"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = trainer(kind, tmp_path / "whole")
    whole.train()
    first = trainer(kind, tmp_path / "split")
    cut = len(whole.schedule) // 2 - 1
    first.train(until=cut)
    second = trainer(kind, tmp_path / "split")
    second.train()
    assert second.iteration == whole.iteration
    assert differing(everything(whole), everything(second)) == []
    assert differing(everything(whole), everything(first)) != []  # the cut run really was behind


def test_the_log_of_a_resumed_run_has_every_record_once(tmp_path: Path) -> None:
    run = trainer("end-to-end", tmp_path, checkpoint_every=4)
    run.train()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    # A run killed after more logging than its last checkpoint: cut the checkpoints back.
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    again = trainer("end-to-end", tmp_path, checkpoint_every=4)
    again.train()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records] == [json.loads(line)["iteration"] for line in lines] == [4, 8]
    assert [r["loss"] for r in records] == [json.loads(line)["loss"] for line in lines]


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["replicated", "frozen"])
@pytest.mark.parametrize("order", ["one after another", "last first", "round robin"])
def test_blocks_do_not_depend_on_the_schedule(kind: str, order: str) -> None:
    drawn = trainer(kind)
    drawn.train()
    other = trainer(kind)
    steps = [0] * 8 + [1] * 8 + [2] * 8
    other.schedule = {"one after another": steps, "last first": steps[::-1], "round robin": [0, 1, 2] * 8}[order]
    other.train()
    assert differing(everything(drawn), everything(other)) == []


def test_joint_blocks_do_depend_on_the_schedule() -> None:
    """The positive control: with shared parts in common the order of steps shows."""
    drawn, other = trainer("joint"), trainer("joint")
    other.schedule = [0] * 8 + [1] * 8 + [2] * 8
    drawn.train()
    other.train()
    assert differing(everything(drawn), everything(other)) != []


def test_a_block_trained_alone_equals_the_same_block_in_a_whole_run() -> None:
    whole, alone = trainer("replicated"), trainer("replicated")
    whole.train()
    alone.schedule = [1] * 8
    alone.train()
    a, b = whole.model.blocks[1].state_dict(), alone.model.blocks[1].state_dict()  # type: ignore[union-attr, index]
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_step_moves_its_block_and_its_average_only() -> None:
    run = trainer("replicated")
    run.schedule = [1]
    before = everything(run)
    run.train()
    moved = {name for name, t in everything(run).items() if name not in before or not torch.equal(t, before[name])}
    assert moved
    assert all(name.startswith(("model.blocks.1.", "block 1.")) for name in moved)
    assert any(name.endswith(".ema") for name in moved)


def test_the_average_follows_its_formula() -> None:
    run = trainer("end-to-end", ema_decay=0.5)
    parameter = run.sets["end-to-end"].parameters[0]
    expected = parameter.detach().clone()
    for step in range(4):
        run.stepper.run(0, step, run.order(0, step), (step, step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(run.sets["end-to-end"].ema[0], expected)
    raw = parameter.detach().clone()
    with run.averaged():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter.detach(), raw)


def test_accumulated_micro_batches_equal_one_large_batch() -> None:
    def weights(batch_size: int, accumulation: int) -> list[torch.Tensor]:
        plain = ImageBatches(images(), mean=(0.5,), std=(0.3,), augment=None, device=torch.device("cpu"))
        config = TrainConfig(steps=4, batch_size=batch_size, accumulation=accumulation, lr=1e-2)
        run = Trainer(EndToEnd(original(dropout=0.0)), plain, config, progress=False)
        run.train()
        return [p.detach() for p in run.model.parameters()]

    for small, large in zip(weights(5, 4), weights(20, 1), strict=True):
        torch.testing.assert_close(small, large, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["replicated", "end-to-end"])
def test_divergence_names_unit_and_step_and_keeps_the_last_good_checkpoint(kind: str, tmp_path: Path) -> None:
    good = trainer(kind, tmp_path, checkpoint_every=3)
    good.train(until=6)
    kept = checkpoints(tmp_path / "checkpoints")
    broken = trainer(kind, tmp_path, checkpoint_every=3)
    unit = good.schedule[6]
    step = good.sets[good.units[unit].name].steps
    load = broken.load_checkpoint

    def load_and_spoil(path: Path) -> None:
        load(path)
        broken.units[unit].own[0].data.fill_(float("nan"))

    # The weights of the coming unit turn bad after the checkpoint is read.
    broken.load_checkpoint = load_and_spoil  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=rf"{broken.units[unit].name}: .*at its step {step} .*{kept[-1].name}"):
        broken.train()
    assert checkpoints(tmp_path / "checkpoints") == kept


def test_checkpoints_are_whole_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    trainer("replicated", tmp_path, checkpoint_every=4, keep_checkpoints=2).train()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["iteration-000000020", "iteration-000000024"]


def test_starting_anew_forgets_older_checkpoints(tmp_path: Path) -> None:
    trainer("replicated", tmp_path).train()
    again = trainer("replicated", tmp_path, lr=1e-3)
    again.train(resume=False, until=3)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["iteration-000000003"]
    resumed = trainer("replicated", tmp_path, lr=1e-3)
    resumed.train(until=3)
    assert differing(everything(again), everything(resumed)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-4}, "train.lr = 0.003, this run has 0.0001"),
        ({"steps": 9}, "train.steps"),
        ({"seed": 1}, "train.seed"),
        ({"batch_size": 4}, "train.batch_size"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    trainer("replicated", tmp_path).train(until=3)
    with pytest.raises(ValueError, match=message):
        trainer("replicated", tmp_path, **change).train()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer("replicated", tmp_path).train(until=3)
    with pytest.raises(ValueError, match="end-to-end"):
        trainer("end-to-end", tmp_path).train()
    with pytest.raises(ValueError, match="shared"):
        trainer("joint", tmp_path).train()


@pytest.mark.parametrize("damage", ["bit", "file of another run", "seconds"])
def test_a_checkpoint_that_is_not_as_it_was_saved_is_refused(damage: str, tmp_path: Path) -> None:
    for name, seed in (("run", 0), ("other", 1)):
        trainer("replicated", tmp_path / name, seed=seed).train(until=2)
    (saved,), (other,) = (checkpoints(tmp_path / name / "checkpoints") for name in ("run", "other"))
    if damage == "seconds":
        file = saved / "state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 0.25}))
    else:
        file = saved / "block-1.safetensors"
        content = bytearray(((other if damage.startswith("file") else saved) / file.name).read_bytes())
        content[-5] ^= damage == "bit"  # of the last tensor
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} was changed or damaged after it was saved"):
        trainer("replicated", tmp_path / "run").train()


def test_a_checkpoint_without_digests_is_read(tmp_path: Path) -> None:
    trainer("replicated", tmp_path).train(until=2)
    (saved,) = checkpoints(tmp_path / "checkpoints")
    values = json.loads((saved / "state.json").read_text())
    older = {name: value for name, value in values.items() if name not in ("files", "sha256")}
    (saved / "state.json").write_text(json.dumps(older))
    trainer("replicated", tmp_path).train()


def test_training_learns_and_bfloat16_does_too() -> None:
    for precision in ("float32", "bfloat16"):
        run = trainer("replicated", steps=40, precision=precision, lr=5e-3, ema_decay=None)
        run.train()
        data = images()
        pixels = (data.images.float() / 255 - 0.5) / 0.3
        prediction = run.model.eval().predict(pixels, steps=3, seeds=4)  # type: ignore[operator]
        assert (prediction.probabilities.argmax(-1) == data.labels).float().mean() > 0.9


def test_learning_rate_schedules() -> None:
    assert [lr_factor(s, 10, 4, "constant") for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(0, 10, 0, "cosine") == 1.0
    assert lr_factor(5, 10, 0, "cosine") == pytest.approx(0.5)
    assert lr_factor(10, 10, 0, "cosine") == pytest.approx(0.0)


def test_the_learning_rate_follows_the_steps_of_the_block() -> None:
    run = trainer("replicated", lr_schedule="cosine", warmup_steps=0)
    run.schedule = [0] * 8 + [1]
    run.train()
    assert run.residency.learning_rate(0) == pytest.approx(3e-3 * lr_factor(7, 8, 0, "cosine"))
    assert run.residency.learning_rate(1) == pytest.approx(3e-3)


def test_block_schedule_is_fair_and_seeded() -> None:
    schedule = block_schedule("random", [300, 300, 300], 1, seed=1)
    assert np.bincount(schedule).tolist() == [300, 300, 300]
    assert all(60 < count < 140 for count in np.bincount(schedule[:300]))
    again, other = (block_schedule("random", [300] * 3, 1, seed=seed) for seed in (1, 2))
    assert [*schedule] == [*again] != [*other]


def test_data_order_is_a_permutation_each_epoch_and_differs_between_units() -> None:
    order = DataOrder(23, 4, 2, seed=0, device=torch.device("cpu"))
    assert order.steps_per_epoch == 2
    first = torch.cat([order(0, step).flatten() for step in range(2)])
    assert len(set(first.tolist())) == 16
    assert order(0, 0).shape == (2, 4)
    assert not torch.equal(order(0, 0), order(1, 0))
    assert not torch.equal(order(0, 0), order(0, 2))
    assert torch.equal(order(0, 1), DataOrder(23, 4, 2, seed=0, device=torch.device("cpu"))(0, 1))


def test_keys_are_distinct() -> None:
    keys = {key(s, u, t, p) for s in range(4) for u in range(4) for t in range(50) for p in ("noise", "dropout")}
    assert len(keys) == 4 * 4 * 50 * 2


def test_compiled_training_follows_eager_training() -> None:
    def run(compiled: bool) -> nn.Module:
        batches = ImageBatches(images(), mean=(0.5,), std=(0.3,), augment=None, device=torch.device("cpu"))
        model = db.convert(original(layers=2, dropout=0.0), db.BlocksConfig(num_blocks=2))
        config = TrainConfig(steps=2, batch_size=8, lr=1e-3, compile=compiled)
        with without_generated_code():
            Trainer(model, batches, config, progress=False).train()
        return model

    for a, b in zip(run(False).parameters(), run(True).parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["replicated", "joint", "end-to-end"])
def test_cuda_graph_steps_follow_eager_steps(kind: str) -> None:
    def run(graph: bool) -> Trainer:
        batches = ImageBatches(
            images(), mean=(0.5,), std=(0.3,), augment=AugmentConfig(randaugment_ops=2), device=torch.device("cuda")
        )
        config = TrainConfig(steps=10, batch_size=8, lr=1e-3, cuda_graph=graph, ema_decay=0.9)
        trained = Trainer(model_of(kind).cuda(), batches, config, progress=False)
        trained.train()
        return trained

    for a, b in zip(run(True).model.parameters(), run(False).model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["replicated", "frozen"])
def test_concurrent_steps_equal_steps_in_turn_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def run(concurrent: bool, until: int | None = None) -> Trainer:
        device = torch.device("cuda")
        augment = AugmentConfig(crop_padding=1, flip=True, randaugment_ops=1)
        batches = ImageBatches(images(), mean=(0.5,), std=(0.3,), augment=augment, device=device)
        config = TrainConfig(
            steps=40, batch_size=8, lr=1e-3, cuda_graph=True, ema_decay=0.9, log_every=7, concurrent=concurrent
        )
        trained = Trainer(model_of(kind).cuda(), batches, config, folder=tmp_path / str(concurrent), progress=False)
        trained.train(until=until)
        return trained

    in_turn = everything(run(False))
    run(True, until=50)
    assert not differing(everything(run(True)), in_turn)


def test_concurrent_steps_of_what_cannot_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graph is false"):
        TrainConfig(steps=1, concurrent=True)
    with pytest.raises(ValueError, match="resident = active keeps one"):
        TrainConfig(steps=1, concurrent=True, cuda_graph=True, resident="active")
    with pytest.raises(ValueError, match="is joint"):
        trainer("joint", concurrent=True, cuda_graph=True)
