#!/usr/bin/env bash
# A class called "train" (CIFAR-100 and COCO have one) makes imagefolder drop other classes, or mix test images into training.
#
# Library: datasets 5.2.0 (pillow 13.0.0).
# Expected: a folder of class folders gives all images with labels; train/CLASS and test/CLASS give two splits.
# What happens: the split is looked for in every folder of the path, the class's too.
#   1. apple/ bear/ tractor/ train/ : the folder "train" is taken for the split. 5 of 20 images are read, without labels.
#   2. train/{apple,bear,tractor,train}/ and test/{...}/ : test/train/*.png matches both splits. The training split
#      has 25 rows, five of them are test images, and the class "train" is doubled.
# Why it matters: CIFAR-100 unpacked as pictures is the standard small benchmark of image classifiers and class-conditional
#   diffusion. Case 2 is test data in training: numbers get better, no error appears.
# Way round: name the files of each split: data_files={"train": "DIR/train/**", "test": "DIR/test/**"}.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 pyarrow==26.0.1 numpy==2.4.6
HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "$dir/venv/bin/python" - "$dir/data" <<'PY'
import sys
from collections import Counter
from pathlib import Path

import datasets
import PIL
from PIL import Image

print("datasets", datasets.__version__, "pillow", PIL.__version__)
datasets.disable_progress_bars()
root, classes = Path(sys.argv[1]), ["apple", "bear", "tractor", "train"]


def draw(folder: Path, green: int) -> None:
    """Write five images for each class; the green channel says which split they are from."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (4, 4), (i, green, 0)).save(folder / name / f"{i:03d}.png")


draw(root / "flat", green=0)
draw(root / "split" / "train", green=0)
draw(root / "split" / "test", green=255)

flat = datasets.load_dataset("imagefolder", data_dir=str(root / "flat"))
print("1. class folders only:", {name: (part.num_rows, part.column_names) for name, part in flat.items()})
assert list(flat) == ["train"] and flat["train"].num_rows == 5 and "label" not in flat["train"].column_names

split = datasets.load_dataset("imagefolder", data_dir=str(root / "split"))
leaked = sum(image.getpixel((0, 0))[1] == 255 for image in split["train"]["image"])
names = split["train"].features["label"].names
print("2. train/ and test/:", {name: part.num_rows for name, part in split.items()}, f"test images in the training split: {leaked}")
print("   training labels:", Counter(names[i] for i in split["train"]["label"]))
assert split["train"].num_rows == 25 and leaked == 5

files = {name: str(root / "split" / name / "**") for name in ("train", "test")}  # the way round
right = datasets.load_dataset("imagefolder", data_files=files)
assert {name: part.num_rows for name, part in right.items()} == {"train": 20, "test": 20}
assert right["train"].features["label"].names == classes
assert not any(image.getpixel((0, 0))[1] for image in right["train"]["image"])
print("as described")
PY
