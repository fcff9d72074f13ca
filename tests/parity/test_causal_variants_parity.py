"""Causal language models that differ from Llama, in every variant that their configs have, against transformers.

As `test_causal_lm_parity.py`, of more classes and in fewer questions: the clean stream is the library's model, every
noisy position is the last of an ordinary causal pass, and so are generation, training, saving and end-to-end losses.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CAUSAL_VARIANTS,
    LENGTH,
    randomise_adaptive,
    same_states,
    seeded,
    tiny,
    token_batch,
)
from test_causal_lm_parity import IDS, LEVEL, clean_logits, noise, streams_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config

import diffusionblocks as db
from diffusionblocks import families as families
from diffusionblocks.core.materialise import build
from diffusionblocks.core.weights import Fresh, pretrained_source
from diffusionblocks.training import EndToEnd

LAYERS = 4
SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
QWEN2_MOE = MOE | {"shared_expert_intermediate_size": 40}
#: shorter than the texts
WINDOW = 5
BY_KIND = {"full_attention": SCALED, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

#: class -> name of a variant -> the config values that make it
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"no-window": {"sliding_window": WINDOW}},  # a value that the class does not know
    "mistral": {"sliding": {"sliding_window": WINDOW}},
    "qwen2": {"sliding": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}},
    "qwen3": {"sliding": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}},
    "ministral": {
        "default": {},
        "kinds": {"layer_types": MIXED},
        "sliding": {"layer_types": MIXED, "sliding_window": WINDOW},
    },
    "ministral3": {
        "default": {},
        "scaled-queries": {
            "rope_parameters": YARN | {"original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.5}
        },
        "sliding": {"sliding_window": WINDOW},
    },
    "granite": {
        "default": {},
        "multipliers": {
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "logits_scaling": 0.5},
    },
    "smollm3": {
        "default": {},
        "positions": {"no_rope_layers": [0, 1, 1, 0]},
        "sliding": {
            "no_rope_layers": [0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": MIXED,
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "no_rope_layer_interval": 2},
    },
    "phi3": {
        "default": {},
        "partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "dropout": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "sliding_window": WINDOW},
    },
    "olmo2": {"default": {}, "biases": {"attention_bias": True}, "yarn": {"rope_parameters": YARN}},
    "olmo3": {
        "default": {},
        "kinds": {"layer_types": MIXED, "rope_parameters": BY_KIND, "sliding_window": WINDOW},
        "biases": {"attention_bias": True},
    },
    "starcoder2": {
        "default": {},
        "no-bias": {"use_bias": False},
        "dropout": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
        "sliding": {"sliding_window": WINDOW},
    },
    "gemma": {"default": {}, "biases": {"attention_bias": True}, "heads": {"head_dim": 16}},
    "gemma2": {
        "default": {},
        "capped": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.7, "query_pre_attn_scalar": 20},
        "kinds": {"layer_types": MIXED, "attention_bias": True, "sliding_window": WINDOW},
        "no-caps": {"final_logit_softcapping": None, "attn_logit_softcapping": None},
    },
    "gpt-oss": {
        "default": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "kinds": {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "layer_types": MIXED,
            "attention_bias": True,
            "sliding_window": WINDOW,
        },
        "plain": {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gpt-neox": {
        "default": {},
        "serial": {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
        "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    },
    "gemma3": {
        "default": {},
        "kinds": {
            "layer_types": MIXED,
            "rope_parameters": BY_KIND,
            "query_pre_attn_scalar": 20,
            "sliding_window": WINDOW,
        },
        "capped": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
        "biases": {"attention_bias": True, "head_dim": 16},
    },
    "mixtral": {
        "default": {"num_local_experts": 4},
        "jitter": {"num_local_experts": 3, "num_experts_per_tok": 1, "router_jitter_noise": 0.1},
        "sliding": {"num_local_experts": 3, "sliding_window": WINDOW},
    },
    "qwen2-moe": {
        "default": QWEN2_MOE,
        "some": QWEN2_MOE | {"mlp_only_layers": [1], "norm_topk_prob": True, "qkv_bias": False},
        "sparse": QWEN2_MOE | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    },
    "olmo": {"default": {}, "clipped": {"clip_qkv": 0.3, "attention_bias": True}},
    "olmoe": {
        "default": {"num_experts": 4, "num_experts_per_tok": 2},
        "clipped": {"num_experts": 3, "clip_qkv": 0.3, "norm_topk_prob": True, "num_experts_per_tok": 2},
        "no-window": {"num_experts": 3, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    },
    "phi": {
        "default": {},
        "normed": {"qk_layernorm": True, "rope_parameters": SCALED | {"partial_rotary_factor": 0.25}},
        "dropout": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1},
    },
    "stablelm": {
        "default": {},
        "parallel": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
        "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    },
    "cohere": {
        "default": {},
        "normed": {"use_qk_norm": True, "logit_scale": 0.7, "attention_bias": True},
    },
    "cohere2": {
        "default": {},
        "kinds": {"layer_types": MIXED, "sliding_window": WINDOW, "logit_scale": 2.0, "attention_bias": True},
    },
    "glm": {"default": {}, "heads": {"head_dim": 16, "attention_bias": True}},
    "glm4": {"default": {}, "heads": {"head_dim": 16, "attention_bias": True}},
    "exaone4": {
        "default": {},
        "kinds": {"layer_types": MIXED, "sliding_window": WINDOW},
        "full": {"layer_types": ["full_attention"] * LAYERS, "sliding_window": None},
    },
    "granite-moe": {
        "default": {"num_local_experts": 4},
        "multipliers": {
            "num_local_experts": 3,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "attention_bias": True,
        },
    },
    "gpt2": {
        "default": {"n_inner": 48},
        "upcast": {"reorder_and_upcast_attn": True, "activation_function": "relu"},
        "unscaled": {"scale_attn_weights": False},
    },
    "opt": {
        "default": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "no-biases": {"word_embed_proj_dim": 32, "enable_bias": False, "layer_norm_elementwise_affine": False},
        "dropout": {"word_embed_proj_dim": 32, "attention_dropout": 0.1, "dropout": 0.3},
    },
    "qwen3-moe": {
        "default": MOE,
        "some": MOE | {"mlp_only_layers": [1], "norm_topk_prob": True, "attention_bias": True},
        "sparse": MOE | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": WINDOW},
    },
}
each_variant = pytest.mark.parametrize(
    ("family", "values"),
    [
        pytest.param(family, values, id=f"{family}-{name}")
        for family in VARIANTS
        for name, values in VARIANTS[family].items()
    ],
)
each_class = pytest.mark.parametrize("family", CAUSAL_VARIANTS)


def original_of(family: str, values: dict[str, Any], **more: Any) -> Any:
    return tiny(family, layers=LAYERS, **(values | more))


def usual(family: str) -> dict[str, Any]:
    """The values of the variant that differs most."""
    return list(VARIANTS[family].values())[1]


def cut(original: Any, layers: range) -> Any:
    """The library's model with these layers alone and without its final norm."""
    few, family = copy.deepcopy(original), families.family_for(original)
    place, _, name = family.layers_path(few).rpartition(".")
    setattr(few.get_submodule(place), name, nn.ModuleList(few.get_submodule(f"{place}.{name}")[i] for i in layers))
    few.config.num_hidden_layers = len(layers)
    if getattr(few.config, "layer_types", None):
        few.config.layer_types = [original.config.layer_types[i] for i in layers]
    place, _, name = str(family.final_norm).rpartition(".")
    setattr(few.get_submodule(place), name, nn.Identity())
    return few


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@each_variant
@torch.no_grad()
def test_the_clean_stream_is_the_models_own(family: str, values: dict[str, Any]) -> None:
    original = original_of(family, values)
    model = db.convert(original, db.BlocksConfig(num_blocks=2)).eval()
    randomise_adaptive(model)  # only noisy positions are told the level
    clean, _ = streams_of(model.block(0), IDS, noise(), LEVEL)
    close(clean, original.base_model(IDS, output_hidden_states=True).hidden_states[2])
    whole = db.convert(original, db.BlocksConfig(num_blocks=1)).eval().block(0)
    clean, _ = streams_of(whole, IDS, noise(), LEVEL)
    close(clean_logits(whole, clean), original(IDS).logits)


@each_variant
@torch.no_grad()
def test_every_noisy_position_is_the_last_of_an_ordinary_causal_pass(family: str, values: dict[str, Any]) -> None:
    """With and without the clean states of the last layer, which training under `clean_weight` reads alone."""
    original = original_of(family, values)
    config = db.BlocksConfig(num_blocks=2, layers=(1, 3), target={"kind": "next-token", "previous": True})  # type: ignore[arg-type]
    model = db.convert(original, config).eval()
    randomise_adaptive(model, std=0.0)
    noisy = model.block(0).shared.added["noisy_token"]
    torch.nn.init.normal_(noisy.linear.weight, generator=seeded(3))
    for b, block in enumerate(model.blocks):
        few = cut(original, model.partition.layer_range(b)).base_model
        _, raw = streams_of(block, IDS, noise(), LEVEL)
        logits = block({"input_ids": IDS}, noise(), LEVEL, context=True)
        embedded = block.family.embed(block.network, IDS)
        # The library's model scales what it is given as embeddings where its class does so behind them.
        scale = getattr(few, "embedding_multiplier", 1.0)
        added = block.shared.added["noisy_token"](block.noise.scaled(noise(), LEVEL))
        for i in range(LENGTH):
            last = added[:, i] + (embedded[:, i - 1] if i else 0)
            given = torch.cat([embedded[:, :i], last[:, None]], dim=1) / scale
            states = few(inputs_embeds=given, use_cache=False).last_hidden_state[:, -1]
            close(raw[:, i], states)
            final = original.get_submodule(block.family.final_norm)(states)
            expected = original.__class__.forward(_headed(original, final), IDS).logits[:, 0]
            close(logits[:, i], expected)


def _headed(original: Any, states: Tensor) -> Any:
    """The library's model, whose layers give these states: to read them out as it does."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    class Output(BaseModelOutputWithPastAndCrossAttentions):
        router_logits = None

    class Trunk(torch.nn.Module):
        decoder = property(lambda self: self)  # OPT's

        def forward(self, *_: Any, **options: Any) -> Output:
            return Output(last_hidden_state=states[:, None])

    few = copy.copy(original)
    few._modules = dict(original._modules) | {original.base_model_prefix: Trunk()}
    return few


@each_variant
@torch.no_grad()
def test_generation_with_a_past_is_full_recomputation(family: str, values: dict[str, Any]) -> None:
    model = db.convert(original_of(family, values), db.BlocksConfig(num_blocks=2)).eval()
    randomise_adaptive(model)
    block, z = model.block(1), noise()
    whole = block({"input_ids": IDS}, z, LEVEL, context=True)
    for static in (False, True):
        past = block.family.past(3, LENGTH + 1, torch.device("cpu"))
        start = 0
        for stop in (5, 6, 6, 9, 11):  # twice the same: a further step for that token
            past.static = static and start > 0
            step = block({"input_ids": IDS[:, start:stop], "past": past}, z[:, stop : stop + 1], LEVEL, context=True)
            close(step[:, 0], whole[:, stop])
            start = stop


@each_variant
def test_a_training_step_reaches_all_of_a_block(family: str, values: dict[str, Any]) -> None:
    target = {"kind": "next-token", "clean_weight": 0.5}
    model = db.convert(original_of(family, values), db.BlocksConfig(num_blocks=2, target=target)).train()  # type: ignore[arg-type]
    randomise_adaptive(model)
    torch.manual_seed(0)
    losses = model.loss(token_batch(12), 1, seeded())
    assert losses.isfinite().all()
    losses.mean().backward()
    lacking = {n for n, p in model.block(1).named_parameters() if p.grad is None or not bool((p.grad != 0).any())}
    assert lacking == {"shared.target.embedding"}  # which trains under `joint` alone
    assert not [n for n, p in model.block(0).named_parameters() if p.grad is not None and ".layers." in n]


@each_class
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_saving_and_files_give_the_same(family: str, tied: bool, tmp_path: Path) -> None:
    original = original_of(family, usual(family), tie_word_embeddings=tied, attn_implementation="eager")
    config = db.BlocksConfig(num_blocks=2, shared="replicated")
    model = db.convert(original, config).eval()
    exported: Any = model.export_initialisation()
    assert type(exported) is type(original)
    with torch.no_grad():
        close(exported(IDS).logits, original(IDS).logits)
    assert same_states(exported.state_dict(), original.state_dict())
    randomise_adaptive(model)
    model.save_pretrained(tmp_path / "blocks")
    loaded = db.load(tmp_path / "blocks").eval()
    assert same_states(loaded.state_dict(), model.state_dict())
    for b in range(2):
        assert torch.equal(loaded.loss(token_batch(), b, seeded()), model.loss(token_batch(), b, seeded()))
    original.save_pretrained(tmp_path / "original")
    name = type(original).__name__
    built = build(pretrained_source(name, tmp_path / "original", {}, seed=0, dtype=None), config).eval()
    plain = db.convert(families.pretrained(name, tmp_path / "original", {}), config).eval()
    assert same_states(built.state_dict(), plain.state_dict())
    for b in range(2):
        assert torch.equal(built.loss(token_batch(), b, seeded()), plain.loss(token_batch(), b, seeded()))


@each_variant
@torch.no_grad()
def test_the_loss_end_to_end_is_the_librarys(family: str, values: dict[str, Any]) -> None:
    original = original_of(family, values)
    ours = EndToEnd(original).eval().loss({"input_ids": IDS})
    logits = original(IDS).logits[:, :-1]
    close(ours, F.cross_entropy(logits.transpose(1, 2), IDS[:, 1:], reduction="none").mean(dim=1))


@each_variant
@torch.no_grad()
def test_kernels_agree_or_are_refused(family: str, values: dict[str, Any]) -> None:
    results = []
    for kernel in ("eager", "sdpa"):
        if family in ("gemma2", "gpt-oss") and kernel == "sdpa":  # the library's own gives something else
            original = original_of(family, values)
            original.config._attn_implementation = kernel
            with pytest.raises(ValueError, match="= sdpa, which knows no two streams of this class; allowed: eager"):
                db.convert(original)
            return
        original = original_of(family, values, attn_implementation=kernel)
        model = db.convert(original, db.BlocksConfig(num_blocks=2)).eval()
        randomise_adaptive(model)
        results.append(model.block(0)({"input_ids": IDS}, noise(), LEVEL, context=True))
    close(*results)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits = True, which adds an auxiliary loss"),
        (
            "phi3",
            {
                "max_position_embeddings": 64,
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 32,
                },
            },
            "rope_type longrope, which change with the text's length",
        ),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True, which has layers.*to False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True, which scales"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False: its stack ends without a norm"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True, which leaves no norm"),
        ("opt", {"layerdrop": 0.1}, "layerdrop = 0.1, which leaves layers out.*; set layerdrop to 0.0"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16, and projects to hidden_size = 32 and back"),
    ],
)
def test_variants_that_are_refused(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        db.convert(original_of(family, VARIANTS[family]["default"] | values))


def test_layers_that_start_by_the_depth_are_drawn_as_in_the_whole_model() -> None:
    """GPT-2's; the positive control is what a model of a block's layers has."""
    config = GPT2Config(vocab_size=27, n_embd=64, n_layer=8, n_head=2)
    built = build(Fresh("GPT2LMHeadModel", config, seed=0), db.BlocksConfig(num_blocks=4))
    expected = config.initializer_range / math.sqrt(2 * config.n_layer)
    for block in built.blocks:
        for layer in block.layers():
            for projection in (layer.attn.c_proj, layer.mlp.c_proj):  # type: ignore[union-attr]
                assert projection.weight.std().item() == pytest.approx(expected, rel=0.05)  # type: ignore[union-attr, operator]
    few = families.instantiate("GPT2LMHeadModel", families.with_layers("GPT2LMHeadModel", config, range(2)))
    assert few.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(2 * expected, rel=0.05)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("cohere2", "kinds"),
        ("exaone4", "kinds"),
        ("olmo3", "kinds"),
        ("gemma3", "kinds"),
        ("smollm3", "sliding"),
        ("qwen2-moe", "sparse"),
        ("qwen3-moe", "some"),
    ],
)
def test_layers_keep_their_kinds_when_blocks_are_built_and_branched(family: str, variant: str) -> None:
    """Fresh blocks are drawn from a model of their own layers, a branch from one of all of them."""
    original = original_of(family, VARIANTS[family][variant])
    config = db.BlocksConfig(num_blocks=2, shared="replicated")
    expected = db.convert(original, config)
    built = build(Fresh(type(original).__name__, original.config, seed=0), config)
    sizes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    assert sizes == {name: tensor.shape for name, tensor in expected.state_dict().items()}
    built.load_state_dict(expected.state_dict())
    for b in range(2):
        assert torch.equal(built.loss(token_batch(), b, seeded()), expected.loss(token_batch(), b, seeded()))
    trunk = db.convert(original, config.as_one_block())
    branches = db.branch(trunk, 2).eval()
    for values in ("layer_types", "no_rope_layers"):  # a branch has all the trunk's layers
        assert (getattr(branches.config, values, None) or []) == 2 * (getattr(original.config, values, None) or [])
    level = torch.full((6,), 0.5)
    whole = trunk.eval().block(0).loss(token_batch(), seeded(), level)
    for block in branches.blocks:  # each is the trunk's function at every level, windows and all
        assert torch.equal(block.loss(token_batch(), seeded(), level), whole)
    shorter = db.branch(trunk, 2, layers=(LAYERS, 3)).eval()
    for values in ("layer_types", "no_rope_layers"):  # and a shorter one has those of the layers that it copies
        kinds = getattr(original.config, values, None) or []
        assert (getattr(shorter.config, values, None) or []) == [*kinds, *(kinds and [kinds[i] for i in (0, 1, 3)])]
    assert torch.equal(shorter.block(0).loss(token_batch(), seeded(), level), whole)
    for layers in (range(4), range(1, 3), range(2, 4)):
        part = families.with_layers(type(original).__name__, original.config, layers)
        ours = families.outline(type(original).__name__, part).state_dict()
        theirs = cut(original, layers).state_dict()
        of_layers = [{n: t.shape for n, t in state.items() if ".layers." in n} for state in (ours, theirs)]
        assert of_layers[0] == of_layers[1]
