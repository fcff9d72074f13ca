"""Masked diffusion of text: our `MaskedTransformer`. It knows the noise level, t, by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..conditioning import AdaptiveNorms
from ..config import BlocksConfig, TokenTargetConfig
from ..noise import Masking
from ..targets import TokenTarget
from .dit import DenoisingTransformer
from .libraries import OURS, Library
from .text import TextAdapter


class MaskedTransformerAdapter(TextAdapter, DenoisingTransformer):
    """Converts `diffusionblocks.models.MaskedTransformer`: z is the partly masked sequence, and there is no other x."""

    classes: ClassVar[dict[str, Library]] = {"MaskedTransformer": OURS}
    target = "tokens"
    _read_out = "head.linear"

    def layers_path(self, model: nn.Module) -> str:
        """See `Adapter`."""
        return "layers"

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Adapter`."""
        return ("token_embedder", "time_embedder", "positions", *self.head_paths(model))

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Adapter`."""
        return ("head",)

    def example_shape(self, config: Any) -> tuple[int]:
        """See `Adapter`."""
        return (int(config.sequence_length),)

    def input_names(self, config: Any) -> tuple[str, ...]:
        """See `Adapter`."""
        return ()

    def default_target(self) -> TokenTargetConfig:
        """See `Adapter`."""
        return TokenTargetConfig()

    def default_noise(self, config: Any) -> Masking:
        """See `Adapter`."""
        return Masking(vocab_size=self.num_classes(config))

    def make_target(self, model: nn.Module, config: BlocksConfig) -> TokenTarget:
        """See `Adapter`."""
        return TokenTarget(self.num_classes(model.config), *self.example_shape(model.config))

    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        """See `Adapter`."""
        super().check_config(model, config)
        noise, count = config.noise, self.num_classes(model.config)
        assert isinstance(noise, Masking)
        if noise.vocab_size != count:
            raise ValueError(
                f"blocks.noise.vocab_size = {noise.vocab_size}, but {type(model).__name__} has vocab_size = {count} "
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
        """See `Adapter`: what the head is told of t, and what it is given."""
        c = network.get_submodule("time_embedder")(condition)
        rotation = network.get_submodule("positions")(z)
        tokens = network.get_submodule("token_embedder")(z)
        for layer, _ in layers:
            tokens = layer(tokens, c, rotation)
        return c, tokens

    def states(
        self, network: nn.Module, final: AdaptiveNorms | None, hidden: Tensor, denoised: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TextAdapter`."""
        return denoised, hidden

    def logits(
        self, network: nn.Module, final: AdaptiveNorms | None, added: nn.ModuleDict, states: Tensor, told: Tensor
    ) -> Tensor:
        """See `TextAdapter`."""
        head = network.get_submodule("head")
        return head(states.to(next(head.parameters()).dtype), told).float()  # type: ignore[no-any-return]
