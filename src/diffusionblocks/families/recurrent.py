"""Recurrent depth (Huginn) as one denoiser (paper, section 4.4): the state of the recurrence is the noised target.

Position i reads token i and denoises the embedding of token i + 1. What it sees of earlier positions are their states,
whose targets it knows already, so one causal stream leaks nothing. A training step is one pass of the core at one noise
level, instead of some thirty with truncated backpropagation; inference takes any number of Euler steps. There is
nothing to split: one block owns all levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..config import BlocksConfig, NextTokenTargetConfig
from ..layers.logit_scale import LogitScale
from ..layers.two_streams import Streams, two_streams
from .family import BlockCall, register_family
from .kinds import NextTokenFamily
from .libraries import OURS
from .ordinary import OrdinaryModel

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


@register_family
class RecurrentDepthFamily(NextTokenFamily):
    """Converts our `RecurrentDepth`. The layers of the block are those of the core."""

    classes = ("RecurrentDepth",)
    library = OURS
    layers = "core"
    stem = ("embedding", "positions", "prelude", "adapter")
    head = ("coda", "final_norm")
    norms = ("norm1", "norm3")
    final_norm = "final_norm"
    embedding_path = "embedding.weight"
    shift = 1  # the position of a token denoises the one after it
    depth_dependent_weights = True
    depth_field = "num_core_layers"

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        assert isinstance(config.target, NextTokenTargetConfig)
        if config.num_blocks != 1:
            raise ValueError(
                f"blocks.num_blocks = {config.num_blocks}: a {type(model).__name__} has one core, the denoiser at "
                "every level; set num_blocks to 1"
            )
        if not config.target.noise_input:
            raise ValueError(
                f"target.noise_input = false: the recurrence of a {type(model).__name__} is of z; leave it out"
            )
        if config.target.self_conditioning:
            raise ValueError(
                f"target.self_conditioning = true: a {type(model).__name__} has no position of its own to show "
                "what was said of a token; leave it out"
            )
        if config.target.reads_trunk:
            raise ValueError(
                f"target.context = trunk: the recurrence of a {type(model).__name__} reads its own states; leave "
                "context out"
            )
        if config.target.clean_weight:
            raise ValueError(
                f"target.clean_weight = {config.target.clean_weight}: a {type(model).__name__} has no clean stream; "
                "leave it out"
            )

    @override
    def add_parts(self, model: nn.Module, config: BlocksConfig) -> nn.ModuleDict:
        assert isinstance(config.target, NextTokenTargetConfig)
        return nn.ModuleDict({"logit_scale": LogitScale(config.target.logit_scale)})

    @override
    def hidden(self, call: BlockCall) -> tuple[Any, Tensor]:
        """Run prelude and core.

        Args:
            call: `inputs` has `input_ids` (batch, length), of which the last one is not read: nothing comes after it;
                where text is generated the new tokens (right-padded), with `past` and `counts` (batch,), see `Streams`.
                `z` is (batch, length - 1, dim), or one state for each new token.

        Returns:
            (what the coda needs to know of the positions, F of the shape of z).
        """
        tokens, past = call.inputs["input_ids"], call.inputs.get("past")
        positions = call.module("positions")
        if past is None:
            tokens = tokens[:, :-1]
            places = _Places(positions(tokens), None)
        else:
            streams = Streams(0, tokens.shape[1], call.z.device, past=past, counts=call.inputs.get("counts"))
            cos, sin = positions(tokens, streams.positions)
            places = _Places((cos[:, None], sin[:, None]), streams)
        context = call.module("embedding")(tokens)
        prelude = list(call.module("prelude").children())
        for number, layer in enumerate(prelude):
            context = layer(context, places.rotation, places.attend(number))
        state = call.module("adapter")(torch.cat([call.z.to(context.dtype), context], dim=-1)).to(context.dtype)
        for number, core_layer in enumerate(call.layers, len(prelude)):
            state = core_layer(state, places.rotation, places.attend(number))
        return (places, len(prelude) + len(call.layers)), state

    @override
    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        raise ValueError(
            f"the recurrence of a {ordinary.model_class} has z as its state, which its class draws by itself: no "
            "ordinary model is one step of it; export_initialisation gives weights to train on"
        )

    @override
    def states(self, call: BlockCall, hidden: Any, denoised: Tensor) -> tuple[Tensor, Tensor]:
        """Run the coda, on the normalised D."""
        assert call.final_norm is not None
        places, before = hidden
        norm = call.module("final_norm")
        x = call.final_norm(denoised.to(next(norm.parameters()).dtype))
        for number, layer in enumerate(call.module("coda").children(), before):
            x = layer(x, places.rotation, places.attend(number))
        if places.streams is not None:
            places.streams.past.advance(places.streams.counts, x.shape[1])
        return norm(x), call.condition

    @override
    def logits(self, call: BlockCall, states: Tensor, condition: Tensor) -> Tensor:
        """Logits by the tied head."""
        return call.extra["logit_scale"](call.module("embedding").logits(states))  # type: ignore[no-any-return]
