"""Which tokens count: `labels` of -100 and `attention_mask`, end to end and in evaluation; prompts of a chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, seeded
from test_continuation import converted, original
from torch import Tensor
from torch.nn import functional as F

from diffusionblocks.data.text_config import TextConfig, TokensConfig
from diffusionblocks.data.token_text import END, chat_prompt, train_tokenizer
from diffusionblocks.evaluation.cross_entropy import Batches, language_row, plain_language_row, voted_rows
from diffusionblocks.training import EndToEnd

LENGTHS = (9, 5, 7)


def texts() -> list[Tensor]:
    return [torch.randint(1, VOCAB, (length,), generator=seeded(length)) for length in LENGTHS]


def padded(left: bool, prompt: int = 2) -> dict[str, Tensor]:
    """Texts in one batch, of whose first tokens, the prompt, none counts."""
    rows: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for text in texts():
        labels = text.clone()
        labels[:prompt] = -100
        missing = max(LENGTHS) - len(text)
        pad = (missing, 0) if left else (0, missing)
        rows["input_ids"].append(F.pad(text, pad, value=0))
        rows["labels"].append(F.pad(labels, pad, value=-100))
        rows["attention_mask"].append(F.pad(torch.ones_like(text), pad))
    return {name: torch.stack(values) for name, values in rows.items()}


def by_hand(model: Any, prompt: int = 2) -> list[Tensor]:
    """Losses of the counted tokens of each text, alone and without padding."""
    losses = []
    for text in texts():
        with torch.no_grad():
            logits = model(input_ids=text[None]).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, text[1:], reduction="none")[prompt - 1 :])
    return losses


def once(batch: dict[str, Tensor]) -> Batches:
    return lambda: [batch]


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("left", [False, True])
def test_end_to_end_counts_what_the_library_counts(left: bool, chunk: int | None) -> None:
    model = original("llama")
    unit = EndToEnd(model)
    unit.loss_chunk = chunk
    found = unit.loss(padded(left))
    expected = torch.stack([losses.mean() for losses in by_hand(model)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for text, loss in zip(texts(), found, strict=True):
        labels = text.clone()
        labels[:2] = -100
        torch.testing.assert_close(model(input_ids=text[None], labels=labels[None]).loss, loss)
    whole = unit.loss({"input_ids": padded(left)["input_ids"]})
    assert not torch.allclose(whole, found, atol=1e-3), "the control: padding and prompts as tokens"
    with pytest.raises(ValueError, match="labels must be the tokens of input_ids themselves"):
        unit.loss(padded(left) | {"labels": padded(left)["input_ids"] + 1})
    with pytest.raises(ValueError, match="takes no position_ids"):
        unit.loss(padded(left) | {"position_ids": padded(left)["input_ids"]})


@pytest.mark.parametrize("left", [False, True])
def test_a_row_is_the_mean_over_the_tokens_that_count(left: bool) -> None:
    model = original("llama")
    losses = by_hand(model)
    row = plain_language_row(EndToEnd(model), once(padded(left)))
    together = torch.cat(losses)
    assert row.tokens == len(together) == sum(LENGTHS) - 2 * len(LENGTHS)
    assert row.cross_entropy == pytest.approx(float(together.mean()), rel=1e-5)
    residuals = torch.stack([losses[i].sum() - together.mean() * len(losses[i]) for i in range(3)])
    assert row.standard_error == pytest.approx(float((residuals.square().sum() * 3 / 2).sqrt()) / row.tokens, rel=1e-4)


@pytest.mark.parametrize("left", [False, True])
def test_votes_and_levels_count_the_same_tokens(left: bool) -> None:
    model, batch = converted("one-stream"), padded(left)
    ordinary: list[Any] = [model.export_block(index).eval() for index in range(2)]
    expected = torch.cat(
        [
            F.cross_entropy(
                torch.stack([each(input_ids=text[None]).logits[0, :-1] for each in ordinary]).mean(dim=0),
                text[1:],
                reduction="none",
            )[1:]
            for text in texts()
        ]
    )
    row = voted_rows(model, once(batch))["mean"]
    assert row.cross_entropy == pytest.approx(expected.mean().item(), rel=1e-5)
    assert row.tokens == len(expected)
    streams = converted("llama")
    levels = language_row(streams, once(batch), levels=3)
    hidden = {name: value.clone() for name, value in batch.items()}
    hidden["input_ids"] = torch.where(batch["attention_mask"] == 0, 5, hidden["input_ids"])
    assert language_row(streams, once(hidden), levels=3) == levels, "nothing that is hidden is read or counted"
    answer = {name: value.clone() for name, value in batch.items()}
    place = -1 if left else LENGTHS[1] - 1
    answer["input_ids"][1, place] = answer["labels"][1, place] = (answer["input_ids"][1, place] + 1) % VOCAB
    assert language_row(streams, once(answer), levels=3).cross_entropy != levels.cross_entropy
    assert levels.tokens == row.tokens


# ---- chats -----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|model|>' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder as a pretrained model leaves it, with a chat template that has special tokens."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. who sat there? " * 40)
    made = train_tokenizer([text], 300, tmp_path / "tokenizer.json")
    made.add_special_tokens(["<|user|>", "<|model|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    return tmp_path / "tokenizer.json"


def test_a_chat_template_is_rendered(tokenizer: Path) -> None:
    data = TokensConfig(kind="tokens", source="nowhere", length=8, tokenizer=tokenizer)
    codec, ids = data.codec(), data.chat_tokens("who sat there?")
    assert codec.decode(ids) == "<|user|>who sat there?\n<|model|>"
    assert ids.tolist() == codec.encode("<|user|>who sat there?\n<|model|>").tolist()
    assert len(ids) < len("<|user|>"), "markers are one token each"
    assert codec.decode(codec.encode("who sat there?")) == "who sat there?", "a plain prompt is not rendered"


def test_a_chat_without_a_template_is_refused(tokenizer: Path) -> None:
    settings = tokenizer.with_name("tokenizer_config.json")
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"chat_template": "{{ raise_exception('only assistants') }}"}))
    with pytest.raises(ValueError, match=r"cannot be rendered: only assistants"):
        chat_prompt(tokenizer, "who?")
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(ValueError, match=r"--chat: no chat template lies beside .*: use --prompt alone"):
        chat_prompt(tokenizer, "who?")
    with pytest.raises(ValueError, match="no tokenizer, and so no chat template: use"):
        TextConfig(kind="text", source="nowhere", length=8).chat_tokens("who?")
