"""DiT (Peebles and Xie, arXiv 2212.09748), the smallest faithful module.

diffusers' `DiTTransformer2DModel` gives every layer a time and label embedder of its own, starts without adaLN-zero's
zero initialisation, and always has class labels. This one has the published shape: one embedder of each kind for all
layers, zero-initialised modulations and head, and classes only where asked for. It is an ordinary diffusers model
(`save_pretrained`, `from_pretrained`, `config`), so it is converted like any other.
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.exact_buffers import ExactBuffers


class TimestepEmbedder(ExactBuffers):
    """Sinusoids of the timestep (frequencies from 1 down to 1/10,000) and a two-layer MLP: (batch,) -> (batch, dim)."""

    frequencies: Tensor

    def __init__(self, dim: int, num_features: int = 256) -> None:
        super().__init__()
        half = num_features // 2
        exponent = torch.arange(half, dtype=torch.float32) * (-math.log(10_000) / half)
        self.register_buffer("frequencies", exponent.exp(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps (batch,), any real numbers -> embedding (batch, dim)."""
        angle = timestep.float()[:, None] * self.frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))  # type: ignore[no-any-return]


class PatchEmbedder(ExactBuffers):
    """Patches to tokens, plus fixed sin-cos positions: (batch, C, size, size) -> (batch, tokens, dim)."""

    position: Tensor

    def __init__(self, size: int, patch: int, channels: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch * patch, dim)
        position = get_2d_sincos_pos_embed(dim, size // patch, base_size=size // patch, output_type="pt")
        self.register_buffer("position", position.float()[None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        n, c, h, w = images.shape
        p = self.patch
        patches = images.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)
        dtype = self.proj.weight.dtype
        return self.proj(patches.to(dtype)) + self.position.to(dtype)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention through SDPA."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) -> the same shape."""
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, d))  # type: ignore[no-any-return]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (batch, tokens, dim) scaled and shifted by (batch, dim)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTLayer(nn.Module):
    """A transformer layer with adaLN-zero (section 3.2): at initialisation it is the identity."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (batch, tokens, dim), condition (batch, dim) -> the shape of x."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(condition)).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """Adaptive norm and linear read-out of the patches, both zero-initialised."""

    def __init__(self, dim: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch * patch * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (batch, tokens, dim), condition (batch, dim) -> patches (batch, tokens, channels * patch * patch)."""
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))  # type: ignore[no-any-return]


class DiT(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Diffusion transformer over square images or latents.

    Args:
        sample_size: height and width of the image or latent; a multiple of `patch_size`.
        patch_size: side of a patch.
        in_channels: channels in and out (no learned sigma).
        hidden_size: width of the residual stream; a multiple of `num_attention_heads` and of 4.
        num_layers: number of transformer layers.
        num_attention_heads: heads a layer.
        mlp_ratio: hidden size of the MLP over `hidden_size`.
        num_classes: number of class labels; 0 is an unconditional model. The label `num_classes` is the null class.

    Raises:
        ValueError: sizes that do not divide, or a value out of range.
    """

    _no_split_modules = ["DiTLayer"]  # type: ignore[assignment]  # noqa: RUF012 - the library's

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        hidden_size: int = 384,
        num_layers: int = 12,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        sizes = {
            "sample_size": sample_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "mlp_ratio": mlp_ratio,
        }
        for name, value in sizes.items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be >= 0 (0: unconditional), got {num_classes}")
        if sample_size % patch_size:
            raise ValueError(f"sample_size must be a multiple of patch_size, got {sample_size} and {patch_size}")
        if hidden_size % num_attention_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads = {num_attention_heads} and of 4 (sin-cos "
                f"positions), got {hidden_size}"
            )
        self.patch_embedder = PatchEmbedder(sample_size, patch_size, in_channels, hidden_size)
        self.timestep_embedder = TimestepEmbedder(hidden_size)
        self.label_embedder = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.layers = nn.ModuleList(DiTLayer(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """DiT's: Xavier for linear layers, small embeddings, zero modulations and head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for index in ("0", "2"):
            nn.init.normal_(self.timestep_embedder.mlp.get_submodule(index).get_parameter("weight"), std=0.02)
        if self.label_embedder is not None:
            nn.init.normal_(self.label_embedder.weight, std=0.02)
        for path in ("final_layer.modulation", "final_layer.linear"):
            nn.init.zeros_(self.get_submodule(path).get_parameter("weight"))
        for layer in self.layers:
            nn.init.zeros_(layer.get_parameter("modulation.weight"))

    def condition(self, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """Timesteps (batch,) and labels (batch,) -> condition (batch, hidden_size) of every layer."""
        return condition_of(self.timestep_embedder, self.label_embedder, timestep, class_labels)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The raw network F.

        Args:
            sample: (batch, in_channels, sample_size, sample_size).
            timestep: (batch,), real; under EDM c_noise = log(sigma) / 4.
            class_labels: (batch,), int64 in [0, num_classes]; None for an unconditional model.

        Returns:
            The shape of `sample`.
        """
        condition = self.condition(timestep, class_labels)
        tokens = self.patch_embedder(sample)
        for layer in self.layers:
            tokens = layer(tokens, condition)
        return unpatchify(self.final_layer(tokens, condition), self.patch_embedder.patch, sample.shape[1])


def condition_of(
    timestep_embedder: nn.Module, label_embedder: nn.Module | None, timestep: Tensor, class_labels: Tensor | None
) -> Tensor:
    """The sum of the two embeddings."""
    condition: Tensor = timestep_embedder(timestep)
    if label_embedder is None:
        return condition
    if class_labels is None:
        raise ValueError("a class-conditional model needs class_labels; the null class is the label num_classes")
    return condition + label_embedder(class_labels)  # type: ignore[no-any-return]


def unpatchify(patches: Tensor, patch: int, channels: int) -> Tensor:
    """(batch, tokens, channels * patch * patch), a square of tokens -> (batch, channels, size, size)."""
    n, t, _ = patches.shape
    side = math.isqrt(t)
    images = patches.reshape(n, side, side, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return images.reshape(n, channels, side * patch, side * patch)
