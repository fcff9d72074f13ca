"""Join the rows of `ablate text/little_data_prose` into one file: a row for each seed and each way to combine.

    python benchmarks/little_data.py runs/little-5m runs/little-20m --out benchmarks/results/text_little_data.json

Reads what `diffusionblocks ablate` left in each folder (row, seed, `result.json`, `row.json`). Rows that are not
finished are named and left out.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusionblocks.common.formats import read_json
from diffusionblocks.reports.results import joint_header, write_results
from diffusionblocks.reports.tables import format_table

Row = dict[str, Any]

#: What a row has of the one that `ablate` noted, beside its scores.
NOTED = ("layers", "blocks", "iterations", "parameters_trained", "peak_memory_bytes", "seconds")


def main() -> None:
    """Gather, write, and print means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of ablations")
    parser.add_argument("--out", required=True, type=Path, help="the file of results")
    options = parser.parse_args()
    rows: list[Row] = []
    results: list[Row] = []
    for run in sorted(file.parent for folder in options.folders for file in folder.glob("*/seed-*/recipe.json")):
        if not ((run / "row.json").is_file() and (run / "result.json").is_file()):
            print(f"{run} is not finished: left out")
            continue
        results.append(read_json(run / "result.json"))
        rows += rows_of(run, results[-1])
    if not rows:
        parser.error(f"no finished row in {', '.join(map(str, options.folders))}")
    write_results(options.out, rows, joint_header(results), study="little data")
    print(format_table(list(means(rows))))


def rows_of(run: Path, result: Row) -> Iterator[Row]:
    """A row for each way in which what the run's parts say is combined."""
    recipe, noted = read_json(run / "recipe.json"), read_json(run / "row.json")["row"]
    for measures in result["rows"]:
        yield {
            "name": run.parent.name,
            "combine": measures.get("combine"),
            "seed": recipe["train"]["seed"],
            "tokens": recipe["data"]["train_limit"],
            "cross_entropy": measures["cross_entropy"],
            "standard_error": measures["standard_error"],
            "distinct_2": measures.get("distinct_2"),
            **{name: noted.get(name) for name in NOTED},
        }


def means(rows: list[Row]) -> Iterator[Row]:
    """Means over the seeds, with their standard deviation, and memory beside the largest of as many tokens."""
    keys = dict.fromkeys((row["tokens"], row["name"], row["combine"]) for row in rows)
    largest = {row["tokens"]: 0 for row in rows}
    for row in rows:
        largest[row["tokens"]] = max(largest[row["tokens"]], row["peak_memory_bytes"])
    for tokens, name, combine in keys:
        same = [row for row in rows if (row["tokens"], row["name"], row["combine"]) == (tokens, name, combine)]
        scores = [row["cross_entropy"] for row in same]
        yield {
            "tokens": tokens,
            "name": name,
            "combine": combine,
            "seeds": len(same),
            "cross_entropy": statistics.fmean(scores),
            "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
            "iterations": statistics.fmean(row["iterations"] for row in same),
            "memory": same[0]["peak_memory_bytes"] / largest[tokens],
        }


if __name__ == "__main__":
    main()
