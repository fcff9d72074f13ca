"""SmolLM2-135M, where a folder of it and stories are at hand: its own tokenizer, its depth, and one block of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import load_recipe

MODEL, TEXTS = "DIFFUSIONBLOCKS_SMOLLM2", "DIFFUSIONBLOCKS_TINYSTORIES"


@pytest.mark.slow
@pytest.mark.skipif(
    MODEL not in os.environ or TEXTS not in os.environ,
    reason=f"set {MODEL} to a folder of SmolLM2-135M and {TEXTS} to one of val.txt.xz and test.txt.xz",
)
def test_smollm2_is_read_with_its_own_tokenizer_one_block_at_a_time(tmp_path: Path) -> None:
    model, texts = os.environ[MODEL], os.environ[TEXTS]
    values = {
        **{"model.pretrained": model, "data.source": texts, "data.train_split": "val", "data.cache": tmp_path},
        **{"data.length": 64, "train.blocks": "[1]", "device": "cpu"},
    }
    experiment = Experiment(load_recipe("text/finetune", [f"{name}={value}" for name, value in values.items()]))
    data = experiment.data("train")
    library = AutoTokenizer.from_pretrained(model)
    first = experiment.codec.decode(data.text.ids[:200].long())
    assert library(first).input_ids[:150] == data.text.ids[:150].tolist()
    blocks = experiment.build()
    assert blocks.partition.num_layers == 30  # type: ignore[union-attr]
    assert [next(part.network.parameters()).is_meta for part in blocks.blocks] == [True, False, True]  # type: ignore[union-attr]
    losses = blocks.loss({"input_ids": data.text.ids[None, :16].long()}, block=1)  # type: ignore[operator]
    assert bool(torch.isfinite(losses).all())
