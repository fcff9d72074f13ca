"""Padding and tokens that do not count: a text's loss is that of the text alone; what cannot be followed is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import HIDDEN, LENGTH, VOCAB, convert, image_batch, seeded, tiny, token_batch
from torch import Tensor

import diffusionblocks as db
from diffusionblocks.core.block import Block
from diffusionblocks.models import RecurrentDepth
from diffusionblocks.targets import NextTokenTarget, cross_entropies
from diffusionblocks.training import EndToEnd

KINDS = ("two streams", "two streams, clean loss", "one stream")
LENGTHS = (3, 7, LENGTH)  # of the texts, each padded to LENGTH
LEVEL = 1.0


def next_token(kind: str, chunk: int | None = None) -> db.DiffusionBlocks:
    """In training mode, which a clean loss needs; there is no dropout."""
    if kind == "one stream":
        sizes = {"hidden_size": HIDDEN, "num_attention_heads": 2, "mlp_size": 48, "mean_recurrence": 2}
        original = RecurrentDepth(vocab_size=VOCAB, sequence_length=LENGTH, **sizes)
        with torch.no_grad():
            for p in original.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=seeded()))
        model = db.convert(original, db.BlocksConfig(num_blocks=1))
    else:
        target = {"kind": "next-token", "clean_weight": 0.5 if "clean" in kind else 0.0}
        model = db.convert(tiny("llama"), db.BlocksConfig(num_blocks=1, target=target))  # type: ignore[arg-type]
    model.block(0).loss_chunk = chunk
    return model.train()


def loss(model: db.DiffusionBlocks, noise: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Losses at one level, with given noise for the target of every token, (batch, length, dim)."""
    block, shift = model.block(0), model.target.shift  # type: ignore[union-attr]
    drawn = type(block.noise).draws

    def draws(self: object, shape: tuple[int, ...], **_: Any) -> Tensor:
        assert shape[1] == batch["input_ids"].shape[1] - shift
        return noise[: shape[0], : shape[1]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block.noise), "draws", draws)
        found = model.loss(batch, 0, level=torch.full((len(batch["input_ids"]),), LEVEL))
    assert type(block.noise).draws is drawn
    return found


def texts() -> tuple[Tensor, Tensor]:
    """Tokens and a mask of texts that are padded on the right."""
    ids = token_batch(3)["input_ids"]
    return ids, (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).long()


NOISE = torch.randn(3, LENGTH, HIDDEN, generator=seeded(9))


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_as_if_it_were_not_there(kind: str, chunk: int | None) -> None:
    model = next_token(kind, chunk)
    ids, mask = texts()
    alone = torch.cat([loss(model, NOISE[i : i + 1], {"input_ids": ids[i : i + 1, :n]}) for i, n in enumerate(LENGTHS)])
    padded = loss(model, NOISE, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
    # Labels say the same where padding stands on the right, as causal attention never looks there.
    labelled = loss(model, NOISE, {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)})
    torch.testing.assert_close(labelled, alone, rtol=1e-5, atol=1e-6)
    both = loss(model, NOISE, {"input_ids": ids, "attention_mask": mask.bool(), "labels": ids})
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(loss(model, NOISE, {"input_ids": ids})[:2], alone[:2], rtol=1e-3)  # the control


@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_for_nothing_wherever_it_stands(kind: str) -> None:
    model = next_token(kind)
    ids, mask = texts()
    right = loss(model, NOISE, {"input_ids": ids, "attention_mask": mask})
    left = torch.stack([row.roll(LENGTH - n) for row, n in zip(ids, LENGTHS, strict=True)])
    there = mask.flip(1)
    assert torch.equal(loss(model, NOISE, {"input_ids": left, "attention_mask": there}), right)
    holes, gaps = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, n in enumerate(LENGTHS):
        places = torch.randperm(LENGTH, generator=seeded(row))[:n].sort().values
        holes[row, places], gaps[row, places] = ids[row, :n], 1
    assert torch.equal(loss(model, NOISE, {"input_ids": holes, "attention_mask": gaps}), right)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_does_not_leak(kind: str) -> None:
    model = next_token(kind)
    ids, mask = texts()
    batch = {"input_ids": ids, "attention_mask": mask}

    def found(batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        losses = loss(model, NOISE, batch)
        losses.sum().backward()
        return losses.detach(), [p.grad for p in model.parameters()]

    before, gradients = found(batch)
    other = torch.where(mask == 0, (ids + 1) % VOCAB, ids)
    after, again = found(batch | {"input_ids": other})
    assert torch.equal(before, after)
    # Bit for bit but for the embedding's, which sums the zeros of other rows.
    for a, b in zip(gradients, again, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    shown = torch.where(torch.arange(LENGTH) == 1, (ids + 1) % VOCAB, ids)  # the positive control
    assert not torch.isclose(found(batch | {"input_ids": shown})[0], before, rtol=1e-4).any()


def test_evaluation_draws_nothing_from_what_is_hidden() -> None:
    model = next_token("two streams").eval()
    ids, mask = texts()
    other = torch.where(mask == 0, (ids + 1) % VOCAB, ids)
    with torch.no_grad():
        found = [model(input_ids=some, attention_mask=mask).loss for some in (ids, other)]
        assert torch.equal(*found)
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).loss, model(input_ids=ids).loss
        )
        assert not torch.isclose(model(input_ids=other).loss, model(input_ids=ids).loss, rtol=1e-4)  # the control


@pytest.mark.parametrize("chunk", [None, 5])
def test_only_tokens_that_count_are_in_the_mean(chunk: int | None) -> None:
    """A prompt is read, and costs nothing: in closed form from the logits of the whole text."""
    model = next_token("two streams, clean loss", chunk)
    block = model.block(0)
    assert isinstance(block, Block)
    assert isinstance(block.target, NextTokenTarget)
    ids = token_batch(3)["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6] = -100
    level = torch.full((3,), LEVEL)
    z = block.noise.corrupt(block.target.encode({"input_ids": ids}), level, NOISE)
    noisy, clean = block({"input_ids": ids}, z, level).split(LENGTH, dim=1)  # type: ignore[union-attr]
    counted = (labels != -100).float()
    first = (cross_entropies(noisy, ids) * counted).sum(1) / counted.sum(1)
    second = (cross_entropies(clean[:, :-1], ids[:, 1:]) * counted[:, 1:]).sum(1) / counted[:, 1:].sum(1)
    weight = block.noise.training_weight(level).float() if block.weight != "none" else 1.0
    found = loss(model, NOISE, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(found, (first + 0.5 * second) * weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_a_token_that_counts_adds_nothing(kind: str) -> None:
    model = next_token(kind)
    ids, _ = texts()
    labels = ids.clone()
    labels[1] = -100
    losses = loss(model, NOISE, {"input_ids": ids, "labels": labels})
    assert losses[1] == 0
    assert torch.equal(losses[[0, 2]], loss(model, NOISE, {"input_ids": ids})[[0, 2]])
    with torch.no_grad():
        found = model(input_ids=ids, labels=labels, generator=seeded()).loss
        losses = model.loss({"input_ids": ids, "labels": labels}, 0, generator=_after_the_draw(model))
    assert found.item() == pytest.approx(losses[[0, 2]].mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="no token of the batch counts"):
        model.loss({"input_ids": ids, "labels": torch.full_like(ids, -100)}, 0)


def _after_the_draw(model: db.DiffusionBlocks) -> torch.Generator:
    """As `forward` leaves its generator once it has drawn a block."""
    generator = seeded()
    torch.randint(model.partition.num_blocks, (1,), generator=generator)
    return generator


IDS = token_batch(2)["input_ids"]
ONES = torch.ones_like(IDS)


def llama(**entries: Any) -> Tensor:
    return convert("llama").loss({"input_ids": IDS} | entries, 0)


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("shifted labels", lambda: llama(labels=IDS.roll(-1, 1)), "labels must be the tokens of input_ids themselves"),
    ("labels of texts", lambda: llama(labels=torch.tensor([0, 1])), r"labels must be .* \(2, 12\).* got .*\(2,\)"),
    ("labels as floats", lambda: llama(labels=IDS.float()), "labels must be whole numbers"),
    ("additive mask", lambda: llama(attention_mask=ONES.float()), "attention_mask must be whole numbers"),
    ("4-d mask", lambda: llama(attention_mask=ONES[:, None, None]), r"attention_mask must be .* got .*\(2, 1, 1, 12\)"),
    ("mask of segments", lambda: llama(attention_mask=2 * ONES), "attention_mask must be 1 at the tokens"),
    ("all hidden", lambda: llama(attention_mask=0 * ONES), "no token of the batch counts"),
    ("positions", lambda: llama(position_ids=IDS), "takes no position_ids: .*positions follow from attention_mask"),
    ("other entries", lambda: llama(token_type_ids=IDS, foo=IDS), "LlamaForCausalLM takes no token_type_ids, foo: it"),
    ("a block's loss", lambda: convert("llama").block(0).loss({"input_ids": IDS, "foo": IDS}), "block 0 takes no foo"),
    (
        "denoise",
        lambda: convert("llama").denoise({"input_ids": IDS, "attention_mask": ONES}, torch.zeros(2, 12, HIDDEN), 1.0),
        r"block \d takes no attention_mask: it reads",
    ),
    (
        "padded masked text",
        lambda: convert("masked").loss({"input_ids": IDS, "attention_mask": ONES.triu()}, 0),
        "attention_mask has zeros: a masked text model",
    ),
    ("labelled masked text", lambda: convert("masked").loss({"input_ids": IDS, "labels": IDS}, 0), "takes no labels"),
    ("masked pictures", lambda: convert("vit").loss(image_batch() | {"mask": ONES}, 0), "takes no mask: it reads"),
    (
        "a picture without label",
        lambda: convert("vit").loss(image_batch(1) | {"labels": torch.tensor([-100])}, 0),
        r"labels must be in \[0, 3\], got -100",
    ),
    (
        "the control of a picture without label",
        lambda: EndToEnd(tiny()).loss(image_batch(1) | {"labels": torch.tensor([-100])}),
        "-100 is out of bounds",
    ),
    (
        "the control of text",
        lambda: EndToEnd(tiny("llama")).loss({"input_ids": IDS, "token_type_ids": ONES}),
        "LlamaForCausalLM takes no token_type_ids: it reads attention_mask, input_ids, labels",
    ),
]


@pytest.mark.parametrize(("act", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_followed_is_refused(act: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        act()


def test_a_mask_of_ones_says_nothing_new_to_masked_text() -> None:
    model = convert("masked")
    found = model.loss({"input_ids": IDS, "attention_mask": ONES}, 0, generator=seeded())
    assert torch.equal(found, model.loss({"input_ids": IDS}, 0, generator=seeded()))


def test_forward_names_what_it_does_not_read() -> None:
    for family, batch in (("vit", image_batch(2)), ("dit", image_batch(2)), ("llama", {"input_ids": IDS})):
        with pytest.raises(TypeError, match=r"forward takes no foo: it reads .*"):
            convert(family)(**batch, foo=1)
