"""What others do to a converted model: copying parts of it, activation checkpointing, torch.compile, FSDP2."""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    NUM_LABELS,
    convert,
    edit_index,
    image_batch,
    noise_batch,
    randomise_adaptive,
    seeded,
    tiny,
    token_batch,
    train_a_little,
    without_generated_code,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

import diffusionblocks as db
from diffusionblocks.common.formats import read_tensors, write_json, write_tensors
from diffusionblocks.layers.adaptive_norms import AdaptiveNorms
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.training.checkpoint import read_owner

#: A family, and the batches that it trains on.
FAMILIES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "vit": noise_batch,
    "llama": token_batch,
    "dit": image_batch,
    "masked": token_batch,
}
WITH_ADAPTIVE_NORMS = ("vit", "dinov2", "llama")


def batch_of(family: str) -> dict[str, Tensor]:
    return FAMILIES.get(family, noise_batch)(4)


def loss_of(block: Any, family: str) -> Tensor:
    return block.loss(batch_of(family), seeded(1)).mean()  # type: ignore[no-any-return]


# ---- copies: adaptive norms follow the module that is called -------------------------------------------------------


@pytest.mark.parametrize("family", WITH_ADAPTIVE_NORMS)
def test_a_copy_of_adaptive_norms_gets_the_gradients_that_the_original_would(family: str) -> None:
    """As peft's modules_to_save makes: a copy takes the original's place, and trains instead of it."""
    model = convert(family)
    randomise_adaptive(model)
    block = model.block(1)
    loss = loss_of(block, family)
    loss.backward()
    owners: list[tuple[Any, Any]] = [(block.adaptive, "0"), (block.shared, "final_norms")]
    for owner, name in owners:
        original = getattr(owner, name)
        expected = original.linear.weight.grad.clone()
        assert expected.abs().sum() > 0
        block.zero_grad()
        clone = copy.deepcopy(original)
        setattr(owner, name, clone)
        again = loss_of(block, family)
        again.backward()
        assert torch.equal(again, loss)
        assert torch.equal(clone.linear.weight.grad, expected)
        assert original.linear.weight.grad is None


@pytest.mark.parametrize("family", WITH_ADAPTIVE_NORMS)
def test_a_copied_layer_is_told_the_level_by_the_adaptive_norms_that_call_it(family: str) -> None:
    model = convert(family)
    randomise_adaptive(model)
    block = model.block(1)
    loss_of(block, family).backward()
    path = block.layer_paths[0]
    owner, _, name = path.rpartition(".")
    layer = block.network.get_submodule(path)
    expected = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    expected |= {f"adaptive {n}": p.grad for n, p in block.adaptive.named_parameters()}
    block.zero_grad()
    clone = copy.deepcopy(layer)
    block.network.get_submodule(owner).add_module(name, clone)
    loss_of(block, family).backward()
    found = {n: p.grad for n, p in clone.named_parameters() if p.grad is not None}
    found |= {f"adaptive {n}": p.grad for n, p in block.adaptive.named_parameters()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert not any(p.grad is not None for p in layer.parameters())


class Wrapper(nn.Module):
    """As peft wraps a module whose copy is to be trained: the copy runs, the original stays beside it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.trained = copy.deepcopy(original)

    def forward(self, *args: Any) -> Any:
        return self.trained(*args)


def test_a_norm_that_was_wrapped_to_train_a_copy_is_still_adapted() -> None:
    model = convert("llama")
    randomise_adaptive(model)
    block = model.block(0)
    loss = loss_of(block, "llama")
    layer: Any = block.layers()[0]
    layer.input_layernorm = Wrapper(layer.input_layernorm)
    again = loss_of(block, "llama")
    assert torch.equal(again, loss)
    again.backward()
    assert layer.input_layernorm.trained.weight.grad.abs().sum() > 0


def test_a_norm_that_was_replaced_is_refused_not_left_without_the_level() -> None:
    block = convert("vit").block(0)
    layer: Any = block.layers()[0]
    layer.layernorm_before = nn.LayerNorm(layer.layernorm_before.normalized_shape)
    with pytest.raises(ValueError, match=r"ViTLayer\.layernorm_before was replaced by a LayerNorm after conversion"):
        loss_of(block, "vit")


@pytest.mark.parametrize("family", WITH_ADAPTIVE_NORMS)
def test_copies_of_a_block_and_of_the_model_are_whole(family: str) -> None:
    model = convert(family)
    randomise_adaptive(model)
    expected = loss_of(model.block(1), family)
    state = io.BytesIO()
    torch.save(model.block(1), state)  # hooks are plain functions, so a block can be written whole
    state.seek(0)
    for clone in (
        copy.deepcopy(model.block(1)),
        copy.deepcopy(model).block(1),
        torch.load(state, weights_only=False),
    ):
        assert torch.equal(loss_of(clone, family), expected)
        loss_of(clone, family).backward()
        adaptive = [part for part in clone.modules() if isinstance(part, AdaptiveNorms)]
        assert all(part.linear.weight.grad is not None for part in adaptive)
    assert not any(p.grad is not None for p in model.parameters())


def test_a_layer_outside_its_block_is_the_original() -> None:
    original = tiny("llama")
    model = convert("llama")
    randomise_adaptive(model)
    norm = model.block(0).layers()[0].get_submodule("input_layernorm")
    x = torch.randn(2, 5, 32, generator=seeded())
    assert torch.equal(copy.deepcopy(norm)(x), original.get_submodule("model.layers.0.input_layernorm")(x))


# ---- activation checkpointing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_has_both_of_transformers_names(name: str) -> None:
    model = convert("vit")
    randomise_adaptive(model)
    assert model.supports_gradient_checkpointing
    expected = loss_of(model.block(0), "vit")
    expected.backward()
    gradients = {n: p.grad for n, p in model.block(0).named_parameters() if p.grad is not None}
    getattr(model, f"{name}_enable")()
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    assert model.is_activation_checkpointing
    assert model.is_gradient_checkpointing
    assert all(model.block(b).activation_checkpointing for b in range(3))
    model.zero_grad()
    loss_of(model.block(0), "vit").backward()
    again = {n: p.grad for n, p in model.block(0).named_parameters() if p.grad is not None}
    assert all(torch.equal(again[n], gradients[n]) for n in gradients)
    getattr(model, f"{name}_disable")()
    assert not model.is_activation_checkpointing
    for options, complaint in (
        ({f"{name}_kwargs": {"use_reentrant": True}}, "use_reentrant = True: only False is supported"),
        ({"every_n_layers": 2}, "every_n_layers = 2: only 1 is supported"),
        ({"offload": True}, "offload = True: only False is supported"),
        ({f"{name}_kwargs": {"early_stop": True}}, "early_stop = True: it is not supported"),
    ):
        with pytest.raises(ValueError, match=complaint):
            getattr(model, f"{name}_enable")(**options)
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("family", ["vit", "dit", "diffusers-dit", "masked", "llama", "recurrent"])
def test_what_is_drawn_is_not_drawn_again_in_the_backward_pass(family: str) -> None:
    """Level, noise and masks come from the caller's generator, which no checkpoint would set back."""
    if family == "recurrent":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "mlp_size": 48, "vocab_size": 27, "sequence_length": 12}
        model = db.convert(RecurrentDepth(**sizes, mean_recurrence=2), db.BlocksConfig(num_blocks=1))
        batch = token_batch(4)
    else:
        model, batch = convert(family), FAMILIES.get(family, image_batch)(4)
    randomise_adaptive(model)
    block = model.block(0)
    found = []
    for checkpointing in (False, True):
        block.activation_checkpointing = checkpointing
        generator = seeded(1)
        loss = block.loss(batch, generator)
        drawn = generator.get_state()
        loss.mean().backward()
        assert torch.equal(generator.get_state(), drawn)
        gradients = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), "generator": drawn, **gradients})
        block.zero_grad(set_to_none=True)
    assert len(found[0]) > 12
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(block.loss(batch, seeded(2)), found[0]["loss"])  # the positive control: draws matter


@pytest.mark.parametrize("family", ["vit", "llama", "diffusers-dit"])
def test_conversion_keeps_the_originals_activation_checkpointing(family: str) -> None:
    original: Any = tiny(family).train()
    assert not db.convert(original).is_activation_checkpointing
    if family == "diffusers-dit":
        original.enable_gradient_checkpointing()
    else:
        original.activation_checkpointing_enable()
    model = db.convert(original)
    assert model.is_activation_checkpointing
    loss_of(model.block(0), family).backward()


def test_transformers_trainer_turns_activation_checkpointing_on(tmp_path: Path) -> None:
    model = convert("vit")
    trainer_of(model, tmp_path, activation_checkpointing=True).train()
    assert model.is_activation_checkpointing


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    images = torch.randn(8, 3, 8, 8, generator=seeded())
    examples = [{"pixel_values": image, "labels": i % NUM_LABELS} for i, image in enumerate(images)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples)


# ---- torch.compile of the whole model ---------------------------------------------------------------------------


@pytest.fixture
def counted() -> Iterator[Any]:
    """dynamo's counters, of graphs that run without generated code."""
    with without_generated_code("eager"):
        counters.clear()
        yield counters
        counters.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing"), [*((family, False) for family in FAMILIES), ("vit", True), ("llama", True)]
)
def test_the_compiled_model_has_one_graph_for_all_blocks_of_a_shape(
    family: str, checkpointing: bool, counted: Any
) -> None:
    many = 12  # more than dynamo's recompile_limit of 8
    model = convert(family, layers=many, num_blocks=many).train()
    randomise_adaptive(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    compiled, batch = torch.compile(model), batch_of(family)
    for seed in range(many + 4):  # more than nine different blocks
        compiled(**batch, generator=seeded(seed)).loss.backward()
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]
    assert not counted["unimplemented"]
    for seed in range(3):
        for run in (model, compiled):
            run.zero_grad()
        found = compiled(**batch, generator=seeded(seed)).loss
        torch.testing.assert_close(found, model(**batch, generator=seeded(seed)).loss)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_loss_has_no_graph_break(family: str, counted: Any) -> None:
    model = convert(family, num_blocks=3).train()
    compiled = torch.compile(model.loss, fullgraph=True)
    for b in range(3):
        found = compiled(batch_of(family), b, generator=seeded(b))
        torch.testing.assert_close(found, model.loss(batch_of(family), b, generator=seeded(b)))
        found.mean().backward()
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]


@pytest.mark.slow
def test_blocks_of_two_shapes_have_two_graphs(counted: Any) -> None:
    model = db.convert(tiny("vit", layers=5), db.BlocksConfig(num_blocks=4, layers=(1, 1, 2, 1))).train()
    compiled = torch.compile(model)
    for seed in range(16):
        compiled(**batch_of("vit"), generator=seeded(seed)).loss.backward()
    assert counted["stats"]["unique_graphs"] == 2


@pytest.mark.slow
def test_transformers_trainer_compiles_the_model(tmp_path: Path, counted: Any) -> None:
    model = convert("vit", layers=10, num_blocks=10)
    trainer = trainer_of(model, tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]
    assert trainer.evaluate()["eval_loss"] > 0


# ---- FSDP2 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("reshard", [None, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [("vit", {}), ("vit", {"shared": "joint", "num_blocks": 1}), ("llama", {}), ("llama", {"loss_chunk": 4})],
)
def test_a_sharded_block_trains_as_the_whole_one(
    family: str, options: dict[str, Any], reshard: bool | None, one_process: None
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = dict(options)
    chunk = options.pop("loss_chunk", None)
    model = convert(family, **options).train()
    block = model.block(0)
    block.loss_chunk = chunk
    expected = loss_of(block, family)
    expected.backward()
    gradients = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    model.zero_grad()
    fully_shard(block, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=reshard)
    loss = model.loss(batch_of(family), 0, generator=seeded(1)).mean()
    assert torch.equal(loss, expected)
    loss.backward()
    shards: Any = dict(block.named_parameters())
    assert {n for n, p in shards.items() if p.grad is not None} == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(shards[name].grad.full_tensor(), gradient), name
    torch.optim.AdamW(block.parameters()).step()
    assert torch.isfinite(model.loss(batch_of(family), 0, generator=seeded(1))).all()


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "dit", "diffusers-dit", "masked", "llama", "qwen3"])
def test_every_parameter_has_a_dimension(family: str) -> None:
    assert all(parameter.dim() > 0 for parameter in convert(family).parameters())


def without_dimension(file: Path) -> None:
    """Make of a block's file, or a checkpoint's, what was written when a logit scale had no dimension."""
    tensors = {n: t.clone() for n, t in read_tensors(file).items()}
    names = [n for n in tensors if "logit_scale.log" in n]
    assert names
    for name in names:
        assert tensors[name].shape == (1,)
        tensors[name] = tensors[name].reshape(())
    write_tensors(file, tensors)


def test_a_logit_scale_that_was_saved_without_a_dimension_still_loads(tmp_path: Path) -> None:
    model = convert("llama")
    train_a_little(model)
    apart = [tmp_path / f"b{b}" for b in range(3)]
    for b, folder in enumerate([*apart, tmp_path / "m"]):
        model.save_pretrained(folder, blocks=[b] if b < 3 else None)
        for file in folder.glob("block-*.safetensors"):
            without_dimension(file)
        edit_index(folder, lambda index: index.pop("files"))  # as of that time
    db.merge(apart, tmp_path / "merged")
    for folder in ("m", "merged"):
        found = db.load(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))


def test_so_does_a_checkpoint(tmp_path: Path) -> None:
    like = {"weights.logit_scale.log": torch.ones(1)}
    write_json(tmp_path / "state.json", {"iteration": 1, "config": {}, "units": ["block 0"], "seconds": 1.0})
    write_tensors(tmp_path / "block-0.safetensors", like)
    without_dimension(tmp_path / "block-0.safetensors")
    assert read_owner(tmp_path, "block 0", like)["weights.logit_scale.log"].item() == 1
    write_tensors(tmp_path / "block-0.safetensors", {"weights.logit_scale.log": torch.ones(2)})
    with pytest.raises(ValueError, match=r"has shape \(2,\), the model \(1,\)"):
        read_owner(tmp_path, "block 0", like)
