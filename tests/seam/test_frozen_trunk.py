"""Blocks that attend to a frozen trunk: what the two streams compute, until they train; no leak; one past for all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    HIDDEN,
    LENGTH,
    VOCAB,
    convert,
    randomise_adaptive,
    same_states,
    seeded,
    tiny,
    token_batch,
    train_a_little,
)
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.core.block import FROZEN
from diffusionblocks.core.branching import branch
from diffusionblocks.core.conversion import assemble
from diffusionblocks.core.materialise import build
from diffusionblocks.core.merging import merge
from diffusionblocks.core.soup import average_with_trunk, soup
from diffusionblocks.core.weights import pretrained_source
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.noise import one_level

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
TRUNK = {"kind": "next-token", "context": "trunk"}


def trunk_of(family: str = "llama", **config: Any) -> db.DiffusionBlocks:
    trunk = convert(family, layers=2, num_blocks=1, **config).eval()
    randomise_adaptive(trunk)
    return trunk


def branched(family: str = "llama", *, trained: bool = False, **changes: Any) -> db.DiffusionBlocks:
    model = branch(trunk_of(family), 3, context="trunk", **changes).eval()
    if trained:
        train_a_little(model)
    return model


# ---- the function -----------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("family", "hinted"), [("llama", False), ("llama", True), ("gemma3", False), ("gpt2", False), ("olmo2", False)]
)
def test_until_it_trains_a_block_computes_what_two_streams_do(family: str, hinted: bool) -> None:
    trunk = trunk_of(family, target={"kind": "next-token", "self_conditioning": hinted})
    with torch.no_grad():
        for parameter in trunk.parameters():  # the way in for a hint starts at zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(4)))
    own, over_trunk = branch(trunk, 3), branch(trunk, 3, context="trunk")
    for b in range(3):
        ours, theirs = (model.loss(token_batch(), b, seeded(3)) for model in (over_trunk, own))
        assert torch.equal(ours, theirs)
    for combine in ("mean", "chain"):
        texts = [model.generate(PROMPTS, 6, combine=combine).tokens for model in (over_trunk, own)]
        assert all(torch.equal(a, b) for a, b in zip(*texts, strict=True))


def logits_of(model: db.DiffusionBlocks, b: int, tokens: Tensor) -> Tensor:
    level = model.partition.boundaries[b]
    z = torch.randn(*tokens.shape, HIDDEN, generator=seeded(1))
    with torch.no_grad():
        return model.block(b)({"input_ids": tokens}, z, one_level(level, z))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_position_sees_the_tokens_before_it_and_no_others(kernel: str) -> None:
    original = tiny("llama", layers=2, attn_implementation=kernel)
    trunk = db.convert(original, db.BlocksConfig(num_blocks=1))
    randomise_adaptive(trunk)
    model = branch(trunk, 3, context="trunk").eval()
    tokens = token_batch(2)["input_ids"]
    for at in (0, 5, LENGTH - 1):
        other = tokens.clone()
        other[:, at] = (other[:, at] + 1) % VOCAB
        before, after = logits_of(model, 1, tokens), logits_of(model, 1, other)
        assert torch.equal(before[:, : at + 1], after[:, : at + 1])
        changed = (before != after).any(dim=-1).all(dim=0)
        assert changed[at + 1 :].all()  # the positive control: what follows reads it


def test_blocks_share_one_past(monkeypatch: pytest.MonkeyPatch) -> None:
    model = branched(trained=True)
    tokens = token_batch(2, length=7)["input_ids"]
    z = torch.randn(2, 7, HIDDEN, generator=seeded(2))
    past = model.family.past(2, 8, torch.device("cpu"))
    seen, none = torch.tensor([3, 6]), torch.zeros(2, dtype=torch.int64)
    for b in (2, 0, 1):  # whichever comes first
        first = b == 2
        inputs = {"input_ids": tokens[:, : 6 if first else 0], "past": past, "counts": seen if first else none}
        now = torch.stack([z[row, place] for row, place in enumerate(seen.tolist())])[:, None]
        level = one_level(model.partition.boundaries[b + 1], now)
        with torch.no_grad():
            step = model.block(b)(inputs, now, level)[:, 0]
            whole = model.block(b)({"input_ids": tokens}, z, level)
        for row, place in enumerate(seen.tolist()):
            torch.testing.assert_close(step[row], whole[row, place])
    calls: list[int] = []
    forward = type(model.block(0).shared.extra["trunk"][0]).forward

    def counted(layer: nn.Module, states: Tensor, **options: Any) -> Any:
        calls.append(states.shape[1])
        return forward(layer, states, **options)

    layer: Any = model.block(0).shared.extra["trunk"][0]
    monkeypatch.setattr(layer, "forward", lambda states, **options: counted(layer, states, **options))
    model.generate([[1, 2, 3]], 4)
    assert calls == [3, 1, 1, 1]  # one clean pass a token, for all blocks


# ---- what trains, and where it goes ------------------------------------------------------------------------------


def test_the_trunk_and_the_embedding_stand_still_and_have_no_gradient() -> None:
    trunk = trunk_of()
    model = branch(trunk, 3, context="trunk")
    start = copy.deepcopy(model.state_dict())
    model.loss(token_batch(), 1, seeded()).mean().backward()
    names = {name for name, p in model.block(1).named_parameters() if p.grad is not None}
    assert names == {name for name, p in model.block(1).named_parameters() if p.requires_grad}
    fixed = {name for name, p in model.block(1).named_parameters() if not p.requires_grad}
    assert fixed == {"network.model.embed_tokens.weight", "shared.target.embedding"} | {
        name for name in model.block(1).state_dict() if name.startswith(FROZEN)
    }
    model.zero_grad()
    train_a_little(model)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {name.split(".")[1] for name in moved} == {"0", "1", "2"}
    assert not any(FROZEN in name or "embed_tokens" in name for name in moved)
    assert not model.train().block(0).shared.extra["trunk"].training  # no dropout
    of_trunk = trunk.block(0).state_dict()
    for name, tensor in model.block(2).state_dict().items():
        if name.startswith(FROZEN):
            assert torch.equal(tensor, of_trunk[f"network.{model.block(2).original_name(name)}"])


def test_layers_computed_again_give_the_same_gradients() -> None:
    model, again = branched(), branched()
    again.gradient_checkpointing_enable()
    gradients = []
    for each in (model, again):
        each.train().loss(token_batch(), 1, seeded()).mean().backward()
        gradients.append([p.grad for p in each.block(1).parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("shared", ["replicated", "joint"])
def test_a_model_is_saved_once_loaded_and_goes_on(shared: str, tmp_path: Path) -> None:
    model = branch(
        trunk_of(shared=shared, target={"kind": "next-token", "embedding": "given"}),
        3,
        context="trunk",
        vocabulary="frozen",
    )
    train_a_little(model)
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert same_states(loaded.state_dict(), model.state_dict())
    texts = [m.generate(PROMPTS, 5).tokens for m in (model, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*texts, strict=True))
    once = [p for p in loaded.block(0).parameters() if not p.requires_grad]
    others = {id(p) for p in loaded.block(2).parameters()}
    assert [id(p) in others for p in once].count(False) == (0 if shared == "joint" else 1)  # the target's rows
    train_a_little(loaded)  # as before it was saved: the same trains
    loaded.save_pretrained(tmp_path / "m")


def test_blocks_of_one_trunk_are_merged_and_of_two_are_not(tmp_path: Path) -> None:
    model = branched(trained=True, vocabulary="frozen")
    for b in range(3):
        model.save_pretrained(tmp_path / f"{b}", blocks=[b])
    merge([tmp_path / f"{b}" for b in range(3)], tmp_path / "whole")
    assert same_states(db.load(tmp_path / "whole").state_dict(), model.state_dict())
    with torch.no_grad():
        model.block(0).shared.extra["trunk"][0].mlp.up_proj.weight += 1.0
    model.save_pretrained(tmp_path / "1", blocks=[1])
    with pytest.raises(ValueError, match="the blocks beside them were trained on other fixed weights"):
        merge([tmp_path / f"{b}" for b in range(3)], tmp_path / "whole")


def test_soups_have_the_trunk_that_the_blocks_have() -> None:
    trunk = trunk_of()
    model = branch(trunk, 3, context="trunk")
    mixed, alone = soup(model), branch(trunk, 1, context="trunk", overlap=0.0)
    assert torch.equal(mixed.loss(token_batch(), 0, seeded()), alone.loss(token_batch(), 0, seeded()))
    again = average_with_trunk(model, trunk, [0.5] * 3)
    assert same_states(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("experts", [False, True])
def test_a_trained_model_is_its_own_trunk(experts: bool, tmp_path: Path) -> None:
    original: Any = tiny("llama", layers=2)
    config = db.BlocksConfig(num_blocks=3 if experts else 1, split="experts" if experts else "layers", target=TRUNK)
    model = db.convert(original, config)
    weights = original.state_dict()
    for b in range(config.num_blocks):
        for name, tensor in model.block(b).state_dict().items():
            if name.startswith(FROZEN):
                assert torch.equal(tensor, weights[model.block(b).original_name(name)])
    original.save_pretrained(tmp_path)
    built = build(pretrained_source("LlamaForCausalLM", tmp_path, {}, seed=0), config)
    assert same_states(built.state_dict(), model.state_dict())


def test_a_tied_head_is_fixed_or_free_as_the_policy_says() -> None:
    trunk = db.convert(tiny("llama", layers=2, tie_word_embeddings=True), db.BlocksConfig(num_blocks=1))
    for vocabulary, free in (("trained", True), ("frozen", False)):
        model = branch(trunk, 2, context="trunk", vocabulary=vocabulary)
        heads = [model.block(b).network.get_parameter("lm_head.weight") for b in (0, 1)]
        assert (heads[0] is heads[1]) is not free
        assert [head.requires_grad for head in heads] == [free, free]
        assert torch.equal(heads[1], trunk.block(0).network.get_parameter("lm_head.weight"))


# ---- refusals ---------------------------------------------------------------------------------------------------


def recurrent() -> nn.Module:
    return RecurrentDepth(vocab_size=VOCAB, sequence_length=LENGTH, hidden_size=HIDDEN, num_attention_heads=2)


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (
        lambda: tiny("llama"),
        {"target": TRUNK},
        r"target\.context = trunk: 3 blocks of consecutive layers have no trunk",
    ),
    (recurrent, {"target": TRUNK, "num_blocks": 1}, r"recurrence of a RecurrentDepth reads its own states"),
    (recurrent, {"vocabulary": "frozen", "num_blocks": 1}, r"blocks\.vocabulary = frozen is for language models"),
    (lambda: tiny("vit"), {"vocabulary": "frozen"}, r"blocks\.vocabulary = frozen is for language models"),
    (lambda: tiny("llama"), {"target": TRUNK | {"noise_input": False}}, r"there are no noisy positions"),
    (lambda: tiny("llama"), {"target": TRUNK | {"clean_weight": 1.0}}, r"which learns nothing; leave clean_weight out"),
    (lambda: tiny("llama"), {"target": TRUNK | {"embedding": "learned"}}, r"the embedding is fixed; leave embedding"),
]


@pytest.mark.parametrize(("make", "config", "message"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(
    make: Callable[[], nn.Module], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        db.convert(make(), db.BlocksConfig.model_validate(config))


def test_a_trunk_that_is_none_of_theirs_is_refused() -> None:
    kinds = {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2}
    config = db.BlocksConfig(num_blocks=2, target=TRUNK)
    with pytest.raises(ValueError, match=r"layer_types of this Gemma3ForCausalLM differ from block to block"):
        assemble(tiny("gemma3", layers=4, **kinds), config)
    assemble(tiny("gemma3", layers=4, **kinds), config.as_one_block())  # what the message advises
    assemble(tiny("gemma3", layers=4, layer_types=["sliding_attention", "full_attention"] * 2), config)
    with pytest.raises(ValueError, match=r"this trunk learns the rows of its target"):
        branch(trunk_of(shared="joint"), 3, context="trunk")
