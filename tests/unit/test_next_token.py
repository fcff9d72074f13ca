"""What an autoregressive model knows: closed forms, the road from level to block, context that matters or does not."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HIDDEN, VOCAB, convert, randomise_adaptive, seeded
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import diffusionblocks as db
from diffusionblocks.evaluation.cross_entropy import (
    Batches,
    LanguageRow,
    decodable_share,
    language_row,
    plain_language_row,
)
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.noise import EDM
from diffusionblocks.reports.figures import draw_levels
from diffusionblocks.targets import NextTokenTarget
from diffusionblocks.training import EndToEnd

LONG = 16


def llama(vocab: int = VOCAB, layers: int = 2) -> LlamaForCausalLM:
    """A tiny model whose every parameter is random, as in a pretrained model."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.2,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def blocks(family: str = "llama", num_blocks: int = 2, **target: Any) -> db.DiffusionBlocks:
    """Converted; its adaptive norms are random, so that blocks and levels differ."""
    if family == "llama":
        original: Any = llama()
    else:
        num_blocks = 1
        sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "mlp_size": 48}
        layers = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            original = RecurrentDepth(VOCAB, LONG, **sizes, **layers)
    options: Any = {"kind": "next-token", **target}
    model = db.convert(original, db.BlocksConfig(num_blocks=num_blocks, overlap=0.1, target=options))
    randomise_adaptive(model)
    return model.eval()


def text(count: int = 6, length: int = LONG, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (count, length), generator=seeded(seed))


def split(tokens: Tensor, size: int = 4) -> Batches:
    return lambda: ({"input_ids": some} for some in tokens.split(size))


def nats_by_hand(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over tokens 1.. of each sequence; `logits` are of those tokens."""
    chances = logits.double().softmax(dim=-1)
    own = [[chances[i, j, tokens[i, 1 + j]] for j in range(tokens.shape[1] - 1)] for i in range(len(tokens))]
    return -torch.tensor(own, dtype=torch.float64).log().mean(dim=1)


class Recorder:
    """What every block of a model is given, and gives."""

    def __init__(self, model: db.DiffusionBlocks) -> None:
        self.calls: list[dict[str, Any]] = []
        for block in model.blocks:
            block.register_forward_hook(self._keep)

    def _keep(self, block: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs, z, level = arguments
        (sigma,) = set(level.tolist())
        output = block.posterior(output, z, level) if block.adds_likelihood else output  # asked for its context
        kept = {"block": block.index, "inputs": inputs["input_ids"], "z": z, "level": sigma, "output": output}
        self.calls.append(kept | {"training": block.training})


# ---- the plain model ---------------------------------------------------------------------------------------


def test_known_chances_in_closed_form() -> None:
    tokens, chances = text(9), torch.rand(VOCAB, generator=seeded(1)).softmax(dim=0)
    row = plain_language_row(lambda ids: chances.log().expand(*ids.shape, VOCAB), split(tokens))
    means = [-sum(math.log(chances[t]) for t in sequence[1:]) / (LONG - 1) for sequence in tokens]
    assert row.cross_entropy == pytest.approx(statistics.fmean(means), rel=1e-6)
    assert row.standard_error == pytest.approx(statistics.stdev(means) / 3, rel=1e-5)
    assert row.tokens == 9 * (LONG - 1)
    assert (row.context_gap, row.decodable_share, row.by_level) == (None, None, ())


def test_the_plain_model_is_scored_as_the_library_scores_it() -> None:
    tokens, model = text(8), llama()
    row = plain_language_row(EndToEnd(model), split(tokens))
    assert row.cross_entropy == pytest.approx(model(input_ids=tokens, labels=tokens).loss.item(), rel=1e-5)


# ---- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "recurrent"])
def test_every_level_by_its_block_with_the_same_noise(family: str) -> None:
    model, tokens, levels = blocks(family), text(6), 5
    recorder = Recorder(model)
    row = language_row(model, split(tokens), levels=levels, seed=3)
    shift = 1 if family == "recurrent" else 0
    noise = model.noise
    assert isinstance(noise, EDM)
    wanted = torch.linspace(math.log(noise.read_max), math.log(noise.read_min), levels, dtype=torch.float64).exp()
    assert torch.allclose(torch.tensor([at.level for at in row.by_level], dtype=torch.float64), wanted)
    assert row.by_level[0].level == noise.read_max
    owned = recorder.calls
    assert len(owned) == 2 * 2 * levels  # two batches, each with its own and with another context
    for call in owned:
        low, high = model.partition.interval(call["block"])
        assert low * (1 - 1e-6) <= call["level"] <= high * (1 + 1e-6)
        assert not call["training"]
    assert {call["block"] for call in owned} == set(range(model.partition.num_blocks))
    eps = {}
    for place, at in enumerate(row.by_level):
        assert at.block == owned[2 * place]["block"]
        own = [owned[2 * (levels * batch + place)] for batch in range(2)]
        other = [owned[2 * (levels * batch + place) + 1] for batch in range(2)]
        assert torch.equal(torch.cat([call["inputs"] for call in own]), tokens)
        assert torch.equal(torch.cat([call["inputs"] for call in other]), tokens[[1, 0, 1, 2, 3, 4]])
        for calls, found in ((own, at.cross_entropy), (other, at.scrambled)):
            logits = torch.cat([call["output"] for call in calls])[:, 1 - shift :]
            assert logits.shape[1] == LONG - 1
            assert found == pytest.approx(nats_by_hand(logits, tokens).mean().item(), rel=1e-5)
        z = torch.cat([call["z"] for call in own])
        assert torch.equal(z, torch.cat([call["z"] for call in other]))
        eps[place] = (z.double() - model.target.encode({"input_ids": tokens})) / at.level
    for place in range(levels - 1):
        torch.testing.assert_close(eps[place], eps[0], atol=1e-4, rtol=1e-4)
    assert abs(eps[0].std().item() - 1) < 0.05
    assert not torch.allclose(eps[0][:2], eps[0][4:], atol=0.1)  # another batch has other noise


def test_headline_is_at_the_highest_level_read() -> None:
    model, tokens = blocks(), text(6)
    recorder = Recorder(model)
    row = language_row(model, split(tokens, 6), levels=3)
    nats = nats_by_hand(recorder.calls[0]["output"][:, 1:], tokens)
    assert row.cross_entropy == pytest.approx(nats.mean().item(), rel=1e-5)
    assert row.standard_error == pytest.approx(statistics.stdev(nats.tolist()) / 6**0.5, rel=1e-4)
    assert row.context_gap == pytest.approx(row.by_level[0].scrambled - row.by_level[0].cross_entropy, rel=1e-6)
    assert row.tokens == 6 * (LONG - 1)


def test_only_the_owners_figures_move_with_a_block() -> None:
    """With block 0 changed its levels have other figures, and those of block 1 the same."""
    model, tokens = blocks(), text(4)
    before = language_row(model, split(tokens), levels=4)
    for module in model.blocks[0].adaptive.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data.neg_()
    after = language_row(model, split(tokens), levels=4)
    for old, new in zip(before.by_level, after.by_level, strict=True):
        assert (old.cross_entropy == new.cross_entropy) == (old.block == 1)


def test_seed_mode_and_global_randomness() -> None:
    model, tokens = blocks(), text(6)
    model.train()
    state = torch.get_rng_state()
    row = language_row(model, split(tokens), levels=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(block.training for block in model.blocks)
    assert language_row(model, split(tokens), levels=3, seed=1) == row
    assert language_row(model, split(tokens), levels=3, seed=2) != row
    assert all(parameter.grad is None for parameter in model.parameters())
    assert json.loads(json.dumps(row.to_dict()))["by_level"][0]["level"] == row.by_level[0].level


# ---- context -----------------------------------------------------------------------------------------------


def test_a_model_that_ignores_its_context_has_no_gap() -> None:
    model, tokens = blocks(embedding="frozen"), text(8)
    assert language_row(model, split(tokens), levels=4).context_gap != 0  # the control: random weights do look
    for block in model.blocks:  # all tokens look alike, and the noised target alone tells one from another
        weight = block.get_parameter("network.model.embed_tokens.weight")
        weight.data.copy_(weight.data[:1].expand_as(weight))
    row = language_row(model, split(tokens), levels=4)
    assert row.context_gap == 0
    assert all(at.cross_entropy == at.scrambled for at in row.by_level)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_other_context_is_never_the_own_one(size: int) -> None:
    """In batches of one too, and in a last batch of one."""
    model, tokens = blocks(), text(7)
    recorder = Recorder(model)
    language_row(model, split(tokens, size), levels=2)
    own = torch.cat([call["inputs"] for call in recorder.calls[0::4]])
    other = torch.cat([call["inputs"] for call in recorder.calls[1::4]])
    assert torch.equal(own, tokens)
    assert torch.equal(other, tokens[[1, 0, 1, 2, 3, 4, 5]])


# ---- what z gives away -------------------------------------------------------------------------------------


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def two_rows(distance: float) -> NextTokenTarget:
    """Two unit rows so far apart."""
    angle = 2 * math.asin(distance / 2)
    target = NextTokenTarget(2, 4, learned=False, seed=0)
    target.take_rows(torch.tensor([[1.0, 0, 0, 0], [math.cos(angle), math.sin(angle), 0, 0]]))
    return target


@pytest.mark.parametrize("distance", [0.3, 1.2, 2.0])
def test_decodable_share_of_two_tokens_in_closed_form(distance: float) -> None:
    """P(the nearest of two is right) = Phi(distance / (2 sigma)), over the training distribution."""
    noise, target = EDM(), two_rows(distance)
    tokens = torch.arange(200_000) % 2
    middles = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    wanted = statistics.fmean(normal_cdf(distance / (2 * sigma)) for sigma in noise.icdf(middles).tolist())
    # A token's share over the levels has a standard deviation of at most 1/2: this is five standard errors.
    assert decodable_share(noise, target, tokens) == pytest.approx(wanted, abs=5 * 0.5 / 200_000**0.5)


@pytest.mark.slow
def test_decodable_share_of_orthogonal_rows_in_closed_form() -> None:
    """Independent scores: P(right) = integral of phi(x) Phi(x + 1 / sigma)^(n - 1)."""
    count = 12
    target = NextTokenTarget(count, 16, learned=False, seed=0)
    target.take_rows(torch.linalg.qr(torch.randn(16, 16, generator=seeded())).Q[:count])
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)

    def right(sigma: float) -> float:
        return torch.trapezoid(density * torch.special.ndtr(x + 1 / sigma) ** (count - 1), x).item()

    levels = EDM().icdf((torch.arange(500, dtype=torch.float64) + 0.5) / 500).tolist()
    wanted = statistics.fmean(right(sigma) for sigma in levels)
    tokens = torch.arange(200_004) % count
    assert decodable_share(EDM(), target, tokens) == pytest.approx(wanted, abs=5 * 0.5 / 200_000**0.5)


def test_decodable_share_at_each_level_in_closed_form() -> None:
    model = db.convert(llama(2), db.BlocksConfig(num_blocks=1, overlap=0.0))
    count = 64
    row = language_row(model, split(text(count, 32, 2), 32), levels=9)
    target = model.target
    assert isinstance(target, NextTokenTarget)
    distance = (target.table[0] - target.table[1]).norm().item()
    between = 0
    for at in row.by_level:
        wanted = normal_cdf(distance / (2 * at.level))
        error = math.sqrt(wanted * (1 - wanted) / (count * 32))
        assert at.decodable == pytest.approx(wanted, abs=5 * error + 1e-9)
        between += 0.6 < wanted < 0.99
    assert between >= 1
    assert row.decodable_share is not None
    assert row.by_level[0].decodable < row.decodable_share < row.by_level[-1].decodable == 1.0


def test_neighbouring_rows_are_told_apart_under_autocast() -> None:
    target = two_rows(0.02)
    noise, tokens = EDM(sigma_min=1e-4, sigma_max=1e-3, p_mean=-8.0), torch.arange(400) % 2
    assert decodable_share(noise, target, tokens) == 1.0
    with torch.autocast("cpu", torch.bfloat16):
        scores = target.rows(tokens) @ target.table.T
        assert (scores.argmax(dim=-1) == tokens).float().mean() < 0.6  # the control: products in bfloat16 do not
        assert decodable_share(noise, target, tokens) == 1.0


def test_decodable_share_depends_on_the_distribution_of_levels() -> None:
    target, tokens = two_rows(1.0), torch.arange(4000) % 2
    low, usual, high = (decodable_share(EDM(p_mean=mean), target, tokens) for mean in (-3.0, -1.2, 1.5))
    assert low > usual + 0.02 > high + 0.1


# ---- refusals and the figure -------------------------------------------------------------------------------


def test_refusals() -> None:
    model, tokens = blocks(), text(4)
    with pytest.raises(ValueError, match="levels must be >= 2, got 1"):
        language_row(model, split(tokens), levels=1)
    with pytest.raises(ValueError, match="for autoregressive models, not for a ViTForImageClassification"):
        language_row(convert(), split(tokens))
    with pytest.raises(ValueError, match="not for a MaskedTransformer"):
        language_row(convert("masked"), split(tokens))
    nothing: list[dict[str, Tensor]] = []
    mixed = [{"input_ids": tokens}, {"input_ids": tokens[:, :8]}]
    wrong: list[tuple[Iterable[dict[str, Tensor]], str]] = [
        (nothing, "at least two sequences, got 0"),
        ([{"input_ids": tokens[:1]}], "at least two sequences, got 1"),
        ([{"input_ids": tokens[:, :1]}], "sequences have 1 token"),
        (mixed, "one length; got 8 after 16"),
    ]
    for batches, message in wrong:
        with pytest.raises(ValueError, match=message):
            language_row(model, lambda batches=batches: batches, levels=2)
        with pytest.raises(ValueError, match=message):
            plain_language_row(EndToEnd(llama()), lambda batches=batches: batches)


@pytest.mark.slow
def test_figure(tmp_path: Path) -> None:
    model = blocks()
    row = language_row(model, split(text(4)), levels=6)
    draw_levels(row, model.partition, tmp_path / "new" / "levels.png", baselines=[("end to end, 2 layers", 2.5)])
    assert (tmp_path / "new" / "levels.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["levels.png"]
    with pytest.raises(ValueError, match="the row has no levels"):
        draw_levels(LanguageRow(2.5, 0.1, 10), model.partition, tmp_path / "none.png")
