"""Causal language models of transformers, of the Llama kind; `causal_lm_variants.py` has those that differ from it.

A block sees every sequence twice: noisy positions, which denoise one token each, and clean ones, which are their
context (paper, section 4.3; `two_streams.py`). Both run through the same layers, with the same rotary positions; only
the noisy ones depend on the noise level, so the clean stream of a pretrained model's first block is the model's own.
With `target.noise_input: false` there is one stream, and the place of a token predicts the next one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..config import BlocksConfig, NextTokenTargetConfig
from ..layers.adaptive_norms import unadapted
from ..layers.exact_buffers import ExactRotation
from ..layers.logit_scale import LogitScale
from ..layers.target_tokens import NoisyToken
from ..layers.two_streams import KERNELS, WINDOW, NotedStreams, Past, Streams, library_attention
from .family import TRUNK, BlockCall, register_family
from .kinds import NextTokenFamily, tokens_of
from .libraries import TRANSFORMERS
from .ordinary import OrdinaryModel
from .rotary import check_rotary

_PREFIX = "diffusionblocks_"
#: The library's own `sdpa`, under a name for which it makes no masks.
_CAUSAL = f"{_PREFIX}causal"


@functools.cache
def _register_kernels() -> None:
    """Make ours known to the library, once there is a model of its language models, which take seconds to import."""
    from transformers import AttentionInterface

    for kernel in KERNELS:
        AttentionInterface.register(f"{_PREFIX}{kernel}", functools.partial(library_attention, kernel=kernel))
    AttentionInterface.register(_CAUSAL, AttentionInterface()["sdpa"])


@register_family
class CausalLMFamily(NextTokenFamily):
    """Converts the classes of transformers whose layers are those of Llama: see `classes`.

    A head that is tied to the input embedding is untied, unless `blocks.vocabulary` is `tied`; its weights start as
    they were. A class that embeds, attends or reads out in another way subclasses this one and overrides
    `embed`, `add_positions`, `rotations`, `keys_values` or `head_logits`.
    """

    calls_layers: ClassVar[bool] = True
    classes: ClassVar[tuple[str, ...]] = (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MinistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "GemmaForCausalLM",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
    )
    library = TRANSFORMERS
    layers: ClassVar[str] = "model.layers"
    #: path of the input embedding
    embedding: ClassVar[str] = "model.embed_tokens"
    #: path of the rotary positions; None where a model has positions of another kind
    rotary: ClassVar[str | None] = "model.rotary_emb"
    #: path within a layer of its attention
    attention: ClassVar[str] = "self_attn"
    stem: ClassVar[tuple[str, ...]] = ("model.embed_tokens", "model.rotary_emb")
    head = ("model.norm", "lm_head")
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    final_norm: ClassVar[str] = "model.norm"
    embedding_path = "model.embed_tokens.weight"
    vocabulary = ("model.embed_tokens", "lm_head")
    shift = 0  # a noisy position of its own for each token
    shape_fields = ("max_position_embeddings",)  # texts may be shorter
    #: the config value that is the dropout of attention's weights
    dropout_field: ClassVar[str] = "attention_dropout"
    #: the attention implementations that give what the class means
    kernels: ClassVar[tuple[str, ...]] = KERNELS

    @override
    def check(self, model: nn.Module) -> None:
        config: Any = model.config
        name = type(model).__name__
        kernel = config._attn_implementation
        if kernel not in (*self.kernels, None):
            raise ValueError(
                f"{name} has attn_implementation = {kernel}, which knows no two streams of this class; allowed: "
                f"{', '.join(self.kernels)}"
            )
        if kernel == "flex_attention" and getattr(config, self.dropout_field) > 0:
            raise ValueError(f"{name}: flex_attention has no dropout; set {self.dropout_field} to 0, or use sdpa")
        check_rotary(model)
        if getattr(config, "use_bidirectional_attention", False):
            raise ValueError(
                f"{name} has use_bidirectional_attention = True, and sees the token it is to predict; set False"
            )
        if getattr(config, "output_router_logits", False):
            raise ValueError(
                f"{name} has output_router_logits = True, which adds an auxiliary loss of its experts' load; blocks "
                "train without it: set output_router_logits to False"
            )

    @override
    def check_config(self, model: nn.Module, config: BlocksConfig) -> None:
        super().check_config(model, config)
        assert isinstance(config.target, NextTokenTargetConfig)
        if not config.target.reads_trunk:
            return
        many = 1 if config.split == "experts" else config.num_blocks
        depth = self.depth(model.config) // many
        parts = [self.values_of_layers(model.config, range(b * depth, (b + 1) * depth)) for b in range(many)]
        if other := [name for name in parts[0] if any(part[name] != parts[0][name] for part in parts)]:
            raise ValueError(
                f"target.context = trunk: {other[0]} of this {type(model).__name__} differ from block to block, and a "
                "trunk has the layers of one; set blocks.num_blocks so that all are alike, or leave context out"
            )

    @override
    def check_weights(self, model: nn.Module, config: BlocksConfig) -> None:
        if (
            config.target is not None
            and config.target.reads_trunk
            and config.num_blocks > 1
            and config.split == "layers"
        ):
            raise ValueError(
                f"target.context = trunk: {config.num_blocks} blocks of consecutive layers have no trunk like them; "
                "branch them from one (a recipe's section trunk), or convert a trained model with split: experts"
            )

    @override
    def add_parts(self, model: nn.Module, config: BlocksConfig) -> nn.ModuleDict:
        assert isinstance(config.target, NextTokenTargetConfig)
        parts = super().add_parts(model, config)
        parts["logit_scale"] = LogitScale(config.target.logit_scale)
        if config.target.noise_input:
            std = float(getattr(model.config, "initializer_range", 0.02))
            parts["noisy_token"] = NoisyToken(self.hidden_size(model.config), std, previous=config.target.previous)
        return parts

    @override
    def adjust(self, network: nn.Module) -> None:
        """Untie the head, keep the positions exact, and let the layers attend in two streams."""
        _register_kernels()
        head, embedding = network.get_submodule("lm_head"), network.get_submodule(self.embedding)
        tied = embedding.get_parameter("weight")
        if head.weight is tied:
            head.weight = nn.Parameter(tied.detach().clone(), tied.requires_grad)
        if self.rotary is not None:
            trunk, _, name = self.rotary.rpartition(".")
            network.get_submodule(trunk).add_module(name, ExactRotation(network.get_submodule(self.rotary)))
        for layer in network.get_submodule(self.layers).children():
            attention: Any = layer.get_submodule(self.attention)
            kernel = (attention.config._attn_implementation or "sdpa").removeprefix(_PREFIX)
            # A config of its own: the model's says what the user chose.
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = f"{_PREFIX}{kernel}"
            setattr(attention.config, WINDOW, window_of(attention))

    @override
    def adjust_config(self, config: Any) -> None:
        config.tie_word_embeddings = False

    @override
    def hidden(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Run both streams; the clean one alone for a block that is shown no noise.

        Args:
            call: `inputs` has `input_ids` (batch, length), the clean tokens; where text is generated the new ones only
                (none, or right-padded), with `past` and `counts` (batch,), see `Streams`. `z` is (batch, length, dim),
                or (batch, 1, dim) of the one next token; of one stream it is not read.

        Returns:
            (clean stream (batch, length, dim), or of length 0 without `clean_output`; F (batch, noisy length, dim)). Of
            one stream F is that of the clean positions, but in training of the last, which has nothing to predict.
        """
        if "noisy_token" not in call.extra:
            return self._one_stream(call)
        if TRUNK in call.extra:
            return self._over_trunk(call)
        tokens, past, noisy = call.inputs["input_ids"], call.inputs.get("past"), call.z.shape[1]
        streams = Streams(noisy, tokens.shape[1], call.z.device, past=past, counts=call.inputs.get("counts"))
        self._check_positions(call.network, tokens.shape[1], noisy, past)
        clean = self.embed(call.network, tokens)
        noisy_tokens = self.with_hint(call, call.extra["noisy_token"](call.z).to(clean.dtype))
        if call.extra["noisy_token"].previous:
            noisy_tokens = noisy_tokens + _before(clean, streams)
        states = self.add_positions(call.network, torch.cat([noisy_tokens, clean], dim=1), streams.positions)
        layers = list(zip(call.layers, self.rotations(call, states, streams.positions), strict=True))
        # Two positions of one text cost a layer what one does, and no parting of the two.
        together = call.clean_output or (past is not None and past.static)
        both = len(layers) if together else len(layers) - 1
        for number, (layer, rotation) in enumerate(layers[:both]):
            states = layer(
                states,
                leading=noisy,
                attention_mask=_in_past(streams, number),
                position_ids=streams.positions,
                position_embeddings=rotation,
            )
        for layer, rotation in layers[both:]:
            states = layer(states, rotation, _in_past(streams, both), call=self._noisy_alone)
        if past is not None:
            past.advance(streams.counts, tokens.shape[1])
        return states[:, noisy:], states[:, :noisy]

    def _over_trunk(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Run the noisy positions alone, over what the frozen trunk makes of the clean ones.

        Where text is generated, `past` is the trunk's: whichever block is called first with new tokens puts them there.
        """
        tokens, past, noisy = call.inputs["input_ids"], call.inputs.get("past"), call.z.shape[1]
        new, counts = tokens.shape[1], call.inputs.get("counts")
        streams = Streams(noisy, new, call.z.device, past=past, counts=counts)
        self._check_positions(call.network, new, noisy, past)
        with torch.no_grad():
            clean = self.embed(call.network, tokens)
            keys_values = self._keys_values_of_trunk(call, clean, counts) if new else []
        states = self.with_hint(call, call.extra["noisy_token"](call.z).to(clean.dtype))
        if call.extra["noisy_token"].previous:
            states = states + _before(clean, streams)
        positions = streams.positions[:, :noisy]
        states = self.add_positions(call.network, states, positions)
        rotations = self.rotations(call, states, positions)
        for number, (layer, rotation) in enumerate(zip(call.layers, rotations, strict=True)):
            mask = streams.of_layer(number)
            if keys_values:
                mask = mask.beside(*keys_values[number])
            states = tokens_of(layer(states, attention_mask=mask, position_ids=positions, position_embeddings=rotation))
        if past is not None:
            past.advance(streams.counts, new)
        return states[:, :0], states

    def _keys_values_of_trunk(
        self, call: BlockCall, clean: Tensor, counts: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """What each layer of the trunk has of clean tokens: keys and values (batch, key heads, length, dim of a head).

        Args:
            call: of the block.
            clean: embeddings of the tokens (batch, length, dim).
            counts: see `Streams`.
        """
        streams = Streams(0, clean.shape[1], clean.device, past=call.inputs.get("past"), counts=counts)
        states = self.add_positions(call.network, clean, streams.positions)
        *inner, last = zip(call.extra[TRUNK].children(), self.rotations(call, states, streams.positions), strict=True)
        pairs = []
        for layer, rotation in inner:
            notes = NotedStreams(streams)
            states = tokens_of(
                layer(states, attention_mask=notes, position_ids=streams.positions, position_embeddings=rotation)
            )
            pairs.append((notes.key, notes.value))
        return [*pairs, self.keys_values(last[0], states, last[1], streams.positions)]

    def config_of(self, network: nn.Module) -> Any:
        """The config of a block's network: its rotary positions have it.

        Its layers have it too; but compiled, a graph that looked among them would know their numbers.
        """
        assert self.rotary is not None
        return network.get_submodule(self.rotary).config

    def longest(self, network: nn.Module) -> int:
        """Tokens of the longest text that a network takes."""
        return int(self.config_of(network).max_position_embeddings)

    def _one_stream(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        tokens, past = call.inputs["input_ids"], call.inputs.get("past")
        if past is None:
            tokens = tokens[:, :-1]
        streams = Streams(0, tokens.shape[1], tokens.device, past=past, counts=call.inputs.get("counts"))
        self._check_positions(call.network, tokens.shape[1], 0, past)
        states = self.add_positions(call.network, self.embed(call.network, tokens), streams.positions)
        rotations = self.rotations(call, states, streams.positions)
        for number, (layer, rotation) in enumerate(zip(call.layers, rotations, strict=True)):
            mask = _in_past(streams, number)
            output = layer(states, attention_mask=mask, position_ids=streams.positions, position_embeddings=rotation)
            states = tokens_of(output)
        if past is not None:
            past.advance(streams.counts, tokens.shape[1])
        return states[:, :0], states

    @override
    def fold(self, call: BlockCall, ordinary: OrdinaryModel) -> None:
        if "noisy_token" in call.extra:
            raise ValueError(
                f"a block of this {ordinary.model_class} reads two streams, noised tokens and their context, and no "
                "ordinary language model does: train with target.noise_input: false to export blocks"
            )
        self.fold_logit_scale(call.extra["logit_scale"].get_parameter("log").double().exp(), call, ordinary)

    def fold_logit_scale(self, scale: Tensor, call: BlockCall, ordinary: OrdinaryModel) -> None:
        """Multiply the logits of a model by a scale (1,).

        Of a tied head the final norm is scaled; where that norm is not linear in its weights the head is untied.
        """
        scaled = ["lm_head"]
        if call.network.get_submodule("lm_head").weight is None:
            if _is_linear_in_weights(call.network.get_submodule(self.final_norm)):
                scaled = [self.final_norm, "lm_head.bias"]
            else:
                ordinary.values["tie_word_embeddings"] = False
            ordinary.shared["lm_head.weight"] = ordinary.shared[self.embedding_path]
        for name, tensor in ordinary.shared.items():
            if f"{name}.".startswith(tuple(f"{path}." for path in scaled)):
                ordinary.shared[name] = (tensor.double() * scale).to(tensor.dtype)

    @override
    def values_of_layers(self, config: Any, layers: Sequence[int]) -> dict[str, Any]:
        kinds = {name: getattr(config, name, None) for name in ("layer_types", "no_rope_layers")}
        values: dict[str, Any] = {name: [each[i] for i in layers] for name, each in kinds.items() if each}
        if hasattr(config, "mlp_only_layers"):  # by number, and each so many layers
            step, plain = config.decoder_sparse_step, config.mlp_only_layers
            values["mlp_only_layers"] = [n for n, i in enumerate(layers) if i in plain or (i + 1) % step]
            values["decoder_sparse_step"] = 1
        return values

    def embed(self, network: nn.Module, tokens: Tensor) -> Tensor:
        """What the first layer is given of clean tokens: (batch, length) -> (batch, length, dim)."""
        return network.get_submodule(self.embedding)(tokens)  # type: ignore[no-any-return]

    def add_positions(self, network: nn.Module, states: Tensor, positions: Tensor) -> Tensor:
        """What the first layer is given of embeddings (batch, length, dim) at their positions, where it is told them
        there."""
        return states

    def rotations(self, call: BlockCall, states: Tensor, positions: Tensor) -> Sequence[tuple[Tensor, ...]]:
        """Cosines and sines for each of the block's layers; nothing for each, where positions are not rotary."""
        rotation = () if self.rotary is None else call.module(self.rotary)(states, positions)
        return [rotation] * len(call.layers)

    def keys_values(
        self, layer: Any, clean: Tensor, rotation: tuple[Tensor, ...], positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a layer attends to of the clean positions.

        Args:
            layer: of the network.
            clean: what the layer is given there, (batch, length, dim).
            rotation: cosines and sines of these positions.
            positions: themselves, (1 or batch, length).

        Returns:
            Keys and values (batch, key heads, length, dim of a head).
        """
        attention, normed = layer.self_attn, unadapted(layer.input_layernorm, clean)
        key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim)) for project in (attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        return _rotated(key.transpose(1, 2), rotation), value.transpose(1, 2)

    def head_logits(self, network: nn.Module, states: Tensor) -> Tensor:
        """The model's own logits of what its final norm gives: (..., dim) -> (..., vocab_size)."""
        head: Any = network.get_submodule("lm_head")
        return F.linear(states, self._table(network), head.bias) if head.weight is None else head(states)

    def _table(self, network: nn.Module) -> nn.Parameter:
        """What logits are made by (vocab_size, dim): the head's own weight; the embedding's, where both are one."""
        own: nn.Parameter | None = network.get_submodule("lm_head").weight  # type: ignore[assignment]
        return network.get_parameter(self.embedding_path) if own is None else own

    def _noisy_alone(self, layer: Any, states: Tensor, rotation: tuple[Tensor, ...], streams: Streams) -> Tensor:
        """A layer at the noisy positions; of the clean ones only keys and values, which is all that is read there."""
        sizes = [streams.noisy, streams.clean]
        at_noisy, clean = states.split(sizes, dim=1)
        positions, clean_positions = streams.positions.split(sizes, dim=1)
        of_noisy, of_clean = (tuple(part.split(sizes, dim=1)[i] for part in rotation) for i in (0, 1))
        # Further calls for one token have no new clean positions, of which not every attention can make keys.
        mask = streams.beside(*self.keys_values(layer, clean, of_clean, clean_positions)) if streams.clean else streams
        return layer(at_noisy, attention_mask=mask, position_ids=positions, position_embeddings=of_noisy)  # type: ignore[no-any-return]

    @override
    def check_length(self, network: nn.Module, length: int) -> None:
        most = self.longest(network)
        if length > most:
            raise ValueError(f"{length} tokens, but the model takes {most} (max_position_embeddings)")

    def _check_positions(self, network: nn.Module, clean: int, noisy: int, past: Past | None) -> None:
        if past is None:
            self.check_length(network, max(clean, noisy))
        elif not past.static:
            self.check_length(network, past.most + clean + noisy)

    def whole_states(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """What the head of an unconverted model is given: tokens (batch, length), no padding -> (batch, length, dim).

        Its layers see the past by `is_causal`, without a mask. The library would first read off the device whether
        several texts share a sequence, which waits in every step; and captured in a CUDA graph it cannot read, and
        gives the layers a mask that keeps them off the fast kernels (of `flex_attention` it cannot even make one).
        """
        _register_kernels()
        whole: Any = model
        config, window = whole.base_model.config, _narrowest(whole.base_model.config)
        kernel = config._attn_implementation
        plain = kernel in {"sdpa", "flex_attention"} & {*self.kernels} and (window is None or tokens.shape[1] <= window)
        try:
            if plain:
                config._attn_implementation = _CAUSAL
            return whole.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        finally:
            config._attn_implementation = kernel

    @override
    def logits(self, call: BlockCall, states: Tensor, condition: Tensor) -> Tensor:
        assert call.final_norm is not None
        normed = call.final_norm(states.to(self._table(call.network).dtype))
        return call.extra["logit_scale"](self.head_logits(call.network, normed))  # type: ignore[no-any-return]

    @override
    def clean_logits(self, call: BlockCall, hidden: Tensor) -> Tensor:
        normed = call.module(self.final_norm)(hidden)
        return call.extra["logit_scale"](self.head_logits(call.network, normed))  # type: ignore[no-any-return]


def window_of(attention: Any) -> int | None:
    """How many tokens the attention of one layer sees, its own included; None: all of the past.

    The class must know the value: of any other, a config keeps what it is given and nobody reads it.
    """
    config = attention.config
    kinds = getattr(config, "layer_types", None)
    if not hasattr(type(config), "sliding_window") or (
        kinds is not None and kinds[attention.layer_idx] != "sliding_attention"
    ):
        return None
    return config.sliding_window  # type: ignore[no-any-return]


def _is_linear_in_weights(norm: nn.Module) -> bool:
    """Whether a norm gives twice as much with twice its weights, which is exact: of some it is 1 + weight."""
    twice = copy.deepcopy(norm)
    parameters = list(twice.parameters())
    if not parameters:
        return False
    for parameter in parameters:
        parameter.data = 2 * parameter.data
    probe = torch.linspace(-1, 2, parameters[0].numel()).to(parameters[0])
    return torch.equal(twice(probe), 2 * norm(probe))


def _narrowest(config: Any) -> int | None:
    """The shortest window of a model's layers."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return getattr(config, "sliding_window", None) if slides else None


def _rotated(key: Tensor, rotation: tuple[Tensor, ...]) -> Tensor:
    """Keys (batch, heads, length, dim) at their positions."""
    from transformers.models.llama.modeling_llama import rotate_half

    cosine, sine = (part[:, None] for part in rotation)
    return ((key * cosine) + (rotate_half(key) * sine)).to(key.dtype)  # type: ignore[no-any-return]


def _in_past(streams: Streams, number: int) -> Streams:
    """The streams of a block's layer, by its number there: where `past` has its keys and values, if there is one."""
    return streams if streams.past is None else streams.of_layer(number)


def _before(clean: Tensor, streams: Streams) -> Tensor:
    """The embedding of the clean token before each noisy position; zero before the first of all."""
    past = streams.past
    if past is None:
        return F.pad(clean, (0, 0, 1, 0))[:, :-1]
    if past.last is None:
        past.last = clean.new_zeros(len(clean), clean.shape[-1])
    if clean.shape[1]:
        rows = torch.arange(len(clean), device=clean.device)
        last = clean[rows, (streams.counts - 1).clamp(min=0)]
        past.last.copy_(torch.where(streams.counts[:, None] > 0, last, past.last))
    return past.last[:, None]
