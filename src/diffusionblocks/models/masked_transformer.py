"""The transformer of masked diffusion (MD4, arXiv 2406.04329), the smallest faithful module.

No class of transformers has this shape: bidirectional with rotary positions, norms without parameters, and scale, shift
and gates from the noise level (adaLN-zero). ModernBERT's and Llama's norms have weights of their own, and neither has
gates; adaptive norms could be hooked onto them, gates could not. It is an ordinary diffusers model (`save_pretrained`,
`from_pretrained`, `config`), so it is converted like any other.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .diffusion_transformer import TimestepEmbedder, modulate
from .text_model_config import WithTextModelConfig

Rotation = tuple[Tensor, Tensor]


class TokenEmbedder(nn.Module):
    """A narrow embedding and a dense layer to the residual stream: ids (batch, length) -> (batch, length, dim)."""

    def __init__(self, num_embeddings: int, width: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, width)
        self.proj = nn.Linear(width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.proj(self.embedding(tokens))  # type: ignore[no-any-return]


class TimeEmbedder(nn.Module):
    """t in [0, 1] -> condition (batch, width): sinusoids of 1000 t and a two-layer MLP, narrow as in MD4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sinusoids = TimestepEmbedder(width, num_features=width)

    def forward(self, t: Tensor) -> Tensor:
        """See the class."""
        return self.sinusoids(1000 * t)  # type: ignore[no-any-return]


class RotaryPositions(nn.Module):
    """Cosines and sines of rotary positions (RoFormer, arXiv 2104.09864), float32.

    They are made anew in every pass: a buffer would be rounded with the weights of a bfloat16 model.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Rotation:
        """ids (batch, length) -> two of (length, head_dim); at positions (..., length) -> (..., length, head_dim)."""
        exponent = torch.arange(0, self.head_dim, 2, device=tokens.device, dtype=torch.float32) / self.head_dim
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        half = positions[..., None].float() * self.base**-exponent
        angle = torch.cat([half, half], dim=-1)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs (i, i + head_dim / 2) of queries or keys (batch, heads, length, head_dim) by their angles."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    turned = x.float() * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.to(x.dtype)


class MaskedLayer(nn.Module):
    """Bidirectional attention and a gated MLP, each under adaLN-zero: at initialisation it is the identity."""

    def __init__(self, dim: int, heads: int, mlp_size: int, condition_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.gate_up = nn.Linear(dim, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, dim, bias=False)
        self.modulation = nn.Linear(condition_dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, rotation: Rotation) -> Tensor:
        """x (batch, length, dim), condition (batch, condition_dim) -> the shape of x."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(condition)).chunk(6, dim=1)
        x = x + gate_a[:, None] * self._attend(modulate(self.norm1(x), shift_a, scale_a), rotation)
        gate, up = self.gate_up(modulate(self.norm2(x), shift_m, scale_m)).chunk(2, dim=-1)
        return x + gate_m[:, None] * self.down(F.silu(gate) * up)  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, rotation: Rotation) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, rotation), rotate(k, rotation), v)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, d))  # type: ignore[no-any-return]


class MaskedHead(nn.Module):
    """Adaptive norm and linear read-out, both zero-initialised: (batch, length, dim) -> logits of the tokens."""

    def __init__(self, dim: int, vocab_size: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(condition_dim, 2 * dim)
        self.linear = nn.Linear(dim, vocab_size)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))  # type: ignore[no-any-return]


class MaskedTransformer(ModelMixin, WithTextModelConfig):  # type: ignore[misc]
    """Bidirectional transformer over partly masked tokens. The default shape is MD4's for text8.

    Args:
        vocab_size: number of different tokens, without the mask, which is the id after them.
        sequence_length: length of the sequences it is trained on and generates.
        embedding_size: width of the token embedding and of the time embedding; even.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`, an even number of times.
        num_layers: number of transformer layers.
        num_attention_heads: heads a layer.
        mlp_size: hidden size of the gated MLP.

    Raises:
        ValueError: sizes that do not divide, or a value out of range.
    """

    _no_split_modules = ["MaskedLayer"]  # type: ignore[assignment]  # noqa: RUF012 - the library's

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int = 27,
        sequence_length: int = 256,
        embedding_size: int = 64,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_size: int = 2048,
    ) -> None:
        super().__init__()
        sizes = {
            "sequence_length": sequence_length,
            "embedding_size": embedding_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "mlp_size": mlp_size,
        }
        for name, value in sizes.items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be >= 2 (without the mask), got {vocab_size}")
        if embedding_size % 2:
            raise ValueError(f"embedding_size must be even (sines and cosines of the time), got {embedding_size}")
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"hidden_size must be an even multiple of num_attention_heads = {num_attention_heads} (rotary "
                f"positions turn pairs), got {hidden_size}"
            )
        self.token_embedder = TokenEmbedder(vocab_size + 1, embedding_size, hidden_size)
        self.time_embedder = TimeEmbedder(embedding_size)
        self.positions = RotaryPositions(hidden_size // num_attention_heads)
        self.layers = nn.ModuleList(
            MaskedLayer(hidden_size, num_attention_heads, mlp_size, embedding_size) for _ in range(num_layers)
        )
        self.head = MaskedHead(hidden_size, vocab_size, embedding_size)
        self._initialise()

    def _initialise(self) -> None:
        """Variance 1 / fan-in for linear layers, whatever the depth; zero modulations and read-out."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_embedder.embedding.weight, std=self.token_embedder.embedding.embedding_dim**-0.5)
        for part in [*self.layers, self.head]:
            nn.init.zeros_(part.get_parameter("modulation.weight"))
        nn.init.zeros_(self.head.linear.weight)

    def forward(self, input_ids: Tensor, timestep: Tensor) -> Tensor:
        """Logits of the hidden tokens.

        Args:
            input_ids: (batch, length), int64 in [0, vocab_size]; vocab_size is the mask.
            timestep: t (batch,), in [0, 1].

        Returns:
            (batch, length, vocab_size).
        """
        condition = self.time_embedder(timestep)
        rotation = self.positions(input_ids)
        x = self.token_embedder(input_ids)
        for layer in self.layers:
            x = layer(x, condition, rotation)
        return self.head(x, condition)  # type: ignore[no-any-return]
