"""The recurrent-depth language model (Huginn; Geiping et al., arXiv 2502.05171), the smallest faithful module.

Prelude layers read the tokens; a few core layers run again and again on a state that starts as noise, each time beside
what the prelude gave; coda layers read the answer off the last state. No library has the class at a small scale. It is
an ordinary diffusers model (`save_pretrained`, `from_pretrained`, `config`), so it is converted like any other.

What is from where. The Huginn paper: sandwich norms, RMSNorm, gated SiLU MLP, rotary positions of base 50,000, biases
on queries and keys alone, the adapter on (state, prelude output), one norm n_c after the recurrence and again after
the coda, the tied head, the state's and the weights' distribution, the random depth. The authors' code (seal-rg,
recurrent-pretraining): norms' eps, that the linear half of the gated MLP starts as small as the output projections,
that the depth is drawn once a batch. The DiffusionBlocks paper: the shape, of Pythia-70M (2 + 4 + 2 layers, width
512, 8 heads). Neither gives the MLP's width at this shape: 2048 is Pythia-70M's own, and four times the width is what
the authors' code takes where nothing is said (Huginn itself: 3.4 times).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.seeds import seed_from
from ..targets import check_entries, check_tokens, cross_entropies, in_chunks
from .masked_transformer import RotaryPositions, Rotation, rotate
from .text_model_config import WithTextModelConfig

_CUT = 3.0  # standard deviations at which the normal draws of state and weights are cut
_LOG_SPREAD = 0.5  # of the depth's rate


#: (query, key, value), each (batch, heads, length, head_dim) -> the mixed values, likewise.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class TiedEmbedding(nn.Embedding):
    """Embedding times sqrt(d), and the read-out of the same weights: ids (batch, length) -> (batch, length, d)."""

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return super().forward(input) * math.sqrt(self.embedding_dim)

    def logits(self, x: Tensor) -> Tensor:
        """(batch, length, d) -> (batch, length, vocab_size)."""
        return F.linear(x, self.weight)


class CausalAttention(nn.Module):
    """Causal multi-head attention with rotary positions; biases on queries and keys, and nowhere else."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key = nn.Linear(dim, 2 * dim)
        self.value = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend | None = None) -> Tensor:
        """x (batch, length, dim) -> the same shape. `attend` stands in for causal attention among x."""
        n, t, d = x.shape
        q, k = self.query_key(x).view(n, t, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        v = self.value(x).view(n, t, self.heads, d // self.heads).transpose(1, 2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True) if attend is None else attend(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, d))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """(batch, length, dim) -> the same shape: down(silu(gate) * up)."""

    def __init__(self, dim: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class SandwichLayer(nn.Module):
    """x = norm2(attn(norm1(x)) + x), then x = norm4(mlp(norm3(x)) + x): what leaves it has unit scale however often it
    is run."""

    def __init__(self, dim: int, heads: int, mlp_size: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=norm_eps)
        self.attn = CausalAttention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=norm_eps)
        self.norm3 = nn.RMSNorm(dim, eps=norm_eps)
        self.mlp = GatedMLP(dim, mlp_size)
        self.norm4 = nn.RMSNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend | None = None) -> Tensor:
        """One layer.

        Args:
            x: (batch, length, dim).
            rotation: cosines and sines of x's positions, each (length, head_dim) or what broadcasts to
                (batch, heads, length, head_dim).
            attend: attention of x over more than itself, for whoever keeps what this layer has seen of the tokens
                before x (in this iteration, for a core layer); None: causal, among x.

        Returns:
            The shape of x.
        """
        x = self.norm2(self.attn(self.norm1(x), rotation, attend) + x)
        return self.norm4(self.mlp(self.norm3(x)) + x)  # type: ignore[no-any-return]


class RecurrentDepth(ModelMixin, WithTextModelConfig):  # type: ignore[misc]
    """Causal language model whose core layers are iterated. The default shape is Pythia-70M's, over 32,000 tokens.

    Its parts are called one by one by whoever trains it in another way: `embed`, `prelude`, `initial_state`,
    `core_pass` (`adapter` and `core`), `core_norm`, `coda`, `final_norm`, `head`.

    Args:
        vocab_size: number of different tokens, >= 2.
        sequence_length: length of the sequences it is trained on.
        hidden_size: width of the residual stream; a multiple of `num_attention_heads`, an even number of times.
        num_prelude_layers: layers before the recurrence.
        num_core_layers: layers of one iteration.
        num_coda_layers: layers after the recurrence.
        num_attention_heads: heads a layer.
        mlp_size: hidden size of the gated MLP.
        mean_recurrence: r, iterations of an evaluation; in training their number has the mean r + 1.
        backprop_depth: how many iterations, the last ones, the gradient goes through.
        rope_base: of the rotary positions.
        norm_eps: of the norms.

    Raises:
        ValueError: sizes that do not divide, or a value out of range.
    """

    _no_split_modules = ["SandwichLayer"]  # type: ignore[assignment]  # noqa: RUF012 - the library's

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int = 32_000,
        sequence_length: int = 256,
        hidden_size: int = 512,
        num_prelude_layers: int = 2,
        num_core_layers: int = 4,
        num_coda_layers: int = 2,
        num_attention_heads: int = 8,
        mlp_size: int = 2048,
        mean_recurrence: int = 32,
        backprop_depth: int = 8,
        rope_base: float = 50_000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.vocab_size, self.mean_recurrence, self.backprop_depth = vocab_size, mean_recurrence, backprop_depth
        positive = {
            "sequence_length": sequence_length,
            "hidden_size": hidden_size,
            "num_prelude_layers": num_prelude_layers,
            "num_core_layers": num_core_layers,
            "num_coda_layers": num_coda_layers,
            "num_attention_heads": num_attention_heads,
            "mlp_size": mlp_size,
            "mean_recurrence": mean_recurrence,
            "backprop_depth": backprop_depth,
            "rope_base": rope_base,
            "norm_eps": norm_eps,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be >= 2, got {vocab_size}")
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"hidden_size must be an even multiple of num_attention_heads = {num_attention_heads} (rotary "
                f"positions turn pairs), got {hidden_size}"
            )

        def layers(number: int) -> nn.ModuleList:
            return nn.ModuleList(
                SandwichLayer(hidden_size, num_attention_heads, mlp_size, norm_eps) for _ in range(number)
            )

        self.embedding = TiedEmbedding(vocab_size, hidden_size)
        self.positions = RotaryPositions(hidden_size // num_attention_heads, rope_base)
        self.prelude = layers(num_prelude_layers)
        self.adapter = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.core = layers(num_core_layers)
        self.coda = layers(num_coda_layers)
        self.final_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self._initialise(num_prelude_layers + mean_recurrence * num_core_layers + num_coda_layers)

    def _initialise(self, depth: int) -> None:
        """Variance 2 / (5 d), and that / (2 depth) for what is added to the residual stream (Takase et al., arXiv
        2312.16903); `depth` counts every layer as often as it runs. Cut normals; no bias, norms of weight 1."""
        std = self.state_std
        small = std / math.sqrt(2 * depth)
        _draw(self.embedding.weight, std)
        _draw(self.adapter.weight, std)
        for layer in [*self.prelude, *self.core, *self.coda]:
            assert isinstance(layer, SandwichLayer)
            gate, up = layer.mlp.gate_up.weight.chunk(2)
            for weight in (layer.attn.query_key.weight, layer.attn.value.weight, gate):
                _draw(weight, std)
            for weight in (layer.attn.proj.weight, layer.mlp.down.weight, up):
                _draw(weight, small)
            nn.init.zeros_(layer.attn.query_key.bias)

    @property
    def state_std(self) -> float:
        """sqrt(2 / (5 d)): of the weights, and before the embedding scale and the cut at 3 of it of the state."""
        return math.sqrt(2 / (5 * self.embedding.embedding_dim))

    @property
    def core_norm(self) -> nn.Module:
        """The norm after the recurrence: it is `final_norm`, used twice, as in the paper and the authors' code."""
        return self.final_norm

    def embed(self, input_ids: Tensor) -> Tensor:
        """Tokens (batch, length) -> embedding times sqrt(d), (batch, length, d)."""
        return self.embedding(input_ids)  # type: ignore[no-any-return]

    def initial_state(self, context: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """s0: like `context` (batch, length, d), normal of std sqrt(2 / 5), cut at 3 of it; drawn in float32.

        By the quantile, because `trunc_normal_` draws until all are inside, and waits for the device to know.
        """
        uniform = torch.rand(context.shape, generator=generator, device=context.device, dtype=torch.float32)
        inside = (2 * uniform - 1) * math.erf(_CUT / math.sqrt(2))
        scale = self.state_std * math.sqrt(self.embedding.embedding_dim)
        return (math.sqrt(2) * scale * torch.erfinv(inside)).to(context.dtype)

    def core_pass(self, state: Tensor, context: Tensor, rotation: Rotation) -> Tensor:
        """One iteration: state and the prelude's output, each (batch, length, d) -> the next state, likewise."""
        # Under autocast the adapter gives bfloat16; the residual stream stays as it is.
        x: Tensor = self.adapter(torch.cat([state, context], dim=-1)).to(state.dtype)
        for layer in self.core:
            x = layer(x, rotation)
        return x

    def recur(self, state: Tensor, context: Tensor, rotation: Rotation, iterations: int) -> Tensor:
        """`iterations` times `core_pass`; gradients, where they are asked for, go through the last `backprop_depth`."""
        free = max(0, iterations - self.backprop_depth)
        if free:
            with torch.no_grad():
                for _ in range(free):
                    state = self.core_pass(state, context, rotation)
            # Older versions of autocast would take the weights cast without a gradient for the rest, too.
            torch.clear_autocast_cache()
        for _ in range(iterations - free):
            state = self.core_pass(state, context, rotation)
        return state

    def head(self, x: Tensor) -> Tensor:
        """The tied read-out: (batch, length, d) -> logits (batch, length, vocab_size)."""
        return self.embedding.logits(x)

    def forward(
        self, input_ids: Tensor, iterations: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits of the next tokens.

        Args:
            input_ids: (batch, length), int64 in [0, vocab_size).
            iterations: of the core, >= 1; None: `mean_recurrence`.
            generator: of the initial state, on the tokens' device.

        Returns:
            (batch, length, vocab_size): position i is of the token after i. In training mode and out of it gradients
            go through the last `backprop_depth` iterations only.

        Raises:
            ValueError: iterations < 1.
        """
        return self.head(self.states(input_ids, iterations, generator))

    def states(
        self, input_ids: Tensor, iterations: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `forward`, before the head: (batch, length, d)."""
        iterations = self.mean_recurrence if iterations is None else iterations
        if iterations < 1:
            raise ValueError(f"iterations must be >= 1, got {iterations}")
        rotation = self.positions(input_ids)
        context = self.embed(input_ids)
        for layer in self.prelude:
            context = layer(context, rotation)
        state = self.initial_state(context, generator)
        x = self.core_norm(self.recur(state, context, rotation, iterations))
        for layer in self.coda:
            x = layer(x, rotation)
        return self.final_norm(x)  # type: ignore[no-any-return]

    def loss(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None, chunk: int | None = None
    ) -> Tensor:
        """The model's own training: cross-entropy of the next tokens after a random number of iterations.

        The number is drawn once for the batch, on the host, from a generator of its own that is keyed by the state of
        `generator` (`depth_generator`): no wait for the device.

        Args:
            batch: {"input_ids": int64 (batch, length)}, length >= 2.
            generator: of depth and initial state, on the tokens' device; None: the global ones.
            chunk: positions whose logits are in memory at a time; None: all.

        Returns:
            Mean over positions 1 to length - 1, in nats, float32, shape (batch,).

        Raises:
            ValueError: tokens of another dtype or shape, or out of range; or an entry that nothing reads.
        """
        check_entries(batch, ("input_ids",), type(self).__name__)
        tokens = batch["input_ids"]
        if tokens.dim() != 2 or tokens.shape[1] < 2:
            raise ValueError(f"input_ids must be of shape (batch, length), length >= 2; got {tuple(tokens.shape)}")
        check_tokens(tokens, self.vocab_size, tuple(tokens.shape))
        return self.loss_after(draw_depth(self.mean_recurrence, depth_generator(generator)), tokens, generator, chunk)

    def loss_after(
        self,
        iterations: int,
        tokens: Tensor,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """As `loss`, after a given number of iterations; no value of the tokens (batch, length) is looked at."""
        # The last position has nothing to predict, and the model is causal: it need not run.
        states = self.states(tokens[:, :-1], iterations, generator)
        return in_chunks(self._token_losses, states, tokens[:, 1:], chunk).mean(dim=1)

    def _token_losses(self, states: Tensor, tokens: Tensor) -> Tensor:
        return cross_entropies(self.head(states), tokens)


def draw_depth(mean: float, generator: torch.Generator) -> int:
    """Number of iterations of a training step: Poisson(rate) + 1 with rate ~ LogNormal(ln mean - 1/8, 1/2).

    The rate's mean is `mean` and its variance mean^2 (e^(1/4) - 1); so, by the laws of total expectation and variance,
    E[n] = mean + 1 and Var[n] = E[rate] + Var[rate] = mean + mean^2 (e^(1/4) - 1).

    Args:
        mean: r > 0.
        generator: on the CPU, so that the host knows the number.
    """
    rate = torch.empty(1, dtype=torch.float64)
    rate.log_normal_(math.log(mean) - _LOG_SPREAD**2 / 2, _LOG_SPREAD, generator=generator)
    return int(torch.poisson(rate, generator=generator)) + 1


def depth_generator(generator: torch.Generator | None) -> torch.Generator:
    """A generator on the CPU, keyed by the state of another one, which is left as it was; None: the global one.

    The state of a GPU's generator (seed and offset) is known to the host, so nothing waits. Whatever is drawn from
    `generator` afterwards moves it on, so that the next step has another key.
    """
    if generator is None:
        return torch.default_generator
    state = generator.get_state().numpy().tobytes()
    return torch.Generator().manual_seed(seed_from(state, person=b"depth"))


def layer_passes(prelude: int, core: int, coda: int, iterations: int, backprop_depth: int) -> tuple[int, int]:
    """Layers that a training step runs (forward, backward); the adapter, an eighth of a layer at the
    default shape, is not counted.

    Args:
        prelude: layers before the recurrence.
        core: layers of one iteration.
        coda: layers after it.
        iterations: n >= 1 of the step.
        backprop_depth: how many of them, at most, the gradient goes through.

    Returns:
        (prelude + core * n + coda, prelude + core * min(n, backprop_depth) + coda).
    """
    outside = prelude + coda
    return outside + core * iterations, outside + core * min(iterations, backprop_depth)


def _draw(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-_CUT * std, b=_CUT * std)
