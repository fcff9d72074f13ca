"""Masked diffusion of text: our `MaskedTransformer`. It knows the noise level, t, by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from ..config import BlocksConfig, TokenTargetConfig
from ..noise import Masking
from ..targets import TokenTarget
from .family import BlockCall, register_family
from .kinds import DenoiserFamily, TextFamily
from .libraries import OURS


@register_family
class MaskedTransformerFamily(TextFamily, DenoiserFamily):
    """Converts `diffusionblocks.models.MaskedTransformer`: z is the partly masked sequence, and there is no other x."""

    classes = ("MaskedTransformer",)
    library = OURS
    target_config = TokenTargetConfig
    layers = "layers"
    stem = ("token_embedder", "time_embedder", "positions")
    head = ("head",)
    last_linear = "head.linear"

    @override
    def default_noise(self, config: Any) -> Masking:
        return Masking(vocab_size=self.num_classes(config))

    @override
    def make_target(self, model: nn.Module, config: BlocksConfig) -> TokenTarget:
        return TokenTarget(self.num_classes(model.config), *self.example_shape(model.config))

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        super().check_config(model, config)
        noise, count = config.noise, self.num_classes(model.config)
        size = getattr(noise, "vocab_size", count)
        if size != count:
            raise ValueError(
                f"blocks.noise.vocab_size = {size}, but {type(model).__name__} has vocab_size = {count} "
                f"and the mask is the id after them; set blocks.noise.vocab_size to {count}"
            )

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Returns the embedding of t, which also conditions the head, and the states that the head reads."""
        c = call.module("time_embedder")(call.condition)
        rotation = call.module("positions")(call.z)
        tokens = call.module("token_embedder")(call.z)
        for layer in call.layers:
            tokens = layer(tokens, c, rotation)
        return c, tokens

    @override
    def states(self, call: BlockCall, hidden: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor]:
        return denoised, hidden

    @override
    def logits(self, call: BlockCall, states: Tensor, condition: Tensor) -> Tensor:
        head = call.module("head")
        return head(states.to(next(head.parameters()).dtype), condition).float()  # type: ignore[no-any-return]
