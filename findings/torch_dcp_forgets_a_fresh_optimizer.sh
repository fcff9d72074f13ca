#!/usr/bin/env bash
# torch.distributed.checkpoint loads nothing into a fresh optimizer, and says nothing: training goes on with Adam's state at zero.
#
# Libraries: torch 2.13.0 (`torch.distributed.checkpoint`).
# Expected: save({"model": ..., "optimizer": optimizer.state_dict()}), then load into the same dictionary of a new process, or an error.
# What happens: `load` fills the entries that the given dictionary has. A fresh optimizer's state_dict has no moments yet, so those in the
#   checkpoint are passed over. `load_state_dict` accepts what is left. Weights are right, the optimizer has forgotten all: Adam's
#   first step after the resumption is as large as the very first one, with a bias correction that starts anew.
# Why it matters: this is the checkpoint format of FSDP2, and the loss after such a resumption looks like a bump, not like a fault.
# Way round: `get_optimizer_state_dict` of torch.distributed.checkpoint.state_dict, which makes the entries first, and
#   `set_optimizer_state_dict`. Test a resumption against the run that was not interrupted, bit for bit.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - "$dir" <<'PY'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

warnings.filterwarnings("ignore")  # "assuming the intent is to load in a single process": it is
print("torch", torch.__version__)


def fresh() -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Linear, optimizer: torch.optim.AdamW, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


model, optimizer = fresh()
train(model, optimizer, 10)
resumed = {}
for name in ("state_dict", "get_optimizer_state_dict"):
    plain, folder = name == "state_dict", f"{sys.argv[1]}/{name}"
    of = (lambda model, optimizer: optimizer.state_dict()) if plain else get_optimizer_state_dict
    dcp.save({"model": model.state_dict(), "optimizer": of(model, optimizer)}, checkpoint_id=folder)
    again, other = fresh()
    values = {"model": again.state_dict(), "optimizer": of(again, other)}
    dcp.load(values, checkpoint_id=folder)
    again.load_state_dict(values["model"])
    if plain:
        other.load_state_dict(values["optimizer"])
    else:  # the way round
        set_optimizer_state_dict(again, other, values["optimizer"])
    assert torch.equal(again.weight, model.weight)
    resumed[name] = again, other, len(other.state)
entries = len(optimizer.state)
train(model, optimizer, 1)
for name, (again, other, loaded) in resumed.items():
    train(again, other, 1)
    off = (again.weight - model.weight).abs().max().item()
    print(f"{name:25s}: {loaded} of {entries} states loaded; weights off by {off:.1e} after one more step")
    assert (loaded, off > 1e-3) == ((0, True) if name == "state_dict" else (entries, False))
    assert name == "state_dict" or torch.equal(again.weight, model.weight)
print("as described")
PY
