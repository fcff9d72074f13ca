"""Masked diffusion of text: our `MaskedTransformer`. It knows the noise level, t, by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config import BlocksConfig, TokenTargetConfig
from ..layers.adaptive_norms import AdaptiveNorms
from ..noise import Masking
from ..targets import TokenTarget
from .dit import DenoisingTransformer
from .libraries import OURS, Library
from .text_family import TextFamily


class MaskedTransformerFamily(TextFamily, DenoisingTransformer):
    """Converts `diffusionblocks.models.MaskedTransformer`: z is the partly masked sequence, and there is no other x."""

    classes: ClassVar[dict[str, Library]] = {"MaskedTransformer": OURS}
    target = "tokens"
    _read_out = "head.linear"

    def layers_path(self, model: nn.Module) -> str:
        """See `Family`."""
        return "layers"

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("token_embedder", "time_embedder", "positions", *self.head_paths(model))

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("head",)

    def example_shape(self, config: Any) -> tuple[int]:
        """See `Family`."""
        return (int(config.sequence_length),)

    def input_names(self, config: Any) -> tuple[str, ...]:
        """See `Family`."""
        return ()

    def default_target(self) -> TokenTargetConfig:
        """See `Family`."""
        return TokenTargetConfig()

    def default_noise(self, config: Any) -> Masking:
        """See `Family`."""
        return Masking(vocab_size=self.num_classes(config))

    def make_target(self, model: nn.Module, config: BlocksConfig) -> TokenTarget:
        """See `Family`."""
        return TokenTarget(self.num_classes(model.config), *self.example_shape(model.config))

    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        """See `Family`."""
        super().check_config(model, config)
        noise, count = config.noise, self.num_classes(model.config)
        size = getattr(noise, "vocab_size", count)
        if size != count:
            raise ValueError(
                f"blocks.noise.vocab_size = {size}, but {type(model).__name__} has vocab_size = {count} "
                f"and the mask is the id after them; set blocks.noise.vocab_size to {count}"
            )

    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms | None]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Tensor],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Family`: what the head is told of t, and what it is given."""
        c = network.get_submodule("time_embedder")(condition)
        rotation = network.get_submodule("positions")(z)
        tokens = network.get_submodule("token_embedder")(z)
        for layer, _ in layers:
            tokens = layer(tokens, c, rotation)
        return c, tokens

    def states(
        self, network: nn.Module, final: AdaptiveNorms | None, hidden: Tensor, denoised: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TextFamily`."""
        return denoised, hidden

    def logits(
        self, network: nn.Module, final: AdaptiveNorms | None, added: nn.ModuleDict, states: Tensor, told: Tensor
    ) -> Tensor:
        """See `TextFamily`."""
        head = network.get_submodule("head")
        return head(states.to(next(head.parameters()).dtype), told).float()  # type: ignore[no-any-return]
