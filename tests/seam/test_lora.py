"""LoRA and DoRA for each block, on fixed weights in any precision: only the updates train, and are counted,
checkpointed and saved; PEFT reads them."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import batch_for, tiny_diffuser
from helpers import fresh_dit, parameter_names, same_states, seeded, tiny
from safetensors.torch import load_file
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.common.modules import bytes_of, weights_dtype
from diffusionblocks.core.materialise import build
from diffusionblocks.core.merging import merge
from diffusionblocks.core.soup import soup
from diffusionblocks.core.weights import Fresh, InFiles
from diffusionblocks.data import ImageBatches, digits
from diffusionblocks.layers.low_rank import (
    Dora,
    add_low_rank,
    fresh_updates,
    is_update,
    plain_state,
    starting_magnitudes,
    updates,
)
from diffusionblocks.layers.quantized import QuantizedLinear, quantize_linear_layers
from diffusionblocks.planning.counting import count_persistent
from diffusionblocks.training import TrainConfig, Trainer
from diffusionblocks.training.units import units_of

WAN = "WanTransformer3DModel"
LORA = db.LoraConfig(rank=3, alpha=6.0)
DORA = db.LoraConfig(rank=3, alpha=6.0, use_dora=True)
NF4 = db.LoraConfig(rank=3, alpha=6.0, base="nf4")
INT8_DORA = db.LoraConfig(rank=3, alpha=6.0, base="int8", use_dora=True)
has_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
has_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
EVERY_KIND = [
    pytest.param(LORA, id="lora"),
    pytest.param(DORA, id="dora"),
    pytest.param(NF4, id="nf4", marks=has_torchao),
    pytest.param(INT8_DORA, id="int8-dora", marks=has_torchao),
]
of_every_kind = pytest.mark.parametrize("lora", EVERY_KIND)
#: every kind, split and precision, but not each with each
COMBINATIONS = [
    pytest.param("layers", torch.float32, LORA, id="layers-lora"),
    pytest.param("experts", torch.bfloat16, LORA, id="experts-bfloat16-lora"),
    pytest.param("experts", torch.float32, DORA, id="experts-dora"),
    pytest.param("experts", torch.bfloat16, NF4, id="experts-bfloat16-nf4", marks=has_torchao),
    pytest.param("layers", torch.float32, INT8_DORA, id="layers-int8-dora", marks=has_torchao),
]


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


def dequantised(model: db.DiffusionBlocks) -> Any:
    """The original, with the weights that a model's updates are of."""
    original = tiny_diffuser(WAN).to(weights_dtype(model))
    state = {n: t for b in model.blocks for n, t in plain_state(b.network, merge=False).items()}
    original.load_state_dict(state)
    return original


@of_every_kind
@pytest.mark.parametrize("split", ["experts"])
def test_blocks_start_as_they_are_without(split: str, lora: Any) -> None:
    model = adapted(split, lora=lora).eval()
    plain = db.convert(dequantised(model), db.BlocksConfig(num_blocks=2, split=split)).eval()
    for b in range(2):
        if lora.use_dora:  # |W| / |W| is 1 but for rounding
            torch.testing.assert_close(outputs(model, b), outputs(plain, b))
        else:
            assert torch.equal(outputs(model, b), outputs(plain, b))
    a = [update.A for block in model.blocks for _, update in updates(block.network)]
    assert all(not torch.equal(one, other) for i, one in enumerate(a) for other in a[:i] if one.shape == other.shape)


@pytest.mark.parametrize(("split", "dtype", "lora"), COMBINATIONS)
def test_only_updates_train_and_weights_stay_bit_for_bit(split: str, dtype: torch.dtype, lora: Any) -> None:
    original = tiny_diffuser(WAN).to(dtype)
    model = adapted(split, dtype, lora)
    fixed = {n: t.clone() for n, t in model.state_dict().items() if not is_update(n)}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if is_update(n)}
    units, shared = units_of(model)
    assert shared == []
    linear = sum(type(part) is torch.nn.Linear for part in original.blocks.modules())
    tensors = 3 if lora.use_dora else 2
    assert sum(len(unit.own) for unit in units) == tensors * linear * (2 if split == "experts" else 1)
    assert all(p.dtype == torch.float32 for unit in units for p in unit.own)
    before = [outputs(model.eval(), b) for b in range(2)]
    model.train()
    model.loss(batch_for(model, WAN), block=0, generator=seeded()).mean().backward()
    assert parameter_names(model, with_grad=True) <= {n for n in trainable if n.startswith("blocks.0.")}
    trained(model)
    for b, block in enumerate(model.blocks):
        state = plain_state(block.network, merge=False)
        if lora.base is None:
            assert all(torch.equal(t, original.state_dict()[n]) for n, t in state.items())
        assert not torch.equal(outputs(model, b), before[b])
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in fixed.items())


def test_experts_have_one_copy_of_the_weights() -> None:
    model = adapted()
    shared = {p.data_ptr() for p in model.block(0).parameters() if not p.requires_grad}
    assert shared == {p.data_ptr() for p in model.block(1).parameters() if not p.requires_grad}
    whole = sum(p.numel() for p in tiny_diffuser(WAN).parameters())
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == whole


@pytest.mark.parametrize(("split", "dtype", "lora"), COMBINATIONS)
def test_updates_are_saved_beside_the_weights_and_merged(
    split: str, dtype: torch.dtype, lora: Any, tmp_path: Path
) -> None:
    model = trained(adapted(split, dtype, lora))
    model.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "block-01.safetensors")
    assert (all(is_update(name) for name in names)) == (split == "experts")
    loaded = db.load(tmp_path / "model")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert {p.dtype for p in loaded.parameters() if p.is_floating_point()} == {dtype, torch.float32}
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
    with pytest.raises(ValueError, match="differ: the blocks beside them were trained on other fixed weights"):
        merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@of_every_kind
@pytest.mark.parametrize("split", ["layers", "experts"])
@pytest.mark.filterwarnings("ignore:.*weights dequantised to float32")
def test_export_merges_the_updates(split: str, lora: Any) -> None:
    model = trained(adapted(split, lora=lora))
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
        told = contextlib.nullcontext()
        if lora.base is not None:
            told = pytest.warns(UserWarning, match=f"whole model is exported with its {lora.base} weights dequantised")
        with told:
            exported = model.export_initialisation().state_dict()
        assert not any(is_update(name) for name in exported)


@of_every_kind
@pytest.mark.parametrize("split", ["experts"])
def test_a_model_that_is_read_block_by_block_is_the_one_of_convert(split: str, lora: Any, tmp_path: Path) -> None:
    model = adapted(split, lora=lora)
    tiny_diffuser(WAN).save_pretrained(tmp_path)
    source = InFiles(WAN, tmp_path, {}, seed=3)
    assert same_states(build(source, model.blocks_config).state_dict(), model.state_dict())
    fresh = build(Fresh(WAN, source.model_config, seed=3), model.blocks_config)
    assert not any(p.is_meta for p in fresh.parameters())


# ---- fixed weights in few bits ------------------------------------------------------------------------------


@has_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_few_bits_are_torchaos(dtype: torch.dtype) -> None:
    from torchao.quantization import Int8Tensor, NF4Tensor, PerRow

    linear = torch.nn.Linear(128, 96).to(dtype)
    int8, nf4 = (QuantizedLinear(linear, kind) for kind in ("int8", "nf4"))
    scale = int8.weight_scale.detach().float()
    codes = Int8Tensor.from_hp(linear.weight.detach().float(), PerRow(), scale=scale)
    assert torch.equal(int8.weight, codes.dequantize().to(dtype))
    assert torch.equal(nf4.weight, NF4Tensor.from_tensor(linear.weight.detach(), 64, 64).get_original_weight())
    weight = linear.weight.detach().float()
    half_a_code = weight.abs().amax(dim=1, keepdim=True) / 254
    assert ((int8.weight.float() - weight).abs() <= 1.01 * half_a_code + 2**-8 * weight.abs()).all()
    assert int8.weight.dtype == nf4.weight.dtype == dtype


@has_torchao
def test_zeros_in_few_bits_stay_zeros_and_equal_scales_finite() -> None:
    linear = torch.nn.Linear(64, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([0.0, 0.5, 0.0, -0.25])[:, None])
    for kind in ("int8", "nf4"):
        weight = QuantizedLinear(linear, kind).weight
        torch.testing.assert_close(weight, linear.weight.detach(), atol=3e-3, rtol=0)
        assert not weight[[0, 2]].any()
    with torch.no_grad():
        linear.weight.fill_(0.5)
    equal = QuantizedLinear(linear, "nf4")
    assert torch.equal(equal.weight, linear.weight)
    assert all(part.isfinite().all() for part in equal.parts)


@has_torchao
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_in_few_bits_computes_with_its_weight_and_keeps_codes_alone(kind: str, autocast: bool) -> None:
    layer = QuantizedLinear(torch.nn.Linear(128, 64), kind)
    plain = torch.nn.Linear(128, 64)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    saved: list[Tensor] = []
    results = []
    for module in (layer, plain.requires_grad_(False)):
        x = torch.randn(3, 5, 128, generator=seeded()).requires_grad_()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            y = module(x)
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), x)))
        if module is layer:
            assert bytes_of(saved) == bytes_of(layer.parts)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@has_torchao
def test_the_planner_counts_codes_and_scales() -> None:
    plain, model = adapted(), adapted(lora=NF4)
    linears = [part.weight.numel() for part in tiny_diffuser(WAN).blocks.modules() if type(part) is torch.nn.Linear]
    scales = [math.gcd(n // 64, 256) for n in linears]
    less = sum(4 * n - (n // 2 + n // 64 + 4 * (n // 64 // g + 513)) for n, g in zip(linears, scales, strict=True))
    counted = [count_persistent(*units_of(m), TrainConfig(steps=1, batch_size=1)).parameters for m in (plain, model)]
    assert counted[1] == counted[0] - less == bytes_of(model.parameters())


@has_torchao
def test_what_is_exported_from_few_bits_says_so() -> None:
    with pytest.warns(UserWarning, match="block 1 is exported with its nf4 weights dequantised to bfloat16"):
        adapted("experts", torch.bfloat16, NF4).export_block(1)


@has_torchao
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lora", [NF4, INT8_DORA], ids=["nf4", "int8-dora"])
def test_few_bits_in_compiled_and_captured_steps_train_as_eager_ones(lora: Any) -> None:
    """Without dropout, of which the compiler draws by a generator of its own."""
    states = []
    for options in ({}, {"compile": True}, {"compile": True, "cuda_graph": True}):
        trainer = digit_trainer("experts", device="cuda", lora=lora, dropout=0.0, **options)
        trainer.train()
        states.append(trainer.model.state_dict())
    for state in states[1:]:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, states[0][name], atol=1e-3, rtol=1e-2)


def test_targets_and_dropout() -> None:
    model = adapted(lora=db.LoraConfig(rank=2, targets=("attn1.to_q", "to_v"), dropout=0.5))
    names = [name for name, _ in updates(model.block(0).network)]
    assert names == [f"blocks.{i}.{name}" for i in range(4) for name in ("attn1.to_q", "attn1.to_v", "attn2.to_v")]
    trained(model)
    _, update = next(updates(model.block(0).network))
    x, y = torch.ones(1, 32), torch.zeros(1, 32)
    linear = torch.nn.Linear(32, 32)
    assert torch.equal(update.eval()(x, y, linear), update(x, y, linear))
    assert not torch.equal(update.train()(x, y, linear), update.eval()(x, y, linear))


# ---- the trainer --------------------------------------------------------------------------------------------


def digit_trainer(
    split: str,
    folder: Path | None = None,
    *,
    lora: Any = LORA,
    dropout: float = 0.1,
    device: str = "cpu",
    **changes: Any,
) -> Trainer:
    """Of blocks of a DiT whose weights are no fresh ones."""
    original = tiny("dit", layers=2, in_channels=1, num_classes=10)
    config = db.BlocksConfig(num_blocks=2, split=split, lora=lora.model_copy(update={"dropout": dropout}))
    values: dict[str, Any] = {"steps": 4, "batch_size": 6, "lr": 3e-3, "ema_decay": 0.9, "seed": 1} | changes
    settings = TrainConfig.model_validate(values)
    return Trainer(
        db.convert(original, config),
        ImageBatches(digits("train"), mean=(0.5,), std=(0.5,), augment=None, device=device),
        settings,
        device=torch.device(device),
        folder=folder,
        progress=False,
    )


@of_every_kind
@pytest.mark.parametrize("split", ["layers", "experts"])
def test_trainer_moves_updates_alone_by_any_schedule_and_residency(split: str, lora: Any) -> None:
    start = digit_trainer(split, lora=lora).model.state_dict()
    states = []
    for options in ({}, {"schedule": "sequential", "resident": "active"}, {"blocks": [1]}):
        trainer = digit_trainer(split, lora=lora, **options)
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


@pytest.mark.parametrize(("split", "lora"), [("layers", LORA), ("experts", DORA)])
def test_checkpoints_hold_updates_alone_and_resume(split: str, lora: Any, tmp_path: Path) -> None:
    whole = digit_trainer(split, lora=lora)
    whole.train()
    part = digit_trainer(split, tmp_path, lora=lora)
    part.train(until=4)
    path = part.save_checkpoint()
    names = [name for file in path.glob("*.safetensors") for name in load_file(file)]
    assert names
    assert all(is_update(name) for name in names if name.startswith("weights."))
    again = digit_trainer(split, tmp_path, lora=lora)
    again.load_checkpoint(path)
    again.train()
    assert same_states(again.model.state_dict(), whole.model.state_dict())


# ---- PEFT and diffusers -------------------------------------------------------------------------------------


@has_peft
@of_every_kind
@pytest.mark.parametrize("loader", ["peft", "diffusers"])
@pytest.mark.filterwarnings("ignore:.*weights dequantised to float32")
def test_peft_computes_what_the_block_does(loader: str, lora: Any, tmp_path: Path) -> None:
    model = trained(adapted(lora=lora))
    model.export_lora(1, tmp_path / "lora")
    base: Any = model.export_block(1, merge_lora=False)
    assert same_states(base.state_dict(), dequantised(model).state_dict())
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


@has_peft
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_is_pefts_in_values_and_gradients(dropout: float) -> None:
    from peft.tuners.lora import Linear
    from peft.tuners.lora import LoraConfig as TheirConfig

    base = torch.nn.Linear(12, 7)
    config = TheirConfig(r=3, lora_alpha=6, lora_dropout=dropout, use_dora=True, init_lora_weights="gaussian")
    theirs = Linear(base, "default", config=config, r=3, lora_alpha=6)
    ours = torch.nn.Linear(12, 7)
    ours.load_state_dict(base.state_dict())
    network = torch.nn.Sequential(ours)
    add_low_rank(network, [""], rank=3, alpha=6.0, dropout=dropout, targets=None, kind=Dora)
    update: Any = ours.lora
    a, b, m = theirs.lora_A["default"], theirs.lora_B["default"], theirs.lora_magnitude_vector["default"]
    with torch.no_grad():
        b.weight.normal_()
        m.weight.mul_(1.5)
        for mine, other in ((update.A, a), (update.B, b), (update.magnitude, m)):
            mine.copy_(other.weight)
    x = torch.randn(5, 12)
    grads = []
    for module, tensors in ((ours, [update.A, update.B, update.magnitude]), (theirs, [a.weight, b.weight, m.weight])):
        torch.manual_seed(0)  # of the dropout
        y = module.train()(x)
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), tensors)))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(update.merge(ours.weight), theirs.eval().get_base_layer().weight + _delta(theirs))


def test_dora_of_a_row_of_zeros_is_finite() -> None:
    linear = torch.nn.Linear(6, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    plain = torch.nn.Linear(6, 3)
    plain.load_state_dict(linear.state_dict())
    network = torch.nn.Sequential(linear)
    add_low_rank(network, [""], rank=2, alpha=2.0, dropout=0.0, targets=None, kind=Dora)
    with torch.no_grad():
        for tensor, value in [*fresh_updates(network, 0, 0), *starting_magnitudes(network)]:
            tensor.copy_(value)
    x = torch.randn(4, 6)
    y = linear(x)
    torch.testing.assert_close(y, plain(x))
    update: Any = linear.lora
    gradients = torch.autograd.grad(y.square().sum(), list(update.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(update.merge(linear.weight), plain.weight.detach())


def _delta(theirs: Any) -> Tensor:
    """What PEFT's merging adds to the weight."""
    before = theirs.get_base_layer().weight.detach().clone()
    theirs.merge()
    merged = theirs.get_base_layer().weight.detach().clone()
    theirs.unmerge()
    return merged - before


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
    with pytest.raises(ValueError, match=r"lora.base = nf4: it takes linear layers whose weights 64 divides"):
        quantize_linear_layers(torch.nn.Sequential(torch.nn.Linear(3, 5)), ["0"], "nf4")
    with pytest.raises(ValueError, match="export each block"):
        soup(adapted())
    with pytest.raises(ValueError, match="no low-rank updates"):
        db.convert(tiny_diffuser(WAN), db.BlocksConfig(num_blocks=1)).export_lora(0, "nowhere")
