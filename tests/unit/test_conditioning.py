"""Adaptive norms: compiled, a norm's own weight and bias are part of the scale and shift; the function is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import convert, seeded
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import diffusionblocks as db
from diffusionblocks.layers.adaptive_norms import AdaptiveNorms, NoiseEmbedding

DIM, CONDITION = 16, 8


class Layer(nn.Module):
    """Two norms and what reads them."""

    def __init__(self, bias: bool, affine: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM, elementwise_affine=affine, bias=bias) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x)).tanh()
        return x


def outcome(run: Any, modules: list[nn.Module], layer: nn.Module, leading: int | None) -> list[Tensor]:
    generator = seeded(1)
    x = torch.randn(3, 5, DIM, generator=generator, requires_grad=True)
    condition = torch.randn(3, CONDITION, generator=generator, requires_grad=True)
    output = run(layer, condition, x, leading=leading)
    parameters = [p for module in modules for p in module.parameters()]
    return [output, *torch.autograd.grad(output.float().square().sum(), [x, condition, *parameters])]


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("bias", "affine", "leading"), [(True, True, None), (False, True, None), (True, False, None), (True, True, 2)]
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_norms_are_the_same_function(
    bias: bool, affine: bool, leading: int | None, precision: torch.dtype
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = Layer(bias, affine)
    adaptive = AdaptiveNorms(layer, list(layer.norms), [DIM, DIM], CONDITION)
    nn.init.normal_(adaptive.linear.weight, std=0.3)
    nn.init.normal_(adaptive.linear.bias, std=0.3)
    compiled = torch.compile(adaptive, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        found, expected = (outcome(run, [layer, adaptive], layer, leading) for run in (compiled, adaptive))
    close = {"atol": 1e-4, "rtol": 1e-4} if precision == torch.float32 else {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.slow
def test_compiled_norms_sum_over_the_tokens_once() -> None:
    """For their scale and shift; what their own weights get is made of those sums, and the norm sums nothing."""
    torch._dynamo.reset()
    layer = Layer(bias=True, affine=True)
    adaptive = AdaptiveNorms(layer, list(layer.norms), [DIM, DIM], CONDITION)
    wanted: list[list[bool]] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls = [n for n in graph.graph.nodes if n.target is torch.ops.aten.native_layer_norm_backward.default]
        wanted.extend(node.args[-1] for node in calls)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=note)
    outcome(torch.compile(adaptive, backend=backend), [layer, adaptive], layer, None)
    assert wanted == [[True, False, False]] * 2  # gradients of the input, the weight and the bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_embedding_tells_the_levels_that_it_told(dtype: torch.dtype) -> None:
    """Rounded to bfloat16, the highest frequency would be off by a tenth, and other levels would be told."""
    from diffusionblocks.models.diffusion_transformer import TimestepEmbedder  # brings diffusers

    for made in (NoiseEmbedding(16), TimestepEmbedder(16)):
        exact = made.frequencies.clone()
        for moved in (made.to(dtype), made.to("meta").to_empty(device="cpu").to(dtype)):
            assert moved.frequencies.dtype == torch.float32
            assert moved.mlp[0].weight.dtype == dtype
        assert made.to(torch.float64).frequencies.dtype == torch.float64
        made = type(made)(16).to(dtype)
        assert torch.equal(made.frequencies, exact)
        seen: list[Tensor] = []
        made.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        level = torch.tensor([-1.2, 0.3, 0.627])
        made(level)
        angle = level[:, None] * exact
        torch.testing.assert_close(seen[0], torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_a_saved_low_precision_model_is_told_the_same_levels(family: str, tmp_path: Path) -> None:
    model = convert(family)
    exact = [b for name, b in model.named_buffers() if name.endswith("frequencies")]
    model.bfloat16().save_pretrained(tmp_path / "m")
    for some in (model, db.load(tmp_path / "m")):
        found = [b for name, b in some.named_buffers() if name.endswith("frequencies")]
        assert len(found) == len(exact) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
