"""Masked diffusion of text: our `MaskedTransformer`. It knows the noise level, t, by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..conditioning import AdaptiveNorms
from ..config import BlocksConfig, TokenTargetConfig
from ..noise import Masking
from ..targets import TokenTarget
from .dit import DenoisingTransformer
from .libraries import OURS, Library


class MaskedTransformerAdapter(DenoisingTransformer):
    """Converts `diffusionblocks.models.MaskedTransformer`: z is the partly masked sequence, and there is no other x."""

    classes: ClassVar[dict[str, Library]] = {"MaskedTransformer": OURS}
    target = "tokens"
    class_count_field = "vocab_size"
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

    def hidden_size(self, model: nn.Module) -> int:
        """See `Adapter`."""
        return int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def num_classes(self, config: Any) -> int:
        """See `Adapter`."""
        return int(config.vocab_size)

    def example_shape(self, config: Any) -> tuple[int]:
        """See `Adapter`."""
        return (int(config.sequence_length),)

    def input_names(self, config: Any) -> tuple[str, ...]:
        """See `Adapter`."""
        return ()

    def empty_batch(self, config: Any, size: int) -> dict[str, Tensor]:
        """See `Adapter`."""
        return {"input_ids": torch.empty(size, *self.example_shape(config), dtype=torch.int64)}

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
        """See `Adapter`."""
        c = network.get_submodule("time_embedder")(condition)
        rotation = network.get_submodule("positions")(z)
        tokens = network.get_submodule("token_embedder")(z)
        for layer, _ in layers:
            tokens = layer(tokens, c, rotation)
        return tokens, network.get_submodule("head")(tokens, c)
