"""Gathers the tables of `diffusionblocks compare recipes/vit/cifar100.yaml` into one results file.

The rows of the comparison are long runs, so they are made apart (one process a GPU) and gathered here:

    diffusionblocks compare recipes/vit/cifar100.yaml --rows diffusionblocks --out runs/a
    diffusionblocks compare recipes/vit/cifar100.yaml --rows end-to-end-12 end-to-end-4 end-to-end-4-x3 --out runs/b
    python benchmarks/cifar100_vit.py runs/a/table.json runs/b/table.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusionblocks.common.formats import read_json
from diffusionblocks.reports.results import joint_header, write_results
from diffusionblocks.reports.tables import format_table

KEEP = ("name", "key", "layers", "blocks", "iterations", "parameters_trained", "peak_memory_bytes", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--commit", help="commit of runs whose table does not name it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar100_vit.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    tables = [read_json(path) for path in options.tables]
    for table in tables:
        for row in table["rows"]:
            for measured in row["accuracies"]:
                rows.append({name: row[name] for name in KEEP} | measured)
    header = joint_header(tables)
    write_results(options.out, rows, header | {"commit": options.commit or header["commit"]})
    print(format_table(rows))


if __name__ == "__main__":
    main()
