"""Causal language models of transformers, of the Llama kind: Llama, Mistral, Qwen2 and Qwen3.

A block sees every sequence twice: noisy positions, which denoise one token each, and clean ones, which are their
context (paper, section 4.3; `attention.py`). Both run through the same layers, with the same rotary positions; only the
noisy ones are told the noise level, so the clean stream of a pretrained model's first block is the model's own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.adaptive_norms import AdaptiveNorms, unadapted
from ..layers.two_streams import KERNELS, Streams, library_attention
from .family import LogitScale
from .libraries import TRANSFORMERS, Library
from .next_token_family import NextTokenFamily

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


class NoisyToken(nn.Module):
    """How a noised embedding enters a noisy position: a linear map, and what stands for "a token is wanted here".

    The map starts at zero: most of z is noise, and at the scale of ordinary weights it would drown the embeddings,
    which are a tenth as large. Each block lets in as much as is of use at its levels.

    Args:
        dim: size of an embedding.
        std: of the initial bias.
        previous: whether the clean token before it is added to a noisy position, as in an ordinary language model.
    """

    def __init__(self, dim: int, std: float, *, previous: bool) -> None:
        super().__init__()
        self.previous = previous
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.linear.bias, std=std)

    def forward(self, z: Tensor) -> Tensor:
        """z (batch, length, dim) -> hidden (batch, length, dim)."""
        return self.linear(z.to(self.linear.weight.dtype))  # type: ignore[no-any-return]


class ExactRotation(nn.Module):
    """The library's rotary positions; their frequencies stay float32 when a block is cast to another dtype.

    The library loads a bfloat16 model with float32 frequencies, too: rounded ones are off by whole turns at some
    hundred tokens.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        # Made anew: those of a model that was cast are rounded already, and no file holds them.
        exact = dict(type(rotary)(self.config).named_buffers())
        for name, buffer in rotary.named_buffers():
            setattr(rotary, name, exact[name].float().to(buffer.device))

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.rotary.config

    def forward(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1 or batch, length, dim of a head), of the dtype of `states`."""
        return self.rotary(states, positions)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> ExactRotation:
        exact = dict(self.rotary.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.rotary.named_buffers():
            if buffer.dtype != torch.float32:
                setattr(self.rotary, name, exact[name].to(buffer.device))
        return self


class CausalLMFamily(NextTokenFamily):
    """Converts `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM`.

    A head that is tied to the input embedding is untied, for blocks that train apart have one copy of each; its weights
    start as they were.
    """

    classes: ClassVar[dict[str, Library]] = {
        "LlamaForCausalLM": TRANSFORMERS,
        "MistralForCausalLM": TRANSFORMERS,
        "Qwen2ForCausalLM": TRANSFORMERS,
        "Qwen3ForCausalLM": TRANSFORMERS,
    }
    embedding_path = "model.embed_tokens.weight"
    shift = 0  # a noisy position of its own for each token
    depth_field = "num_hidden_layers"

    def layers_path(self, model: nn.Module) -> str:
        """See `Family`."""
        return "model.layers"

    def shared_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("model.embed_tokens", "model.rotary_emb", *self.head_paths(model))

    def head_paths(self, model: nn.Module) -> tuple[str, ...]:
        """See `Family`."""
        return ("model.norm", "lm_head")

    def layer_norms(self, layer: nn.Module) -> list[nn.Module]:
        """See `Family`."""
        return [layer.get_submodule("input_layernorm"), layer.get_submodule("post_attention_layernorm")]

    def final_norms(self, network: nn.Module) -> list[nn.Module]:
        """See `Family`."""
        return [network.get_submodule("model.norm")]

    def example_shape(self, config: Any) -> tuple[int]:
        """See `Family`. Texts may be shorter."""
        return (int(config.max_position_embeddings),)

    def check(self, model: nn.Module) -> None:
        """See `Family`."""
        config: Any = model.config
        name = type(model).__name__
        kernel = config._attn_implementation
        if kernel not in (*KERNELS, None):
            raise ValueError(
                f"{name} has attn_implementation = {kernel}, which knows no two streams; allowed: {', '.join(KERNELS)}"
            )
        if kernel == "flex_attention" and config.attention_dropout > 0:
            raise ValueError(f"{name}: flex_attention has no dropout; set attention_dropout to 0, or use sdpa")
        rope = (config.rope_parameters or {}).get("rope_type", "default")
        if rope in ("dynamic", "longrope"):
            raise ValueError(f"{name} has rotary positions of rope_type {rope}, which change with the text's length")

    def add_parts(self, model: nn.Module, config: Any) -> nn.ModuleDict:
        """See `Family`."""
        std = float(getattr(model.config, "initializer_range", 0.02))
        return nn.ModuleDict(
            {
                "noisy_token": NoisyToken(self.hidden_size(model), std, previous=config.target.previous),
                "logit_scale": LogitScale(config.target.logit_scale),
            }
        )

    def settle(self, network: nn.Module) -> None:
        """Untie the head, keep the positions exact, and let the layers attend in two streams."""
        _register_kernels()
        head, embedding = network.get_submodule("lm_head"), network.get_submodule("model.embed_tokens")
        tied = embedding.get_parameter("weight")
        if head.weight is tied:
            head.weight = nn.Parameter(tied.detach().clone(), tied.requires_grad)
        trunk = network.get_submodule("model")
        trunk.add_module("rotary_emb", ExactRotation(trunk.get_submodule("rotary_emb")))
        for layer in network.get_submodule("model.layers").children():
            attention: Any = layer.get_submodule("self_attn")
            kernel = (attention.config._attn_implementation or "sdpa").removeprefix(_PREFIX)
            # A config of its own: the model's says what the user chose.
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = f"{_PREFIX}{kernel}"

    def settle_config(self, config: Any) -> None:
        """See `Family`."""
        config.tie_word_embeddings = False

    def hidden(
        self,
        network: nn.Module,
        layers: Sequence[tuple[nn.Module, AdaptiveNorms | None]],
        added: nn.ModuleDict,
        inputs: Mapping[str, Any],
        z: Tensor,
        condition: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `Family`.

        Args:
            network, layers, added, condition: as there.
            inputs: `input_ids` (batch, length), the clean tokens; where text is generated the new ones only (none, or
                right-padded), with `past` and `counts` (batch,), see `Streams`. `clean_wanted` (bool): whether the
                clean stream's last states are wanted; without it they are, as far as they go.
            z: (batch, length, dim), or (batch, 1, dim) of the one token that is wanted next.

        Returns:
            (clean stream (batch, length or, where it is not wanted, 0, dim), F (batch, noisy length, dim)).
        """
        tokens, past = inputs["input_ids"], inputs.get("past")
        noisy = z.shape[1]
        embed, rotary = network.get_submodule("model.embed_tokens"), network.get_submodule("model.rotary_emb")
        streams = Streams(noisy, tokens.shape[1], z.device, past=past, counts=inputs.get("counts"))
        self._check_length(network, noisy if past is None else past.most + tokens.shape[1] + noisy)
        clean = embed(tokens)
        wanted = added["noisy_token"](z).to(clean.dtype)
        if added["noisy_token"].previous:
            wanted = wanted + _before(clean, streams)
        states = torch.cat([wanted, clean], dim=1)
        rotation = rotary(states, streams.positions)
        with_clean = len(layers) if inputs.get("clean_wanted", True) else len(layers) - 1
        for i, (layer, adaptive) in enumerate(layers):
            assert adaptive is not None
            if i < with_clean:
                states = adaptive(
                    layer, condition, states, leading=noisy, position_embeddings=rotation, streams=streams
                )
            else:
                states = adaptive(layer, condition, states, rotation, streams, call=_noisy_alone)
        if past is not None:
            past.advance(streams.counts, tokens.shape[1])
        return states[:, noisy:], states[:, :noisy]

    @staticmethod
    def _check_length(network: nn.Module, length: int) -> None:
        config: Any = network.get_submodule("model.rotary_emb").config
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens, but the model takes {config.max_position_embeddings} (max_position_embeddings)"
            )
        window = attention_window(config)
        if window is not None and length > window:
            raise ValueError(f"{length} tokens, but the model's attention slides over {window}, which is not supported")

    def whole_states(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """What the head of an unconverted model is given: tokens (batch, length), no padding -> (batch, length, dim).

        Its layers see the past by `is_causal`, without a mask. The library would first read off the device whether
        several texts share a sequence, which waits in every step; and captured in a CUDA graph it cannot read, and
        gives the layers a mask that keeps them off the fast kernels (of `flex_attention` it cannot even make one).
        """
        _register_kernels()
        whole: Any = model
        config, window = whole.base_model.config, attention_window(whole.base_model.config)
        chosen = config._attn_implementation
        plain = chosen in ("sdpa", "flex_attention") and (window is None or tokens.shape[1] <= window)
        try:
            if plain:
                config._attn_implementation = _CAUSAL
            return whole.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        finally:
            config._attn_implementation = chosen

    def logits(
        self, network: nn.Module, final: AdaptiveNorms | None, added: nn.ModuleDict, states: Tensor, told: Tensor
    ) -> Tensor:
        """See `TextFamily`: norm and head, of D."""
        assert final is not None
        head = network.get_submodule("lm_head")
        normed = final(network.get_submodule("model.norm"), told, states.to(next(head.parameters()).dtype))
        return added["logit_scale"](head(normed))  # type: ignore[no-any-return]

    def clean_logits(self, network: nn.Module, added: nn.ModuleDict, hidden: Tensor) -> Tensor:
        """See `Family`."""
        states = network.get_submodule("model.norm")(hidden)
        return added["logit_scale"](network.get_submodule("lm_head")(states))  # type: ignore[no-any-return]


def attention_window(config: Any) -> int | None:
    """How far back attention sees, where that is not all the way."""
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return getattr(config, "sliding_window", None) if slides else None


def _noisy_alone(layer: Any, states: Tensor, rotation: tuple[Tensor, Tensor], streams: Streams) -> Tensor:
    """A layer at the noisy positions; of the clean ones only keys and values, which is all that is read of the last."""
    from transformers.models.llama.modeling_llama import rotate_half

    noisy = streams.noisy
    wanted, clean = states.split([noisy, streams.clean], dim=1)
    rotations = [part.split([noisy, streams.clean], dim=1) for part in rotation]
    cosine, sine = (part[1][:, None] for part in rotations)
    attention = layer.self_attn
    normed = unadapted(layer.input_layernorm, clean)
    key, value = (
        project(normed).unflatten(-1, (-1, attention.head_dim)) for project in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "k_norm"):
        key = attention.k_norm(key)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    key = key * cosine + rotate_half(key) * sine
    return layer(  # type: ignore[no-any-return]
        wanted, position_embeddings=tuple(part[0] for part in rotations), streams=streams, clean=(key, value)
    )


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
        past.last = torch.where(streams.counts[:, None] > 0, last, past.last)
    return past.last[:, None]
