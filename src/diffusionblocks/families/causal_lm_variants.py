"""Causal language models of transformers that differ from Llama: where each of them does, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..layers.adaptive_norms import unadapted
from .causal_lm import CausalLMFamily, rotated
from .family import BlockCall, register_family


@register_family
class GraniteFamily(CausalLMFamily):
    """Granite: embeddings and logits are scaled (its residuals and attention scores are scaled by its layers)."""

    classes = ("GraniteForCausalLM",)

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        return super().embed(network, tokens) * float(_config(network).embedding_multiplier)

    @override
    def head_logits(self, network: nn.Module, states: Tensor) -> Tensor:
        return super().head_logits(network, states) / float(_config(network).logits_scaling)


@register_family
class SmolLM3Family(CausalLMFamily):
    """SmolLM3: some layers have no positions."""

    classes = ("SmolLM3ForCausalLM",)

    @override
    def keys_values(self, layer: Any, clean: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not layer.self_attn.use_rope:
            cosine, sine = rotation
            rotation = cosine[..., :0], sine[..., :0]
        return super().keys_values(layer, clean, rotation)


@register_family
class Phi3Family(CausalLMFamily):
    """Phi-3 and Phi-4: one projection for queries, keys and values."""

    classes = ("Phi3ForCausalLM",)

    @override
    def keys_values(self, layer: Any, clean: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        attention = layer.self_attn
        projected = attention.qkv_proj(unadapted(layer.input_layernorm, clean))
        heads = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        count = attention.num_key_value_heads
        key, value = heads[:, -2 * count : -count], heads[:, -count:]
        return rotated(key, rotation), value


class _ByKindOfLayer(CausalLMFamily):
    """Rotary positions that differ between layers that slide and layers that see all."""

    kinds_field = "layer_types"
    #: the attribute of a layer's attention that says its kind
    kind: ClassVar[str]

    @override
    def rotations(self, call: BlockCall, states: Tensor, positions: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        layers: list[Any] = list(call.module(self.layers).children())
        kinds = [getattr(layer.self_attn, self.kind) for layer in layers]
        each = {kind: call.module("model.rotary_emb")(states, positions, kind) for kind in dict.fromkeys(kinds)}
        return [each[kind] for kind in kinds]


class _NormsBehind(CausalLMFamily):
    """Norms behind attention and MLP, not before them, and of all keys at once."""

    norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    @override
    def keys_values(self, layer: Any, clean: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        attention = layer.self_attn
        key, value = (
            states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for states in (attention.k_norm(attention.k_proj(clean)), attention.v_proj(clean))
        )
        return rotated(key, rotation), value


@register_family
class Olmo2Family(_NormsBehind):
    """OLMo 2: norms behind attention and MLP."""

    classes = ("Olmo2ForCausalLM",)


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
        return F.dropout(embedded, _config(network).embedding_dropout, network.training)


class _SoftCappedLogits(CausalLMFamily):
    """Logits that are bent to stay below a bound, and four norms a layer."""

    norms = ("input_layernorm", "pre_feedforward_layernorm")

    @override
    def head_logits(self, network: nn.Module, states: Tensor) -> Tensor:
        logits, most = super().head_logits(network, states), _config(network).final_logit_softcapping
        return logits if most is None else F.tanh(logits / most) * most


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
class GptOssFamily(CausalLMFamily):
    """gpt-oss: attention may go to a key that is not there, which `eager` alone does."""

    classes = ("GptOssForCausalLM",)
    kernels = ("eager",)

    @override
    def keys_values(self, layer: Any, clean: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cosine, sine = (torch.cat([half, half], dim=-1) for half in rotation)
        return super().keys_values(layer, clean, (cosine, sine))


@register_family
class GPTNeoXFamily(CausalLMFamily):
    """GPT-NeoX and Pythia: names of its own, one projection, and attention and MLP side by side."""

    classes = ("GPTNeoXForCausalLM",)
    layers = "gpt_neox.layers"
    embedding = "gpt_neox.embed_in"
    rotary = "gpt_neox.rotary_emb"
    attention = "attention"
    stem = ("gpt_neox.embed_in", "gpt_neox.emb_dropout", "gpt_neox.rotary_emb")
    head = ("gpt_neox.final_layer_norm", "lm_head")
    final_norm = "gpt_neox.final_layer_norm"
    embedding_path = "gpt_neox.embed_in.weight"

    @override
    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        return network.get_submodule("gpt_neox.emb_dropout")(super().embed(network, tokens))  # type: ignore[no-any-return]

    @override
    def keys_values(self, layer: Any, clean: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        attention = layer.attention
        projected = attention.query_key_value(unadapted(layer.input_layernorm, clean))
        _, key, value = projected.unflatten(-1, (-1, 3 * attention.head_size)).transpose(1, 2).chunk(3, dim=-1)
        return rotated(key, rotation), value


def _config(network: nn.Module) -> Any:
    """The config of a model, or of one that was converted: its rotary positions have it."""
    return network.get_submodule("model.rotary_emb").config
