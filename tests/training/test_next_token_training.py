"""A tiny autoregressive model learns text block by block: below the letters' frequencies, and by its context."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import diffusionblocks as db
from diffusionblocks.config import NextTokenTargetConfig
from diffusionblocks.data import TextBatches, evaluation_chunks, python_topics
from diffusionblocks.evaluation.cross_entropy import LanguageRow, language_row
from diffusionblocks.training import EndToEnd, TrainConfig, Trainer

CPU = torch.device("cpu")
LENGTH = 64


def held_out() -> Iterator[dict[str, Tensor]]:
    return itertools.islice(evaluation_chunks(python_topics("test"), LENGTH, batch_size=64, device=CPU), 2)


def unigram_entropy() -> float:
    """Nats a character of the letters' frequencies in the training text."""
    ids = python_topics("train").ids.long()
    frequency = torch.bincount(ids).double() / len(ids)
    return float(-(frequency * frequency.log()).nansum())


def little_llama(kernel: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=27,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        attn_implementation=kernel,
    )
    return LlamaForCausalLM(config)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("compiled", "again", "kernel"),
    [
        (False, False, "sdpa"),
        ("layers", False, "sdpa"),
        ("layers", True, "sdpa"),
        ("layers", True, "flex_attention"),
    ],
)
@pytest.mark.parametrize("blocks", [0, 2])
def test_gpu_graphs_follow_eager_steps(blocks: int, compiled: Any, again: bool, kernel: str) -> None:
    """Blocks, and (0) the end-to-end control; with layers that are computed again, too."""

    def run(graph: bool) -> Trainer:
        original = little_llama(kernel if graph else "sdpa")
        model = db.convert(original, db.BlocksConfig(num_blocks=blocks)) if blocks else EndToEnd(original)
        changes = {"compile": compiled, "activation_checkpointing": again, "cuda_graph": True} if graph else {}
        config = TrainConfig(steps=10, batch_size=8, lr=1e-3, **changes)
        batches = TextBatches(python_topics("train"), LENGTH, device=torch.device("cuda"))
        trained = Trainer(model.cuda(), batches, config, progress=False)
        trained.train()
        return trained

    atol = 1e-4 if kernel == "sdpa" else 2e-3  # FlexAttention multiplies float32 in TF32
    for a, b in zip(run(True).model.parameters(), run(False).model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


def test_blocks_learn_the_next_character_from_its_context() -> None:
    target = NextTokenTargetConfig(logit_scale=8.0)
    model = db.convert(little_llama(), db.BlocksConfig(num_blocks=2, overlap=0.1, target=target))
    before = measured(model)
    train = TrainConfig(steps=150, batch_size=32, lr=4e-3, warmup_steps=20)
    Trainer(model, TextBatches(python_topics("train"), LENGTH, device=CPU), train, progress=False).train()
    after = measured(model)
    unigram = unigram_entropy()
    assert before.context_gap is not None
    # The controls: it is the training that does it.
    assert before.cross_entropy > unigram
    assert abs(before.context_gap) < 0.05
    assert after.cross_entropy + 4 * after.standard_error < unigram - 0.2
    assert after.context_gap is not None
    assert after.context_gap > 0.3
    assert all(at.scrambled > at.cross_entropy for at in after.by_level if at.decodable < 0.5)
    # Where z gives the token away it is read off z.
    assert all(at.cross_entropy < 0.1 for at in after.by_level if at.decodable == 1)


def measured(model: db.DiffusionBlocks) -> LanguageRow:
    return language_row(model, held_out, levels=6)
