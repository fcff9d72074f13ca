"""Causal language models against transformers: the clean stream is the library's model, and so is each noisy position.

The two-stream mask has no counterpart in the library, but each of its rows has: what noisy position i gives is what an
ordinary causal pass over the clean tokens before it gives at a last position with the noisy position's input.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CAUSAL_FAMILIES,
    HIDDEN,
    LENGTH,
    POLICIES,
    VOCAB,
    fresh_causal,
    parameter_names,
    randomise_adaptive,
    same_states,
    seeded,
    tiny,
    token_batch,
)
from pydantic import ValidationError
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.block import Block

IDS = token_batch(3)["input_ids"]
LEVEL = torch.tensor([0.05, 0.4, 3.0])

each_family = pytest.mark.parametrize("family", CAUSAL_FAMILIES)
each_tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def original_of(family: str = "llama", layers: int = 4, **overrides: Any) -> Any:
    return tiny(family, layers=layers, **overrides)


def noise(dtype: torch.dtype = torch.float32, length: int = LENGTH) -> Tensor:
    return torch.randn(3, length, HIDDEN, generator=seeded(7), dtype=dtype)


def streams_of(block: Block, ids: Tensor, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """What the family gives: the clean stream and F."""
    assert block.shared.noise_embedding is not None
    condition = block.shared.noise_embedding(block.noise.condition(level))
    given = block.noise.scaled(z, level)
    return block.family.hidden(block.call(condition, {"input_ids": ids}, given))


def clean_logits(block: Block, clean: Tensor) -> Tensor:
    return block.family.clean_logits(block.call(LEVEL, {}, clean), clean)


# ---- the clean stream is the library's model ----------------------------------------------------------------


@each_family
@each_tying
@pytest.mark.parametrize("adapted", [False, True])
def test_the_first_blocks_clean_stream_is_the_models_own(family: str, tied: bool, adapted: bool) -> None:
    original = original_of(family, tie_word_embeddings=tied)
    model = db.convert(original, db.BlocksConfig(num_blocks=2)).eval()
    if adapted:  # only noisy positions are told the level
        randomise_adaptive(model)
    with torch.no_grad():
        clean, raw = streams_of(model.block(0), IDS, noise(), LEVEL)
        expected = original.model(IDS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(clean, expected, rtol=1e-6, atol=1e-6)
    assert raw.shape == (3, LENGTH, HIDDEN)


def cut(original: Any, layers: range) -> Any:
    """The library's model with these layers alone and without its final norm."""
    few = copy.deepcopy(original)
    few.model.layers = nn.ModuleList(few.model.layers[i] for i in layers)
    few.model.config.num_hidden_layers = len(layers)
    few.model.norm = nn.Identity()
    return few


@each_family
@pytest.mark.parametrize("previous", [False, True])
def test_every_position_of_both_streams_is_one_of_an_ordinary_causal_pass(family: str, previous: bool) -> None:
    original = original_of(family)
    config = db.BlocksConfig(num_blocks=2, layers=(1, 3), target={"kind": "next-token", "previous": previous})  # type: ignore[arg-type]
    model = db.convert(original, config).eval()
    for b, block in enumerate(model.blocks):
        few = cut(original, model.partition.layer_range(b))
        with torch.no_grad():
            clean, raw = streams_of(block, IDS, noise(), LEVEL)
            torch.testing.assert_close(clean, few.model(IDS, use_cache=False).last_hidden_state, rtol=1e-5, atol=1e-5)
            embedded = few.model.embed_tokens(IDS)
            wanted = block.shared.added["noisy_token"](block.noise.scaled(noise(), LEVEL))
            for i in range(LENGTH):
                last = wanted[:, i] + (embedded[:, i - 1] if previous and i else 0)
                given = torch.cat([embedded[:, :i], last[:, None]], dim=1)
                states = few.model(inputs_embeds=given, use_cache=False).last_hidden_state
                torch.testing.assert_close(raw[:, i], states[:, -1], rtol=1e-5, atol=1e-5)


@each_family
def test_at_conversion_a_position_does_not_look_at_z(family: str) -> None:
    """It enters through a map that starts at zero: until then all of F is of the context."""
    model = db.convert(original_of(family), db.BlocksConfig(num_blocks=2)).eval()
    other = torch.randn(noise().shape, generator=seeded(9))
    with torch.no_grad():
        (_, first), (_, second) = (streams_of(model.block(1), IDS, z, LEVEL) for z in (noise(), other))
        assert torch.equal(first, second)
        randomise_adaptive(model)  # the positive control
        (_, first), (_, second) = (streams_of(model.block(1), IDS, z, LEVEL) for z in (noise(), other))
    assert not torch.allclose(first, second, atol=1e-2)


def test_an_adapted_layer_scales_and_shifts_noisy_positions_alone() -> None:
    model = db.convert(original_of(), db.BlocksConfig(num_blocks=2)).eval()
    randomise_adaptive(model)
    block = model.block(1)
    layer, adaptive = block.layers()[0], block.adaptive[0]
    seen: list[tuple[Tensor, Tensor]] = []
    names = ("input_layernorm", "post_attention_layernorm")
    for name in names:  # this hook runs after the adaptive one and sees what the layer sees
        layer.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        streams_of(block, IDS, noise(), LEVEL)
        condition = block.shared.noise_embedding(block.noise.condition(LEVEL))
        parts = adaptive.linear(nn.functional.silu(condition))[:, None].chunk(4, dim=-1)
    for i, (name, (given, out)) in enumerate(zip(names, seen, strict=True)):
        norm = original_of().model.layers[2].get_submodule(name)
        with torch.no_grad():
            plain = norm(given)
        assert torch.equal(out[:, LENGTH:], plain[:, LENGTH:])
        expected = plain[:, :LENGTH] * (1 + parts[2 * i]) + parts[2 * i + 1]
        torch.testing.assert_close(out[:, :LENGTH], expected)
        assert not torch.allclose(expected, plain[:, :LENGTH], atol=0.1)


@each_family
@each_tying
def test_one_block_has_the_librarys_logits(family: str, tied: bool) -> None:
    original = original_of(family, tie_word_embeddings=tied)
    model = db.convert(original, db.BlocksConfig(num_blocks=1)).eval()
    block = model.block(0)
    with torch.no_grad():
        clean, _ = streams_of(block, IDS, noise(), LEVEL)
        logits = clean_logits(block, clean)
        torch.testing.assert_close(logits, original(IDS).logits, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_models_positions_are_those_of_the_library(tmp_path: Path) -> None:
    """The library keeps rotary frequencies in float32; rounded ones give other logits after some hundred tokens."""
    tiny("llama", max_position_embeddings=600).bfloat16().save_pretrained(tmp_path)  # type: ignore[operator]
    original = type(fresh_causal()).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert original.dtype == torch.bfloat16
    assert original.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = token_batch(2, length=500)["input_ids"]
    model = db.convert(original, db.BlocksConfig(num_blocks=1)).eval()
    z, level = torch.zeros(2, 500, HIDDEN), torch.ones(2)

    def logits() -> Tensor:
        block = model.block(0)
        with torch.no_grad():
            clean, _ = streams_of(block, ids, z, level)
            return clean_logits(block, clean).float()

    with torch.no_grad():
        expected = original(ids).logits.float()
        close = (logits() - expected).abs().max()
        model.block(0).network.get_submodule(
            "model.rotary_emb.rotary"
        ).inv_freq = original.model.rotary_emb.inv_freq.bfloat16()
        rounded = (logits() - expected).abs().max()
    assert close < 0.05 * expected.abs().max()
    assert rounded > 4 * close  # the positive control


# ---- conversion and export ------------------------------------------------------------------------------------


@each_family
@each_tying
@pytest.mark.parametrize("shared", POLICIES)
def test_export_gives_the_original_back(family: str, tied: bool, shared: str) -> None:
    original = original_of(family, tie_word_embeddings=tied, attn_implementation="eager")
    exported: Any = db.convert(original, db.BlocksConfig(num_blocks=2, shared=shared)).eval().export_initialisation()  # type: ignore[arg-type]
    assert type(exported) is type(original)
    assert same_states(exported.state_dict(), original.state_dict())
    assert exported.config._attn_implementation == "eager"
    assert not exported.config.tie_word_embeddings
    assert exported.lm_head.weight is not exported.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(exported(IDS).logits, original(IDS).logits)
    assert same_states(
        db.convert(exported, db.BlocksConfig(num_blocks=4)).export_initialisation().state_dict(), original.state_dict()
    )


@each_family
@each_tying
@pytest.mark.parametrize("shared", POLICIES)
def test_convert_leaves_the_model_as_it_was(family: str, tied: bool, shared: str) -> None:
    original = original_of(family, tie_word_embeddings=tied)
    with torch.no_grad():
        before = original(IDS).logits
    state, config = copy.deepcopy(original.state_dict()), original.config.to_dict()
    rng = torch.get_rng_state()
    model = db.convert(original, db.BlocksConfig(num_blocks=2, shared=shared))  # type: ignore[arg-type]
    assert torch.equal(rng, torch.get_rng_state())
    randomise_adaptive(model)
    model.loss(token_batch(), 1, seeded()).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        assert torch.equal(original(IDS).logits, before)
    assert same_states(original.state_dict(), state)
    assert original.config.to_dict() == config
    assert original.config._attn_implementation == "sdpa"
    assert {layer.self_attn.config._attn_implementation for layer in original.model.layers} == {"sdpa"}
    assert (original.lm_head.weight is original.model.embed_tokens.weight) == tied
    assert all(p.grad is None for p in original.parameters())
    assert not any(module._forward_hooks for module in original.modules())


@pytest.mark.each_value
@each_family
@each_tying
@pytest.mark.parametrize("shared", POLICIES)
def test_saved_and_loaded_it_is_the_same(family: str, tied: bool, shared: str, tmp_path: Path) -> None:
    original = original_of(family, tie_word_embeddings=tied)
    model = db.convert(original, db.BlocksConfig(num_blocks=2, shared=shared))  # type: ignore[arg-type]
    randomise_adaptive(model)
    with torch.no_grad():
        for b in range(2):  # as if they had trained: the head is no longer the embedding
            model.block(b).network.get_parameter("lm_head.weight").add_(0.5)
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert loaded.blocks_config == model.blocks_config
    for b in range(2):
        ours, theirs = (m.loss(token_batch(), b, seeded()) for m in (model, loaded))
        assert torch.equal(ours, theirs)
    assert same_states(loaded.export_initialisation().state_dict(), model.export_initialisation().state_dict())


@each_tying
@pytest.mark.parametrize("shared", POLICIES)
def test_no_two_blocks_or_names_share_memory_but_jointly_trained_ones(shared: str, tied: bool) -> None:
    model = db.convert(original_of(tie_word_embeddings=tied), db.BlocksConfig(num_blocks=2, shared=shared))  # type: ignore[arg-type]
    for block in model.blocks:
        found = list(dict(block.named_parameters(remove_duplicate=False)).values())
        assert len({p.untyped_storage().data_ptr() for p in found}) == len(found)
    common = [p for p in model.block(0).parameters() if any(p is q for q in model.block(1).parameters())]
    assert bool(common) == (shared == "joint")


# ---- without noise input: one stream, which is the library's ----------------------------------------------------


def without_noise(family: str = "llama", blocks: int = 1, **overrides: Any) -> db.DiffusionBlocks:
    target: Any = {"kind": "next-token", "noise_input": False}
    return db.convert(original_of(family, **overrides), db.BlocksConfig(num_blocks=blocks, target=target)).eval()


@each_family
@each_tying
def test_one_block_without_noise_input_has_the_librarys_logits(family: str, tied: bool) -> None:
    model = without_noise(family, tie_word_embeddings=tied)
    with torch.no_grad():
        expected = original_of(family, tie_word_embeddings=tied)(IDS).logits[:, :-1]
        for z in (noise(length=LENGTH - 1), torch.zeros(3, LENGTH - 1, HIDDEN)):
            context = model.block(0)({"input_ids": IDS}, z, LEVEL, context=True)
            torch.testing.assert_close(context, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("kernel", ["eager", "flex_attention"])
def test_kernels_agree_on_one_stream(kernel: str) -> None:
    z = noise(length=LENGTH - 1)
    with torch.no_grad():
        ours, reference = (
            without_noise(attn_implementation=name).block(0)({"input_ids": IDS}, z, LEVEL) for name in (kernel, "sdpa")
        )
    torch.testing.assert_close(ours, reference, rtol=2e-5, atol=2e-5)


def test_its_loss_is_that_of_the_librarys_logits_and_what_z_says() -> None:
    """In closed form; and no position sees the token that it predicts, but by z."""
    model, g = without_noise(blocks=2), seeded(4)
    level = torch.full((3,), 0.5)
    block = model.partition.block_of(0.5)
    z = model.target.table[IDS[:, 1:]] + 0.5 * torch.randn(3, LENGTH - 1, HIDDEN, generator=g)  # type: ignore[attr-defined]
    ordinary = model.export_block(block)
    with torch.no_grad():
        logits = ordinary(IDS).logits[:, :-1] + z @ model.target.table.T / 0.25  # type: ignore[attr-defined]
        torch.testing.assert_close(model.block(block)({"input_ids": IDS}, z, level), logits, rtol=0, atol=1e-4)
        expected = torch.nn.functional.cross_entropy(logits.mT, IDS[:, 1:], reduction="none").mean(dim=1)
        found = model.block(block).losses({"input_ids": IDS}, {"input_ids": IDS}, z, level)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        other = IDS.clone()
        other[:, 5] = (other[:, 5] + 1) % VOCAB
        context = [model.block(block)({"input_ids": ids}, z, level, context=True) for ids in (IDS, other)]
    assert torch.equal(context[0][:, :5], context[1][:, :5])
    assert not torch.equal(context[0][:, 5], context[1][:, 5])


def test_padding_on_either_side_of_one_stream_is_not_there() -> None:
    model = without_noise(blocks=2).train()
    short = IDS[:, :7]
    batch = {"input_ids": torch.cat([short, torch.zeros(3, 5, dtype=torch.int64)], dim=1)}
    mask = torch.tensor([[1] * 7 + [0] * 5] * 3)
    left = {"input_ids": batch["input_ids"].roll(5, 1), "attention_mask": mask.roll(5, 1)}
    generators = [[seeded(i) for i in range(3)] for _ in range(3)]
    expected = model.block(1).loss({"input_ids": short}, generators[0])
    for padded, draws in zip(({**batch, "attention_mask": mask}, left), generators[1:], strict=True):
        torch.testing.assert_close(model.block(1).loss(padded, draws), expected)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"likelihood": "learned"}, "needs target.likelihood = added"),
        ({"previous": False}, "target.previous = false: .* reads a text as an ordinary model does; leave previous out"),
        ({"clean_weight": 0.5}, "target.clean_weight = 0.5: .* no second stream; leave clean_weight out"),
    ],
)
def test_settings_of_a_second_stream_are_refused_without_one(target: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        db.BlocksConfig.model_validate({"target": {"kind": "next-token", "noise_input": False, **target}})


# ---- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [{}, {"clean_weight": 0.5}, {"previous": False}, {"logit_scale": 3.0}, {"noise_input": False}]
)
@pytest.mark.parametrize("shared", POLICIES)
@each_family
def test_gradients_reach_all_of_a_block_and_nothing_else(family: str, shared: str, target: dict[str, Any]) -> None:
    config = db.BlocksConfig(num_blocks=2, shared=shared, target={"kind": "next-token", **target})  # type: ignore[arg-type]
    model = db.convert(original_of(family), config)
    randomise_adaptive(model)
    model.loss(token_batch(12), 1, seeded()).mean().backward()
    named = dict(model.named_parameters(remove_duplicate=False))
    common = {id(p) for p in model.shared_parameters()}
    assert bool(common) == (shared == "joint")
    reached = parameter_names(model, with_grad=True)
    assert all(n.startswith("blocks.1.") or id(named[n]) in common for n in reached)
    trainable = {n for n, p in named.items() if n.startswith("blocks.1.") and p.requires_grad}
    assert trainable == {n for n in reached if n.startswith("blocks.1.")}
    assert all(bool((named[n].grad != 0).any()) for n in trainable)
    shares = {n for n in trainable if ".shared." in n or "embed_tokens" in n or "lm_head" in n or "model.norm" in n}
    assert bool(shares) == (shared != "frozen")
    learned = shared == "joint" and "noise_input" not in target
    assert ("blocks.1.shared.target.embedding" in trainable) == learned


# ---- kernels ----------------------------------------------------------------------------------------------------


def outputs_and_gradients(kernel: str, dtype: torch.dtype, device: str = "cpu", train: bool = True) -> list[Tensor]:
    """The logits of a block whose model runs under that kernel, and the gradients of all its parameters."""
    heads = {"head_dim": 16} if device == "cuda" else {}  # the least that FlexAttention takes there
    original = original_of(attn_implementation=kernel, **heads).to(device, dtype)
    model = db.convert(original, db.BlocksConfig(num_blocks=2))
    randomise_adaptive(model.to("cpu"))
    block = model.to(device).block(1)
    with torch.set_grad_enabled(train):
        logits = block({"input_ids": IDS.to(device)}, noise(dtype).to(device), LEVEL.to(device, dtype))
        assert logits.shape == (3, LENGTH, VOCAB)
        if not train:
            return [logits]
    logits.double().square().mean().backward()
    grads = [p.grad for p in block.parameters() if p.grad is not None]
    assert len(grads) > 20
    return [logits.detach(), *grads]


def assert_kernels_agree(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 1e-6  # some parts are float32 whatever the model's dtype
    for ours, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_agree(rows: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without masks, and with those of some rows at a time."""
    if rows is not None:
        monkeypatch.setattr("diffusionblocks.layers.two_streams._ROWS_ON_CPU", rows)
        monkeypatch.setattr("diffusionblocks.layers.two_streams.has_kernel", lambda query, *, on_gpu: False)
    expected = outputs_and_gradients("eager", dtype)
    for kernel in ("sdpa", "flex_attention"):
        assert_kernels_agree(outputs_and_gradients(kernel, dtype), expected, dtype)
        # FlexAttention itself: on a CPU it has no backward pass.
        assert_kernels_agree(outputs_and_gradients(kernel, dtype, train=False), expected[:1], dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_kernels_agree() -> None:
    expected = outputs_and_gradients("eager", torch.float32, "cuda")
    for kernel in ("sdpa", "flex_attention"):
        for ours, theirs in zip(outputs_and_gradients(kernel, torch.float32, "cuda"), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
