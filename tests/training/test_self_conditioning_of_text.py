"""Self-conditioning of text: what a block is shown in training, by the bound, by votes and while text is generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LENGTH, VOCAB, convert, same_states, seeded, token_batch
from torch import Tensor, nn

import diffusionblocks as db
from diffusionblocks.common.finite import FiniteCheck
from diffusionblocks.common.modules import bytes_of
from diffusionblocks.core.block import Block
from diffusionblocks.core.inference import Continuing
from diffusionblocks.evaluation.memory import step_memory
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import parse_recipe
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.planning import predict
from diffusionblocks.sampling import LogitVotes
from diffusionblocks.targets import HINT, NextTokenTarget, TokenTarget

FAMILIES = ("masked", "bert", "llama", "gpt2")


def blocks(family: str, *, trained: bool = True, on: bool = True, **changes: Any) -> db.DiffusionBlocks:
    """Three blocks; trained, their maps of the hint are not zero any more."""
    masked = family in ("masked", "bert")
    target = {"kind": "tokens" if masked else "next-token"} | ({"self_conditioning": True} if on else {}) | changes
    noise = {"noise": db.Masking(vocab_size=VOCAB + 1, mask_token_id=VOCAB)} if family == "bert" else {}
    model = convert(family, num_blocks=3, target=target, **noise).eval()
    if trained:
        for b in range(3):
            nn.init.normal_(hint_map(model.block(b)), std=0.5, generator=seeded(b))
    return model


def hint_map(block: Block) -> Tensor:
    return block.shared.extra["hint"].get_parameter("weight")  # type: ignore[union-attr]


def drawn(block: Block, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    x, z, level = block.corrupted(batch, seeded(3))
    return dict(x), z, level


def logits_of(block: Block, x: dict[str, Tensor], z: Tensor, level: Tensor) -> Tensor:
    """Those that a hint is made of."""
    with torch.no_grad():
        return block(x, z, level, context=block.adds_likelihood)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_a_block_is_what_it_is_without(family: str) -> None:
    plain, fresh, trained = (blocks(family, trained=t, on=on).block(1) for t, on in ((0, 0), (0, 1), (1, 1)))
    batch = token_batch()
    x, z, level = drawn(fresh, batch)
    shown = torch.arange(6) % 2 == 0
    x[HINT] = shown[:, None].float()
    first = {name: value for name, value in x.items() if name != HINT}
    expected = plain.losses(batch, first, z, level)
    assert torch.equal(fresh.losses(batch, x, z, level), expected)
    ours = trained.losses(batch, x, z, level)
    assert torch.equal(ours[~shown], expected[~shown])
    assert not torch.isclose(ours[shown], expected[shown]).any()
    # The map learns at once: its gradient is not zero where the map is.
    fresh.losses(batch, x, z, level).sum().backward()
    assert hint_map(fresh).grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["masked", "llama"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_training_shows_half_of_the_texts_what_the_block_itself_says(family: str, chunk: int | None) -> None:
    """By hand, and the gradient is that of the second pass with the hint as a constant."""
    model = blocks(family)
    block, batch = model.block(1), token_batch(40)
    x, z, level = drawn(block, batch)
    assert 0.25 < x[HINT].mean() < 0.75
    block.loss_chunk = chunk
    losses = block.losses(batch, x, z, level)
    losses.sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    assert all(p.grad is None for b in (0, 2) for p in model.block(b).parameters())
    model.zero_grad()
    block.loss_chunk = None
    first = {name: value for name, value in x.items() if name != HINT}
    probabilities = logits_of(block, first, z, level).softmax(-1)
    target = block.target
    if isinstance(target, TokenTarget):
        assert target.hint_rows is not None
        rows = (probabilities @ target.hint_rows) * (z == target.mask_id)[..., None]
        weight = block.noise.training_weight(level).float()
    else:
        assert isinstance(target, NextTokenTarget)
        rows, weight = probabilities @ target.table, torch.ones(40)
    shown = {**first, HINT: rows * x[HINT][..., None]}
    expected = target.loss(block(shown, z, level), batch, z) * weight
    torch.testing.assert_close(losses, expected)
    expected.sum().backward()
    for name, p in block.named_parameters():
        assert (p.grad is None) == (name not in gradients)
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5)


def test_masked_tokens_reach_the_hint_by_no_road() -> None:
    """Only the loss knows what is masked; what is shown does reach the second pass: the positive control."""
    block = blocks("masked").block(0)
    tokens = token_batch()["input_ids"]
    x, z, _ = drawn(block, {"input_ids": tokens})
    level, seen = torch.full((6,), 0.8), []
    block.register_forward_hook(lambda _, args, output: seen.append((args[0].get(HINT), output)))
    x[HINT].fill_(1)
    hidden = z == VOCAB
    assert hidden.any()
    assert not hidden.all()
    block.losses({"input_ids": tokens}, x, z, level)
    block.losses({"input_ids": tokens.where(~hidden, (tokens + 1) % VOCAB)}, x, z, level)
    block.losses({"input_ids": tokens}, x, z.where(hidden, (z + 1) % VOCAB), level)
    (hint, output), (same_hint, same_output), (other_hint, other_output) = seen[1::2]
    assert hint is not None
    assert (hint[~hidden] == 0).all()
    assert torch.equal(hint, same_hint)
    assert torch.equal(output, same_output)
    assert not torch.equal(hint, other_hint)
    assert not torch.equal(output, other_output)


@pytest.mark.parametrize("place", [0, 4])
def test_a_next_token_reaches_the_hint_of_its_position_by_no_road(place: int) -> None:
    """A clean token and its successors are another's: positions up to it see nothing of that, those behind it do."""
    block = blocks("llama").block(0)
    batch = token_batch()
    x, z, level = drawn(block, batch)
    x[HINT].fill_(1)
    seen: list[tuple[Tensor | None, Tensor]] = []
    block.register_forward_hook(lambda _, args, output: seen.append((args[0].get(HINT), output)))
    block.losses(batch, x, z, level)
    other = x["input_ids"].clone()
    other[:, place:] = (other[:, place:] + 1) % VOCAB
    block.losses(batch, x | {"input_ids": other}, z, level)
    (hint, output), (other_hint, other_output) = seen[1::2]
    assert hint is not None
    assert other_hint is not None
    upto, behind = slice(None, place + 1), slice(place + 1, None)
    for ours, theirs in ((hint, other_hint), (output, other_output)):
        torch.testing.assert_close(ours[:, upto], theirs[:, upto], rtol=0, atol=1e-6)
        assert not torch.isclose(ours[:, behind], theirs[:, behind]).all(dim=(0, 2)).any()


def test_texts_with_generators_of_their_own_are_shown_the_same_however_they_are_padded() -> None:
    block = blocks("llama").block(0)
    tokens = token_batch(4)["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, 8:] = 0
    generators = [seeded(i) for i in range(4)]
    padded = block.loss({"input_ids": tokens, "attention_mask": mask}, generators)
    cut = block.loss({"input_ids": tokens[:, :8]}, [seeded(i) for i in range(4)])
    torch.testing.assert_close(padded, cut)


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_the_bound_is_of_what_a_block_says_twice() -> None:
    block = blocks("masked").block(1)
    _, z, level = drawn(block, token_batch())
    target = block.target
    assert isinstance(target, TokenTarget)
    expected = block({HINT: target.hint(logits_of(block, {}, z, level), z)}, z, level)
    assert torch.equal(block.estimate({}, z, level), expected)
    assert not torch.allclose(expected, block({}, z, level))
    plain = blocks("masked", on=False, trained=False).block(1)
    assert torch.equal(plain.estimate({}, z, level), plain({}, z, level))


def test_unmasking_shows_each_step_what_the_one_before_it_said() -> None:
    model = blocks("masked")
    target = model.target
    assert isinstance(target, TokenTarget)
    steps: list[tuple[float, Tensor, Tensor]] = []
    model.generate(range(3), steps=6, callback=lambda step, level, z, logits: steps.append((level, z, logits)))
    said = None
    with torch.no_grad():
        for level, z, logits in steps:
            x = {} if said is None else {HINT: target.hint(said, z)}
            torch.testing.assert_close(model.denoise(x, z, level), logits)
            said = logits
    assert not torch.allclose(model.denoise({}, steps[-1][1], steps[-1][0]), steps[-1][2])


def test_votes_show_each_block_the_mean_of_what_was_said_before_it() -> None:
    model = blocks("llama", feedback="soft")
    calls: list[tuple[dict[str, Any], Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, output: calls.append((args[0], args[1], output)))
    tokens = token_batch()["input_ids"]
    with torch.no_grad():
        assert isinstance(model.inference, Continuing)
        votes = model.inference.vote({"input_ids": tokens}, seeded(), FiniteCheck())
    assert [HINT in inputs for inputs, _, _ in calls] == [False, True, True]
    said = LogitVotes(("mean",))
    for inputs, z, context in calls:
        if said.count:
            torch.testing.assert_close(inputs[HINT], model.target.hint(said.answer("mean"), z))
        said.add(context)
    torch.testing.assert_close(votes.answer("mean"), said.answer("mean"))


@pytest.mark.parametrize("combine", ["mean", "chain"])
def test_generation_says_what_whole_texts_are_told(combine: str) -> None:
    """Every token's chain begins without a hint, and goes on with what its own steps said."""
    model = blocks("llama", feedback="hard")
    calls: list[tuple[bool, int]] = []
    hints: list[Tensor] = []

    def note(b: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            calls.append((HINT in args[0], b))
            hints.append(args[0].get(HINT, torch.zeros(0)))

        return hook

    for b in range(3):
        model.block(b).register_forward_hook(note(b))
    prompt = token_batch(1)["input_ids"][0, :5]
    made = model.generate([prompt], max_new_tokens=4, combine=combine, temperature=0.0)
    assert calls == [(False, 0), (True, 1), (True, 2)] * 4
    assert hints[1].shape == (1, 1, 32)
    again = model.generate([made.tokens[0][:7]], max_new_tokens=2, combine=combine, temperature=0.0)
    assert len(again.tokens[0]) == len(made.tokens[0]) == 9
    off = blocks("llama", on=False, trained=False, feedback="hard")
    fresh = blocks("llama", trained=False, feedback="hard")
    same = [m.generate([prompt], max_new_tokens=4, combine=combine) for m in (off, fresh)]
    assert torch.equal(same[0].tokens[0], same[1].tokens[0])


@pytest.mark.parametrize("family", ["masked", "llama"])
def test_it_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = blocks(family)
    model.save_pretrained(tmp_path)
    loaded = db.load(tmp_path)
    assert same_states(model.state_dict(), loaded.state_dict())
    assert loaded.block(0).self_conditioning


# ---- a step's memory, and refusals -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "next-token"])
def test_the_predicted_step_is_the_measured_one(kind: str) -> None:
    sizes = {"num_attention_heads": 2, "hidden_size": 64}
    model: dict[str, Any] = {
        "type": "MaskedTransformer",
        "config": sizes | {"sequence_length": 64, "num_layers": 2, "embedding_size": 32, "mlp_size": 128},
    }
    if kind == "next-token":
        more = {"max_position_embeddings": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 27}
        model = {"type": "LlamaForCausalLM", "config": sizes | {"num_key_value_heads": 2} | more}
    recipe = parse_recipe(
        {
            "name": "t",
            "model": model,
            "blocks": {"num_blocks": 1, "target": {"kind": kind, "self_conditioning": True}},
            "data": {"kind": "topics", "length": 64},
            "train": {"steps": 3, "batch_size": 16},
            "evaluate": {"kind": "bits"}
            if kind == "tokens"
            else {"kind": "language", "prompt_length": 8, "new_tokens": 8},
            "device": "cpu",
        },
        "a test",
    )
    ledger = predict(recipe)
    run = Experiment(recipe).trainer(progress=False)
    assert ledger.parameters == bytes_of(run.units[0].module.parameters())
    measured = max(unit.transient for unit in step_memory(run))
    assert ledger.activations + ledger.gradients == pytest.approx(measured, rel=0.03)


def test_what_it_cannot_be_combined_with_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target.self_conditioning = true needs target.likelihood = added"):
        db.NextTokenTargetConfig(self_conditioning=True, likelihood="learned")
    with pytest.raises(ValueError, match=r"target.self_conditioning = true: with target.noise_input = false there is"):
        db.NextTokenTargetConfig(self_conditioning=True, noise_input=False)
    recurrent = RecurrentDepth(
        vocab_size=VOCAB, sequence_length=LENGTH, hidden_size=32, num_attention_heads=2, mlp_size=48
    )
    config = db.BlocksConfig(num_blocks=1, target=db.NextTokenTargetConfig(self_conditioning=True))
    with pytest.raises(ValueError, match=r"target.self_conditioning = true: a RecurrentDepth has no position"):
        db.convert(recurrent, config)
    for fixed in ({"shared": "frozen"}, {"lora": {"rank": 2}}):
        target = {"kind": "next-token", "self_conditioning": True}
        with pytest.raises(ValueError, match=r"target.self_conditioning = true with .* could never learn"):
            convert("llama", target=target, **fixed)
    with pytest.raises(ValueError, match="is shown what other blocks say"):
        blocks("bert", noise_input=False).export_block(1)
    plain, z = convert("masked").block(0), torch.full((6, LENGTH), VOCAB)
    with pytest.raises(ValueError, match="takes no hint"):
        plain({HINT: torch.zeros(6, LENGTH, 32)}, z, torch.ones(6))
