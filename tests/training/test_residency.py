"""Residency, schedules, subsets and memory settings: what is on the device never changes what a block becomes."""

from __future__ import annotations

import itertools
import json
import os
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import IMAGE, LENGTH, NUM_LABELS, VOCAB, seeded, tiny, without_compiler, without_generated_code
from safetensors.torch import load_file
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.common.modules import bytes_of
from diffusionblocks.common.seeds import key
from diffusionblocks.data import AugmentConfig, ImageBatches, ImageData, TextBatches, TextData
from diffusionblocks.evaluation.memory import transient_peak
from diffusionblocks.training import BatchMaker, EndToEnd, TrainConfig, Trainer, residency
from diffusionblocks.training.arena import Arena, Layout, host_memory, mapped_file
from diffusionblocks.training.checkpoint import checkpoints
from diffusionblocks.training.host_buffers import OpenFile
from diffusionblocks.training.optim import Updater
from diffusionblocks.training.residency import ActiveResident, AllResident
from diffusionblocks.training.schedules import block_schedule, next_others
from diffusionblocks.training.shared_module import shape_of

BLOCKS = 3


def images(n: int = 40) -> ImageData:
    pixels = torch.randint(0, 256, (n, 3, IMAGE, IMAGE), generator=seeded(), dtype=torch.uint8)
    return ImageData(pixels, torch.arange(n) % NUM_LABELS, tuple("abcd"))


def blocks_of(family: str = "dit", shared: str = "replicated", layers: int = 3, **config: Any) -> db.DiffusionBlocks:
    original = tiny(family, layers=layers, **({"hidden_dropout_prob": 0.1} if family == "vit" else {}))
    return db.convert(original, db.BlocksConfig(num_blocks=BLOCKS, shared=shared, **config))  # type: ignore[arg-type]


def wide_blocks(optimizer: str) -> db.DiffusionBlocks:
    """Most trained values are in parameters large enough for 8-bit state (`in_8_bits`)."""
    if optimizer == "adamw-8bit":
        pytest.importorskip("torchao")
    original = tiny("vit", hidden_size=64, hidden_dropout_prob=0.1)
    return db.convert(original, db.BlocksConfig(num_blocks=BLOCKS))


def in_8_bits(found: dict[str, Tensor]) -> float:
    """Share of the trained values whose optimizer state is in 8 bits."""
    coded, plain = (sum(t.numel() for n, t in found.items() if n.endswith(e)) for e in ("exp_avg.codes", "exp_avg"))
    return coded / (coded + plain)


def trainer(model: nn.Module, folder: Path | None = None, **changes: Any) -> Trainer:
    values: dict[str, Any] = {"steps": 5, "batch_size": 6, "lr": 3e-3, "warmup_steps": 2, "ema_decay": 0.9}
    settings = TrainConfig.model_validate(values | changes)
    return Trainer(model, batches_for(model), settings, folder=folder, progress=False)


def batches_for(model: nn.Module) -> BatchMaker:
    cpu = torch.device("cpu")
    if isinstance(model, db.DiffusionBlocks) and model.model_class in ("MaskedTransformer", "LlamaForCausalLM"):
        ids = torch.randint(VOCAB, (30 * LENGTH,), generator=seeded(), dtype=torch.uint8)
        return TextBatches(TextData(ids, VOCAB), LENGTH, device=cpu)
    augment = AugmentConfig(flip=True)
    return ImageBatches(images(), mean=(0.5,) * 3, std=(0.5,) * 3, augment=augment, device=cpu)


def everything(run: Trainer) -> dict[str, Tensor]:
    """All that belongs to the blocks that a run trains: weights, optimizer state, averages."""
    run.residency.flush()
    found: dict[str, Tensor] = {}
    for unit in run.units:
        found |= {f"{unit.name}.{name}": t.detach().clone() for name, t in unit.module.state_dict().items()}
    for name, group in run.sets.items():
        found |= {f"{name}.{key}": t.clone() for key, t in group.state().items()}
    return found


def trained(model: nn.Module, folder: Path | None = None, **changes: Any) -> dict[str, Tensor]:
    run = trainer(model, folder, **changes)
    run.train()
    return everything(run)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


SCHEDULES = [
    {"schedule": "random"},
    {"schedule": "random", "steps_per_switch": 2},
    {"schedule": "round-robin"},
    {"schedule": "round-robin", "steps_per_switch": 3},
    {"schedule": "sequential"},
]
RESIDENCIES = [{"resident": "all"}, {"resident": "active"}, {"resident": "active", "offload": "disk"}]


# ---- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "round-robin", "sequential"])
@pytest.mark.parametrize("steps_per_switch", [1, 3, 100])
def test_every_unit_steps_exactly_its_steps(kind: str, steps_per_switch: int) -> None:
    schedule = block_schedule(kind, [7, 4, 9], steps_per_switch, seed=3)
    assert np.bincount(schedule).tolist() == [7, 4, 9]


def test_schedules_are_what_they_are_called() -> None:
    assert [*block_schedule("round-robin", [3, 3, 3], 1, 0)] == [0, 1, 2] * 3
    assert [*block_schedule("round-robin", [3, 5], 2, 0)] == [0, 0, 1, 1, 0, 1, 1, 1]
    assert [*block_schedule("sequential", [2, 3], 1, 0)] == [0, 0, 1, 1, 1]
    turns = block_schedule("random", [6, 6], 3, 0)
    assert all(len(set(turns[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert [*block_schedule("random", [50, 50], 1, 0)] != [*block_schedule("round-robin", [50, 50], 1, 0)]


def test_the_next_other_unit_is_known_ahead() -> None:
    assert [*next_others([0, 0, 1, 2, 2])] == [1, 1, 2, None, None]
    assert [*next_others([0, 0, 1, 2, 2], 2)] == [2, None, None]
    assert [*next_others([])] == []


def listed(kind: str, steps: list[int], steps_per_switch: int, seed: int) -> list[int]:
    """The order of runs that began before schedules were arrays: every visit in a list, which is then permuted."""
    visits = [[min(steps_per_switch, n - start) for start in range(0, n, steps_per_switch)] for n in steps]
    order = [(unit, length) for unit, lengths in enumerate(visits) for length in lengths]
    if kind != "sequential":
        rounds = itertools.zip_longest(*visits)
        order = [(unit, length) for lengths in rounds for unit, length in enumerate(lengths) if length is not None]
    if kind == "random":
        generator = torch.Generator().manual_seed(key(seed, 0, 0, "schedule"))
        order = [order[place] for place in torch.randperm(len(order), generator=generator).tolist()]
    return [unit for unit, length in order for _ in range(length)]


def following(order: list[int]) -> list[int | None]:
    """The next other unit of every iteration."""
    return [next((unit for unit in order[i:] if unit != order[i]), None) for i in range(len(order))]


@pytest.mark.parametrize("kind", ["random", "round-robin", "sequential"])
@pytest.mark.parametrize("steps_per_switch", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("steps", [[1], [9], [8, 8, 8], [7, 4, 9], [0, 3, 1, 3], [20, 1, 1, 13, 6, 20]])
def test_a_schedule_is_the_order_of_older_runs(kind: str, steps_per_switch: int, steps: list[int]) -> None:
    expected, schedule = listed(kind, steps, steps_per_switch, 5), block_schedule(kind, steps, steps_per_switch, 5)
    assert [*schedule] == expected
    assert len(schedule) == len(expected)
    assert schedule[-1] == expected[-1]
    assert [*next_others(schedule)] == following(expected)
    assert [*next_others(schedule, len(expected) // 2)] == following(expected)[len(expected) // 2 :]


@pytest.mark.parametrize("kind", ["random", "round-robin", "sequential"])
def test_a_long_schedule_takes_a_byte_an_iteration(kind: str) -> None:
    steps = 2 * 10**5
    started = time.process_time()
    schedule = block_schedule(kind, [steps] * 4, 1, 0)
    assert 0 <= schedule[len(schedule) // 2] < 4
    assert next(next_others(schedule, len(schedule) // 2)) is not None
    assert schedule.nbytes == 4 * steps
    assert time.process_time() - started < 2


def test_a_schedule_of_too_many_iterations_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 units.*3,000,000,000.*50,000,000.*train.steps"):
        block_schedule("random", [10**9] * 3, 1, 0)


# ---- the same blocks, whatever the schedule and the residency ------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("shared", ["replicated", "frozen"])
@pytest.mark.parametrize("family", ["vit", "dit", "diffusers-dit", "masked", "llama"])
def test_schedule_and_residency_do_not_matter(family: str, shared: str, tmp_path: Path) -> None:
    reference = trained(blocks_of(family, shared))
    start = everything(trainer(blocks_of(family, shared)))
    moved = [name for name in reference if not torch.equal(reference[name], start[name])]
    assert len(moved) > len(reference) / 2  # the positive control: training changes them
    for number, (how, where) in enumerate((a, b) for a in SCHEDULES for b in RESIDENCIES):
        assert same(trained(blocks_of(family, shared), tmp_path / str(number), **how, **where), reference), (how, where)


@pytest.mark.parametrize("where", RESIDENCIES)
def test_joint_parts_are_moved_by_all_blocks_in_the_order_of_the_schedule(
    where: dict[str, str], tmp_path: Path
) -> None:
    reference = trained(blocks_of(shared="joint"), schedule="round-robin")
    assert "shared.0.exp_avg" in reference
    assert same(trained(blocks_of(shared="joint"), tmp_path, schedule="round-robin", **where), reference)
    # The positive control: there the order does matter.
    assert not same(trained(blocks_of(shared="joint"), schedule="sequential"), reference)


def test_blocks_of_unequal_shapes(tmp_path: Path) -> None:
    def model() -> db.DiffusionBlocks:
        return db.convert(tiny("dit", layers=4), db.BlocksConfig(num_blocks=BLOCKS, layers=(2, 1, 1)))

    reference = trained(model())
    for number, where in enumerate(RESIDENCIES):
        run = trainer(model(), tmp_path / str(number), **where)
        assert len(run.residency.shared_modules) == 2
        run.train()
        assert same(everything(run), reference)


@pytest.mark.each_value
@pytest.mark.parametrize("shared", ["replicated", "frozen"])
@pytest.mark.parametrize("where", RESIDENCIES)
def test_a_subset_trains_as_in_the_whole(where: dict[str, str], shared: str, tmp_path: Path) -> None:
    reference = trained(blocks_of(shared=shared))
    untouched = blocks_of(shared=shared).state_dict()
    model = blocks_of(shared=shared)
    part = trained(model, tmp_path, blocks=[0, 2], **where)
    assert part.keys() == {name for name in reference if not name.startswith("block 1.")}
    assert all(torch.equal(part[name], reference[name]) for name in part)
    assert all(
        torch.equal(t, untouched[name]) for name, t in model.state_dict().items() if name.startswith("blocks.1.")
    )


# ---- exact resume ------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("shared", ["replicated", "joint"])
@pytest.mark.parametrize("where", RESIDENCIES)
@pytest.mark.parametrize("family", ["dit", "masked", "llama"])
def test_resume_is_exact_and_may_change_the_residency(
    family: str, where: dict[str, str], shared: str, tmp_path: Path
) -> None:
    reference = trained(blocks_of(family, shared), schedule="random", steps_per_switch=2)
    first = trainer(blocks_of(family, shared), tmp_path, schedule="random", steps_per_switch=2, **where)
    first.train(until=7)
    for number, other in enumerate(RESIDENCIES):
        second = trainer(
            blocks_of(family, shared), tmp_path / f"again-{number}", schedule="random", steps_per_switch=2, **other
        )
        second.load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
        second.train()
        assert same(everything(second), reference), other


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    run = trainer(blocks_of(), tmp_path)
    run.train(until=2)
    path = checkpoints(tmp_path / "checkpoints")[-1]
    other = db.convert(tiny("dit", mlp_ratio=3.0), db.BlocksConfig(num_blocks=BLOCKS))
    with pytest.raises(ValueError, match=r"block-0.safetensors does not match the model: .*mlp.0.weight has shape"):
        trainer(other).load_checkpoint(path)
    with pytest.raises(ValueError, match="lacks or has too much"):
        trainer(blocks_of(shared="frozen")).load_checkpoint(path)


# ---- what is where -----------------------------------------------------------------------------------------


def test_active_holds_one_unit_and_one_shape_for_all(tmp_path: Path) -> None:
    run = trainer(blocks_of(layers=6), tmp_path, resident="active", ema_decay=None)
    assert isinstance(run.residency, ActiveResident)
    (slot,) = run.residency._slots.values()
    block = run.units[0].module
    weights = sum(t.numel() * t.element_size() for t in [*block.parameters(), *block.buffers()])
    trainable = sum(p.numel() * p.element_size() for p in block.parameters() if p.requires_grad)
    held = sum(arena.memory.numel() for arena in (slot.memory.weights, slot.memory.state))
    count = len(list(block.parameters()))
    assert weights + 2 * trainable <= held <= weights + 2 * trainable + 256 * 5 * count  # alignment
    assert run.residency.host_bytes == BLOCKS * held
    assert isinstance(trainer(blocks_of()).residency, AllResident)
    assert trainer(blocks_of()).residency.host_bytes == 0


def test_one_unit_stays_on_the_device() -> None:
    assert isinstance(trainer(EndToEnd(tiny("vit")), resident="active").residency, AllResident)
    assert isinstance(trainer(blocks_of(), resident="active", blocks=[1]).residency, AllResident)


def test_on_disk_the_blocks_are_safetensors_that_go_with_the_run(tmp_path: Path) -> None:
    run = trainer(blocks_of(), tmp_path, resident="active", offload="disk")
    run.train()
    expected = everything(run)
    files = sorted((tmp_path / "resident").glob("*.safetensors"))
    assert len(files) == 2 * BLOCKS
    state = load_file(files[0])
    assert torch.equal(state["0.exp_avg"], expected["block 0.0.exp_avg"])
    del run
    assert not (tmp_path / "resident").exists()


def test_files_are_read_and_written_as_their_mapping_has_them(tmp_path: Path) -> None:
    fixed, moved = torch.arange(1000.0), torch.arange(5, dtype=torch.bfloat16)
    layout = Layout({"fixed": fixed, "moved": moved}, fixed=["fixed"])
    path = tmp_path / "unit.safetensors"
    mapping = Arena(layout, mapped_file(path, layout))
    mapping["fixed"].copy_(fixed)
    file, buffer = OpenFile(path, layout), host_memory(layout.bytes + 512, pinned=False)
    file.read(buffer)
    inside = Arena(layout, buffer[: layout.bytes])
    assert torch.equal(inside["fixed"], fixed)
    inside["fixed"].zero_()
    inside["moved"].copy_(moved)
    file.write_changes(buffer)
    assert torch.equal(mapping["moved"], moved)
    assert torch.equal(mapping["fixed"], fixed)  # the file still has what is only read
    assert torch.equal(load_file(path)["moved"], moved)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="a file of waiting blocks ends at byte"):
        file.read(buffer)


def test_blocks_differ_in_shape_where_it_matters() -> None:
    units = trainer(blocks_of(layers=6)).units
    assert shape_of(units[0]) == shape_of(units[1]) == shape_of(units[2])
    units = trainer(blocks_of("diffusers-dit", layers=6)).units  # its head is conditioned by layer 0
    assert shape_of(units[0]) != shape_of(units[1]) == shape_of(units[2])


def test_arena_and_mapped_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.uint8), "c": torch.tensor(2.0)}
    layout = Layout(tensors)
    for memory in (host_memory(layout.bytes, pinned=False), mapped_file(tmp_path / "x.safetensors", layout)):
        arena = Arena(layout, memory)
        for name, tensor in tensors.items():
            assert not arena[name].any()
            assert arena[name].data_ptr() % 64 == 0
            arena[name].copy_(tensor)
        assert all(torch.equal(arena[name], tensor) for name, tensor in tensors.items())
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# ---- memory optimisations -----------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("family", ["vit", "dit", "diffusers-dit", "masked", "llama", "end-to-end"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpointing_computes_the_same(family: str, accumulation: int) -> None:
    def model() -> nn.Module:
        return EndToEnd(tiny("vit", hidden_dropout_prob=0.1)) if family == "end-to-end" else blocks_of(family)

    reference = trained(model(), accumulation=accumulation)
    assert same(trained(model(), accumulation=accumulation, activation_checkpointing=True), reference)


@pytest.mark.each_value
@pytest.mark.parametrize("where", RESIDENCIES)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_optimizer_in_backward_is_the_optimizer(where: dict[str, str], optimizer: str, tmp_path: Path) -> None:
    options = {"gradient_clip": None, "optimizer": optimizer, "steps": 3}
    with without_compiler():
        reference = trained(wide_blocks(optimizer), **options)
        for checkpointing in (False, True):
            settings = {"optimizer_in_backward": True, "activation_checkpointing": checkpointing, **where}
            folder = tmp_path / str(checkpointing)
            assert same(trained(wide_blocks(optimizer), folder, **options, **settings), reference), checkpointing
    assert (in_8_bits(reference) > 0.8) == (optimizer == "adamw-8bit")


@pytest.mark.each_value
@pytest.mark.parametrize(
    "settings",
    [{"resident": "active"}, {"resident": "active", "offload": "disk", "activation_checkpointing": True}],
    ids=["active", "disk-checkpointing"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_accumulation_stacks_with_the_other_savers(optimizer: str, settings: dict[str, Any], tmp_path: Path) -> None:
    options = {"accumulation": 2, "optimizer": optimizer, "steps": 3}
    with without_compiler():
        reference = trained(wide_blocks(optimizer), **options)
        assert same(trained(wide_blocks(optimizer), tmp_path, **options, **settings), reference)
        # The positive control: the other micro-batch counts.
        assert not same(trained(wide_blocks(optimizer), **(options | {"accumulation": 1})), reference)
    assert (in_8_bits(reference) > 0.8) == (optimizer == "adamw-8bit")


def test_8bit_micro_batches_are_one_large_batch() -> None:
    pytest.importorskip("torchao")

    def weights(**sizes: int) -> dict[str, Tensor]:
        whole = EndToEnd(tiny("vit", hidden_size=64))  # draws no noise, which would differ
        trained(whole, optimizer="adamw-8bit", ema_decay=None, **sizes)
        return {name: p.detach() for name, p in whole.named_parameters()}

    with without_compiler():
        micro, large, one = weights(batch_size=3, accumulation=2), weights(batch_size=6), weights(batch_size=3)
    far = [torch.cat([(found[n] - large[n]).abs().flatten() for n in large]).mean() for found in (micro, one)]
    assert far[0] < 0.01 * far[1]


def test_checkpointing_keeps_no_copy_of_the_weights_in_bfloat16() -> None:
    model = EndToEnd(tiny("vit", layers=8, hidden_size=128, intermediate_size=512))
    settings = {"activation_checkpointing": True, "optimizer_in_backward": True, "gradient_clip": None}
    run = trainer(model, precision="bfloat16", batch_size=1, **settings)
    run.step(0)
    # Of the weights only one layer's, cast and gradient, is there beside the activations of one image.
    assert transient_peak(lambda: run.step(0), run.device) < 0.3 * bytes_of(model.parameters())


@pytest.mark.parametrize("in_backward", [False, True])
def test_parameters_go_with_their_optimizer(in_backward: bool) -> None:
    config = TrainConfig(steps=1, batch_size=1, lr=1.0, gradient_clip=None, optimizer_in_backward=in_backward)

    def made() -> tuple[nn.Parameter, Updater]:
        parameter = nn.Parameter(torch.ones(3))
        updater = Updater([parameter], 1, 0, config, [])
        updater.allocate()
        updater.lr.fill_(1.0)
        return parameter, updater

    parameter, updater = made()
    there = weakref.ref(parameter)
    (2 * parameter).sum().backward()
    assert (parameter.grad is None) == in_backward == bool((parameter != 1).all())
    del parameter, updater
    assert there() is None  # a reference cycle would keep a block's weights on the device
    parameter, updater = made()
    del updater
    (2 * parameter).sum().backward()
    assert parameter.grad is not None
    assert torch.equal(parameter, torch.ones(3))  # no longer trained


@pytest.mark.parametrize("where", RESIDENCIES)
def test_8bit_state_moves_saves_and_resumes(where: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torchao")

    def model() -> db.DiffusionBlocks:
        return db.convert(tiny("dit", hidden_size=64, mlp_ratio=4.0), db.BlocksConfig(num_blocks=BLOCKS))

    with without_compiler():
        reference = trained(model(), optimizer="adamw-8bit")
        assert any(name.endswith("exp_avg.codes") for name in reference)
        assert not same(trained(model()), reference)
        first = trainer(model(), tmp_path, optimizer="adamw-8bit", **where)
        first.train(until=8)
        second = trainer(model(), tmp_path, optimizer="adamw-8bit", **where)
        second.train()
        assert same(everything(second), reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer_in_backward": True}, "set train.gradient_clip to null"),
        ({"optimizer_in_backward": True, "gradient_clip": None, "accumulation": 2}, "set train.accumulation to 1"),
        ({"blocks": [2, 0]}, "blocks must ascend"),
        ({"blocks": []}, "at least 1"),
        ({"blocks": [0, 3]}, "the model has blocks 0 to 2"),
        ({"steps_per_switch": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(blocks_of(), **changes)


def test_the_former_name_of_steps_per_switch_is_read() -> None:
    assert TrainConfig.model_validate({"dwell": 3}) == TrainConfig(steps_per_switch=3)
    with pytest.raises(ValueError, match=r"steps_per_switch is given twice: .* leave dwell out"):
        TrainConfig.model_validate({"dwell": 3, "steps_per_switch": 3})


def test_blocks_with_joint_parts_cannot_train_apart() -> None:
    with pytest.raises(ValueError, match="cannot train apart"):
        trainer(blocks_of(shared="joint"), blocks=[0])
    with pytest.raises(ValueError, match="has no blocks"):
        trainer(EndToEnd(tiny("vit")), blocks=[0])


def test_log_tells_each_blocks_own_learning_rate(tmp_path: Path) -> None:
    run = trainer(blocks_of(), tmp_path, resident="active", schedule="sequential", log_every=5, steps=5)
    run.train()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["unit"] for record in records] == ["block 0", "block 1", "block 2"]
    assert len({record["lr"] for record in records}) == 1


@pytest.mark.parametrize("family", ["dit", "vit"])
def test_blocks_of_one_shape_share_one_compiled_graph(family: str) -> None:
    from torch._dynamo.utils import counters

    def graphs(**changes: Any) -> int:
        counters.clear()
        run = trainer(blocks_of(family, layers=3), compile=True, activation_checkpointing=True, steps=2, **changes)
        with without_generated_code("eager"):
            run.train()
        assert not counters["graph_break"]
        return int(counters["stats"]["unique_graphs"])

    one = graphs(blocks=[0])
    assert one == 2  # the augmentation, and the block
    assert graphs() == graphs(resident="active") == one


# ---- on a GPU --------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gpu_trainer(folder: Path | None, shared: str = "replicated", family: str = "dit", **changes: Any) -> Trainer:
    device = torch.device("cuda")
    values: dict[str, Any] = {"steps": 12, "batch_size": 6, "lr": 3e-3, "ema_decay": 0.9, "steps_per_switch": 4}
    batches = ImageBatches(images(), mean=(0.5,) * 3, std=(0.5,) * 3, augment=AugmentConfig(flip=True), device=device)
    config = TrainConfig.model_validate(values | changes)
    model = blocks_of(family, shared, layers=6)
    return Trainer(model, batches, config, device=device, folder=folder, progress=False)


def with_gradients(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a DiT without the bias of its keys, which attention does not depend on.

    What a GPU gives as its gradient is rounding alone, of which Adam makes whole steps.
    """
    return torch.cat([tensor.chunk(3)[i] for i in (0, 2)]) if name.endswith("attn.qkv.bias") else tensor


@on_gpu
@pytest.mark.parametrize("shared", ["replicated", "joint"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpointing": True},
        {"optimizer_in_backward": True, "gradient_clip": None},
        {"optimizer_in_backward": True, "gradient_clip": None, "optimizer": "adamw-8bit"},
        {"optimizer_in_backward": True, "gradient_clip": None, "optimizer": "adamw-8bit", "cuda_graph": True},
        {"cuda_graph": True},
        {"compile": True, "cuda_graph": True},
    ],
)
def test_gpu_residency_does_not_matter(options: dict[str, Any], shared: str, tmp_path: Path) -> None:
    if "optimizer" in options:
        pytest.importorskip("torchao")
    reference = gpu_trainer(None, shared, **options)
    reference.train()
    expected = everything(reference)
    for number, where in enumerate(RESIDENCIES[1:]):
        run = gpu_trainer(tmp_path / str(number), shared, **options, **where)
        run.train()
        found = everything(run)
        assert found.keys() == expected.keys()
        for name in expected:
            mine, other = (with_gradients(name, tensors[name].cpu()) for tensors in (found, expected))
            torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: n + m)


@on_gpu
@pytest.mark.parametrize("where", RESIDENCIES[:2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2},
        {"optimizer_in_backward": True, "gradient_clip": None},
        {"fused_kernels": ()},  # torchao's compiled steps
        {"weights": "bfloat16"},
    ],
)
def test_gpu_captured_8bit_steps_follow_eager_ones(
    options: dict[str, Any], where: dict[str, str], tmp_path: Path
) -> None:
    """With an average, and interrupted and resumed when steps are captured already."""
    pytest.importorskip("torchao")

    def run(graph: bool) -> dict[str, Tensor]:
        def made() -> Trainer:
            device = torch.device("cuda")
            values: dict[str, Any] = {"steps": 12, "batch_size": 6, "lr": 1e-3, "ema_decay": 0.9, "cuda_graph": graph}
            plain = AugmentConfig()
            batches = ImageBatches(images(), mean=(0.5,) * 3, std=(0.5,) * 3, augment=plain, device=device)
            model = db.convert(tiny("dit", hidden_size=64, mlp_ratio=4.0), db.BlocksConfig(num_blocks=BLOCKS))
            settings = TrainConfig.model_validate(values | {"optimizer": "adamw-8bit"} | options | where)
            model = model.to(torch.bfloat16) if "weights" in options else model
            return Trainer(model, batches, settings, device=device, folder=tmp_path / str(graph), progress=False)

        made().train(until=25)
        second = made()
        second.train()
        return everything(second)

    eager, captured = run(False), run(True)
    assert in_8_bits(eager) > 0.5
    assert eager.keys() == captured.keys()
    near = {"rtol": 3e-2, "atol": 3e-3} if "weights" in options else {"rtol": 1e-3, "atol": 1e-4}
    for name, tensor in eager.items():
        if name.endswith((".step", ".steps")):
            assert torch.equal(captured[name].cpu(), tensor.cpu()), name
        elif name.endswith(".codes"):
            assert (captured[name] != tensor).float().mean() < 0.05, name
        else:
            mine, other = (with_gradients(name, tensors[name]) for tensors in (captured, eager))
            torch.testing.assert_close(mine, other, **near, msg=lambda m, n=name: n + m)


@on_gpu
@pytest.mark.parametrize("where", RESIDENCIES)
def test_gpu_steps_and_switches_do_not_wait_for_the_device(where: dict[str, str], tmp_path: Path) -> None:
    run = gpu_trainer(tmp_path, steps_per_switch=2, **where)
    for unit in (0, 0, 1, 1, 2, 2):
        run.step(unit, (unit + 1) % 3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for unit in (0, 0, 1, 1, 2, 2):
            run.step(unit, (unit + 1) % 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("options", [{}, {"compile": "layers"}, {"compile": True}, {"cuda_graph": True}])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_gpu_steps_wait_for_weights_that_come_late(
    options: dict[str, Any], offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are held up, before the first and between any two: a step that did not wait would read other weights."""
    monkeypatch.setattr(residency, "_CHUNK", 2**14)
    real = ActiveResident._exchange

    def late(self: ActiveResident, memory: Tensor, outgoing: Any, incoming: Any) -> Any:
        with torch.cuda.stream(self._into):
            torch.cuda._sleep(100_000_000)  # the control's steps must come first, on a GPU that others use as well
        arrivals: list[Any] = []
        for start in range(0, len(memory), 2**14):
            piece = slice(start, start + 2**14)
            parts = [
                one and SimpleNamespace(memory=one.memory[piece], changing=one.changing[piece])
                for one in (outgoing, incoming)
            ]
            arrivals += [(start + end, event) for end, event in real(self, memory[piece], *parts)]
            with torch.cuda.stream(self._into):
                torch.cuda._sleep(200_000)
        return arrivals

    def weights(**changes: Any) -> list[Tensor]:
        torch._dynamo.reset()
        run = gpu_trainer(None, steps=6, steps_per_switch=2, **options, **changes)
        run.train()
        run.residency.flush()
        return [p.detach().cpu().clone() for unit in run.units for p in unit.module.parameters()]

    def far(found: list[Tensor]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))

    expected = weights()
    where = {"resident": "active", "offload": offload}
    monkeypatch.setattr(ActiveResident, "_exchange", late)
    assert far(weights(**where)) < 2e-3
    if not options:
        monkeypatch.setattr(ActiveResident, "_wait_for_weights", lambda *_: None)
        assert not far(weights(**where)) < 2e-3  # the control: NaN counts as far


@on_gpu
def test_gpu_checkpointing_chooses_the_same_kernel_again() -> None:
    run = gpu_trainer(None, activation_checkpointing=True, precision="bfloat16", steps=2)
    run.train()  # torch refuses a layer whose second run keeps other tensors than its first


@on_gpu
@pytest.mark.parametrize("graph", [False, True])
def test_gpu_compiled_checkpointing_drops_out_the_same_again(graph: bool) -> None:
    def weights(**changes: Any) -> dict[str, Tensor]:
        torch._dynamo.reset()
        run = gpu_trainer(None, family="vit", compile="layers", cuda_graph=graph, **changes)
        run.train()
        return run.model.state_dict()

    expected, found = weights(), weights(activation_checkpointing=True)
    for name, tensor in expected.items():
        if "k_proj.bias" in name:  # softmax does not see it: its gradient is rounding, which AdamW makes large
            continue
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: n + m)


@on_gpu
def test_gpu_memory_is_that_of_one_block(tmp_path: Path) -> None:
    def held(**changes: Any) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        run = gpu_trainer(tmp_path, **changes)
        for unit in (0, 1, 2):
            run.step(unit)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before

    assert held(resident="active") < 0.6 * held(resident="all")  # tiny tensors: the allocator's rounding counts
