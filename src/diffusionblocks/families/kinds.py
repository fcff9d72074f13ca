"""Kinds of families, by what their blocks denoise: a label, an image, masked tokens, or the next token."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..common.messages import warn_once
from ..config import BlocksConfig, ImageTargetConfig, LabelTargetConfig, NextTokenTargetConfig, TokenTargetConfig
from ..layers.target_tokens import Hint
from ..layers.two_streams import Past
from ..noise import Masking
from ..targets import HINT, ImageTarget, LabelTarget, NextTokenTarget, Target, TokenTarget, random_rows
from .family import BlockCall, Family


def tokens_of(output: Any) -> Tensor:
    """The tokens that a layer returns, which some versions of a library return in a tuple."""
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


class ClassifierFamily(Family):
    """Classifiers: an image in, logits of its label out; the label's embedding is denoised."""

    target_config = LabelTargetConfig
    inputs = ("pixel_values",)
    class_count_field = "num_labels"
    shape_fields = ("num_channels", "image_size", "image_size")

    @override
    def make_target(self, model: nn.Module, config: BlocksConfig) -> LabelTarget:
        assert isinstance(config.target, LabelTargetConfig)
        count, dim = self.num_classes(model.config), self.hidden_size(model.config)
        embedding = config.target.embedding
        return LabelTarget(count, dim, learned=embedding == "learned", seed=config.seed, one_hot=embedding == "one-hot")

    @override
    def check_weights(self, model: nn.Module, config: BlocksConfig) -> None:
        assert isinstance(config.target, LabelTargetConfig)
        if config.shared != "frozen":
            return
        if config.target.self_conditioning:
            raise ValueError(
                "target.self_conditioning = true with shared = frozen: the map of what is shown starts at zero and "
                "could never learn; use shared: replicated"
            )
        if (part := self.told_by_zero(config)) is not None:
            warn_once(
                f"blocks will never be told {part}: shared = frozen freezes the map of it, which starts at zero; use "
                "shared: replicated"
            )

    def told_by_zero(self, config: BlocksConfig) -> str | None:
        """What blocks are told of by a map of conversion's that starts at zero; None: nothing."""
        assert isinstance(config.target, LabelTargetConfig)
        return "z (target.token = linear)" if config.target.noise_input and config.target.token == "linear" else None

    def whole_logits(self, model: nn.Module, pixel_values: Tensor) -> Tensor:
        """What an unconverted model gives: images (batch, channels, height, width) -> logits (batch, num_classes)."""
        return model(pixel_values).logits  # type: ignore[no-any-return]

    # ---- the unconverted model in parts, for local learning ------------------------------------------------

    @property
    def runs_in_parts(self) -> bool:
        """Whether stem and head can be run by themselves: whether `embed` and `classify` are written."""
        return type(self).embed is not ClassifierFamily.embed

    def embed(self, network: nn.Module, pixel_values: Tensor) -> Tensor:
        """Run the stem: images (batch, channels, height, width) -> tokens (batch, length, dim).

        Args:
            network: the model, or a tree of its stem.
            pixel_values: the images.
        """
        raise NotImplementedError(f"{type(self).__name__} does not run a model in parts")

    def classify(self, network: nn.Module, tokens: Tensor) -> Tensor:
        """Run the head, as the model does: tokens (batch, length, dim) -> logits (batch, num_classes).

        Args:
            network: the model, or a tree of its head.
            tokens: what the last layer returned.
        """
        raise NotImplementedError(f"{type(self).__name__} does not run a model in parts")


class DenoiserFamily(Family):
    """Transformers that know the noise level by themselves and are one block's whole network: F is what they return."""

    knows_noise_level = True
    depth_field = "num_layers"
    #: path of the last linear layer, which may start at zero
    last_linear: ClassVar[str]

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        if config.conditioning_dim is not None:
            raise ValueError(
                f"conditioning_dim = {config.conditioning_dim}: {type(model).__name__} knows the noise level by "
                "itself, so none is added; leave it out"
            )

    @override
    def check_weights(self, model: nn.Module, config: BlocksConfig) -> None:
        last = model.get_submodule(self.last_linear)
        if any(bool(p.any()) for p in last.parameters()):
            return
        if config.shared == "frozen":
            raise ValueError(
                f"shared = frozen would freeze {self.last_linear}, which is zero in a fresh {type(model).__name__}: "
                "it could never learn; use shared: replicated, or start from trained weights"
            )
        if config.lora is not None:
            raise ValueError(
                f"lora would freeze {self.last_linear}, which is zero in a fresh {type(model).__name__}: it could "
                "never learn; leave lora out, or start from trained weights"
            )


class ImageFamily(DenoiserFamily):
    """Diffusion models of images: F is of the noised image, given c_noise and the label."""

    target_config = ImageTargetConfig
    shape_fields = ("in_channels", "sample_size", "sample_size")

    @override
    def input_names(self, config: Any) -> tuple[str, ...]:
        return ("labels",) if self.num_classes(config) else ()

    @override
    def make_target(self, model: nn.Module, config: BlocksConfig) -> ImageTarget:
        assert isinstance(config.target, ImageTargetConfig)
        channels, height, width = self.example_shape(model.config)
        count, dropout = self.num_classes(model.config), config.target.label_dropout
        return ImageTarget((channels, height, width), num_classes=count, label_dropout=dropout)

    @override
    def readout(self, call: BlockCall, hidden: Tensor, denoised: Tensor) -> Tensor:
        return denoised


class TextFamily(Family):
    """Models of text: tokens in, logits at every position out.

    The read-out comes in two halves: the states of all positions, and the logits of any of them. Only the second is as
    large as the vocabulary, and there each position is on its own. So a loss can be computed on some positions at a
    time (`Block.loss_chunk`).
    """

    class_count_field = "vocab_size"
    shape_fields = ("sequence_length",)
    spare_classes = True  # ids that no text has are never targets: vocabularies are padded to round numbers
    #: whether texts may be shorter than the model has positions for
    shorter_texts: ClassVar[bool] = True

    @override
    def takes_shape(self, config: Any, shape: tuple[int, ...]) -> bool:
        own = self.example_shape(config)
        return shape <= own if self.shorter_texts else shape == own

    @override
    def empty_batch(self, config: Any, size: int, length: int | None = None) -> dict[str, Tensor]:
        shape = self.example_shape(config) if length is None else (length,)
        return {"input_ids": torch.empty(size, *shape, dtype=torch.int64)}

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        super().check_config(model, config)
        fixed = "shared = frozen" if config.shared == "frozen" else "lora" if config.lora is not None else None
        if fixed is not None and getattr(config.target, "self_conditioning", False):
            raise ValueError(
                f"target.self_conditioning = true with {fixed}: the map of what is shown starts at zero and could "
                "never learn; use shared: replicated without lora"
            )

    @override
    def add_parts(self, model: nn.Module, config: BlocksConfig) -> nn.ModuleDict:
        assert isinstance(config.target, TokenTargetConfig | NextTokenTargetConfig)
        return nn.ModuleDict({"hint": Hint(self.hidden_size(model.config))} if config.target.self_conditioning else {})

    def with_hint(self, call: BlockCall, states: Tensor) -> Tensor:
        """Hidden states (batch, length, dim) of z's positions, with what was said of them, where it is shown."""
        hint = call.inputs.get(HINT)
        return states if hint is None else states + call.extra["hint"](hint).to(states.dtype)

    def states(self, call: BlockCall, hidden: Any, denoised: Tensor) -> tuple[Tensor, Tensor]:
        """The first half of `readout`, whose arguments see.

        Returns:
            (states (batch, length, dim), the condition of `logits` for each sample (batch, dim)).
        """
        return denoised, call.condition

    @abc.abstractmethod
    def logits(self, call: BlockCall, states: Tensor, condition: Tensor) -> Tensor:
        """The second half, of any of the positions: (batch, some, dim) -> (batch, some, vocab_size).

        Args:
            call: has modules only: `network`, `extra`, and `final_norm` for that condition.
            states, condition: what `states` returned.
        """

    @override
    def readout(self, call: BlockCall, hidden: Any, denoised: Tensor) -> Tensor:
        return self.logits(call, *self.states(call, hidden, denoised))


class MaskedTextFamily(TextFamily):
    """Masked language models: partly masked tokens in, logits of all tokens out. z is the tokens; there is no x."""

    target_config = TokenTargetConfig
    #: whether the mask is an id of the vocabulary, which the noise process names; else it is the id after them
    mask_in_vocabulary: ClassVar[bool] = True

    @override
    def classes_for(self, count: int) -> int:
        return count + self.mask_in_vocabulary

    @override
    def default_noise(self, config: Any) -> Masking:
        return Masking(vocab_size=self.num_classes(config))

    @override
    def make_target(self, model: nn.Module, config: BlocksConfig) -> TokenTarget:
        (length,) = self.example_shape(model.config)
        mask, count = getattr(config.noise, "mask_id", None), self.num_classes(model.config)
        rows = None
        assert isinstance(config.target, TokenTargetConfig)
        if config.target.self_conditioning:
            rows = random_rows(count, self.hidden_size(model.config), config.seed)
        return TokenTarget(count, length, mask, shorter=self.shorter_texts, hint_rows=rows)

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        super().check_config(model, config)
        name, noise, count = type(model).__name__, config.noise, self.num_classes(model.config)
        mask = getattr(noise, "mask_token_id", None)
        if mask is None and self.mask_in_vocabulary:
            raise ValueError(
                f"{name} does not say which of its {count} tokens is the mask; set blocks.noise.mask_token_id (a "
                f"tokenizer's mask_token_id), and blocks.noise.vocab_size = {count}"
            )
        size = getattr(noise, "vocab_size", count)
        if size != count:
            place = "" if self.mask_in_vocabulary else " and the mask is the id after them"
            raise ValueError(
                f"blocks.noise.vocab_size = {size}, but {name} has vocab_size = {count}{place}; set "
                f"blocks.noise.vocab_size to {count}"
            )
        if mask is not None and not self.mask_in_vocabulary:
            raise ValueError(
                f"blocks.noise.mask_token_id = {mask}, but the mask of a {name} is the id after its tokens; leave "
                "mask_token_id out"
            )


class NextTokenFamily(TextFamily):
    """Language models: tokens in, the embedding of a token each out."""

    target_config = NextTokenTargetConfig
    inputs = ("input_ids",)
    generation_names = ("past", "counts")
    #: path of the input embedding's weight, whose rows the target can take
    embedding_path: ClassVar[str]
    #: see `NextTokenTarget`; of blocks that are shown no noise it is 1
    shift: ClassVar[int]

    @override
    def make_target(self, model: nn.Module, config: BlocksConfig) -> NextTokenTarget:
        options = config.target
        assert isinstance(options, NextTokenTargetConfig)
        target = NextTokenTarget(
            self.num_classes(model.config),
            self.hidden_size(model.config),
            learned=options.embedding == "learned",
            seed=config.seed,
            shift=self.shift if options.noise_input else 1,
            clean_weight=options.clean_weight,
        )
        if not next(model.parameters()).is_meta:
            self.fill_target(model, target, config)
        return target

    @override
    def fill_target(self, network: nn.Module, target: Target, config: BlocksConfig) -> None:
        assert isinstance(target, NextTokenTarget)
        assert isinstance(config.target, NextTokenTargetConfig)
        if config.target.embedding != "frozen":
            target.take_rows(network.get_parameter(self.embedding_path))

    @override
    def past(self, batch: int, capacity: int, device: torch.device) -> Past:
        return Past(batch, capacity, device)
