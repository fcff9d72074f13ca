"""Masked diffusion of text: our `MaskedTransformer`. It knows the noise level, t, by itself."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from ..config import BlocksConfig
from .family import BlockCall, register_family
from .kinds import DenoiserFamily, MaskedTextFamily
from .libraries import OURS


@register_family
class MaskedTransformerFamily(MaskedTextFamily, DenoiserFamily):
    """Converts `diffusionblocks.models.MaskedTransformer`: z is the partly masked sequence, and there is no other x."""

    calls_layers = True
    classes = ("MaskedTransformer",)
    library = OURS
    layers = "layers"
    stem = ("token_embedder", "time_embedder", "positions")
    head = ("head",)
    last_linear = "head.linear"

    mask_in_vocabulary = False
    shorter_texts = False
    spare_classes = False

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        super().check_config(model, config)
        assert config.target is not None
        if not config.target.sees_noise:
            raise ValueError(
                f"target.noise_input = false: {type(model).__name__} knows the noise level by itself; leave it out"
            )

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Returns the embedding of t, which also conditions the head, and the states that the head reads."""
        c = call.module("time_embedder")(call.condition)
        rotation = call.module("positions")(call.z)
        tokens = self.with_hint(call, call.module("token_embedder")(call.z))
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
