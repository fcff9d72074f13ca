"""Peak memory of a language model's training step, end to end and of one of four blocks, by what of it stands still.

    python benchmarks/text_memory.py --out benchmarks/results/text_memory.json              # predicted, without a GPU
    python benchmarks/text_memory.py --out text-memory.json --measure                       # and measured, on a GPU
    python benchmarks/text_memory.py --out text-memory.json --measure --tiny                # on a CPU, to try it

A Llama of 12 layers of width 768, 32,000 tokens, length 1,024, batch 8, bfloat16, compiled, `loss_chunk: auto` in all
rows, one block on the device. Rows: `streams`: two (noisy positions and their context through the same layers), one
(z is hidden), or one over a frozen trunk; `vocabulary`: whether embedding and head train, and whether they are one
table, end to end too. A share is of the end-to-end row above.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.experiments import run as runs
from diffusionblocks.experiments.experiment import Experiment
from diffusionblocks.experiments.recipe import Recipe, parse_recipe
from diffusionblocks.experiments.recipe_changes import after_branch, trunk_recipe
from diffusionblocks.planning import predict
from diffusionblocks.reports.results import write_results
from diffusionblocks.reports.tables import format_table

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64}
#: streams -> what of `blocks.target` makes them
STREAMS: dict[str, dict[str, Any]] = {"two": {}, "one": {"noise_input": False}, "trunk": {"context": "trunk"}}
_STEPS = 6


def recipe_of(streams: str | None, vocabulary: str, *, tiny: bool) -> Recipe:
    """The recipe of a row; without streams it is end to end."""
    length = 64 if tiny else 1024
    heads = {"num_attention_heads": 2 if tiny else 12, "num_key_value_heads": 2 if tiny else 12}
    config = (TINY if tiny else SIZES) | heads | {"max_position_embeddings": length}
    config["tie_word_embeddings"] = vocabulary == "tied"
    target = {"kind": "next-token", **STREAMS[streams or "two"]}
    fixed = vocabulary == "frozen" or streams == "trunk"
    values: dict[str, Any] = {
        "name": "text-memory",
        "method": "diffusionblocks" if streams else "end-to-end",
        "model": {"type": "LlamaForCausalLM", "config": config},
        "blocks": {"num_blocks": 4, "overlap": 0.1, "vocabulary": vocabulary, "target": target},
        "data": {"kind": "topics", "length": length},
        "trunk": {"steps": 1} if fixed else None,
        "train": {"steps": 100, "batch_size": 8, "lr": 3e-4, "gradient_clip": 1.0, "resident": "active"}
        | {"precision": "bfloat16", "compile": not tiny, "loss_chunk": "auto"},
        "evaluate": {"prompt_length": 8, "new_tokens": 8},
        "device": "cpu" if tiny else "cuda",
    }
    return parse_recipe(values, "text_memory.py")


def measured(recipe: Recipe) -> int:
    """Most bytes on the GPU while one of the blocks, or the whole model, takes some steps; 0 on a CPU."""
    experiment = Experiment(recipe)
    on_gpu = experiment.device.type == "cuda"
    model = None
    if recipe.trunk is not None:
        model = runs.branch_trunk(recipe, experiment.derive(trunk_recipe(recipe)).trainer(None, progress=False))
        experiment = experiment.derive(after_branch(recipe), same_run=True)
    trainer = experiment.trainer(None, model=model, progress=False)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train(until=_STEPS)
    return torch.cuda.max_memory_allocated() if on_gpu else 0


def rows(*, measure: bool, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for end to end, then one for each policy; then the same of a model whose tables are one."""
    whole: dict[str, int] = {}
    of_two = [(streams, vocabulary) for streams in STREAMS for vocabulary in ("trained", "frozen")]
    for streams, vocabulary in [(None, "trained"), *of_two, (None, "tied"), *((s, "tied") for s in STREAMS)]:
        recipe = recipe_of(streams, vocabulary, tiny=tiny)
        ledger = predict(recipe, num_examples=0)
        peaks = {"predicted": ledger.peak} | ({"measured": measured(recipe)} if measure else {})
        whole = peaks if streams is None else whole
        yield {
            "name": "end-to-end" if streams is None else "diffusionblocks",
            "streams": streams,
            "vocabulary": vocabulary,
            **{name: getattr(ledger, name) for name in ("parameters", "optimizer", "activations")},
            **{f"{name}_peak": peak for name, peak in peaks.items()},
            **{f"{name}_share": peak / whole[name] if whole[name] else None for name, peak in peaks.items()},
        }


def main() -> None:
    """Predict, measure where asked for, write, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measure", action="store_true", help="also train some steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    table = list(rows(measure=options.measure, tiny=options.tiny))
    write_results(options.out, table)
    print(format_table(table))


if __name__ == "__main__":
    main()
