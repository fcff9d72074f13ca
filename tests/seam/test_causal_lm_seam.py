"""Language models through the whole seam: one order of blocks, one loss on every road, loops that know no blocks."""

from __future__ import annotations

import copy
import math
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
    convert,
    fresh_causal,
    randomise_adaptive,
    record_calls,
    same_states,
    seeded,
    tiny,
    token_batch,
    train_a_little,
    without_generated_code,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import diffusionblocks as db
from diffusionblocks.evaluation.cross_entropy import language_row
from diffusionblocks.training import EndToEnd

each_family = pytest.mark.parametrize("family", CAUSAL_FAMILIES)


# ---- one order of blocks -------------------------------------------------------------------------------------


def letters(overlap: float = 0.0) -> db.DiffusionBlocks:
    """Three blocks, each of which says one letter of its own: block b says b + 1, whatever z says."""
    model = convert("llama", overlap=overlap, target={"kind": "next-token", "likelihood": "learned"}).eval()
    with torch.no_grad():
        for b, block in enumerate(model.blocks):
            final = block.shared.final_norms.linear
            final.weight.zero_()
            scale, shift = final.bias.chunk(2)  # what the final norm gives is replaced by ones
            scale.fill_(-1.0)
            shift.fill_(1.0)
            head = block.network.get_parameter("lm_head.weight")
            head.zero_()
            head[b + 1] = 50.0 / HIDDEN
    return model


def test_training_evaluation_and_sampling_have_one_order_of_blocks(tmp_path: Path) -> None:
    letters().save_pretrained(tmp_path / "m")
    model = db.load(tmp_path / "m").eval()
    low, high = model.partition.boundaries[0], model.partition.boundaries[-1]
    assert model.partition.block_of(high) == 0
    assert model.partition.block_of(low) == 2
    z = torch.randn(4, LENGTH, HIDDEN, generator=seeded())
    for b in range(3):
        of_letter = {"input_ids": torch.full((4, LENGTH), b + 1)}
        losses = [model.loss(of_letter, other, seeded()).mean().item() for other in range(3)]
        assert [loss < 1e-3 for loss in losses] == [other == b for other in range(3)]
        row = language_row(model, lambda batch=of_letter: [batch], levels=12)  # type: ignore[misc]
        assert [level.cross_entropy < 1e-3 for level in row.by_level] == [level.block == b for level in row.by_level]
        assert {level.block for level in row.by_level} == {0, 1, 2}
        for level in (low, 0.1, 0.3, 1.0, high):
            said = model.denoise(of_letter, z, level).argmax(dim=-1)
            assert (said == model.partition.block_of(level) + 1).all()
    calls = record_calls(model)
    made = model.continue_texts([[5, 6], [7]], 4, steps=3)
    assert [place for place, _ in calls] == [0, 1, 2] * 4
    assert [level for _, level in calls[:3]] == pytest.approx(model.noise.levels(3)[:-1])
    assert [row[-4:].tolist() for row in made.tokens] == [[3] * 4] * 2  # the last block, at the lowest level, decides
    made = model.continue_texts([[5, 6], [7]], 4, steps=1)  # at the highest level read
    assert [row[-4:].tolist() for row in made.tokens] == [[1] * 4] * 2


def test_blocks_in_the_wrong_order_say_other_things() -> None:
    """The positive control."""
    model = letters()
    model.blocks = nn.ModuleList(reversed(list(model.blocks)))
    assert model.continue_texts([[5]], 2, steps=1).tokens[0].tolist() == [5, 3, 3]
    assert model.loss({"input_ids": torch.full((4, LENGTH), 1)}, 0, seeded(), torch.full((4,), 0.1)).mean() > 1


@pytest.mark.parametrize("overlap", [0.0, 0.1])
def test_training_levels_are_the_blocks_own(overlap: float) -> None:
    model = convert("llama", overlap=overlap)
    for b, block in enumerate(model.blocks):
        levels: list[Tensor] = []
        block.register_forward_pre_hook(lambda _, args, levels=levels: levels.append(args[2]))
        for seed in range(20):
            model.loss(token_batch(), block=b, generator=seeded(seed))
        drawn = torch.cat(levels)
        low, high = model.partition.training_interval(b)
        assert low <= drawn.min() <= drawn.max() <= high
        owned = [model.partition.block_of(level) == b for level in drawn.tolist()]
        assert all(owned) if overlap == 0 else 0.5 < sum(owned) / len(owned) < 1
    with pytest.raises(ValueError, match="block 2 owns it"):
        model.loss(token_batch(), 0, level=torch.full((6,), 0.05))


# ---- the whole journey ---------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("shared", POLICIES)
@each_family
def test_convert_train_save_load_generate(family: str, shared: str, tmp_path: Path) -> None:
    model = convert(family, shared=shared)
    start = copy.deepcopy(model.state_dict())
    train_a_little(model)
    moved = {name.split(".")[1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == {"0", "1", "2"}
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert same_states(loaded.state_dict(), model.state_dict())
    for b in range(3):
        ours, theirs = (m.loss(token_batch(), block=b, generator=seeded()) for m in (model, loaded))
        assert torch.equal(ours, theirs)
    texts, again = (m.continue_texts([[1, 2, 3], [4]], 5).tokens for m in (model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(texts, again, strict=True))
    assert [len(row) for row in texts] == [8, 6]


def test_branching_copies_the_trunk() -> None:
    trunk = convert("llama", num_blocks=1).eval()
    branched = db.branch(trunk, 3)
    assert branched.partition.num_layers == 9
    for ours, theirs in zip(
        branched.continue_texts([[1, 2], [3]], 6, steps=5).tokens,
        trunk.continue_texts([[1, 2], [3]], 6, steps=5).tokens,
        strict=True,
    ):
        assert torch.equal(ours, theirs)


# ---- savers of memory and time -------------------------------------------------------------------------------


def loss_and_gradients(block: nn.Module, run: Any) -> tuple[Tensor, list[Tensor]]:
    loss = run(token_batch(), seeded(3))
    loss.mean().backward()
    gradients = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@each_family
@pytest.mark.parametrize("target", [{}, {"clean_weight": 0.5}])
def test_checkpointing_computes_the_same(family: str, target: dict[str, Any]) -> None:
    config = db.BlocksConfig(num_blocks=2, target={"kind": "next-token", **target})  # type: ignore[arg-type]
    model = db.convert(tiny(family, layers=4, attention_dropout=0.2), config)
    randomise_adaptive(model)
    block = model.block(1)
    torch.manual_seed(1)
    plain, gradients = loss_and_gradients(block, block.loss)
    block.activation_checkpointing = True
    torch.manual_seed(1)
    again, recomputed = loss_and_gradients(block, block.loss)
    assert torch.equal(plain, again)
    assert len(gradients) > 20
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    torch.manual_seed(2)  # the positive control: dropout is on
    assert not torch.equal(loss_and_gradients(block, block.loss)[0], plain)


@pytest.mark.slow
@pytest.mark.each_value
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-layers"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_compiled_block_computes_the_same_in_one_graph(whole: bool, kernel: str) -> None:
    from torch._dynamo.utils import counters

    model = db.convert(tiny("llama", layers=6, attn_implementation=kernel), db.BlocksConfig(num_blocks=2))
    randomise_adaptive(model)
    block = model.block(1)
    plain, gradients = loss_and_gradients(block, block.loss)
    with without_generated_code():
        counters.clear()
        if whole:
            block.compile(fullgraph=True)
        else:
            block.compile_parts()
        compiled, again = loss_and_gradients(block, block.loss)
        graphs = int(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # By layers: all but the last share one; then that, the embedding, the final norm's and the head's, positions.
    assert graphs == 1 if whole else graphs <= 6


@pytest.mark.slow
def test_blocks_share_their_compiled_layers() -> None:
    from torch._dynamo.utils import counters

    model = db.convert(tiny("llama", layers=6), db.BlocksConfig(num_blocks=3))
    found: list[int] = []
    with without_generated_code():
        counters.clear()
        for block in map(model.block, range(3)):
            block.compile_parts()
            block.loss(token_batch(), seeded(3)).mean().backward()
            found.append(int(counters["stats"]["unique_graphs"]))
    assert found[0] == found[2] >= 2


# ---- end to end ----------------------------------------------------------------------------------------------


@each_family
def test_end_to_end_is_the_librarys_next_token_loss(family: str) -> None:
    model: Any = tiny(family)
    batch = token_batch()
    losses = EndToEnd(model).loss(batch)
    assert losses.shape == (6,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), model(**batch, labels=batch["input_ids"]).loss, rtol=1e-6, atol=1e-6)
    rows = [model(input_ids=row[None], labels=row[None]).loss for row in batch["input_ids"]]
    torch.testing.assert_close(losses, torch.stack(rows), rtol=1e-5, atol=1e-5)


@each_family
def test_end_to_end_asks_the_device_for_no_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads off the device whether texts share a sequence; a step must not wait for that."""

    def asked(*_: Any) -> None:
        raise AssertionError("the library looked for sequences packed together")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", asked)
    model: Any = tiny(family)
    EndToEnd(model).loss(token_batch()).mean().backward()
    with pytest.raises(AssertionError, match="packed"):  # and it does otherwise
        model(**token_batch(), use_cache=False)


@each_family
def test_end_to_end_checkpointing_computes_the_same(family: str) -> None:
    unit = EndToEnd(tiny(family).train())
    plain, gradients = loss_and_gradients(unit, lambda batch, _: unit.loss(batch))
    unit.activation_checkpointing = True
    assert unit.activation_checkpointing
    again, recomputed = loss_and_gradients(unit, lambda batch, _: unit.loss(batch))
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))


# ---- loops that know nothing of blocks -----------------------------------------------------------------------


@each_family
def test_a_plain_call_returns_a_loss_in_both_modes(family: str) -> None:
    model = convert(family)
    loss = model.train()(**token_batch(), generator=seeded()).loss
    drawn = seeded()
    chosen = int(torch.randint(3, (1,), generator=drawn))
    assert torch.equal(loss, model.loss(token_batch(), chosen, drawn).mean())
    loss.backward()
    assert any(p.grad is not None for p in model.block(chosen).parameters())
    model.eval()
    g = seeded()
    expected = torch.stack([model.loss(token_batch(), b, g).mean() for b in range(3)]).mean()
    assert torch.equal(model(**token_batch(), generator=seeded()).loss, expected)


def counting(size: int, seed: int) -> Tensor:
    """Texts whose every token follows from the one before it: one more, from a random start."""
    starts = torch.randint(VOCAB, (size, 1), generator=seeded(seed))
    return (starts + torch.arange(LENGTH)) % VOCAB


def first_reading(model: db.DiffusionBlocks) -> float:
    return language_row(model, lambda: [{"input_ids": counting(20, 9)}], levels=2).cross_entropy


@pytest.mark.parametrize("shared", POLICIES)
def test_transformers_trainer_trains_a_converted_model_unchanged(shared: str, tmp_path: Path) -> None:
    model = db.convert(fresh_causal(), db.BlocksConfig(shared=shared, target={"kind": "next-token", "logit_scale": 4}))  # type: ignore[arg-type]
    start = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=6,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    examples = [{"input_ids": row} for row in counting(64, 0)]
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, eval_dataset=examples[:10])
    result = trainer.train()
    assert result.global_step == 6
    assert math.isfinite(result.training_loss)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert not same_states(model.state_dict(), start)
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert same_states(saved, model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_plain_loop_learns_which_token_follows(family: str) -> None:
    model = db.convert(
        fresh_causal(family),
        db.BlocksConfig(target={"kind": "next-token", "logit_scale": 8.0}),  # type: ignore[arg-type]
    )
    before = first_reading(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    generator = seeded()
    for step in range(240):
        model.train()(input_ids=counting(16, step), generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = first_reading(model)
    assert before > 2.5  # ln 27 = 3.3
    assert after < 0.3
    made = model.continue_texts([[3, 4, 5], [20]], 6, temperature=0.0).tokens
    assert [row.tolist() for row in made] == [list(range(3, 12)), [(20 + i) % VOCAB for i in range(7)]]


@pytest.mark.slow
def test_what_is_read_was_trained_at_either_end_of_the_levels() -> None:
    """A short training draws next to nothing above sigma 10; there and below 0.01 it must not be guessed at."""
    vocabulary = 64
    torch.manual_seed(0)
    model = db.convert(
        fresh_causal(layers=1, vocab_size=vocabulary),
        db.BlocksConfig(num_blocks=1, target={"kind": "next-token", "logit_scale": 4.0}),  # type: ignore[arg-type]
    )

    def counted(size: int, seed: int) -> dict[str, Tensor]:
        starts = torch.randint(vocabulary, (size, 1), generator=seeded(seed))
        return {"input_ids": (starts + torch.arange(LENGTH)) % vocabulary}

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    generator = seeded()
    for step in range(200):
        model.loss(counted(16, step), 0, generator).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    row = language_row(model, lambda: [counted(20, 9)], levels=8)
    assert row.cross_entropy < 0.1  # ln 64 = 4.2
    assert row.by_level[-1].cross_entropy < 0.1
    batch = counted(20, 9)
    y = model.target.encode(batch)
    for level in (80.0, 10.0, 0.03, 0.002):  # asked for by name, those outside are sane as well
        z = y + level * torch.randn(y.shape, generator=seeded(3))
        with torch.no_grad():
            logits = model.denoise(batch, z, level)[:, 1:]
        assert nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()) < 0.1, level
    made = model.continue_texts([[3, 4, 5], [20]], 6).tokens
    assert [row.tolist() for row in made] == [list(range(3, 12)), list(range(20, 27))]
