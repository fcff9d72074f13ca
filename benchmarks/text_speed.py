"""Tokens a second of text models, in training and in generation, of every row that `compare` has.

    python benchmarks/text_speed.py recipes/text/autoregressive_prose.yaml --out speed.json
    python benchmarks/text_speed.py recipes/text/recurrent_prose.yaml --out speed.json

Training runs through the trainer itself, steps of all blocks by turns after all have warmed up. Generation continues
the test text's first sequences as the recipe's `evaluate` section says, with fresh weights: how fast tokens come does
not depend on which. Its first pass, which loads kernels, is not timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.experiments.baselines import executed, variants
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, load_recipe
from diffusionblocks.experiments.step_time import seconds_a_step
from diffusionblocks.experiments.tasks.next_token_text import LanguageConfig, prompts_of, write
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table


def generation(recipe: Recipe, splits: dict[str, Any]) -> float:
    """Tokens a second of the second of two passes."""
    options = recipe.evaluate
    assert isinstance(options, LanguageConfig)
    experiment = Experiment(executed(recipe, fast=False), splits)
    model = experiment.trainer(progress=False).model.eval()
    prompts = prompts_of(options, splits["test"])
    return [write(experiment, options, model, prompts).tokens_per_second for _ in range(2)][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[])
    for what in ("training", "generation"):
        parser.add_argument(f"--{what}", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.set)
    torch.set_float32_matmul_precision("high")
    splits = {split: recipe.data.load(split) for split in ("train", "test")}
    batch = recipe.train.batch_size * recipe.train.accumulation
    rows: list[dict[str, Any]] = []
    for variant in variants(recipe):
        if "-x" in variant.key:
            continue  # the same step, more of them
        row: dict[str, Any] = {
            "name": variant.name,
            "key": variant.key,
            "layers": variant.layers,
            "blocks": variant.blocks,
        }
        if options.training:
            seconds = seconds_a_step(Experiment(variant.recipe, splits))
            row["ms_a_step"] = 1000 * seconds
            row["training_tokens_per_second"] = batch * splits["train"].length / seconds
        if options.generation:
            row["generated_tokens_per_second"] = generation(variant.recipe, splits)
        rows.append(row)
        print(format_table(rows[-1:]), flush=True)
        write_results(options.out, rows, setting={"recipe": options.recipe, "set": options.set})


if __name__ == "__main__":
    main()
