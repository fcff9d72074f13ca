"""A model with something of its own is refused by name: conversion would drop it in silence."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CAUSAL_FAMILIES, DIT_FAMILIES, FAMILIES, fresh_causal, noise_batch, seeded, tiny, token_batch
from torch import nn
from transformers import LlamaForCausalLM, ViTForImageClassification
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import diffusionblocks as db

ALL = (*FAMILIES, *DIT_FAMILIES, *CAUSAL_FAMILIES, "masked")


def refused(model: nn.Module, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        db.convert(model)
    assert "\n" not in str(caught.value)
    assert "cannot convert" in str(caught.value)


class WithALayer(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bonus = nn.Linear(config.vocab_size, config.vocab_size)


class WithAForward(LlamaForCausalLM):
    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options)


class BelowAForward(WithAForward):
    pass


class WithAParameter(ViTForImageClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(1))


class WithNothing(LlamaForCausalLM):
    """A subclass that computes what its class does."""

    def __init__(self, config: Any, note: str = "") -> None:
        super().__init__(config)
        self.note = note

    def count(self) -> int:
        return self.num_parameters()


class OtherLayer(LlamaDecoderLayer):
    def forward(self, *args: Any, **options: Any) -> Any:
        return 2 * super().forward(*args, **options)


def test_subclasses_with_something_of_their_own() -> None:
    config = fresh_causal("llama").config
    refused(WithALayer(config), r"bonus \(Linear\) is no module of a LlamaForCausalLM of its config")
    refused(WithAForward(config), r"the model is a WithAForward, whose forward is its own")
    refused(BelowAForward(config), r"the model is a BelowAForward, whose forward is its own")
    refused(WithAParameter(tiny("vit").config), r"temperature is no parameter or buffer of a ViTForImageClassification")
    assert db.convert(WithNothing(config)).model_class == "LlamaForCausalLM"


def spoilt(family: str, change: Callable[[Any], Any]) -> nn.Module:
    model = tiny(family)
    change(model)
    return model


def replace_layer(model: Any) -> None:
    model.model.layers[1] = OtherLayer(model.config, 1)


def replace_attention(model: Any) -> None:
    model.model.layers[1].self_attn = nn.MultiheadAttention(32, 2)


def add_below(model: Any) -> None:
    model.model.layers[2].mlp.family = nn.Linear(2, 2)


def patch(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: 0 * x


def patch_by_type(model: Any) -> None:
    model.forward = types.MethodType(lambda self, *args, **options: None, model)


def hook_trunk(model: Any) -> None:
    model.model.register_forward_hook(lambda module, args, output: output)


def hook_root(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, args: args)


def hook_gradient(model: Any) -> None:
    model.model.norm.weight.register_hook(lambda grad: 0 * grad)


def buffer(model: Any) -> None:
    model.model.register_buffer("bias", torch.ones(3))


def share_layers(model: Any) -> None:
    model.model.layers[2] = model.model.layers[0]


def share_weights(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def drop_layers(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def widen_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 40, bias=False)


def parametrize(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def prune(model: Any) -> None:
    from torch.nn.utils import prune as pruning

    pruning.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)


def compile_in_place(model: Any) -> None:
    model.model.layers[0].compile()


def spread(model: Any) -> None:
    model.lm_head.to("meta")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (replace_layer, r"model\.layers\.1 is a OtherLayer, whose forward is its own \(not LlamaDecoderLayer's\)"),
        (replace_attention, r"model\.layers\.1\.self_attn is a MultiheadAttention in place of a LlamaAttention"),
        (add_below, r"model\.layers\.2\.mlp\.family \(Linear\) is no module of a LlamaForCausalLM"),
        (patch, r"model\.layers\.0\.mlp has a forward set on the instance"),
        (patch_by_type, r"the model has a forward set on the instance"),
        (hook_trunk, r"model has hooks, which conversion would drop"),
        (hook_root, r"the model has hooks"),
        (hook_gradient, r"model\.norm\.weight has a hook on its gradient"),
        (buffer, r"model\.bias is no parameter or buffer"),
        (share_layers, r"model\.layers\.2\..* and model\.layers\.0\..* are one tensor"),
        (share_weights, r"model\.layers\.2\.mlp\.up_proj\.weight and model\.layers\.0\.mlp\.up_proj\.weight are one"),
        (drop_layers, r"it lacks model\.layers\.2, .*which a LlamaForCausalLM of its config has"),
        (widen_head, r"lm_head\.weight is \(40, 32\), in a LlamaForCausalLM of its config it is \(27, 32\)"),
        (parametrize, r"model\.layers\.0\.mlp\.up_proj"),
        (prune, r"model\.layers\.0\.mlp\.up_proj\.weight_orig is no parameter"),
        (compile_in_place, r"model\.layers\.0 was compiled in place"),
        (spread, r"it is on several devices, cpu, meta"),
    ],
)
def test_instances_with_something_of_their_own(change: Callable[[Any], None], complaint: str) -> None:
    refused(spoilt("llama", change), complaint)


def test_a_hook_on_a_module_that_the_blocks_hold_is_kept() -> None:
    original: Any = tiny("llama")
    seen: list[int] = []
    original.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    db.convert(original).loss(token_batch(2), 0, generator=seeded())
    assert seen


@pytest.mark.parametrize("family", ALL)
def test_every_supported_class_is_plain_used_or_not(family: str) -> None:
    """What a library adds to its models when they run, are copied or saved is no reason to refuse them."""
    model: Any = tiny(family)
    if family in (*FAMILIES, *CAUSAL_FAMILIES):
        batch = {"input_ids": token_batch(2)["input_ids"]} if family in CAUSAL_FAMILIES else noise_batch(2)
        model(**batch, output_hidden_states=True)
    for original in (model, copy.deepcopy(model), model.half(), model.to("meta")):
        assert db.convert(original, db.BlocksConfig()).partition.num_blocks == 3


def test_tied_and_untied_heads_are_both_plain() -> None:
    assert db.convert(fresh_causal("llama", tie_word_embeddings=True))
    untied: Any = fresh_causal("llama", tie_word_embeddings=True)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert db.convert(untied)
    tied: Any = fresh_causal("llama", tie_word_embeddings=False)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    refused(tied, r"lm_head\.weight and model\.embed_tokens\.weight are one tensor")


# ---- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Any:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed
    distributed.destroy_process_group()


def test_wrapped_models_say_how_to_unwrap() -> None:
    model = tiny("llama")
    refused(torch.compile(model), r"cannot convert OptimizedModule: unwrap first: convert model\._orig_mod")
    refused(nn.DataParallel(model), r"unwrap first: convert model\.module")
    assert db.convert(torch.compile(model)._orig_mod)
    assert db.convert(nn.DataParallel(model).module)


def test_models_wrapped_for_several_processes_say_how_to_unwrap(one_process: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = tiny("llama")
    refused(nn.parallel.DistributedDataParallel(model), r"unwrap first: convert model\.module, and wrap what convert")
    fully_shard(model)
    refused(model, r"unwrap first: convert the model before fully_shard is called on it")


def test_models_of_peft_say_how_to_unwrap() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    refused(model, r"unwrap first: model = model\.merge_and_unload\(\)")
    assert db.convert(model.merge_and_unload())


def test_a_class_named_as_pefts_says_how_to_unwrap() -> None:
    """The same without peft: what tells it is where its class is from."""
    kind = type("PeftModel", (nn.Module,), {"__module__": "peft.peft_model"})
    refused(kind(), r"cannot convert PeftModel: unwrap first: model = model\.merge_and_unload\(\)")


# ---- what is carried over -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "llama", "dit"])
def test_flags_and_dtypes_of_single_parameters_are_carried_over(family: str, tmp_path: Any) -> None:
    original = tiny(family)
    names = [n for n, p in original.named_parameters() if "norm" in n or n.endswith("bias")]
    assert names
    for name in names:
        parameter = original.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.data = parameter.data.double()
    model = db.convert(original)
    before = {n: (p.dtype, p.requires_grad) for n, p in original.named_parameters()}
    found = {
        name.removeprefix("network."): (p.dtype, p.requires_grad)
        for b in range(3)
        for name, p in model.block(b).named_parameters()
        if name.startswith("network.")
    }
    assert found == before
    exported: Any = model.export_initialisation()
    assert {n: p.dtype for n, p in exported.named_parameters()} == {n: dtype for n, (dtype, _) in before.items()}
    model.save_pretrained(tmp_path)
    for mine, theirs in zip(model.parameters(), db.load(tmp_path).parameters(), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_a_classifier_of_another_loss_is_refused() -> None:
    for kind in ("multi_label_classification", "regression"):
        model: Any = tiny("vit")
        model.config.problem_type = kind
        refused(model, rf"problem_type = {kind}")


def test_positions_of_no_square_are_refused() -> None:
    refused(tiny("siglip2", num_patches=8), r"num_patches = 8.*set num_patches to a square number, such as 4")


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_rotary_frequencies_are_exact_in_memory_as_saved_and_loaded(family: str, tmp_path: Any) -> None:
    """`.to(bfloat16)` rounds the original's; no file holds them, and a loaded model has them from its config."""
    model = db.convert(tiny(family).to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    buffers, loaded = dict(model.named_buffers()), dict(db.load(tmp_path).named_buffers())
    names = [name for name in buffers if name.endswith("inv_freq")]
    assert names
    for name in names:
        assert buffers[name].dtype == torch.float32
        assert torch.equal(buffers[name], loaded[name])
