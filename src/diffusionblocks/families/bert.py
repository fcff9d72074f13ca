"""Masked language models of transformers: encoders of BERT's kind, by their own layers and head.

z is the partly masked text, as the model reads it; conversion adds the noise level, by adaptive norms. The mask is a
token of the model's own vocabulary, of which no text is made: it is ruled out; all other logits are the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..config import BlocksConfig
from ..layers.exact_buffers import ExactRotation
from ..layers.ruled_out import RuledOut
from .family import BlockCall, register_family
from .kinds import MaskedTextFamily, tokens_of
from .libraries import TRANSFORMERS
from .ordinary import OrdinaryModel
from .rotary import check_rotary


class EncoderFamily(MaskedTextFamily):
    """Encoders with a read-out of every position.

    Texts have no padding, so layers run without a mask, and token types are 0, as by default. A decoder that is tied to
    the input embedding is untied, for blocks that train apart have one copy of each.
    """

    library = TRANSFORMERS
    shape_fields = ("max_position_embeddings",)  # texts may be shorter
    #: paths of the input embedding and of the decoder that may be tied to it
    embedding: ClassVar[str]
    decoder: ClassVar[str]

    @override
    def check(self, model: nn.Module) -> None:
        config: Any = model.config
        if getattr(config, "is_decoder", False):
            raise ValueError(
                f"{type(model).__name__} has is_decoder = True, and sees only the tokens before the one it is to "
                "predict; set is_decoder to False"
            )

    @override
    def add_parts(self, model: nn.Module, config: BlocksConfig) -> nn.ModuleDict:
        mask: Any = getattr(config.noise, "mask_id")  # noqa: B009 - `check_config` has seen to it
        parts = super().add_parts(model, config)
        parts["ruled_out"] = RuledOut(mask)
        return parts

    @override
    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        """Nothing: what is added rules out the mask's own logit, which the library's models do not."""

    @override
    def adjust(self, network: nn.Module) -> None:
        """Untie the decoder, and leave out what it has no use for."""
        decoder, embedding = network.get_submodule(self.decoder), network.get_submodule(self.embedding)
        tied = embedding.get_parameter("weight")
        if decoder.weight is tied:
            decoder.weight = nn.Parameter(tied.detach().clone(), tied.requires_grad)
        for path in self.unused:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, None)

    @override
    def adjust_config(self, config: Any) -> None:
        config.tie_word_embeddings = False

    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        """What the first layer is given: tokens (batch, length) -> (batch, length, dim)."""
        for path in self.stem_paths(network):
            tokens = network.get_submodule(path)(tokens)
        return tokens

    def layer_options(self, call: BlockCall, states: Tensor) -> Sequence[dict[str, Any]]:
        """What each of the block's layers is given beside the states."""
        return [{}] * len(call.layers)

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        states = self.with_hint(call, self.embed(call.network, call.z))
        options = self.layer_options(call, states)
        for layer, more in zip(call.layers, options, strict=True):
            states = tokens_of(layer(states, **more))
        return states, states

    @override
    def logits(self, call: BlockCall, states: Tensor, condition: Tensor) -> Tensor:
        states = states.to(next(call.module(self.decoder).parameters()).dtype)
        if call.final_norm is not None:
            states = call.final_norm(states)
        for path in self.head:
            if path != self.final_norm:
                states = call.module(path)(states)
        return call.extra["ruled_out"](states.float())  # type: ignore[no-any-return]


@register_family
class BertFamily(EncoderFamily):
    """Converts `BertForMaskedLM`: norms behind attention and MLP, and a head with a transformation of its own."""

    classes = ("BertForMaskedLM",)
    layers = "bert.encoder.layer"
    embedding = "bert.embeddings.word_embeddings"
    decoder = "cls.predictions.decoder"
    stem = ("bert.embeddings",)
    head = ("cls",)
    unused: ClassVar[tuple[str, ...]] = ("cls.predictions.bias",)  # of older files: it is the decoder's
    norms = ("attention.output.LayerNorm", "output.LayerNorm")


@register_family
class RobertaFamily(EncoderFamily):
    """Converts `RobertaForMaskedLM` and classes of its shape, whose first position comes behind that of the padding.

    A text's token that is the padding's id has the padding's position, and is not counted, as in the class.
    """

    classes = ("RobertaForMaskedLM", "XLMRobertaForMaskedLM", "CamembertForMaskedLM")
    layers: ClassVar[str] = "roberta.encoder.layer"
    embedding = "roberta.embeddings.word_embeddings"
    decoder = "lm_head.decoder"
    stem = ("roberta.embeddings",)
    head = ("lm_head",)
    unused = ("lm_head.bias",)  # of older files: it is the decoder's
    norms = BertFamily.norms

    @override
    def check(self, model: nn.Module) -> None:
        super().check(model)
        config: Any = model.config
        if config.pad_token_id is None:
            raise ValueError(
                f"{type(model).__name__} has pad_token_id = None, from which its positions are counted; set it to the "
                "tokenizer's"
            )

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        first: Any = next(network.get_submodule(self.layers).children())
        new_padding, padding = first.attention.self.config.pad_token_id, network.get_submodule(self.stem[0]).padding_idx
        if new_padding != padding:  # transformers.Trainer sets it to its tokenizer's
            raise ValueError(
                f"config.pad_token_id was changed to {new_padding} after conversion, but positions are counted from "
                f"{padding}, and would not be once the model is loaded: give a tokenizer with the model's own padding"
            )
        return super().embed(network, tokens)

    @override
    def example_shape(self, config: Any) -> tuple[int, ...]:
        (positions,) = super().example_shape(config)
        return (positions - 1 - int(config.pad_token_id or 0),)


@register_family
class DistilBertFamily(EncoderFamily):
    """Converts `DistilBertForMaskedLM`."""

    classes = ("DistilBertForMaskedLM",)
    layers = "distilbert.transformer.layer"
    embedding = "distilbert.embeddings.word_embeddings"
    decoder = "vocab_projector"
    stem = ("distilbert.embeddings",)
    head = ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")
    norms = ("sa_layer_norm", "output_layer_norm")
    depth_field = "n_layers"
    width_field = "dim"


@register_family
class ElectraFamily(EncoderFamily):
    """Converts `ElectraForMaskedLM`, whose embeddings may be narrower than its layers."""

    classes = ("ElectraForMaskedLM",)
    layers = "electra.encoder.layer"
    embedding = "electra.embeddings.word_embeddings"
    decoder = "generator_lm_head"
    head = ("generator_predictions", "generator_lm_head")
    norms = BertFamily.norms

    @override
    def stem_paths(self, model: nn.Module) -> tuple[str, ...]:
        trunk = model.get_submodule("electra")
        return tuple(f"electra.{name}" for name in ("embeddings", "embeddings_project") if hasattr(trunk, name))


@register_family
class ModernBertFamily(EncoderFamily):
    """Converts `ModernBertForMaskedLM`: rotary positions, and layers that see all or only what is near.

    The first layer has no norm before its attention, and weights are drawn the smaller the more layers there are. So
    layers keep their place.
    """

    classes = ("ModernBertForMaskedLM",)
    layers = "model.layers"
    embedding = "model.embeddings.tok_embeddings"
    decoder = "decoder"
    stem = ("model.embeddings", "model.rotary_emb")
    head = ("model.final_norm", "head", "decoder")
    norms = ("attn_norm", "mlp_norm")
    final_norm = "model.final_norm"
    kinds_field = "layer_types"
    layers_alike = False

    @override
    def check(self, model: nn.Module) -> None:
        super().check(model)
        check_rotary(model)

    @override
    def adjust(self, network: nn.Module) -> None:
        super().adjust(network)
        network.get_submodule("model").add_module(
            "rotary_emb", ExactRotation(network.get_submodule("model.rotary_emb"))
        )

    @override
    def values_of_layers(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        return {"layer_types": [config.layer_types[i] for i in layers]}

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        return network.get_submodule("model.embeddings")(tokens)  # type: ignore[no-any-return]

    @override
    def layer_options(self, call: BlockCall, states: Tensor) -> Sequence[dict[str, Any]]:
        """The mask and the rotary positions of each layer's kind."""
        from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

        rotary, layers = call.module("model.rotary_emb"), list(call.module(self.layers).children())
        masks = {
            "full_attention": create_bidirectional_mask,
            "sliding_attention": create_bidirectional_sliding_window_mask,
        }
        positions = torch.arange(states.shape[1], device=states.device)[None]
        of_kind = {
            kind: {
                "attention_mask": masks[kind](config=rotary.config, inputs_embeds=states, attention_mask=None),
                "position_embeddings": rotary(states, positions, kind),
            }
            for kind in dict.fromkeys(layer.attention_type for layer in layers)
        }
        return [of_kind[layer.attention_type] for layer in layers]
