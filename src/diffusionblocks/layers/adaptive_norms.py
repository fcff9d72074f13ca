"""Conditioning on the noise level: a noise embedding, and adaptive norms for models that have none.

The adaptive norms wrap the model's own norms from outside, by forward hooks: no module is replaced, so parameters
keep their original names, and the scale and shift are zero-initialised, so that a converted layer starts as the
original function (adaLN of DiT, arXiv 2212.09748, section 3.2, without gates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .exact_buffers import ExactBuffers


class NoiseEmbedding(ExactBuffers):
    """Fourier features of c_noise and a two-layer MLP: (batch,) -> (batch, dim).

    c_noise = log(sigma) / 4 spans about [-1.6, 1.1]; frequencies run geometrically from 1 to 64, so that levels
    inside the narrowest interval of a partition are still told apart.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num_frequencies: int = 32, max_frequency: float = 64.0) -> None:
        super().__init__()
        exponent = torch.linspace(0.0, math.log(max_frequency), num_frequencies)
        self.register_buffer("frequencies", exponent.exp(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise (batch,) -> embedding (batch, dim)."""
        angle = c_noise.float()[:, None] * self.frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))  # type: ignore[no-any-return]


class AdaptiveNorms(nn.Module):
    """Scale and shift of the outputs of some norms, from the noise embedding; zero at initialisation.

    The norms are looked up in the module that is called, by name: a copy of that module, or of this one, is adapted
    like the original, and gets its gradients.

    Args:
        module: the foreign module that `forward` will call, or one of its structure; its norms are hooked, not owned.
        norms: those of its submodules that are adapted (or itself).
        dims: feature size of each norm.
        condition_dim: size of the noise embedding.
    """

    def __init__(self, module: nn.Module, norms: Sequence[nn.Module], dims: Sequence[int], condition_dim: int) -> None:
        super().__init__()
        names = {id(part): name for name, part in module.named_modules()}
        self.names = [names[id(norm)] for norm in norms]
        self.dims = list(dims)
        self.linear = nn.Linear(condition_dim, 2 * sum(dims))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for norm in norms:
            # Set only while `forward` runs the module (again under activation checkpointing, which re-runs it).
            norm.adaptation = None  # type: ignore[assignment]
            norm.register_forward_hook(_adapt)

    def forward(
        self,
        module: nn.Module,
        condition: Tensor,
        *args: Any,
        leading: int | None = None,
        call: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Any:
        """Call `module(*args, **options)` with its norms adapted to `condition` (batch, condition_dim).

        Args:
            module: of the structure that was hooked.
            condition: the noise embedding.
            args, options: of the module.
            leading: adapt only so many positions, the first; the others see the norms as they were. None adapts all.
            call: run `call(module, *args, **options)` instead.

        Raises:
            ValueError: one of its norms is no longer that of the model that was converted.
        """
        return self.adapt(self.modulation(condition), module, *args, leading=leading, call=call, **options)

    def modulation(self, condition: Tensor) -> Tensor:
        """Scale and shift of all norms: noise embedding (batch, condition_dim) -> (batch, 2 * sum(dims))."""
        return self.linear(F.silu(condition))  # type: ignore[no-any-return]

    def adapt(
        self,
        modulation: Tensor,
        module: nn.Module,
        *args: Any,
        leading: int | None = None,
        call: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Any:
        """`forward`, for a noise embedding whose `modulation` is known: of each sample, or one for all of them."""
        parts = modulation.split([2 * dim for dim in self.dims], dim=-1)
        hooked = [_hooked(module, name) for name in self.names]
        for norms, part in zip(hooked, parts, strict=True):
            scale, shift = part.chunk(2, dim=-1)
            for norm in norms:
                norm.adaptation = (scale, shift, leading)  # type: ignore[assignment]
        try:
            return module(*args, **options) if call is None else call(module, *args, **options)
        finally:
            for norms in hooked:
                for norm in norms:
                    norm.adaptation = None  # type: ignore[assignment]

    @torch.no_grad()
    def folded(self, module: nn.Module, condition: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        """Weights with which the norms of a module give by themselves what they give adapted to one condition.

        Args:
            module: of the structure that was hooked.
            condition: the noise embedding (1, condition_dim).

        Returns:
            (weights and biases by their names in `module`; the names of norms that have no place for them).
        """
        parts = self.modulation(condition).split([2 * dim for dim in self.dims], dim=-1)
        weights: dict[str, Tensor] = {}
        without: list[str] = []
        for name, part in zip(self.names, parts, strict=True):
            norm: Any = module.get_submodule(name)
            if not (isinstance(norm, nn.LayerNorm) and norm.elementwise_affine and norm.bias is not None):
                without.append(name or type(norm).__name__)
                continue
            scale, shift = part[0].double().chunk(2)
            prefix, gain, dtype = f"{name}." if name else "", 1.0 + scale, norm.weight.dtype
            weights[f"{prefix}weight"] = (norm.weight.double() * gain).to(dtype)
            weights[f"{prefix}bias"] = (norm.bias.double() * gain + shift).to(dtype)
        return weights, without


def _hooked(module: nn.Module, name: str) -> list[nn.Module]:
    """The hooked norm of that name; the hooked copies in it, where a library has wrapped it to train a copy."""
    norm = module.get_submodule(name)
    if "adaptation" in norm.__dict__:
        return [norm]
    inner = [part for part in norm.modules() if "adaptation" in part.__dict__]
    if not inner:
        raise ValueError(
            f"{type(module).__name__}.{name} was replaced by a {type(norm).__name__} after conversion, which cannot be "
            "told the noise level: replace it in the original model, and convert that"
        )
    return inner


def unadapted(norm: nn.Module, *args: Any) -> Any:
    """Call a norm as it was before conversion, in the midst of a call that is adapted."""
    hooked = _hooked(norm, "")
    adaptations = [part.adaptation for part in hooked]
    for part in hooked:
        part.adaptation = None  # type: ignore[assignment]
    try:
        return norm(*args)
    finally:
        for part, adaptation in zip(hooked, adaptations, strict=True):
            part.adaptation = adaptation


def _adapt(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The hook of every adapted norm. It knows no object but the norm itself, so that copies have what is theirs."""
    adaptation: Any = module.adaptation
    if adaptation is None:  # the norm is used outside a converted model
        return output
    scale, shift, leading = adaptation
    gain, shift = 1.0 + scale.float(), shift.float()
    if leading is not None:
        # Split, not sliced: the gradient of a slice is filled up with zeros, and the two are added.
        noisy, clean = output.split([leading, output.shape[1] - leading], dim=1)
        return torch.cat([_adapted(noisy, gain, shift), clean], dim=1)
    if torch.compiler.is_compiling() and type(module) is nn.LayerNorm and module.elementwise_affine:
        # The norm's weight and bias join gain and shift: then the gradients of all four are made of two sums over
        # each sample's tokens, where there would be four. Compiled, what the norm gave is never computed.
        plain = F.layer_norm(args[0], module.normalized_shape, eps=module.eps)
        if module.bias is not None:
            shift = shift + gain * module.bias
        return _adapted(plain, gain * module.weight, shift)
    return _adapted(output, gain, shift)


def _adapted(states: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """states (batch, ..., dim) times gain plus shift, each (batch or 1, dim), in float32, of the dtype of states."""
    shape = (gain.shape[0], *([1] * (states.dim() - 2)), states.shape[-1])
    return (states.float() * gain.view(shape) + shift.view(shape)).to(states.dtype)
