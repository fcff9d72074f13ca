"""Recurrent depth against the library's Llama parts, and against the whole model written out by hand in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from diffusionblocks.models import RecurrentDepth

D, HEADS, MLP, VOCAB, LENGTH = 32, 4, 48, 11, 9


@pytest.fixture
def model() -> RecurrentDepth:
    """No parameter zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = RecurrentDepth(VOCAB, LENGTH, D, 1, 2, 1, HEADS, MLP)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_a_layer_is_made_of_llamas_parts(model: RecurrentDepth) -> None:
    """Rotary positions, attention, gated MLP and RMSNorm of transformers, in the order of the paper."""
    layer: Any = model.core[1]
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        attention_bias=True,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        attn_implementation="eager",
    )
    attention, mlp = LlamaAttention(config, 0), LlamaMLP(config)
    w_q, w_k = layer.attn.query_key.weight.chunk(2)
    b_q, b_k = layer.attn.query_key.bias.chunk(2)
    zero = torch.zeros(D)
    attention.load_state_dict(
        {
            "q_proj.weight": w_q,
            "q_proj.bias": b_q,
            "k_proj.weight": w_k,
            "k_proj.bias": b_k,
            "v_proj.weight": layer.attn.value.weight,
            "v_proj.bias": zero,
            "o_proj.weight": layer.attn.proj.weight,
            "o_proj.bias": zero,
        }
    )
    gate, up = layer.mlp.gate_up.weight.chunk(2)
    mlp.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": layer.mlp.down.weight})
    norms = []
    for ours in (layer.norm1, layer.norm2, layer.norm3, layer.norm4):
        norms.append(LlamaRMSNorm(D, eps=1e-6))
        norms[-1].load_state_dict(ours.state_dict())
    n1, n2, n3, n4 = norms
    x = torch.randn(2, LENGTH, D, generator=seeded())
    rotation = LlamaRotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
    causal = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        middle = n2(attention(n1(x), position_embeddings=rotation, attention_mask=causal)[0] + x)
        expected = n4(mlp(n3(middle)) + middle)
        found = layer(x, model.positions(torch.zeros(1, LENGTH)))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found, x, atol=0.1)


def by_hand(weights: dict[str, Tensor], tokens: Tensor, state: Tensor, iterations: int) -> Tensor:
    """The logits of one sequence (length,), with loops over heads and positions and complex rotations."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    width = D // HEADS
    turns = torch.outer(torch.arange(len(tokens)).double(), 50_000.0 ** (-torch.arange(0, width, 2).double() / width))
    turns = torch.polar(torch.ones_like(turns), turns)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.complex(first, second) * turns

    def attend(x: Tensor, name: str) -> Tensor:
        qk = x @ w[f"{name}.query_key.weight"].T + w[f"{name}.query_key.bias"]
        v = x @ w[f"{name}.value.weight"].T
        out = torch.zeros_like(x)
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            q, k = turned(qk[:, :D][:, part]), turned(qk[:, D:][:, part])
            for i in range(len(x)):
                scores = torch.stack([(q[i] * k[j].conj()).real.sum() / width**0.5 for j in range(i + 1)])
                out[i, part] = scores.softmax(0) @ v[: i + 1, part]
        return out @ w[f"{name}.proj.weight"].T

    def mlp(x: Tensor, name: str) -> Tensor:
        hidden = x @ w[f"{name}.gate_up.weight"].T
        gate, up = hidden[:, :MLP], hidden[:, MLP:]
        return (gate * gate.sigmoid() * up) @ w[f"{name}.down.weight"].T

    def layer(x: Tensor, name: str) -> Tensor:
        x = norm(attend(norm(x, f"{name}.norm1"), f"{name}.attn") + x, f"{name}.norm2")
        return norm(mlp(norm(x, f"{name}.norm3"), f"{name}.mlp") + x, f"{name}.norm4")

    context = layer(w["embedding.weight"][tokens] * D**0.5, "prelude.0")
    state = state.double()
    for _ in range(iterations):
        state = torch.cat([state, context], dim=-1) @ w["adapter.weight"].T
        for i in range(2):
            state = layer(state, f"core.{i}")
    x = layer(norm(state, "final_norm"), "coda.0")
    return norm(x, "final_norm") @ w["embedding.weight"].T


def test_the_model_is_what_the_paper_says(model: RecurrentDepth) -> None:
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=seeded())
    states = model.initial_state(torch.zeros(2, LENGTH, D), seeded(4))
    with torch.no_grad():
        found = model(tokens, 3, seeded(4))
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for row in range(2):
        expected = by_hand(weights, tokens[row], states[row], 3)
        torch.testing.assert_close(found[row].double(), expected, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(found[row].double(), by_hand(weights, tokens[row], states[1 - row], 3), atol=1e-2)
