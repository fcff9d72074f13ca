"""LoRA for each block: only the updates train, and are counted, checkpointed and saved; PEFT reads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import batch_for, tiny_diffuser
from helpers import fresh_dit, parameter_names, same_states, seeded, tiny
from safetensors.torch import load_file
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.core.materialise import build
from diffusionblocks.core.merging import merge
from diffusionblocks.core.soup import soup
from diffusionblocks.core.weights import Fresh
from diffusionblocks.data import ImageBatches, digits
from diffusionblocks.layers.low_rank import is_update, updates
from diffusionblocks.training import TrainConfig, Trainer
from diffusionblocks.training.units import units_of

WAN = "WanTransformer3DModel"
LORA = db.LoraConfig(rank=3, alpha=6.0)


def adapted(split: str = "experts", dtype: torch.dtype = torch.float32, lora: Any = LORA) -> db.DiffusionBlocks:
    config = db.BlocksConfig(num_blocks=2, split=split, lora=lora)
    return db.convert(tiny_diffuser(WAN).to(dtype), config)


def trained(model: db.DiffusionBlocks, steps: int = 2) -> db.DiffusionBlocks:
    for b, block in enumerate(model.blocks):
        optimizer = torch.optim.SGD([p for p in block.parameters() if p.requires_grad], lr=1.0)
        for step in range(steps):
            optimizer.zero_grad()
            model.loss(batch_for(model, WAN), block=b, generator=seeded(step)).mean().backward()
            optimizer.step()
    return model.eval()


def outputs(model: Any, b: int = 1) -> Tensor:
    batch = batch_for(model, WAN)
    z = batch.pop("pixel_values")
    with torch.no_grad():
        return model.block(b)(batch, z, torch.tensor(model.partition.interval(b)))


@pytest.mark.parametrize("split", ["layers", "experts"])
def test_blocks_start_as_they_are_without(split: str) -> None:
    plain = db.convert(tiny_diffuser(WAN), db.BlocksConfig(num_blocks=2, split=split)).eval()
    model = adapted(split).eval()
    for b in range(2):
        assert torch.equal(outputs(model, b), outputs(plain, b))
    a = [update.A for block in model.blocks for _, update in updates(block.network)]
    assert all(not torch.equal(one, other) for i, one in enumerate(a) for other in a[:i] if one.shape == other.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", ["layers", "experts"])
def test_only_updates_train_and_weights_stay_bit_for_bit(split: str, dtype: torch.dtype) -> None:
    original = tiny_diffuser(WAN).to(dtype)
    model = adapted(split, dtype)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if is_update(n)}
    units, shared = units_of(model)
    assert shared == []
    linear = sum(type(part) is torch.nn.Linear for part in original.blocks.modules())
    assert sum(len(unit.own) for unit in units) == 2 * linear * (2 if split == "experts" else 1)
    assert all(p.dtype == torch.float32 for unit in units for p in unit.own)
    before = [outputs(model.eval(), b) for b in range(2)]
    model.train()
    model.loss(batch_for(model, WAN), block=0, generator=seeded()).mean().backward()
    assert parameter_names(model, with_grad=True) <= {n for n in trainable if n.startswith("blocks.0.")}
    trained(model)
    for b, block in enumerate(model.blocks):
        state = {n: t for n, t in block.network.state_dict().items() if not is_update(n)}
        assert all(torch.equal(t, original.state_dict()[n]) for n, t in state.items())
        assert not torch.equal(outputs(model, b), before[b])


def test_experts_have_one_copy_of_the_weights() -> None:
    model = adapted()
    shared = {p.data_ptr() for p in model.block(0).parameters() if not p.requires_grad}
    assert shared == {p.data_ptr() for p in model.block(1).parameters() if not p.requires_grad}
    whole = sum(p.numel() for p in tiny_diffuser(WAN).parameters())
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", ["layers", "experts"])
def test_updates_are_saved_beside_the_weights_and_merged(split: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(adapted(split, dtype))
    model.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "block-01.safetensors")
    assert (all(is_update(name) for name in names)) == (split == "experts")
    loaded = db.load(tmp_path / "model")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert {p.dtype for p in loaded.parameters()} == {dtype, torch.float32}
    assert torch.equal(outputs(loaded), outputs(model))
    if split == "experts":
        ids = [{id(p) for p in block.parameters() if not p.requires_grad} for block in loaded.blocks]
        assert ids[0] == ids[1]
    for b in range(2):  # each job saves its block
        model.save_pretrained(tmp_path / f"part{b}", blocks=[b])
    merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "whole")
    assert same_states(db.load(tmp_path / "whole").state_dict(), model.state_dict())


def test_jobs_on_other_weights_are_not_merged(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "part0", blocks=[0])
    other = db.convert(tiny_diffuser(WAN, seed=1), adapted().blocks_config)
    other.save_pretrained(tmp_path / "part1", blocks=[1])
    with pytest.raises(ValueError, match="differ: the low-rank updates beside them are of other weights"):
        merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("split", ["layers", "experts"])
def test_export_merges_the_updates(split: str) -> None:
    model = trained(adapted(split))
    for b in range(2):
        config = db.BlocksConfig(num_blocks=1, noise=model.noise)
        with_update, without = (
            db.convert(model.export_block(b, merge_lora=merged), config).eval() for merged in (True, False)
        )
        batch = batch_for(model, WAN)
        z, level = batch.pop("pixel_values"), torch.tensor(model.partition.interval(b))
        with torch.no_grad():
            ours, theirs, base = (m(batch, z, level) for m in (model.block(b), with_update.block(0), without.block(0)))
        torch.testing.assert_close(theirs, ours)
        assert not torch.allclose(base, ours, atol=1e-3)
    if split == "layers":
        exported = model.export_initialisation().state_dict()
        assert not any(is_update(name) for name in exported)


def test_updates_are_built_as_convert_draws_them() -> None:
    config = db.BlocksConfig(num_blocks=2, split="experts", lora=LORA)
    built = build(Fresh(WAN, tiny_diffuser(WAN).config, seed=3), config)
    model = adapted()
    for b in range(2):
        theirs = dict(updates(model.block(b).network))
        for name, update in updates(built.block(b).network):
            assert torch.equal(update.A, theirs[name].A)
            assert not update.B.any()
    assert not any(p.is_meta for p in built.parameters())


def test_targets_and_dropout() -> None:
    model = adapted(lora=db.LoraConfig(rank=2, targets=("attn1.to_q", "to_v"), dropout=0.5))
    names = [name for name, _ in updates(model.block(0).network)]
    assert names == [f"blocks.{i}.{name}" for i in range(4) for name in ("attn1.to_q", "attn1.to_v", "attn2.to_v")]
    trained(model)
    _, update = next(updates(model.block(0).network))
    x, y = torch.ones(1, 32), torch.zeros(1, 32)
    assert torch.equal(update.eval()(x, y), update(x, y))
    assert not torch.equal(update.train()(x, y), update.eval()(x, y))


# ---- the trainer --------------------------------------------------------------------------------------------


def digit_trainer(split: str, folder: Path | None = None, **changes: Any) -> Trainer:
    """Of blocks of a DiT whose weights are no fresh ones."""
    original = tiny("dit", layers=2, in_channels=1, num_classes=10)
    config = db.BlocksConfig(num_blocks=2, split=split, lora=db.LoraConfig(rank=2, dropout=0.1))
    values: dict[str, Any] = {"steps": 4, "batch_size": 6, "lr": 3e-3, "ema_decay": 0.9, "seed": 1} | changes
    settings = TrainConfig.model_validate(values)
    return Trainer(
        db.convert(original, config),
        ImageBatches(digits("train"), mean=(0.5,), std=(0.5,), augment=None, device="cpu"),
        settings,
        folder=folder,
        progress=False,
    )


@pytest.mark.parametrize("split", ["layers", "experts"])
def test_trainer_moves_updates_alone_by_any_schedule_and_residency(split: str) -> None:
    start = digit_trainer(split).model.state_dict()
    states = []
    for options in ({}, {"schedule": "sequential", "resident": "active"}, {"blocks": [1]}):
        trainer = digit_trainer(split, **options)
        trainer.train()
        trainer.residency.flush()
        states.append(trainer.model.state_dict())
        for name, tensor in states[-1].items():
            if isinstance(tensor, Tensor) and not is_update(name):
                assert torch.equal(tensor, start[name]), name
        parameters = [p for group in trainer.sets.values() for p in group.parameters]
        moments = [t for group in trainer.sets.values() for m in group.moments for t in m.values() if t.dim()]
        assert sum(t.numel() for t in moments) == 2 * sum(p.numel() for p in parameters)
        assert {p.shape for p in parameters} <= {p.shape for p in trainer.model.parameters() if p.requires_grad}
    moved = [name for name, tensor in states[0].items() if is_update(name) and not torch.equal(tensor, start[name])]
    assert len(moved) == sum(map(is_update, start))
    assert same_states(states[1], states[0])
    assert all(torch.equal(states[2][name], states[0][name]) for name in moved if name.startswith("blocks.1."))


@pytest.mark.parametrize("split", ["layers", "experts"])
def test_checkpoints_hold_updates_alone_and_resume(split: str, tmp_path: Path) -> None:
    whole = digit_trainer(split)
    whole.train()
    part = digit_trainer(split, tmp_path)
    part.train(until=4)
    path = part.save_checkpoint()
    names = [name for file in path.glob("*.safetensors") for name in load_file(file)]
    assert names
    assert all(is_update(name) for name in names if name.startswith("weights."))
    again = digit_trainer(split, tmp_path)
    again.load_checkpoint(path)
    again.train()
    assert same_states(again.model.state_dict(), whole.model.state_dict())


# ---- PEFT and diffusers -------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("loader", ["peft", "diffusers"])
def test_peft_computes_what_the_block_does(loader: str, tmp_path: Path) -> None:
    model = trained(adapted())
    model.export_lora(1, tmp_path / "lora")
    base: Any = model.export_block(1, merge_lora=False)
    assert same_states(base.state_dict(), tiny_diffuser(WAN).state_dict())
    if loader == "peft":
        from peft import PeftModel

        network: Any = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    else:
        base.load_lora_adapter(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
        network = base
    batch = batch_for(model, WAN)
    z, time = batch.pop("pixel_values"), torch.tensor([100.0, 300.0])
    ours = model.block(1).network.eval()
    with torch.no_grad():
        theirs = network.eval()(z, timestep=time, return_dict=False, **batch)[0]
        torch.testing.assert_close(theirs, ours(z, timestep=time, return_dict=False, **batch)[0])
        plain = tiny_diffuser(WAN)(z, timestep=time, return_dict=False, **batch)[0]
    assert not torch.allclose(theirs, plain, atol=1e-3)


def test_files_of_updates_have_pefts_names(tmp_path: Path) -> None:
    model = adapted(lora=db.LoraConfig(rank=2, targets=("attn1.to_q",)))
    model.export_lora(0, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items() if ".0." in n} == {
        "base_model.model.blocks.0.attn1.to_q.lora_A.weight": (2, 32),
        "base_model.model.blocks.0.attn1.to_q.lora_B.weight": (32, 2),
    }
    facts = db.common.formats.read_json(tmp_path / "lora" / "block.json")
    assert facts["levels"] == list(model.partition.interval(0))


# ---- what is refused ----------------------------------------------------------------------------------------


def test_what_low_rank_updates_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'to_w' is no linear layer; they are attn1.to_k, "):
        adapted(lora=db.LoraConfig(targets=("to_w",)))
    with pytest.raises(ValueError, match="lora with shared = joint"):
        db.BlocksConfig(lora=LORA, shared="joint")
    with pytest.raises(ValueError, match="is told the noise level by what conversion adds"):
        db.convert(tiny("vit"), db.BlocksConfig(lora=LORA))
    with pytest.raises(ValueError, match=r"lora would freeze final_layer.linear, which is zero"):
        db.convert(fresh_dit(), db.BlocksConfig(lora=LORA))
    with pytest.raises(ValueError, match="export each block"):
        soup(adapted())
    with pytest.raises(ValueError, match="no low-rank updates"):
        db.convert(tiny_diffuser(WAN), db.BlocksConfig(num_blocks=1)).export_lora(0, "nowhere")
