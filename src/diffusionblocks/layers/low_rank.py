"""Low-rank updates of linear layers (LoRA, arXiv 2106.09685): y = W x + (alpha / rank) * B A x, W fixed.

An update hangs on its linear layer as a child, `lora`, that a forward hook adds: the layer stays the model's own, under
its own names. Names and shapes of A and B are PEFT's, up to the prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.seeds import keyed_generator

#: the name of an update in its linear layer
LORA = "lora"


class LowRank(nn.Module):
    """The update of a linear layer: A (rank, in) drawn as PEFT draws it, B (out, rank) zero, both float32.

    Args:
        linear: what it updates; it is not changed.
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: share of the inputs' entries that the update does not see in training.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        device = linear.weight.device
        self.scale, self.dropout = alpha / rank, dropout
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device=device))

    def initial_factor(self, generator: torch.Generator) -> Tensor:
        """A fresh A: uniform between -1 / sqrt(in) and 1 / sqrt(in)."""
        bound = 1 / math.sqrt(self.A.shape[1])
        return torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output with the update added, of its dtype: (..., in), (..., out) -> (..., out)."""
        x = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        return (output + F.linear(F.linear(x, self.A), self.B) * self.scale).to(output.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) * B A, summed in float64, of the dtype of W."""
        update = self.B.detach().double() @ self.A.detach().double() * self.scale
        return (weight.detach().double() + update).to(weight.dtype)


def _add(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return linear.lora(args[0], output)  # type: ignore[no-any-return, operator]


def add_low_rank(
    network: nn.Module,
    layer_paths: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
) -> None:
    """Hang an update on linear layers of a network; A has no values yet (`fresh_updates`).

    Args:
        network: with the layers.
        layer_paths: of the layers, in which linear layers are looked for.
        rank, alpha, dropout: see `LowRank`.
        targets: names of linear layers, or ends of names (`to_q`, `attn.to_q`); None takes all.

    Raises:
        ValueError: a target that no layer has.
    """
    names = [
        name
        for path in layer_paths
        for name, part in network.get_submodule(path).named_modules(prefix=path)
        if type(part) is nn.Linear
    ]
    if targets is not None:
        for target in targets:
            if not any(_ends(name, target) for name in names):
                choices = sorted({_in_layer(name, layer_paths) for name in names})
                raise ValueError(f"lora.targets: {target!r} is no linear layer; they are {', '.join(choices)}")
        names = [name for name in names if any(_ends(name, target) for target in targets)]
    for name in names:
        linear: Any = network.get_submodule(name)
        linear.add_module(LORA, LowRank(linear, rank, alpha, dropout))
        linear.register_forward_hook(_add)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _in_layer(name: str, layer_paths: Sequence[str]) -> str:
    path = next(path for path in layer_paths if name.startswith(f"{path}."))
    return name.removeprefix(f"{path}.")


def is_update(name: str) -> bool:
    """Whether a tensor's name is that of an update."""
    return f".{LORA}." in f".{name}"


def updates(module: nn.Module) -> Iterator[tuple[str, LowRank]]:
    """The updates below a module, each by the name of its linear layer."""
    for name, part in module.named_modules():
        if isinstance(update := getattr(part, LORA, None), LowRank):
            yield name, update


def fresh_updates(network: nn.Module, seed: int, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of a network's updates, each with its initial value; they depend on seed, block and name alone."""
    for name, update in updates(network):
        yield update.A, update.initial_factor(keyed_generator(seed, block, 0, f"lora {name}"))
        yield update.B, torch.zeros(update.B.shape)


def plain_state(module: nn.Module, *, merge: bool = True) -> dict[str, Tensor]:
    """A module's state dict as its class has it: with its updates in the weights, or without them."""
    state = {name: tensor for name, tensor in module.state_dict().items() if not is_update(name)}
    if merge:
        for name, update in updates(module):
            key = f"{name}.weight" if name else "weight"
            state[key] = update.merge(state[key])
    return state
