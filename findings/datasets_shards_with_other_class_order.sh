#!/usr/bin/env bash
# Parquet shards of one split whose ClassLabel names stand in another order are read with the first shard's names.
#
# Library: datasets 5.2.0 (pyarrow 26.0.1).
# Expected: every Parquet file carries its own class names, so labels keep their meaning, or the reader refuses.
# What happens: load_dataset takes the features of the first file for all. Labels of the other shards keep their numbers and
#   change their meaning; between splits only the numbers are compared by whoever evaluates. No warning.
# Why it matters: shards that several machines encoded, each listing its class folders in its own order, train on half the
#   labels wrong; a test split in another order gives accuracy 0 for a perfect model.
# Way round: read each file alone, compare features["label"].names, and map labels by name.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1 numpy==2.4.6
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "$dir/venv/bin/python" - "$dir" <<'PY'
import sys
from pathlib import Path

import datasets
import pyarrow

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
datasets.disable_progress_bars()
root = Path(sys.argv[1])


def write(file: str, names: list[str]) -> None:
    """Two rows, whose column `what` says the class in words."""
    features = datasets.Features({"what": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"what": ["cat", "dog"], "label": [names.index("cat"), names.index("dog")]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / file)


write("train-0.parquet", ["cat", "dog"])
write("train-1.parquet", ["dog", "cat"])


def read(*files: str) -> list[tuple[str, str]]:
    """(what the row is, what its label is called)."""
    data = datasets.load_dataset("parquet", data_files=[str(root / file) for file in files], split="train")
    return [(row["what"], data.features["label"].int2str(row["label"])) for row in data]


alone, together = read("train-1.parquet"), read("train-0.parquet", "train-1.parquet")
print("the second shard alone:", alone)
print("both shards:           ", together)
assert alone == [("cat", "cat"), ("dog", "dog")]
assert together == [("cat", "cat"), ("dog", "dog"), ("cat", "dog"), ("dog", "cat")]

parts = [datasets.Dataset.from_parquet(str(root / f"train-{i}.parquet"), cache_dir=str(root / f"c{i}")) for i in (0, 1)]
names = parts[0].features["label"].names  # the way round: labels by name
right = [(row["what"], names[names.index(part.features["label"].int2str(row["label"]))]) for part in parts for row in part]
assert all(what == label for what, label in right)
print("as described")
PY
