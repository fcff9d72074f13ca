"""Linear layers whose weight is fixed and kept in 8 or 4 bits (QLoRA, arXiv 2305.14314).

Codes and scales are torchao's, but plain tensors under names of their own: they move, are counted and are saved as any
other. A forward pass dequantises the weight, and so does the backward pass: only codes wait for it.

    int8    `weight_codes` int8 (out, in), `weight_scale` (out, 1): W = codes * scale
    nf4     `weight_codes` uint8, two weights each; `weight_table` (256, 2), which two; for every 64 weights one int8 in
            `weight_scales`, and for up to 256 of these one `weight_factor`; `weight_mean` ():
            W = table[codes] * (scales / factor + mean)
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.precision import as_autocast

#: how the names of what stands for a weight begin
_PART = "weight_"


class Quantization(abc.ABC):
    """How a weight is kept in few bits.

    Attributes:
        parts: names of the tensors, without `weight_`; the last has the dtype that the weight had.
    """

    parts: tuple[str, ...]

    @abc.abstractmethod
    def takes(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape can be kept so."""

    @abc.abstractmethod
    def shapes(self, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and dtype of each part of a weight of a shape; None is the weight's own dtype."""

    @abc.abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a weight (out, in), by torchao."""

    @abc.abstractmethod
    def dequantize(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """The weight that parts, in the order of `parts`, stand for."""


class Int8(Quantization):
    """Symmetric, a scale for each output."""

    parts = ("codes", "scale")

    def takes(self, shape: torch.Size) -> bool:
        """Any."""
        return True

    def shapes(self, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Codes as the weight, a scale a row."""
        return {"codes": (tuple(shape), torch.int8), "scale": ((shape[0], 1), None)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `torchao.quantization.Int8Tensor.from_hp`, by scales of the weight's dtype, in float32.

        In bfloat16 a quotient near 127 is rounded to halves before it is rounded to a code.
        """
        from torchao.quantization import Int8Tensor, PerRow

        scale = Int8Tensor.from_hp(weight, PerRow()).scale.to(weight.dtype)
        return {"codes": Int8Tensor.from_hp(weight.float(), PerRow(), scale=scale.float()).qdata, "scale": scale}

    def dequantize(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Codes times scales."""
        codes, scale = parts
        return codes.to(scale.dtype) * scale


class NF4(Quantization):
    """16 quantiles of a normal distribution, a scale for each 64 weights, in 8 bits itself."""

    parts = ("codes", "scales", "factor", "table", "mean")
    _BLOCK, _SCALES = 64, 256

    def takes(self, shape: torch.Size) -> bool:
        """Those that 64 divides."""
        return shape.numel() % self._BLOCK == 0

    def _scales_together(self, shape: torch.Size) -> int:
        return math.gcd(shape.numel() // self._BLOCK, self._SCALES)

    def shapes(self, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Half a byte for each weight, and their scales."""
        blocks = shape.numel() // self._BLOCK
        return {
            "codes": ((shape.numel() // 2,), torch.uint8),
            "scales": ((blocks,), torch.int8),
            "factor": ((blocks // self._scales_together(shape),), None),
            "table": ((256, 2), None),
            "mean": ((), None),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `torchao.quantization.to_nf4`, but that zeros stay zeros and equal scales finite."""
        from torchao.quantization import NF4Tensor

        together = self._scales_together(weight.shape)
        quantized = NF4Tensor.from_tensor(weight.contiguous(), self._BLOCK, together)
        # Of 64 zeros torchao takes 0 / 0 for the lowest code, and of equal scales 1 / 0 for what divides them.
        blocks = quantized.quantized_data.view(-1, self._BLOCK // 2)
        zero = (weight.reshape(-1, self._BLOCK) == 0).all(dim=1, keepdim=True)
        middle, byte = quantized.nf4.tolist().index(0.0), torch.arange(256, device=weight.device)
        factor, finite = quantized.quantization_factor, quantized.quantization_factor.isfinite()
        scales = quantized.quantized_scalers.view(-1, together)
        return {
            "codes": blocks.masked_fill(zero, middle << 4 | middle).flatten(),
            "scales": scales.masked_fill(~finite[:, None], 0).flatten(),
            "factor": factor.masked_fill(~finite, 1),
            "table": torch.stack([quantized.nf4[byte >> 4], quantized.nf4[byte & 15]], dim=1),
            "mean": quantized.scaler_mean,
        }

    def dequantize(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """What the codes stand for, times their scales."""
        codes, scales, factor, table, mean = parts
        scale = (scales.view(len(factor), -1) / factor[:, None]).to(mean.dtype) + mean
        values = table.index_select(0, codes.int()).view(-1, self._BLOCK)
        return (values * scale.view(-1, 1)).view(shape)


#: Quantisations by the names that recipes have for them.
QUANTIZATIONS: dict[str, Quantization] = {"int8": Int8(), "nf4": NF4()}


class _FixedLinear(torch.autograd.Function):
    """y = W x + b of a weight that is dequantised in each pass; neither W nor b has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str, shape: torch.Size, *parts: Tensor) -> Tensor:
        ctx.kind, ctx.shape = kind, shape
        ctx.save_for_backward(*parts)
        weight = QUANTIZATIONS[kind].dequantize(parts, shape).to(x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = ctx.saved_tensors
        weight = QUANTIZATIONS[ctx.kind].dequantize(parts, ctx.shape).to(gradient.dtype)
        return gradient @ weight, None, None, None, *(None for _ in parts)


class QuantizedLinear(nn.Linear):
    """A linear layer with a fixed weight in few bits, which computes in the dtype of its input, or autocast's.

    Args:
        linear: what it stands for; the bias is its own. Of one on the meta device the parts are there, too.
        kind: one of `QUANTIZATIONS`.

    Raises:
        ImportError: torchao is not installed (not on the meta device).
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = linear.in_features, linear.out_features, kind
        self.register_parameter("bias", linear.bias)
        weight = linear.weight.detach()
        for name, (shape, dtype) in self._how.shapes(weight.shape).items():
            empty = torch.empty(shape, dtype=dtype or weight.dtype, device="meta")
            self.register_parameter(_PART + name, nn.Parameter(empty, requires_grad=False))
        if not weight.is_meta:
            for name, value in self.quantized(weight):
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.train(linear.training)

    @property
    def _how(self) -> Quantization:
        return QUANTIZATIONS[self.kind]

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def names(self) -> list[str]:
        """The names of what stands for the weight."""
        return [_PART + name for name in self._how.parts]

    @property
    def parts(self) -> list[Tensor]:
        """What stands for the weight."""
        return [getattr(self, name) for name in self.names]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, dequantised: (out, in), in the dtype that it had."""
        return self._how.dequantize(self.parts, self._shape)

    def quantized(self, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parts of another weight (out, in), each by the name of its parameter."""
        weight = weight.to(self.parts[-1].dtype)
        yield from ((_PART + name, value.detach()) for name, value in self._how.quantize(weight).items())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _FixedLinear.apply(as_autocast(x), self.bias, self.kind, self._shape, *self.parts)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """As of a linear layer, with how it is kept."""
        return f"{super().extra_repr()}, kind={self.kind}"


def check_quantizer(kind: str | None) -> None:
    """Refuse a quantisation whose package is not installed.

    Raises:
        ImportError: torchao is missing.
    """
    if kind is None:
        return
    try:
        from torchao.quantization import Int8Tensor, NF4Tensor  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"blocks.lora.base: {kind} needs torchao 0.18 ({error}): run pip install 'torchao>=0.18', or leave "
            "blocks.lora.base out"
        ) from error


def quantize_linear_layers(network: nn.Module, layer_paths: Iterable[str], kind: str) -> None:
    """Let the linear layers below some paths keep their weights in few bits, where their shape allows it.

    Args:
        network: with the layers; it is changed.
        layer_paths: of the layers.
        kind: one of `QUANTIZATIONS`.

    Raises:
        ValueError: not one of them can be kept so.
    """
    names = [
        name
        for path in layer_paths
        for name, part in network.get_submodule(path).named_modules(prefix=path)
        if type(part) is nn.Linear and QUANTIZATIONS[kind].takes(part.weight.shape)
    ]
    if not names:
        raise ValueError(
            f"lora.base = {kind}: it takes linear layers whose weights 64 divides, and no layer has one; leave it out"
        )
    for name in names:
        owner, _, last = name.rpartition(".")
        linear: Any = network.get_submodule(name)
        setattr(network.get_submodule(owner), last, QuantizedLinear(linear, kind))


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The linear layers below a module that keep their weights in few bits, each by its name."""
    return ((name, part) for name, part in module.named_modules() if isinstance(part, QuantizedLinear))
