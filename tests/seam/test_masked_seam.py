"""Masked text through the whole seam: convert, train, save, load, route, generate, measure; and known answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LENGTH,
    POLICIES,
    VOCAB,
    convert,
    edit_index,
    fresh_masked,
    image_batch,
    record_calls,
    same_states,
    seeded,
    tiny,
    token_batch,
    train_a_little,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import diffusionblocks as db
from diffusionblocks.config import BlocksConfig
from diffusionblocks.evaluation.bits import bits_per_character
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.targets import TokenTarget

MASK = VOCAB


def recipe_of(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "t",
        "model": {
            "type": "MaskedTransformer",
            "config": {
                "sequence_length": 16,
                "embedding_size": 16,
                "hidden_size": 32,
                "num_layers": 4,
                "num_attention_heads": 2,
                "mlp_size": 48,
            },
        },
        "blocks": {"num_blocks": 2},
        "data": {"kind": "topics", "length": 16},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"kind": "bits", "limit": 40},
        "device": "cpu",
    }
    return parse_recipe(values | changes, "a test")


# ---- the whole journey --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", POLICIES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_convert_train_save_load_generate(schedule: str, shared: str, tmp_path: Path) -> None:
    model = convert("masked", shared=shared, noise=db.Masking(schedule=schedule))
    start = copy.deepcopy(model.state_dict())
    train_a_little(model)
    moved = {name.split(".")[1] for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == {"0", "1", "2"}
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    assert same_states(loaded.state_dict(), model.state_dict())
    assert loaded.blocks_config == model.blocks_config
    assert loaded.partition == model.partition
    for b in range(3):
        ours, theirs = (m.loss(token_batch(), block=b, generator=seeded()) for m in (model, loaded))
        assert torch.equal(ours, theirs)
    calls = record_calls(loaded)
    texts = loaded.generate([3, 4, 5], steps=7)
    assert texts.shape == (3, LENGTH)
    assert 0 <= texts.min() <= texts.max() < VOCAB
    assert torch.equal(texts, model.generate([3, 4, 5], steps=7))
    assert torch.equal(texts[1:2], model.generate([4], steps=7))
    levels = loaded.noise.levels(7)[:-1]
    assert [level for _, level in calls] == pytest.approx(levels)
    assert [place for place, _ in calls] == [loaded.partition.block_of(level) for level in levels]
    # Block 0 owns the highest levels, which are the first of a chain.
    assert [place for place, _ in calls] == sorted(place for place, _ in calls)
    assert calls[0][0] == 0
    assert calls[-1][0] == 2


def test_blocks_in_the_wrong_order_make_other_texts() -> None:
    """The positive control: it matters which block runs at which level."""
    model = convert("masked").eval()
    right = model.generate(range(8), steps=12)
    bits = measured(model)
    model.blocks = nn.ModuleList(reversed(list(model.blocks)))
    assert not torch.equal(model.generate(range(8), steps=12), right)
    assert measured(model) != pytest.approx(bits, abs=1e-4)


def measured(model: db.DiffusionBlocks) -> float:
    networks = {b: lambda z, t, b=b: model.block(b)({}, z, t) for b in range(model.partition.num_blocks)}
    batches = [token_batch(32, seed) for seed in range(2)]
    return bits_per_character(networks, model.noise, batches, model.partition).bits


def test_training_evaluation_and_sampling_have_one_order_of_blocks(tmp_path: Path) -> None:
    """Through the seam: each block knows one letter of its own, so what each road makes tells which block it asked."""
    model = db.convert(fresh_masked(), BlocksConfig(overlap=0.0)).eval()
    with torch.no_grad():
        for b in range(3):
            model.block(b).network.get_submodule("head.linear").bias[b + 1] = 50.0  # a, b, c, ...
    model.save_pretrained(tmp_path / "m")
    loaded = db.load(tmp_path / "m")
    texts = loaded.generate(range(50), steps=30)
    assert set(texts.unique().tolist()) == {1, 2, 3}
    share = [(texts == b + 1).float().mean().item() for b in range(3)]
    assert share == pytest.approx([1 / 3] * 3, abs=0.06)  # blocks of equal mass reveal as many letters each
    for b in range(3):
        of_letter = {"input_ids": torch.full((64, LENGTH), b + 1)}
        losses = [loaded.loss(of_letter, block=other, generator=seeded()).mean().item() for other in range(3)]
        assert [loss < 1e-3 for loss in losses] == [other == b for other in range(3)]
        bits = bits_per_character(
            {c: lambda z, t, c=c: loaded.block(c)({}, z, t) for c in range(3)},
            loaded.noise,
            [of_letter],
            loaded.partition,
        )
        assert [bit < 1e-3 for bit in bits.block_bits] == [other == b for other in range(3)]


def test_training_levels_are_the_blocks_own() -> None:
    model = convert("masked", overlap=0.1)
    for b, block in enumerate(model.blocks):
        levels: list[Tensor] = []
        block.register_forward_pre_hook(lambda _, args, levels=levels: levels.append(args[2]))
        for seed in range(20):
            model.loss(token_batch(), block=b, generator=seeded(seed))
        drawn = torch.cat(levels)
        low, high = model.partition.training_interval(b)
        assert low <= drawn.min() <= drawn.max() <= high
        assert drawn.min() < low + 0.1 * (high - low)
        assert drawn.max() > high - 0.1 * (high - low)
    assert model.partition.interval(0) == pytest.approx((2 / 3, 1.0))
    assert model.partition.training_interval(0) == pytest.approx((2 / 3 - 0.1 / 3, 1.0))


# ---- known answers ---------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("method", ["diffusionblocks", "end-to-end"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_uniform_model_takes_log2_27_bits(schedule: str, method: str) -> None:
    """A fresh model is uniform; the recipe's own road measures it. Only the number of masked characters varies."""
    recipe = recipe_of(
        method=method,
        blocks={"num_blocks": 2, "noise": {"kind": "masking", "schedule": schedule}},
        evaluate={"kind": "bits", "limit": 600, "times": 4},
    )
    experiment = Experiment(recipe)
    (row,) = experiment.task.measure(experiment, experiment.build())
    assert row.sequences == 600
    assert row.bits == pytest.approx(math.log2(27), abs=4 * row.standard_error)
    assert row.standard_error < 0.1
    blocks = 2 if method == "diffusionblocks" else 1
    assert len(row.block_bits) == blocks
    for bits, error in zip(row.block_bits, row.block_errors, strict=True):
        assert bits == pytest.approx(math.log2(27) / blocks, abs=4 * error)


@pytest.mark.slow
def test_the_unigram_model_takes_the_cross_entropy_of_its_letters() -> None:
    """Biases of the read-out make a model of letters by their frequency, at every level and in every block."""
    recipe = recipe_of(evaluate={"kind": "bits", "limit": 600, "times": 8})
    model = Experiment(recipe).build()
    counts = torch.bincount(recipe.data.load("train").text.ids.long(), minlength=27).double()
    frequencies = counts / counts.sum()
    with torch.no_grad():
        for block in model.blocks:
            block.network.get_submodule("head.linear").bias.copy_(frequencies.log())
    (row,) = recipe.task.measure(Experiment(recipe), model)
    ids = recipe.data.load("test").text.ids[: 600 * 16].long()
    expected = -frequencies.log2()[ids].mean().item()
    assert 3.9 < expected < 4.3
    assert row.bits == pytest.approx(expected, abs=4 * row.standard_error)


def test_loss_by_hand() -> None:
    model = convert("masked").eval()
    batch, level = token_batch(), torch.tensor([0.67, 0.7, 0.8, 0.9, 0.99, 1.0])
    losses = model.loss(batch, block=0, generator=seeded(), level=level)
    tokens = batch["input_ids"]
    masked = 1e-4 + (1 - 2e-4) * level.double()
    z = tokens.masked_fill(torch.rand(tokens.shape, generator=seeded()) < masked[:, None], MASK)
    assert (z == MASK).any()
    assert (z != MASK).any()
    nats = -model.block(0)({}, z, level).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    expected = (nats * (z == MASK)).sum(1) / LENGTH * ((1 - 2e-4) / masked)
    torch.testing.assert_close(losses.double(), expected.double(), rtol=1e-5, atol=1e-6)
    plain = convert("masked", target={"kind": "tokens", "weight": "none"}).eval()
    losses = plain.loss(batch, block=0, generator=seeded(), level=level)
    torch.testing.assert_close(losses.double(), ((nats * (z == MASK)).sum(1) / LENGTH).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_mean_training_loss_is_the_bound(schedule: str) -> None:
    """The mean of the blocks' training losses is the bound in nats a character, whatever the schedule."""
    model = convert("masked", overlap=0.0, noise=db.Masking(schedule=schedule)).eval()
    batch = token_batch(3000)
    with torch.no_grad():
        nats = sum(model.loss(batch, block=b, generator=seeded(b)).mean().item() for b in range(3)) / 3
    networks = {b: lambda z, t, b=b: model.block(b)({}, z, t) for b in range(3)}
    bits = bits_per_character(networks, model.noise, [batch], model.partition)
    assert nats / math.log(2) == pytest.approx(bits.bits - bits.reconstruction, abs=5 * bits.standard_error)


def test_hidden_tokens_are_hidden() -> None:
    """What is masked reaches the network by no road: only the loss knows it."""
    model = convert("masked").eval()
    batch = token_batch()
    tokens = batch["input_ids"]
    level = torch.full((6,), 0.8)
    seen: list[Tensor] = []
    model.block(0).register_forward_hook(lambda _, args, output: seen.extend([args[1], output]))
    model.loss(batch, block=0, generator=seeded(), level=level)
    hidden = seen[0] == MASK
    assert hidden.any()
    assert torch.equal(seen[0][~hidden], tokens[~hidden])
    model.loss({"input_ids": tokens.where(~hidden, (tokens + 1) % VOCAB)}, block=0, generator=seeded(), level=level)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    # The positive control: what is shown does reach it.
    model.loss({"input_ids": tokens.where(hidden, (tokens + 1) % VOCAB)}, block=0, generator=seeded(), level=level)
    assert not torch.equal(seen[1], seen[5])


def test_infilling_keeps_what_is_given() -> None:
    model = convert("masked").eval()
    given = token_batch(1)["input_ids"][0].clone()
    given[3:7] = MASK
    texts = model.generate(range(20), steps=4, template=given)
    assert torch.equal(texts[:, given != MASK], given[given != MASK].expand(20, -1))
    assert len({tuple(row) for row in texts[:, 3:7].tolist()}) > 10
    assert (texts < VOCAB).all()


# ---- other roads in ----------------------------------------------------------------------------------------------


def test_a_plain_call_returns_a_loss_in_both_modes() -> None:
    model = convert("masked")
    assert model.train()(**token_batch(), generator=seeded()).loss.requires_grad
    model.eval()
    expected = torch.stack([model.loss(token_batch(), b, g).mean() for g in [seeded()] for b in range(3)]).mean()
    assert torch.equal(model(**token_batch(), generator=seeded()).loss, expected)


def test_transformers_trainer_trains(tmp_path: Path) -> None:
    model = convert("masked")
    start = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    examples = [{"input_ids": row} for row in token_batch(16)["input_ids"]]
    result = Trainer(model=model, args=arguments, train_dataset=examples).train()
    assert result.global_step == 6
    assert math.isfinite(result.training_loss)
    assert not same_states(model.state_dict(), start)


@pytest.mark.parametrize("trainer", [Trainer, db.BlocksTrainer])
def test_trainers_train_a_foreign_model_with_its_tokenizer(trainer: type[Trainer], tmp_path: Path) -> None:
    letters = {chr(97 + i): i for i in range(26)} | {"[PAD]": 26, "[MASK]": 27}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]")
    noise = db.Masking(vocab_size=28, mask_token_id=processing.mask_token_id)
    model = db.convert(tiny("bert", pad_token_id=26), BlocksConfig(noise=noise))
    start = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    examples = [dict(processing("abcdefghijkl"[i:] + "abcdefghijkl"[:i])) for i in range(12)]
    loop = trainer(model, arguments, train_dataset=examples, eval_dataset=examples, processing_class=processing)  # type: ignore[arg-type]
    assert math.isfinite(loop.train().training_loss)
    assert math.isfinite(loop.evaluate()["eval_loss"])
    assert not same_states(model.state_dict(), start)


@pytest.mark.parametrize("noise", [None, db.EDM(p_mean=-0.7)])
def test_configs_that_were_saved_before_there_were_kinds_still_load(noise: db.EDM | None, tmp_path: Path) -> None:
    model = convert("dit", noise=noise).eval()
    model.save_pretrained(tmp_path / "m")
    edit_index(tmp_path / "m", lambda values: values["blocks_config"]["noise"].pop("kind"))
    loaded = db.load(tmp_path / "m")
    assert loaded.blocks_config == model.blocks_config
    assert torch.equal(loaded.sample([1], steps=3), model.sample([1], steps=3))


def test_branching_copies_the_trunk() -> None:
    trunk = convert("masked", num_blocks=1).eval()
    branched = db.branch(trunk, 3)
    assert branched.partition.num_layers == 9
    assert torch.equal(branched.generate([1, 2], steps=9), trunk.generate([1, 2], steps=9))


# ---- refusals ------------------------------------------------------------------------------------------------------

MODEL = convert("masked").eval()
TOKENS = token_batch()["input_ids"]
CASES: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
    (lambda: convert("masked", noise=db.EDM()), ("noise.kind = edm", "MaskedTransformer needs masking")),
    (
        lambda: convert("dit", noise=db.Masking()),
        ("noise.kind = masking", "DiT needs ddpm or edm or flow", "leave noise out"),
    ),
    (lambda: convert("masked", noise=db.Masking(vocab_size=30)), ("vocab_size = 30", "vocab_size = 27")),
    (lambda: convert("masked", target={"kind": "image"}), ("target.kind = image", "denoises tokens")),
    (lambda: convert("masked", partition="log-uniform"), ("log-uniform", "masking", "equi-probability, uniform")),
    (lambda: convert("masked", conditioning_dim=8), ("conditioning_dim = 8", "leave it out")),
    (lambda: db.convert(fresh_masked(), BlocksConfig(shared="frozen")), ("frozen", "head.linear", "never learn")),
    (lambda: BlocksConfig(noise={"kind": "cold"}), ("noise", "cold", "edm", "masking")),
    (lambda: BlocksConfig(noise={"kind": "masking", "schedule": "sqrt"}), ("'sqrt'", "linear, cosine")),
    (lambda: MODEL.loss({"input_ids": TOKENS.float()}, 0), ("int64", "(6, 12)", "float32")),
    (lambda: MODEL.loss({"input_ids": TOKENS[:, :5]}, 0), ("(6, 12)", "(6, 5)")),
    (lambda: MODEL.loss({"input_ids": TOKENS + 9}, 0), ("[0, 26]",)),
    (lambda: MODEL.loss(image_batch(), 0), ("lacks ['input_ids']",)),
    (lambda: MODEL.loss({"input_ids": TOKENS}, 0, level=torch.full((6,), 0.2)), ("level 0.2", "block 2 owns it")),
    (lambda: MODEL.sample([0]), ("sample is for diffusion models", "generates text: use generate")),
    (lambda: MODEL.predict(image_batch()["pixel_values"]), ("predict is for classifiers", "use generate")),
    (lambda: convert("dit").generate(), ("generate is for text models", "DiT generates images: use sample")),
    (lambda: convert("vit").generate(), ("generate is for text models", "classifies: use predict")),
    (lambda: MODEL.generate(steps=0), ("steps must be >= 1, got 0",)),
    (lambda: MODEL.generate(grid="karras"), ("'karras'", "equal-quantile", "cosine", "uniform")),
    (lambda: MODEL.generate(template=TOKENS[0, :5]), ("template", "(12,)", "(5,)")),
    (lambda: MODEL.generate(temperature=-1.0), ("temperature", "-1")),
    (lambda: recipe_of(evaluate={"kind": "accuracy"}), ("evaluate.kind must be bits for MaskedTransformer",)),
    (lambda: recipe_of(data={"kind": "digits"}), ("MaskedTransformer generates text", "topics, text")),
    (lambda: recipe_of(data={"kind": "topics"}), ("data.length", "is missing")),
    (lambda: recipe_of(blocks={"noise": {"kind": "masking", "p_std": 1}}), ("blocks.noise.p_std",)),
]


@pytest.mark.parametrize(("act", "words"), CASES, ids=[case[1][0] for case in CASES])
def test_refused_with_the_value_and_what_is_allowed(act: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        act()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"the message lacks {missing}: {error.value}"


def test_without_z_every_token_counts() -> None:
    target = TokenTarget(VOCAB, LENGTH)
    loss = target.loss(torch.zeros(6, LENGTH, VOCAB), token_batch())
    torch.testing.assert_close(loss, torch.full((6,), math.log(VOCAB)))
    assert (target.loss(torch.zeros(6, LENGTH, VOCAB), token_batch(), token_batch()["input_ids"]) == 0).all()


def test_the_helpers_model_is_what_the_tests_take_it_for() -> None:
    assert all(bool((p != 0).any()) for p in tiny("masked").parameters())
