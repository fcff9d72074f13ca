"""AdamW of bfloat16 weights without a float32 copy: each value is rounded up or down by chance, right on average.

Between two neighbours `lo <= x <= hi` of bfloat16 the result is `hi` with probability `(x - lo) / (hi - lo)`, so its
mean is `x`. Rounded to nearest, a step below half their distance (1/512 of a weight) is lost every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# The bits that float32 has and bfloat16 has not.
_LOWER_BITS = 16
# Elements that are handled at once: bounds the memory of float32 temporaries.
_AT_ONCE = 2**24


class Draws:
    """Where the chance of rounding comes from.

    Attributes:
        generator: on the weights' device; a trainer puts in that of the step, whose seed is keyed to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(0)


def round_stochastically(target: Tensor, values: Tensor, generator: torch.Generator) -> None:
    """Write float32 values into a bfloat16 tensor, rounded by chance without bias; into any other to nearest.

    Args:
        target: of any shape.
        values: float32, of the same shape. What is not finite stays what it is.
        generator: on their device.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(values)
        return
    # The lost bits are a fraction of 2^16: with a uniform draw added they carry into the others with that probability.
    bits = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(
        0, 1 << _LOWER_BITS, generator=generator
    )
    bits += values.contiguous().view(torch.int32)
    upper = (bits >> _LOWER_BITS << _LOWER_BITS).view(torch.float32)
    target.copy_(torch.where(values.isfinite(), upper, values))


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW in float32 arithmetic whose weights and moments are kept in the weights' dtype, rounded by chance.

    A second moment in bfloat16, too, would not move if it were rounded to nearest: under a decay of 0.999 it changes by
    less than half the distance of two neighbours. No step waits for the device.

    Args:
        parameters: what it moves.
        draws: of the rounding.
        lr: float32 scalar on the parameters' device.
        betas: decay of the moments.
        weight_decay: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        draws: Draws,
        *,
        lr: Tensor,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})
        self._draws = draws

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        lr, (beta1, beta2), generator = group["lr"], group["betas"], self._draws.generator
        corrections = 1 - beta1 ** state["step"], (1 - beta2 ** state["step"]).sqrt()
        for weight, grad, first, second in _pieces(parameter, gradient, state["exp_avg"], state["exp_avg_sq"]):
            grad32 = grad.float()
            first32 = first.float().lerp_(grad32, 1 - beta1)
            second32 = second.float().lerp_(grad32.square_(), 1 - beta2)
            step = first32 / corrections[0] / (second32.sqrt() / corrections[1] + group["eps"])
            weight32 = weight.float()
            weight32 -= lr * (group["weight_decay"] * weight32 + step)
            for target, values in ((weight, weight32), (first, first32), (second, second32)):
                round_stochastically(target, values, generator)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces that are small enough; whole where they cannot be seen as one row."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(tensor.detach().view(-1).split(_AT_ONCE) for tensor in tensors), strict=True)
