"""Causal language models of transformers that differ from Llama: where each of them does, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..layers.adaptive_norms import unadapted
from ..layers.two_streams import KeysValues
from .causal_lm import CausalLMFamily
from .family import BlockCall, register_family
from .ordinary import OrdinaryModel


@register_family
class AnyAttentionFamily(CausalLMFamily):
    """Classes whose attention makes keys in a way of its own: it is run on the clean positions for them.

    They have layers without positions, one projection for queries, keys and values, other rotations, or clipped keys.
    Queries are computed there too, and read by nobody; compiled, they are left out.
    """

    classes: ClassVar[tuple[str, ...]] = (
        "SmolLM3ForCausalLM",
        "Phi3ForCausalLM",
        "OlmoForCausalLM",
        "OlmoeForCausalLM",
        "GlmForCausalLM",
        "Glm4ForCausalLM",
        "Ministral3ForCausalLM",
    )
    #: path within a layer of the norm before its attention; None where there is none
    norm_before: ClassVar[str | None] = "input_layernorm"

    @override
    def keys_values(
        self, layer: Any, clean: Tensor, rotation: tuple[Tensor, ...], positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = clean if self.norm_before is None else unadapted(layer.get_submodule(self.norm_before), clean)
        notes = KeysValues()
        attention = layer.get_submodule(self.attention)
        attention(states, attention_mask=notes, position_ids=positions, position_embeddings=rotation)
        return notes.key, notes.value


@register_family
class GraniteFamily(CausalLMFamily):
    """Granite: embeddings and logits are scaled (its residuals and attention scores are scaled by its layers)."""

    classes = ("GraniteForCausalLM", "GraniteMoeForCausalLM")

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        return super().embed(network, tokens) * float(self.config_of(network).embedding_multiplier)

    @override
    def head_logits(self, network: nn.Module, states: Tensor) -> Tensor:
        return super().head_logits(network, states) / float(self.config_of(network).logits_scaling)


@register_family
class StableLmFamily(AnyAttentionFamily):
    """StableLM: attention and MLP side by side, or one after the other."""

    classes = ("StableLmForCausalLM",)

    @override
    def layer_norms(self, layer: nn.Module) -> list[nn.Module]:
        return [norm for name in self.norms if (norm := getattr(layer, name)) is not None]


@register_family
class PhiFamily(AnyAttentionFamily):
    """Phi-1, Phi-1.5 and Phi-2: one norm for attention and MLP, and dropout of embeddings."""

    classes = ("PhiForCausalLM",)
    norms = ("input_layernorm",)
    stem = ("model.embed_tokens", "model.embed_dropout", "model.rotary_emb")
    head = ("model.final_layernorm", "lm_head")
    final_norm = "model.final_layernorm"

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        return network.get_submodule("model.embed_dropout")(super().embed(network, tokens))  # type: ignore[no-any-return]


@register_family
class CohereFamily(AnyAttentionFamily):
    """Command R: one norm for attention and MLP, and logits that are scaled."""

    classes = ("CohereForCausalLM", "Cohere2ForCausalLM")
    norms = ("input_layernorm",)

    @override
    def head_logits(self, network: nn.Module, states: Tensor) -> Tensor:
        return super().head_logits(network, states) * float(self.config_of(network).logit_scale)


class _ByKindOfLayer(CausalLMFamily):
    """Rotary positions that differ between layers that slide and layers that see all."""

    kinds_field = "layer_types"
    #: the attribute of a layer's attention that says its kind
    kind: ClassVar[str]

    @override
    def rotations(self, call: BlockCall, states: Tensor, positions: Tensor) -> Sequence[tuple[Tensor, ...]]:
        layers: list[Any] = list(call.module(self.layers).children())
        kinds = [getattr(layer.self_attn, self.kind) for layer in layers]
        each = {kind: call.module("model.rotary_emb")(states, positions, kind) for kind in dict.fromkeys(kinds)}
        return [each[kind] for kind in kinds]


class _NormsBehind(AnyAttentionFamily):
    """Norms behind attention and MLP, not before them."""

    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    norm_before = None


@register_family
class NormsBehindFamily(_NormsBehind):
    """OLMo 2 and EXAONE 4."""

    classes = ("Olmo2ForCausalLM", "Exaone4ForCausalLM")


@register_family
class Olmo3Family(_NormsBehind, _ByKindOfLayer):
    """OLMo 3: as OLMo 2, with positions by the kind of layer."""

    classes = ("Olmo3ForCausalLM",)
    kind = "attention_type"


@register_family
class Starcoder2Family(CausalLMFamily):
    """Starcoder2: embeddings have dropout."""

    classes = ("Starcoder2ForCausalLM",)

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        embedded = super().embed(network, tokens)
        return F.dropout(embedded, self.config_of(network).embedding_dropout, network.training)


class _SoftCappedLogits(CausalLMFamily):
    """Logits that are bent to stay below a bound, and four norms a layer."""

    norms = ("input_layernorm", "pre_feedforward_layernorm")

    @override
    def head_logits(self, network: nn.Module, states: Tensor) -> Tensor:
        logits, most = super().head_logits(network, states), self.config_of(network).final_logit_softcapping
        return logits if most is None else F.tanh(logits / most) * most

    @override
    def fold_logit_scale(self, scale: Tensor, call: BlockCall, ordinary: OrdinaryModel) -> None:
        super().fold_logit_scale(scale, call, ordinary)
        if (most := self.config_of(call.network).final_logit_softcapping) is not None:
            ordinary.values["final_logit_softcapping"] = most * scale.item()


@register_family
class Gemma2Family(_SoftCappedLogits):
    """Gemma 2: scores are bent, too, which `eager` alone does."""

    classes = ("Gemma2ForCausalLM",)
    kernels = ("eager",)


@register_family
class Gemma3Family(_SoftCappedLogits, _ByKindOfLayer):
    """Gemma 3 of text."""

    classes = ("Gemma3ForCausalLM",)
    kind = "layer_type"


@register_family
class GptOssFamily(AnyAttentionFamily):
    """gpt-oss: attention may go to a key that is not there, which `eager` alone does."""

    classes = ("GptOssForCausalLM",)
    kernels = ("eager",)


@register_family
class GPTNeoXFamily(AnyAttentionFamily):
    """GPT-NeoX and Pythia: names of its own, and attention and MLP side by side."""

    classes = ("GPTNeoXForCausalLM",)
    layers = "gpt_neox.layers"
    embedding = "gpt_neox.embed_in"
    rotary = "gpt_neox.rotary_emb"
    attention = "attention"
    stem = ("gpt_neox.embed_in", "gpt_neox.emb_dropout", "gpt_neox.rotary_emb")
    head = ("gpt_neox.final_layer_norm", "lm_head")
    final_norm = "gpt_neox.final_layer_norm"
    embedding_path = "gpt_neox.embed_in.weight"
    vocabulary = ("gpt_neox.embed_in", "lm_head")

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        return network.get_submodule("gpt_neox.emb_dropout")(super().embed(network, tokens))  # type: ignore[no-any-return]


@register_family
class GPT2Family(AnyAttentionFamily):
    """GPT-2: learned positions, and names of its own."""

    classes = ("GPT2LMHeadModel",)
    layers = "transformer.h"
    embedding = "transformer.wte"
    rotary = None
    attention = "attn"
    stem = ("transformer.wte", "transformer.wpe", "transformer.drop")
    head = ("transformer.ln_f", "lm_head")
    norms = ("ln_1", "ln_2")
    norm_before = "ln_1"
    final_norm = "transformer.ln_f"
    embedding_path = "transformer.wte.weight"
    vocabulary = ("transformer.wte", "lm_head")
    depth_field = "n_layer"
    width_field = "n_embd"
    shape_fields = ("n_positions",)
    dropout_field = "attn_pdrop"

    @override
    def check(self, model: nn.Module) -> None:
        super().check(model)
        _refuse(
            model,
            add_cross_attention="has layers that attend to an encoder, which blocks have not",
            scale_attn_by_inverse_layer_idx="scales scores by a layer's number, which changes when blocks are branched",
        )

    @override
    def add_positions(self, network: nn.Module, states: Tensor, positions: Tensor) -> Tensor:
        placed = states + network.get_submodule("transformer.wpe")(positions)
        return network.get_submodule("transformer.drop")(placed)  # type: ignore[no-any-return]

    @override
    def longest(self, network: nn.Module) -> int:
        return len(network.get_parameter("transformer.wpe.weight"))

    @override
    def initial_scale(self, name: str, config: Any, layers: int) -> float:
        """The last projections of attention and MLP start smaller, the more layers there are."""
        return math.sqrt(layers / config.n_layer) if name.endswith(".c_proj.weight") else 1.0


@register_family
class OPTFamily(AnyAttentionFamily):
    """OPT: learned positions. The norm before an MLP, which sees positions in one row, is not told the level."""

    classes = ("OPTForCausalLM",)
    layers = "model.decoder.layers"
    embedding = "model.decoder.embed_tokens"
    rotary = None
    stem = ("model.decoder.embed_tokens", "model.decoder.embed_positions")
    head = ("model.decoder.final_layer_norm", "lm_head")
    norms = ("self_attn_layer_norm",)
    norm_before = "self_attn_layer_norm"
    final_norm = "model.decoder.final_layer_norm"
    embedding_path = "model.decoder.embed_tokens.weight"
    vocabulary = ("model.decoder.embed_tokens", "lm_head")

    @override
    def check(self, model: nn.Module) -> None:
        super().check(model)
        config: Any = model.config
        if not config.do_layer_norm_before:
            raise ValueError(
                f"{type(model).__name__} has do_layer_norm_before = False: its stack ends without a norm to read a "
                "block's states through; allowed: True"
            )
        _refuse(
            model,
            _remove_final_layer_norm="leaves no norm to read a block's states through",
            layerdrop="leaves layers out of a step at random, which may be all of a block",
        )
        if config.word_embed_proj_dim != config.hidden_size:
            raise ValueError(
                f"{type(model).__name__} has word_embed_proj_dim = {config.word_embed_proj_dim}, and projects to "
                f"hidden_size = {config.hidden_size} and back; blocks denoise at one width: they must be equal"
            )

    @override
    def add_positions(self, network: nn.Module, states: Tensor, positions: Tensor) -> Tensor:
        # The mask, from which the library would count positions, is not read where they are given.
        embed = network.get_submodule("model.decoder.embed_positions")
        return states + embed(None, position_ids=positions)  # type: ignore[no-any-return]

    @override
    def longest(self, network: nn.Module) -> int:
        positions: Any = network.get_submodule("model.decoder.embed_positions")
        return int(positions.num_embeddings - positions.offset)


def _refuse(model: nn.Module, **reasons: str) -> None:
    """Refuse a model whose config sets one of these fields."""
    for name, reason in reasons.items():
        if value := getattr(model.config, name):
            raise ValueError(
                f"{type(model).__name__} has {name} = {value}, which {reason}; set {name} to {type(value)()}"
            )
