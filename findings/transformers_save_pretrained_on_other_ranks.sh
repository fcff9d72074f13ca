#!/usr/bin/env bash
# In a process group transformers saves on rank 0 alone: other ranks' models, which are others, are not written, and no error says so.
#
# Libraries: transformers 5.23.0, torch 2.13.0.
# Expected: save_pretrained writes a folder that from_pretrained opens; `is_main_process=True` is its documented default, "useful when in
#   distributed training and need to call this function on all processes".
# What happens: where torch.distributed is initialised, every rank but 0 returns without a file, also with `is_main_process=True`. Ranks that
#   train models of their own (members of an ensemble, blocks, sweeps) lose all but the first.
# Why it matters: the run ends well and the folders are empty; what reads them later fails, when the weights are gone.
# Way round: save before `init_process_group` or after `destroy_process_group`; or write config and safetensors oneself. Look for the file.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cat > "$dir/save.py" <<'PY'
import os
import sys
from pathlib import Path

import torch.distributed as dist
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = Path(sys.argv[1]) / os.environ["RANK"]
config = transformers.ViTConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, image_size=8, patch_size=4)
model = transformers.ViTForImageClassification(config)  # of this rank: each has other weights
dist.init_process_group("gloo")
model.save_pretrained(folder / "within", is_main_process=True)
dist.barrier()
dist.destroy_process_group()
model.save_pretrained(folder / "after")  # the way round
PY
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -m torch.distributed.run --nproc-per-node 2 "$dir/save.py" "$dir/models"
"$dir/venv/bin/python" - "$dir/models" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

print("torch", version("torch"), "transformers", version("transformers"))
for rank, when in ((0, "within"), (1, "within"), (0, "after"), (1, "after")):
    folder = Path(sys.argv[1]) / str(rank) / when
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    print(f"rank {rank}, {when} the process group: {files}")
    assert files == ([] if (rank, when) == (1, "within") else ["config.json", "model.safetensors"])
print("as described")
PY
