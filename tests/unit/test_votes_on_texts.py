"""Blocks that vote on next tokens: hand-computed averages, in evaluation and token by token; no leak; what it costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import HIDDEN, VOCAB, convert, same_states, seeded
from test_continuation import PROMPTS, converted, lists, original
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import diffusionblocks as db
from diffusionblocks.common.finite import FiniteCheck
from diffusionblocks.core.inference import Continuing
from diffusionblocks.data import TextBatches, python_topics
from diffusionblocks.evaluation.cross_entropy import language_row, plain_language_row, voted_rows
from diffusionblocks.sampling import LogitVotes
from diffusionblocks.training import EndToEnd, TrainConfig, Trainer
from diffusionblocks.training.ensemble import Ensemble

RULES = ("mean", "probabilities")


def average(logits: list[Tensor], combine: str) -> Tensor:
    """By hand, in float64: log-probabilities of the answer of several networks."""
    if combine == "mean":
        return torch.stack(logits).double().mean(dim=0).log_softmax(dim=-1)
    return torch.stack(logits).double().softmax(dim=-1).mean(dim=0).log()


def texts(count: int = 5, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=seeded())


def test_votes_by_hand() -> None:
    logits = [torch.randn(3, 7, generator=seeded(i)) for i in range(4)]
    votes = LogitVotes()
    for each in logits:
        votes.add(each)
    for combine in RULES:
        torch.testing.assert_close(votes.answer(combine).log_softmax(-1).double(), average(logits, combine))
    assert not torch.allclose(votes.answer("mean").softmax(-1), votes.answer("probabilities").softmax(-1))
    with pytest.raises(KeyError, match="mean"):
        LogitVotes(["probabilities"]).answer("mean")


@pytest.mark.parametrize("combine", RULES)
def test_blocks_that_see_no_noise_answer_as_the_average_of_ordinary_models(combine: str) -> None:
    """Cross-entropy and greedy text: those of the exported blocks, which are the library's own models."""
    model = converted("one-stream")
    exported: list[Any] = [model.export_block(index).eval() for index in range(2)]

    def together(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return average([each(input_ids=tokens).logits for each in exported], combine)

    batches = lambda: [{"input_ids": texts()}]  # noqa: E731
    expected = plain_language_row(together, batches)
    found = voted_rows(model, batches)[combine]
    assert found.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-5)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
    assert found.tokens == expected.tokens
    alone = [plain_language_row(lambda ids, each=each: each(input_ids=ids).logits, batches) for each in exported]
    assert found.cross_entropy < sum(row.cross_entropy for row in alone) / 2, "Jensen: of an average, whatever it is"

    def grown(text: list[int]) -> list[int]:
        for _ in range(8):
            text = [*text, int(together(torch.tensor([text]))[0, -1].argmax())]
        return text

    by_hand = [grown(list(prompt)) for prompt in PROMPTS]
    assert lists(model.generate(PROMPTS, 8, combine=combine, temperature=0)) == by_hand
    if combine == "mean":
        assert lists(model.generate(PROMPTS, 8, temperature=0)) == by_hand, "it is the default"


@pytest.mark.parametrize("family", ["llama", "one-stream", "recurrent"])
def test_one_block_alone_is_its_own_answer(family: str) -> None:
    target: dict[str, Any] = {"kind": "next-token", "logit_scale": 8.0, "noise_input": family != "one-stream"}
    model = db.convert(original(family), db.BlocksConfig(num_blocks=1, target=target)).eval()
    tokens, inference = texts(4, 6), model.inference
    assert isinstance(inference, Continuing)
    with torch.no_grad():
        votes = inference.vote({"input_ids": tokens}, seeded(3), FiniteCheck(owner=lambda level: 0))
        shape = model.target.encode({"input_ids": tokens}).shape
        level = model.noise.read_max
        z = model.noise.alpha_sigma(level)[1] * torch.randn(*shape, generator=seeded(3))
        context = model.denoise({"input_ids": tokens}, z, level, context=True)
    assert votes.count == 1
    torch.testing.assert_close(votes.answer("mean"), context)
    torch.testing.assert_close(votes.answer("probabilities"), context.log_softmax(-1))


def votes_of(model: db.DiffusionBlocks, tokens: Tensor) -> Tensor:
    inference = model.inference
    assert isinstance(inference, Continuing)
    with torch.no_grad():
        votes = inference.vote({"input_ids": tokens}, seeded(1), FiniteCheck(owner=model.partition.block_of))
    return votes.answer("probabilities")


def test_a_vote_knows_nothing_of_the_token_it_is_on() -> None:
    """The positive control: `losses_at` makes z of that token, and its context logits then do depend on it."""
    model, tokens = converted("llama"), texts(1, 8)
    other = tokens.clone()
    other[0, 4] = (tokens[0, 4] + 1) % VOCAB
    before, after = votes_of(model, tokens)[0], votes_of(model, other)[0]
    torch.testing.assert_close(before[:5], after[:5])  # of the tokens up to that one
    assert not torch.allclose(before[5:], after[5:], atol=1e-3)
    block, level = model.block(1), model.partition.interval(1)[0]
    with torch.no_grad():
        known, changed = (
            block.losses_at({"input_ids": ids}, max(level, model.noise.read_min), seeded(1)).context
            for ids in (tokens, other)
        )
    assert known is not None
    assert changed is not None
    assert not torch.allclose(known[0, 4], changed[0, 4], atol=1e-3)


def uncached(model: db.DiffusionBlocks, prompt: list[int], new: int, seed: int, combine: str) -> list[int]:
    """All anew for each token, with training's forward pass: a chain of z, and a draw from what its steps say."""
    g, levels = seeded(seed), model.partition.levels(model.noise)
    priors = torch.randn(32, HIDDEN, generator=g)
    uniforms = torch.rand(32, len(levels), generator=g, dtype=torch.float64)
    text = list(prompt)

    def drawn(logits: Tensor, uniform: Tensor) -> int:
        cumulative = logits.double().softmax(dim=0).cumsum(dim=0)
        return int((cumulative <= uniform * cumulative[-1]).sum())

    for number in range(new):
        z, contexts = levels[0] * priors[number], []
        for step, (level, following) in enumerate(itertools.pairwise(levels)):
            shown = torch.zeros(len(text) + 1, HIDDEN)
            shown[-1] = z
            with torch.no_grad():
                inputs = {"input_ids": torch.tensor([[*text, 0]])}
                context = model.denoise(inputs, shown[None], level, context=True)
                posterior = model.posterior(context, shown[None], level)[0, -1]
            contexts.append(context[0, -1])
            row = model.target.table[drawn(posterior, uniforms[number, step])]
            z = z + (following - level) * (z - row) / level
        text.append(drawn(average(contexts, combine), uniforms[number, -1]))
    return text


@pytest.mark.parametrize("combine", RULES)
def test_text_by_votes_is_that_of_everything_anew(combine: str) -> None:
    model = converted("llama")
    seeds = (3, 4, 5)
    found = lists(model.generate(PROMPTS, 7, seeds=seeds, combine=combine))
    assert found == [uncached(model, p, 7, s, combine) for p, s in zip(PROMPTS, seeds, strict=True)]
    assert found != lists(model.generate(PROMPTS, 7, seeds=seeds, combine="chain"))


def test_a_token_costs_one_pass_of_all_layers() -> None:
    model, calls = converted("llama"), [0, 0, 0, 0]
    for index, block in enumerate(model.blocks):
        for place, layer in enumerate(block.layers()):
            number = 2 * index + place
            layer.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    model.generate(PROMPTS, 5, combine="mean")
    assert calls == [5, 5, 5, 5]
    tokens = texts(4, 8)
    calls[:] = [0] * 4
    voted_rows(model, lambda: [{"input_ids": tokens}])
    assert calls == [1, 1, 1, 1]
    calls[:] = [0] * 4  # the control: levels one by one, of two contexts
    language_row(model, lambda: [{"input_ids": tokens}], levels=4)
    assert sum(calls) == 2 * 4 * 2


def test_what_cannot_vote_is_refused() -> None:
    model = convert("llama", layers=2, num_blocks=2, target={"kind": "next-token", "likelihood": "learned"})
    with pytest.raises(ValueError, match=r"combine = 'mean' needs the blocks' context logits.*likelihood = added"):
        model.generate([[1]], 2, combine="mean")
    with pytest.raises(ValueError, match="unknown combine 'product'; allowed: mean, probabilities, chain"):
        converted("llama").generate([[1]], 2, combine="product")
    with pytest.raises(ValueError, match="needs the blocks' context logits"):
        voted_rows(model, lambda: [{"input_ids": texts()}])
    with pytest.raises(ValueError, match="votes on next tokens are for autoregressive models, not for a"):
        voted_rows(convert(), lambda: [])


# ---- blocks of one stream ----------------------------------------------------------------------------------------


def test_a_block_of_one_stream_takes_one_plain_step_of_its_layers() -> None:
    """No noisy stream runs: its layers see the tokens once, and a step is the ordinary model's but for z . e."""
    model, tokens = converted("one-stream").train(), texts(4, 12)
    two = converted("llama").train()
    lengths: dict[str, list[int]] = {"one": [], "two": []}
    for name, each in (("one", model), ("two", two)):
        for layer in each.block(1).layers():
            layer.register_forward_hook(lambda _, args, __, name=name: lengths[name].append(args[0].shape[1]))
    operations = {}
    plain = EndToEnd(model.export_block(1)).train()
    for name, module in (("one", model.block(1)), ("two", two.block(1)), ("plain", plain)):
        with FlopCounterMode(display=False) as counter:
            module.loss({"input_ids": tokens}, seeded()).sum().backward()
        operations[name] = counter.get_total_flops()
    assert lengths["one"] == [11, 11], "the last token has nothing to predict"
    assert max(lengths["two"]) > 2 * 11, "the control: two streams"
    likelihood = 2 * tokens.numel() * VOCAB * HIDDEN  # one product with the table, forward alone
    assert operations["one"] <= operations["plain"] + likelihood
    assert operations["two"] > 1.5 * operations["plain"]


def test_blocks_of_one_stream_are_an_ensemble() -> None:
    """Their votes are the answers of `Ensemble`; at endless noise their loss is an ordinary model's."""
    model, tokens = converted("one-stream"), texts(6, 10)
    ensemble = Ensemble([model.export_block(index) for index in range(2)]).eval()
    inference = model.inference
    assert isinstance(inference, Continuing)
    with torch.no_grad():
        votes = inference.vote({"input_ids": tokens}, seeded(), FiniteCheck(owner=model.partition.block_of))
        for rule, logits in ensemble.answers(tokens).items():
            torch.testing.assert_close(votes.answer(str(rule)), logits[:, :-1])
        for index in range(2):
            block, member = model.block(index), ensemble.member(index)
            at_noise = block.losses_at({"input_ids": tokens}, 1e6, seeded()).losses
            torch.testing.assert_close(at_noise, member.loss({"input_ids": tokens}))
            low = block.losses_at({"input_ids": tokens}, 0.5, seeded()).losses
            assert not torch.allclose(low, at_noise, atol=1e-2)


def test_blocks_of_one_stream_train_on_data_orders_of_their_own() -> None:
    """As members of an ensemble do; each is the same whatever the other trains on."""
    seen: list[Tensor] = []

    class Recording(TextBatches):
        def __call__(self, indices: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
            seen.append(indices.clone())
            return super().__call__(indices, generator)

    batches, states = Recording(python_topics("train"), 8, device=torch.device("cpu")), []
    for only in (None, (1,)):
        target: Any = {"kind": "next-token", "noise_input": False}
        model = db.convert(original("llama", vocab_size=27), db.BlocksConfig(num_blocks=2, target=target))
        config = TrainConfig(steps=2, batch_size=4, blocks=only, schedule="sequential")
        Trainer(model, batches, config, progress=False).train()
        states.append({name: tensor.clone() for name, tensor in model.block(1).state_dict().items()})
    first, second, alone = seen[:2], seen[2:4], seen[4:]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(second), torch.cat(alone))
    assert same_states(*states)
