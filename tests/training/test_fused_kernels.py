"""The fused MLP, the kernels behind it, AdamW's kernel, and the rewrites of a graph that use them."""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import seeded, tiny
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import diffusionblocks as db
from diffusionblocks.layers.fused_mlp import Tiles, _FusedMLP, fused_mlp, supported
from diffusionblocks.layers.short_attention import _factors, attention_backward, attention_forward, short_attention
from diffusionblocks.training import EndToEnd, TrainConfig
from diffusionblocks.training.compilation import Compiler, sampling_options
from diffusionblocks.training.graph_rewrites import (
    fuse_mlps,
    join_gelus,
    merge_projections,
    rewriting,
    shorten_attention,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its interpreter runs the kernels"
)


def operands(rows: int, dim: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x, g, W1, b1, W2, b2."""
    random = seeded(0)
    shapes = [(rows, dim), (rows, dim), (hidden, dim), (hidden,), (dim, hidden), (dim,)]
    scales = [1.0, 1.0, dim**-0.5, 1.0, hidden**-0.5, 1.0]
    values = [torch.randn(shape, generator=random) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return [tensor.to(device, dtype) for tensor in values]


def reference(x: Tensor, g: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, approximate: str = "none") -> Any:
    """The output in float64, and the gradients of x, W1, b1, W2, b2."""
    x, w1, b1, w2, b2 = (tensor.detach().double().requires_grad_() for tensor in (x, w1, b1, w2, b2))
    y = F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)
    return [y.detach(), *torch.autograd.grad(y, (x, w1, b1, w2, b2), g.double())]


def error(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach().double(), expected.detach()
    return float((value - expected).norm() / expected.norm())


def test_gradients_are_exact() -> None:
    x, g, *weights = operands(12, 16, 48, torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *weights)]
    y = _FusedMLP.apply(*leaves, torch.float64)
    found = [y.detach(), *torch.autograd.grad(y, leaves, g)]
    for value, expected in zip(found, reference(x, g, *weights), strict=True):
        assert error(value, expected) < 1e-13
    assert error(found[0], reference(x, g, *weights, approximate="tanh")[0]) > 1e-6  # another GELU would be seen


@needs_triton
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_kernels_are_exact(dtype: torch.dtype, within: float) -> None:
    """With rows that fill no tile, and float16 for bfloat16, whose products the interpreter gets wrong."""
    from diffusionblocks.layers import fused_mlp_kernels as kernels

    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("a GPU's products of float32 are of tf32")
    x, g, w1, b1, w2, b2 = operands(75, 32, 128, dtype, DEVICE)
    y, dx, dw1, db1, dw2, _ = reference(x, g, w1, b1, w2, torch.zeros_like(b2))
    tiles = Tiles(parts=2, rows=32, chunk=32, warps=4, stages=2)
    assert error(kernels.forward(x, w1, b1, w2, tiles).sum(0), y) < within
    assert error(kernels.backward_input(x, g, w1, b1, w2, tiles).sum(0), dx) < within
    for slices, expected in zip(kernels.backward_weights(x, g, w1, b1, w2, tiles), (dw1, dw2, db1), strict=True):
        assert error(slices.sum(0), expected) < within
    other = reference(x, g, w1, b1, w2, torch.zeros_like(b2), approximate="tanh")
    assert error(kernels.forward(x, w1, b1, w2, tiles).sum(0), other[0]) > 1e-5


def attention(tokens: int, dtype: torch.dtype, dropout: float) -> tuple[tuple[Any, ...], list[Tensor], Tensor]:
    """(q, k, v, g, seed, dropout, scale); the output and gradients in float64; what dropout multiplies scores by."""
    random = seeded(0)
    projections = torch.randn(2, tokens, 3, 2, 32, generator=random).to(dtype)  # strides as of one product's parts
    q, k, v = (projections[:, :, i].transpose(1, 2) for i in range(3))
    g = torch.randn(2, tokens, 2, 32, generator=random).to(dtype)
    seed = torch.randint(2**31 - 1, (2,), generator=random, dtype=torch.int32)
    factors = _factors(q, seed, dropout).double()
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    y = (((leaves[0] @ leaves[1].mT / 32**0.5).softmax(-1) * factors) @ leaves[2]).transpose(1, 2)
    gradients = torch.autograd.grad(y, leaves, g.double())
    return (q, k, v, g, seed, dropout, 32**-0.5), [y.detach(), *(d.transpose(1, 2) for d in gradients)], factors


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_is_exact(dropout: float) -> None:
    (q, k, v, g, *rest), expected, factors = attention(65, torch.float64, dropout)
    found = [attention_forward(q, k, v, *rest), *attention_backward(q, k, v, g, *rest)]
    for value, exact in zip(found, expected, strict=True):
        assert error(value, exact) < 1e-13
    assert float(factors.mean()) == pytest.approx(1, abs=0.01)
    assert float((factors == 0).double().mean()) == pytest.approx(dropout, abs=0.01)


@needs_triton
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_attention_kernels_are_exact(dtype: torch.dtype, within: float) -> None:
    from diffusionblocks.layers import short_attention_kernels as kernels

    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("a GPU's products of float32 are of tf32")
    arguments, expected, _ = attention(65, dtype, 0.1)
    q, k, v, g, seed = (tensor.to(DEVICE) for tensor in arguments[:5])
    rest = (seed, *arguments[5:])
    found = [kernels.forward(q, k, v, *rest), *kernels.backward(q, k, v, g, *rest)]
    for value, exact in zip(found, expected, strict=True):
        assert error(value.cpu(), exact) < within
    assert error(kernels.forward(q, k, v, seed + 1, *rest[1:]).cpu(), expected[0]) > 0.1  # another mask would be seen


def test_attention_drops_by_the_global_generator() -> None:
    q = torch.randn(2, 2, 40, 32, generator=seeded(0))
    torch.manual_seed(0)
    first, second = short_attention(q, q, q, 0.5), short_attention(q, q, q, 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(short_attention(q, q, q, 0.5), first, rtol=0, atol=0)
    assert not torch.allclose(first, second)
    plain = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(short_attention(q, q, q), plain)
    mean = torch.stack([short_attention(q, q, q, 0.5) for _ in range(400)]).mean(0)
    assert error(mean, plain) < 0.1


@needs_triton
def test_adamw_is_torchs() -> None:
    from diffusionblocks.training.adamw_kernel import update

    random = seeded(0)
    start = [torch.randn(shape, generator=random) for shape in ((3000,), (7,), (33, 65))]
    mine = [tensor.to(DEVICE, copy=True) for tensor in start]
    states = [
        {"step": torch.zeros((), device=DEVICE), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for p in mine
    ]
    exact = [tensor.to(DEVICE).double().requires_grad_() for tensor in start]
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.1, "eps": 1e-8}
    optimizer = torch.optim.AdamW(exact, lr=1e-2, **settings)
    group = settings | {"lr": torch.tensor(1e-2, device=DEVICE)}
    for _ in range(4):
        gradients = [torch.randn(tensor.shape, generator=random).to(DEVICE) for tensor in start]
        for parameter, gradient in zip(exact, gradients, strict=True):
            parameter.grad = gradient.double()
        optimizer.step()
        update(list(zip(mine, gradients, states, strict=True)), group)
    for tensor, parameter, before in zip(mine, exact, start, strict=True):
        assert error(tensor - before.to(DEVICE), parameter.detach() - before.to(DEVICE)) < 1e-4
    assert [float(state["step"]) for state in states] == [4, 4, 4]


# ---- rewrites ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention over few tokens, and an MLP on what it makes."""

    def __init__(self, dim: int = 128, hidden: int = 2048, approximate: str = "none", *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.projections = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        heads = (x.shape[0], x.shape[1], 4, x.shape[2] // 4)
        q, k, v = (projection(x).view(heads).transpose(1, 2) for projection in self.projections)
        states = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)
        return self.mlp(states.reshape(x.shape))  # type: ignore[no-any-return]


def counts(module: nn.Module, tokens: int = 65, *, lower: bool = True) -> tuple[int, int, int]:
    """How many MLPs, groups of projections and attentions are rewritten in a compiled module."""
    torch._dynamo.reset()
    found = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(tuple(rewrite(graph, "cpu") for rewrite in (fuse_mlps, merge_projections, shorten_attention)))
        return graph.forward

    dim = module.projections[0].in_features  # type: ignore[index, union-attr]
    with torch.autocast("cpu", torch.bfloat16, enabled=lower), torch.no_grad():
        torch.compile(module, backend=backend)(torch.randn(2, tokens, dim))
    return found[0]


def test_what_is_rewritten() -> None:
    assert counts(Layer()) == (1, 1, 1)
    assert counts(Layer(), lower=False) == (0, 0, 0)
    assert counts(Layer(approximate="tanh")) == (0, 1, 1)
    assert counts(Layer(hidden=1024)) == (0, 1, 1)
    assert counts(Layer(dim=64, causal=True)) == (0, 1, 0)
    assert counts(Layer(), tokens=200) == (1, 1, 0)
    assert counts(Layer(dim=512)) == (0, 0, 0)
    assert supported(128, 3072, 128)
    assert not supported(768, 3072, 768)


def test_a_rewritten_graph_computes_the_same() -> None:
    torch.manual_seed(0)
    module = Layer()
    x = torch.randn(4, 65, 128, generator=seeded(1))

    def gradients(call: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = call(x)
        loss = (output.float() * torch.linspace(-1, 1, 128)).sum()
        # The key's bias has no gradient but rounding.
        parameters = [p for name, p in module.named_parameters() if name != "projections.1.bias"]
        return [output.detach(), *torch.autograd.grad(loss, parameters)]

    expected = gradients(module)
    torch._dynamo.reset()
    backend = rewriting(lookup_backend("aot_eager"), ("mlp", "projections", "attention"), "cpu")
    for value, plain in zip(gradients(torch.compile(module, backend=backend)), expected, strict=True):
        assert value.stride() == plain.stride()
        assert error(value, plain.double()) < 0.02


def test_a_block_and_a_whole_model_are_rewritten_alike() -> None:
    """Adaptive norms and the label's token stand in no rewrite's way, and losses and gradients are the same."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 2048, "num_hidden_layers": 2}
    images = {"image_size": 32, "patch_size": 4, "num_labels": 10}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    network = ViTForImageClassification(ViTConfig(**sizes, **images, **rates))
    block = db.convert(copy.deepcopy(network), db.BlocksConfig(num_blocks=2)).blocks[0]
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([3, 7])}
    config = TrainConfig(steps=1, compile=True, precision="bfloat16", fused_kernels=("mlp", "projections", "attention"))
    again = copy.deepcopy(block)
    again.activation_checkpointing = True  # then layers are graphs in the graph
    for module in (block, EndToEnd(network), again):  # one layer, two that share a graph, and one that is recomputed
        losses, seen = {}, Counter[Any]()

        def backend(graph: Any, inputs: Any, seen: Counter[Any] = seen) -> Any:
            parts = [part for part in graph.modules() if isinstance(part, fx.GraphModule)]
            seen.update(node.target for part in parts for node in part.graph.nodes)
            return lookup_backend("aot_eager")(graph, inputs)

        for compiled in (False, True):
            if compiled:
                Compiler(config, torch.device("cpu"), backend=backend, on_gpu=True).compile([module])
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = module.loss(batch, seeded(2)).sum()  # type: ignore[operator]
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
            losses[compiled] = loss.detach(), gradient
        assert (seen[fused_mlp], seen[short_attention], seen[torch.split]) == (1, 1, 1)
        torch.testing.assert_close(losses[True][0], losses[False][0], rtol=0.01, atol=0)
        assert error(losses[True][1], losses[False][1].double()) < 0.05


# ---- for sampling -------------------------------------------------------------------------------------------


def gelus_joined(model: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """How many products got their GELU, and what the compiled model gives, without gradients."""
    counts: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        counts.append(join_gelus(graph, "cpu"))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(model, backend=backend)(x)
    return sum(counts), output


def test_a_product_and_its_gelu_become_one_for_inference() -> None:
    torch.manual_seed(0)

    def mlp(approximate: str) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 64), nn.GELU(approximate=approximate), nn.Linear(64, 16)).bfloat16()

    x = torch.randn(2, 5, 16)
    model = mlp("tanh")
    count, output = gelus_joined(model, x.bfloat16())
    assert count == 1
    plain = copy.deepcopy(model).float()(x.bfloat16().float())
    assert error(output, plain) < 0.01
    assert error(output, plain) <= error(model(x.bfloat16()), plain) * 1.05, "it rounds once less"
    assert gelus_joined(mlp("none"), x.bfloat16())[0] == 0, "another function"
    assert gelus_joined(mlp("tanh").float(), x)[0] == 0, "no bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        assert gelus_joined(mlp("tanh").float(), x)[0] == 0, "weights that autocast casts"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_product_with_its_gelu_on_a_gpu() -> None:
    x, _, w1, b1, *_ = operands(512, 384, 1536, torch.bfloat16, "cuda")
    expected = F.gelu(F.linear(x.double(), w1.double(), b1.double()), approximate="tanh")
    assert error(torch.ops.diffusionblocks.linear_gelu(x, w1, b1), expected) < 0.004


@pytest.mark.parametrize("how", [True, "layers"])
def test_a_compiled_sampler_draws_the_same_images(how: Any) -> None:
    model = db.convert(tiny("dit"), db.BlocksConfig(num_blocks=3)).eval()
    torch._dynamo.reset()
    options = sampling_options(torch.device("cpu"), on_gpu=True)
    backend = rewriting(lookup_backend("eager"), ("gelu",), "cpu")
    options["backend"] = backend
    sampler = model.sampler(cuda_graph=True, dtype=torch.bfloat16, compile=how, compile_options=options)
    plain = model.sampler(dtype=torch.bfloat16).sample([1, 2], steps=4, guidance=2.0, guidance_interval=(0.1, 20.0))
    images = sampler.sample([1, 2], steps=4, guidance=2.0, guidance_interval=(0.1, 20.0))
    assert error(images, plain) < 0.05
    assert not torch.equal(images, plain), "the GELUs were joined to their products"
    assert all(part._compiled_call_impl is None for part in model.modules()), "the model itself stays as it is"
