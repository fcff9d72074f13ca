#!/usr/bin/env bash
# A method registered with FSDP2 that calls the module itself gathers the root's weights twice a step, whatever reshard_after_forward says.
#
# Libraries: torch 2.13.0 (`fully_shard`, `register_fsdp_forward_method`).
# Expected: the root keeps its gathered weights from the forward to the backward pass (`reshard_after_forward=False`, the root's default), so
#   a step gathers them once. `register_fsdp_forward_method(model, "loss")` is the documented way to call another method than `forward`.
# What happens: `loss` usually calls `self(...)`. Then the hooks of both run, and the root is gathered again in the backward pass: 6 gathers
#   instead of 5 for a root with two layers, with `reshard_after_forward=False` as well. Results are right.
# Why it matters: the root holds what the layers do not: embeddings and head, of a language model often its largest matrices. They cross the
#   network once more in every step, and nothing says so.
# Way round: let the registered method call `type(self).forward(self, ...)`, past the hooks (run below), or make the loss in `forward`.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv --without-pip "$dir/venv"
"${PYTHON:-python3}" -m pip --python "$dir/venv/bin/python" install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6
cat > "$dir/main.py" <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)


class Model(nn.Module):
    """A stem, two layers and a head; the layers are shared out each by itself, stem and head as the root's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()

    def loss_past_the_hooks(self, x: Tensor) -> Tensor:
        return type(self).forward(self, x).square().mean()


class Gathers(TorchDispatchMode):
    """Counts collectives that gather."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        self.count += func.namespace == "c10d" and "allgather" in func._opname
        return func(*args, **(kwargs or {}))


def gathers(method: str) -> tuple[int, float]:
    """Of a step: how often it gathers, and the loss."""
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=False)
    with Gathers() as seen:
        if method == "forward":
            loss = model(torch.ones(2, 8)).square().mean()
        else:
            register_fsdp_forward_method(model, method)
            loss = getattr(model, method)(torch.ones(2, 8))
        loss.backward()
    return seen.count, loss.item()


def rank(number: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    found = {method: gathers(method) for method in ("forward", "loss", "loss_past_the_hooks")}
    if number == 0:
        print("torch", torch.__version__)
        for method, (count, loss) in found.items():
            print(f"{method:20s}: {count} gathers in a step, loss {loss:.6f}")
        assert len({loss for _, loss in found.values()}) == 1
        assert [count for count, _ in found.values()] == [5, 6, 5]
        print("as described")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank, args=(os.path.join(sys.argv[1], "store"),), nprocs=2)
PY
"$dir/venv/bin/python" "$dir/main.py" "$dir"
