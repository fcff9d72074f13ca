"""Low-rank updates of linear layers (LoRA, arXiv 2106.09685): y = W x + (alpha / rank) * B A x, W fixed.

An update hangs on its linear layer as a child, `lora`, that a forward hook adds: the layer stays the model's own, under
its own names. Names and shapes of A and B are PEFT's, up to the prefix; so is the magnitude of DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.precision import without_autocast
from ..common.seeds import keyed_generator
from .quantized import QuantizedLinear, quantized_layers

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
        device = next(linear.parameters()).device
        self.scale, self.dropout = alpha / rank, dropout
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device=device))

    def initial_factor(self, generator: torch.Generator) -> Tensor:
        """A fresh A: uniform between -1 / sqrt(in) and 1 / sqrt(in)."""
        bound = 1 / math.sqrt(self.A.shape[1])
        return torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, output: Tensor, linear: nn.Linear) -> Tensor:
        """The output of the layer with the update, of its dtype.

        Args:
            x: the layer's input (..., in).
            output: what the layer makes of it (..., out).
            linear: the layer.
        """
        x = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        return (output + self._update_of(x)).to(output.dtype)

    def _update_of(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B) * self.scale

    def merge(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) * B A, summed in float64, of the dtype of W."""
        return self._sum(weight.detach().double()).to(weight.dtype)

    def _sum(self, weight: Tensor) -> Tensor:
        """W + (alpha / rank) * B A, in the dtype of W; it has no gradient."""
        return weight + self.B.detach().to(weight.dtype) @ self.A.detach().to(weight.dtype) * self.scale

    def start_from(self, linear: nn.Linear) -> Iterator[tuple[Tensor, Tensor]]:
        """What starts from the layer's weight, each with its initial value: nothing."""
        yield from ()


class Dora(LowRank):
    """The update of DoRA (arXiv 2402.09353): y = m * (W + (alpha / rank) * B A) x / |W + (alpha / rank) * B A|.

    The magnitude m (out,), float32, starts as |W|, the norm of each row. As in PEFT, no gradient passes through norms.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(linear, rank, alpha, dropout)
        self.magnitude = nn.Parameter(torch.empty(linear.out_features, dtype=torch.float32, device=self.A.device))

    def forward(self, x: Tensor, output: Tensor, linear: nn.Linear) -> Tensor:
        """See `LowRank.forward`; where dropout hides inputs, W does not see them either."""
        with torch.no_grad(), without_autocast(x):
            norms = _norms(self._sum(linear.weight.to(self.A.dtype)))
        ratio = self.magnitude / norms
        inputs = F.dropout(x.to(self.A.dtype), self.dropout, self.training)
        of_inputs = linear.forward(inputs.to(x.dtype)) if self.training and self.dropout else output
        of_weight = of_inputs if linear.bias is None else of_inputs - linear.bias
        return (output + (ratio - 1) * of_weight + ratio * self._update_of(inputs)).to(output.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """m * (W + (alpha / rank) * B A) / |W + (alpha / rank) * B A|, in float64, of the dtype of W."""
        whole = self._sum(weight.detach().double())
        ratio = self.magnitude.detach().double() / _norms(whole)
        return (ratio[:, None] * whole).to(weight.dtype)

    def start_from(self, linear: nn.Linear) -> Iterator[tuple[Tensor, Tensor]]:
        """The magnitude, with the norm of each row of W."""
        yield self.magnitude, torch.linalg.vector_norm(linear.weight.detach().float(), dim=1)


def _norms(weight: Tensor) -> Tensor:
    """The norm of each row, above zero: a row of zeros has magnitude zero and stays what it is."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms.clamp_min(torch.finfo(torch.float32).tiny)


def _add(linear: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return linear.lora(args[0], output, linear)  # type: ignore[no-any-return, operator]


def add_low_rank(
    network: nn.Module,
    layer_paths: Sequence[str],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
    kind: type[LowRank] = LowRank,
) -> None:
    """Hang an update on linear layers of a network; it has no values yet (`fresh_updates`, `starting_magnitudes`).

    Args:
        network: with the layers.
        layer_paths: of the layers, in which linear layers are looked for.
        rank, alpha, dropout: see `LowRank`.
        targets: names of linear layers, or ends of names (`to_q`, `attn.to_q`); None takes all.
        kind: of the updates.

    Raises:
        ValueError: a target that no layer has.
    """
    names = [
        name
        for path in layer_paths
        for name, part in network.get_submodule(path).named_modules(prefix=path)
        if type(part) in (nn.Linear, QuantizedLinear)
    ]
    if targets is not None:
        for target in targets:
            if not any(_ends(name, target) for name in names):
                choices = sorted({_in_layer(name, layer_paths) for name in names})
                raise ValueError(f"lora.targets: {target!r} is no linear layer; they are {', '.join(choices)}")
        names = [name for name in names if any(_ends(name, target) for target in targets)]
    for name in names:
        linear: Any = network.get_submodule(name)
        linear.add_module(LORA, kind(linear, rank, alpha, dropout))
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


def starting_magnitudes(network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of a network's updates that start from the weights, each with its initial value."""
    for name, update in updates(network):
        linear: Any = network.get_submodule(name)
        yield from update.start_from(linear)


def plain_state(module: nn.Module, *, merge: bool = True) -> dict[str, Tensor]:
    """A module's state dict as its class has it: weights dequantised, and with its updates in them, or without."""
    state = {name: tensor for name, tensor in module.state_dict().items() if not is_update(name)}
    for name, linear in quantized_layers(module):
        prefix = f"{name}." if name else ""
        for part in linear.names:
            del state[prefix + part]
        state[f"{prefix}weight"] = linear.weight
    if merge:
        for name, update in updates(module):
            key = f"{name}.weight" if name else "weight"
            state[key] = update.merge(state[key])
    return state
