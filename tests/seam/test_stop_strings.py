"""Stop strings of a generation config end a text as in the library's own `generate`; without a tokenizer a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import diffusionblocks as db
from diffusionblocks.data.token_text import train_tokenizer
from diffusionblocks.sampling import continue_plainly

PROMPTS = [torch.tensor([65, 66]), torch.tensor([70]), torch.tensor([90, 91, 92])] * 4
STRINGS = ["ab", "q", "c d"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("abc abd acd bcd quick c d abcd " * 40, encoding="utf-8")
    trained: Tokenizer = train_tokenizer([folder / "train.txt"], 270, folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_object=trained)


def model_of(tokenizer: Any) -> Any:
    model: Any = tiny("llama", layers=2, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def test_a_text_ends_where_the_librarys_own_generate_ends_it(tokenizer: Any) -> None:
    model = model_of(tokenizer).eval()
    said = continue_plainly(model, PROMPTS[:3], max_new_tokens=20, seeds=range(3), temperature=0.0).tokens
    pairs = [tokenizer.decode(row[at : at + 2]) for row in said for at in range(len(row) - 12, len(row) - 1)]
    strings = [text for text in pairs if text.isascii()]  # what it says by itself, a while on
    model.generation_config.stop_strings = strings
    ours = continue_plainly(
        model, PROMPTS[:3], max_new_tokens=20, seeds=range(3), temperature=0.0, tokenizer=tokenizer
    ).tokens
    for row, prompt in zip(ours, PROMPTS, strict=False):
        theirs = model.generate(
            prompt[None],
            max_new_tokens=20,
            do_sample=False,
            tokenizer=tokenizer,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        )
        assert row.tolist() == theirs[0].tolist()
    assert any(len(row) < len(whole) for row, whole in zip(ours, said, strict=True))


def test_blocks_end_behind_the_first_string_and_go_on_without(tokenizer: Any) -> None:
    model = db.convert(model_of(tokenizer), db.BlocksConfig(num_blocks=2))
    endless = model.generate(PROMPTS, 40).tokens
    model.generation_config.stop_strings = STRINGS
    ended = model.generate(PROMPTS, 40, tokenizer=tokenizer).tokens

    def until(row: torch.Tensor, prompt: torch.Tensor) -> list[int]:
        for end in range(len(prompt) + 1, len(row) + 1):
            text, before = tokenizer.decode(row[:end]), tokenizer.decode(row[: end - 1])
            if any(string in text[max(0, len(before) - len(string) + 1) :] for string in STRINGS):
                return row[:end].tolist()  # type: ignore[no-any-return]
        return row.tolist()  # type: ignore[no-any-return]

    assert [row.tolist() for row in ended] == [until(*pair) for pair in zip(endless, PROMPTS, strict=True)]
    assert any(len(a) < len(b) for a, b in zip(ended, endless, strict=True))  # positive control
    passed_over = model.generate(PROMPTS, 40, stop_strings=[]).tokens
    assert [row.tolist() for row in passed_over] == [row.tolist() for row in endless]


def test_strings_without_a_tokenizer_are_refused_in_a_line(tokenizer: Any) -> None:
    model = db.convert(model_of(tokenizer), db.BlocksConfig(num_blocks=2))
    model.generation_config.stop_strings = STRINGS
    with pytest.raises(
        ValueError, match=r"stop_strings = \['ab', 'q', 'c d'\] .* give generate\(tokenizer="
    ) as refusal:
        model.generate(PROMPTS, 4)
    assert "\n" not in str(refusal.value)
    model.generation_config.stop_strings = [3]
    with pytest.raises(ValueError, match=r"generation_config\.stop_strings = \[3\]: must be a string"):
        model.generate(PROMPTS, 4, tokenizer=tokenizer)
