"""Recurrent depth (Huginn) as one denoiser (paper, section 4.4): the state of the recurrence is the noised target.

Position i reads token i and denoises the embedding of token i + 1. What it sees of earlier positions are their states,
whose targets it knows already, so one causal stream leaks nothing. A training step is one pass of the core at one noise
level, instead of some thirty with truncated backpropagation; inference takes any number of Euler steps. There is
nothing to split: one block owns all levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import BlocksConfig, NextTokenTargetConfig
from ..layers.adaptive_norms import AdaptiveNorms
from ..layers.two_streams import Streams, two_streams
from .family import LogitScale
from .libraries import OURS, Library
from .next_token_family import NextTokenFamily

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Places:
    """What the layers need to know of the positions of one forward pass."""

    rotation: tuple[Tensor, Tensor]
    streams: Streams | None

    def attend(self, layer: int) -> Attend | None:
        """The attention of a layer over what `streams.past` holds for that number; None: plainly causal."""
        if self.streams is None:
            return None
        return functools.partial(two_streams, streams=self.streams, layer=layer)


class RecurrentDepthFamily(NextTokenFamily):
    """Converts our `RecurrentDepth`. The layers of the block are those of the core."""

    classes: ClassVar[dict[str, Library]] = {"RecurrentDepth": OURS}
    embedding_path = "embedding.weight"
    shift = 1  # the position of a token denoises the one after it
    depth_dependent_weights = True
    depth_field = "num_core_layers"

    def layers_path(self, model: nn.Module) -> str:
        """See `Family`."""
        return "core"

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("embedding", "positions", "prelude", "family", *self.head_paths(model))

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("coda", "final_norm")

    def layer_norms(self, layer: nn.Module) -> list[nn.Module]:
        """See `Family`."""
        return [layer.get_submodule("norm1"), layer.get_submodule("norm3")]

    def final_norms(self, network: nn.Module) -> list[nn.Module]:
        """See `Family`."""
        return [network.get_submodule("final_norm")]

    def example_shape(self, config: Any) -> tuple[int]:
        """See `Family`."""
        return (int(config.sequence_length),)

    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        """See `Family`."""
        assert isinstance(config.target, NextTokenTargetConfig)
        if config.num_blocks != 1:
            raise ValueError(
                f"blocks.num_blocks = {config.num_blocks}: a {type(model).__name__} has one core, the denoiser at "
                "every level; set num_blocks to 1"
            )
        if config.target.clean_weight:
            raise ValueError(
                f"target.clean_weight = {config.target.clean_weight}: a {type(model).__name__} has no clean stream; "
                "leave it out"
            )

    def add_parts(self, model: nn.Module, config: Any) -> nn.ModuleDict:
        """See `Family`."""
        return nn.ModuleDict({"logit_scale": LogitScale(config.target.logit_scale)})

    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms | None]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Any],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Any, Tensor]:
        """See `Family`.

        Args:
            network, layers, added, condition: as there.
            inputs: `input_ids` (batch, length), of which the last one is not read: nothing comes after it; where text
                is generated the new tokens (right-padded), with `past` and `counts` (batch,), see `Streams`.
            z: (batch, length - 1, dim), or one state for each new token.

        Returns:
            (what the coda needs to know of the positions, F of the shape of z).
        """
        tokens, past = inputs["input_ids"], inputs.get("past")
        positions = network.get_submodule("positions")
        if past is None:
            tokens = tokens[:, :-1]
            places = _Places(positions(tokens), None)
        else:
            streams = Streams(0, tokens.shape[1], z.device, past=past, counts=inputs.get("counts"))
            cos, sin = positions(tokens, streams.positions)
            places = _Places((cos[:, None], sin[:, None]), streams)
        context = network.get_submodule("embedding")(tokens)
        prelude = list(network.get_submodule("prelude").children())
        for number, layer in enumerate(prelude):
            context = layer(context, places.rotation, places.attend(number))
        family = network.get_submodule("family")
        state = family(torch.cat([z.to(context.dtype), context], dim=-1)).to(context.dtype)
        for number, (layer, adaptive) in enumerate(layers, len(prelude)):
            assert adaptive is not None
            state = adaptive(layer, condition, state, places.rotation, places.attend(number))
        return (places, len(prelude) + len(layers)), state

    def states(
        self, network: nn.Module, final: AdaptiveNorms | None, hidden: Any, denoised: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `TextFamily`: the coda, of the normalised D."""
        assert final is not None
        places, before = hidden
        norm = network.get_submodule("final_norm")
        x = final(norm, condition, denoised.to(next(norm.parameters()).dtype))
        for number, layer in enumerate(network.get_submodule("coda").children(), before):
            x = layer(x, places.rotation, places.attend(number))
        if places.streams is not None:
            places.streams.past.advance(places.streams.counts, x.shape[1])
        return norm(x), condition

    def logits(
        self, network: nn.Module, final: AdaptiveNorms | None, added: nn.ModuleDict, states: Tensor, told: Tensor
    ) -> Tensor:
        """See `TextFamily`: the tied head."""
        return added["logit_scale"](network.get_submodule("embedding").logits(states))  # type: ignore[operator, no-any-return]
