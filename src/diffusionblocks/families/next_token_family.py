"""What all families that denoise the next token have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..config import BlocksConfig, NextTokenTargetConfig
from ..layers.two_streams import Past
from ..targets import NextTokenTarget, Target
from .text_family import TextFamily


class NextTokenFamily(TextFamily):
    """A language model: tokens in, the embedding of a token each out."""

    target = "next-token"
    generation_names = ("past", "counts")
    #: path of the input embedding's weight, whose rows the target can take
    embedding_path: ClassVar[str]
    #: see `NextTokenTarget`
    shift: ClassVar[int]

    def input_names(self, config: Any) -> tuple[str, ...]:
        """See `Family`."""
        return ("input_ids",)

    def default_target(self) -> NextTokenTargetConfig:
        """See `Family`."""
        return NextTokenTargetConfig()

    def make_target(self, model: nn.Module, config: BlocksConfig) -> NextTokenTarget:
        """See `Family`."""
        options = config.target
        assert isinstance(options, NextTokenTargetConfig)
        target = NextTokenTarget(
            self.num_classes(model.config),
            self.hidden_size(model),
            learned=options.embedding == "learned",
            seed=config.seed,
            shift=self.shift,
            clean_weight=options.clean_weight,
        )
        if not next(model.parameters()).is_meta:
            self.fill_target(model, target, config)
        return target

    def fill_target(self, network: nn.Module, target: Target, config: BlocksConfig) -> None:
        """See `Family`."""
        assert isinstance(target, NextTokenTarget)
        assert isinstance(config.target, NextTokenTargetConfig)
        if config.target.embedding != "frozen":
            target.take_rows(network.get_parameter(self.embedding_path))

    def past(self, batch: int, capacity: int, device: torch.device) -> Past:
        """See `Family`: keys and values of all layers, of one block's clean stream or at one denoising step."""
        return Past(batch, capacity, device)
